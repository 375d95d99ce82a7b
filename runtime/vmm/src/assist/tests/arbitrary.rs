//! Whatever the guest does, the assist neither panics nor leaves the guest's RAM.

use proptest::prelude::*;

use super::super::fake::{OPCODES, PREFIXES, general};
use super::*;

/// Instruction bytes: noise, or one of the table's opcodes with noise around it.
fn any_code() -> impl Strategy<Value = Vec<u8>> {
    let (prefix, opcode) = (prop::sample::select(PREFIXES), prop::sample::select(OPCODES));
    let known = (prefix, opcode, prop::collection::vec(any::<u8>(), 0..10))
        .prop_map(|(prefix, opcode, rest)| [prefix, opcode, &rest].concat());
    prop_oneof![3 => known, 1 => prop::collection::vec(any::<u8>(), 0..20)]
}

/// Addresses near what is mapped, and any number.
fn any_register() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (0..DATA_PAGES * 0x1000).prop_map(|offset| DATA + offset),
        (0..DATA_PAGES * 64).prop_map(|offset| DATA + offset * 64),
        (0u64..64).prop_map(|offset| DATA + DATA_PAGES * 0x1000 - offset),
        (0u64..64).prop_map(|offset| offset),
        (0u64..64).prop_map(|offset| u64::MAX - offset),
        (0u64..64).prop_map(|offset| 0x7fff_ffff_ffff - offset),
    ]
}

fn set_registers(regs: &mut kvm_regs, values: &[u64; 16]) {
    for (place, value) in general(regs).into_iter().zip(values) {
        *place = *value;
    }
}

/// Just the page tables and the data, with room beside each that nothing maps.
const SMALL_RAM: [(u64, usize); 2] = [(0x10_0000, 0x1_0000), (DATA_GPA, 0x1_0000)];

/// RAM that is not mapped for the guest must not change, except accessed and dirty bits.
fn untouchable(m: &Machine) -> Vec<u8> {
    let mut ram = m.bytes(SMALL_RAM[0].0, SMALL_RAM[0].1);
    for entry in ram.chunks_exact_mut(8) {
        entry[0] &= !((ACCESSED | DIRTY) as u8);
    }
    let data = (DATA_PAGES * 0x1000) as usize;
    ram.extend(m.bytes(DATA_GPA + data as u64, SMALL_RAM[1].1 - data));
    ram
}

proptest! {
    #![proptest_config(cases(2000))]

    #[test]
    fn no_bytes_and_registers_panic_or_touch_unmapped_memory(
        code in any_code(),
        registers in prop::array::uniform16(any_register()),
        fs in any_register(),
        memory: u64,
        rflags: u64,
        header in prop::array::uniform16(any::<u8>()),
    ) {
        let mut m = Machine::with_ram(&SMALL_RAM);
        set_registers(&mut m.cpu.regs, &registers);
        m.cpu.regs.rflags = rflags;
        m.cpu.sregs.fs.base = fs;
        m.cpu.sregs.gs.base = memory;
        for page in 0..DATA_PAGES {
            m.write(DATA_GPA + page * 0x1000, &memory.to_le_bytes().repeat(512));
            m.write(DATA_GPA + page * 0x1000 + 512, &header);
        }
        let before = untouchable(&m);
        let outcome = m.run(&code);
        prop_assert!(untouchable(&m) == before, "memory changed by {code:02x?}");
        match outcome {
            Ok(_) => prop_assert!(m.cpu.injected.len() <= 1),
            Err(refused) => {
                prop_assert!(m.cpu.injected.is_empty());
                prop_assert!(!refused.to_string().is_empty());
            }
        }
    }

    #[test]
    fn no_page_tables_panic(
        linear in any_register(),
        entries in prop::collection::vec(any::<u64>(), 512),
        small in any::<bool>(),
        control in any::<u64>(),
        bytes in prop_oneof![
            Just(&[0xf3, 0x48, 0x0f, 0xb8, 0x06][..]),
            Just(&[0x48, 0x0f, 0x38, 0xf1, 0x06][..]),
            Just(&[0x48, 0x0f, 0xae, 0x26][..]),
            Just(&[0x48, 0x0f, 0xae, 0x2e][..]),
        ],
    ) {
        let mut m = Machine::new();
        for (index, entry) in entries.iter().enumerate() {
            // Small ones point into RAM more often than not.
            let entry = if small { entry & 0xff_ffff | KERNEL } else { *entry };
            m.write_u64(0x30_0000 + index as u64 * 8, entry);
        }
        m.cpu.sregs.cr3 = 0x30_0000;
        m.cpu.sregs.cr4 |= control & (CR4_SMAP | CR4_LA57 | CR4_PKE);
        m.cpu.sregs.efer ^= control & EFER_NXE;
        m.cpu.regs.rsi = linear;
        m.cpu.regs.rax = control;
        let _ = m.run(bytes);
    }
}
