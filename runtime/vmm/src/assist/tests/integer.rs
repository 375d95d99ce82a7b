//! General registers, flags, plain memory.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;

use super::super::paging::atomic_u64;
use super::*;

const CF: u64 = 1;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;
/// All status flags.
const STATUS: u64 = 0x8d5;

type Native = fn(u64, u64, u64) -> (u64, u64);

/// Name, bytes on RAX, RBX and RCX, the flags it defines, the instruction itself.
const REGISTER_FORMS: &[(&str, &[u8], u64, Native)] = &[
    ("popcnt rax, rbx", &[0xf3, 0x48, 0x0f, 0xb8, 0xc3], STATUS, native::popcnt64),
    ("popcnt eax, ebx", &[0xf3, 0x0f, 0xb8, 0xc3], STATUS, native::popcnt32),
    ("popcnt ax, bx", &[0x66, 0xf3, 0x0f, 0xb8, 0xc3], STATUS, native::popcnt16),
    ("tzcnt rax, rbx", &[0xf3, 0x48, 0x0f, 0xbc, 0xc3], CF | ZF, native::tzcnt64),
    ("tzcnt eax, ebx", &[0xf3, 0x0f, 0xbc, 0xc3], CF | ZF, native::tzcnt32),
    ("tzcnt ax, bx", &[0x66, 0xf3, 0x0f, 0xbc, 0xc3], CF | ZF, native::tzcnt16),
    ("lzcnt rax, rbx", &[0xf3, 0x48, 0x0f, 0xbd, 0xc3], CF | ZF, native::lzcnt64),
    ("lzcnt eax, ebx", &[0xf3, 0x0f, 0xbd, 0xc3], CF | ZF, native::lzcnt32),
    ("lzcnt ax, bx", &[0x66, 0xf3, 0x0f, 0xbd, 0xc3], CF | ZF, native::lzcnt16),
    ("andn rax, rbx, rcx", &[0xc4, 0xe2, 0xe0, 0xf2, 0xc1], CF | ZF | SF | OF, native::andn64),
    ("andn eax, ebx, ecx", &[0xc4, 0xe2, 0x60, 0xf2, 0xc1], CF | ZF | SF | OF, native::andn32),
    ("shlx rax, rbx, rcx", &[0xc4, 0xe2, 0xf1, 0xf7, 0xc3], STATUS, native::shlx64),
    ("shlx eax, ebx, ecx", &[0xc4, 0xe2, 0x71, 0xf7, 0xc3], STATUS, native::shlx32),
    ("shrx rax, rbx, rcx", &[0xc4, 0xe2, 0xf3, 0xf7, 0xc3], STATUS, native::shrx64),
    ("shrx eax, ebx, ecx", &[0xc4, 0xe2, 0x73, 0xf7, 0xc3], STATUS, native::shrx32),
    ("sarx rax, rbx, rcx", &[0xc4, 0xe2, 0xf2, 0xf7, 0xc3], STATUS, native::sarx64),
    ("sarx eax, ebx, ecx", &[0xc4, 0xe2, 0x72, 0xf7, 0xc3], STATUS, native::sarx32),
    ("crc32 rax, rbx", &[0xf2, 0x48, 0x0f, 0x38, 0xf1, 0xc3], STATUS, native::crc32_64),
    ("crc32 eax, ebx", &[0xf2, 0x0f, 0x38, 0xf1, 0xc3], STATUS, native::crc32_32),
    ("crc32 eax, bx", &[0x66, 0xf2, 0x0f, 0x38, 0xf1, 0xc3], STATUS, native::crc32_16),
    ("crc32 eax, bl", &[0xf2, 0x0f, 0x38, 0xf0, 0xc3], STATUS, native::crc32_8),
    ("crc32 eax, bh", &[0xf2, 0x0f, 0x38, 0xf0, 0xc7], STATUS, native::crc32_8_high),
];

/// Numbers with few or many bits, and the ones near the edges.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (any::<u64>(), 0u32..64).prop_map(|(value, by)| value >> by),
        (any::<u64>(), 0u32..64).prop_map(|(value, by)| value << by),
        Just(0),
    ]
}

proptest! {
    #![proptest_config(cases(500))]
    #[test]
    fn register_forms_do_what_the_processor_does(
        rax in number(), rbx in number(), rcx in number(),
    ) {
        let mut m = Machine::new();
        for (name, bytes, defined, processor) in REGISTER_FORMS {
            m.cpu.regs = kvm_regs { rax, rbx, rcx, rip: RIP, rflags: 2, ..Default::default() };
            m.done(bytes);
            let (result, flags) = processor(rax, rbx, rcx);
            prop_assert_eq!(m.cpu.regs.rax, result, "{}", name);
            prop_assert_eq!(m.cpu.regs.rflags & defined, flags & defined, "flags of {}", name);
            prop_assert_eq!((m.cpu.regs.rbx, m.cpu.regs.rcx), (rbx, rcx), "sources of {}", name);
        }
    }

    #[test]
    fn compare_and_exchange_does_what_the_processor_does(
        wide: bool, equal: bool, memory: u128, mut registers: [u64; 4],
    ) {
        if equal {
            let shift = if wide { 64 } else { 32 };
            let high = (memory >> shift) as u64;
            let mask = if wide { u64::MAX } else { 0xffff_ffff };
            registers[0] = registers[0] & !mask | memory as u64 & mask;
            registers[3] = registers[3] & !mask | high & mask;
        }
        let [rax, rbx, rcx, rdx] = registers;
        let mut m = Machine::new();
        m.write(DATA_GPA, &memory.to_le_bytes());
        m.cpu.regs = kvm_regs {
            rax, rbx, rcx, rdx, rsi: DATA, rip: RIP, rflags: 0x8d7, ..Default::default()
        };
        // lock cmpxchg16b [rsi], lock cmpxchg8b [rsi]
        m.done(if wide { &[0xf0, 0x48, 0x0f, 0xc7, 0x0e] } else { &[0xf0, 0x0f, 0xc7, 0x0e] });
        let (low, high, flags, after) = native::compare_exchange(wide, memory, registers);
        prop_assert_eq!((m.cpu.regs.rax, m.cpu.regs.rdx), (low, high));
        prop_assert_eq!(m.cpu.regs.rflags & ZF, flags & ZF);
        prop_assert_eq!(m.cpu.regs.rflags | ZF, 0x8d7, "only ZF changes");
        prop_assert_eq!(m.bytes(DATA_GPA, 16), after.to_le_bytes());
    }
}

#[test]
fn popcnt_reads_memory_of_the_operand_s_width() {
    let mut m = Machine::new();
    m.write(DATA_GPA, &[0xff; 16]);
    m.cpu.regs.rsi = DATA + 4;
    for (bytes, bits) in [
        (&[0xf3, 0x48, 0x0f, 0xb8, 0x06][..], 64),
        (&[0xf3, 0x0f, 0xb8, 0x06], 32),
        (&[0x66, 0xf3, 0x0f, 0xb8, 0x06], 16),
    ] {
        m.cpu.regs.rax = 0;
        m.done(bytes);
        assert_eq!(m.cpu.regs.rax, bits);
    }
}

#[test]
fn movbe_swaps_both_ways_in_every_width() {
    let mut m = Machine::new();
    m.cpu.regs.rsi = DATA;
    for (load, store, bytes) in [
        (&[0x48, 0x0f, 0x38, 0xf0, 0x06][..], &[0x48, 0x0f, 0x38, 0xf1, 0x46, 0x10][..], 8),
        (&[0x0f, 0x38, 0xf0, 0x06], &[0x0f, 0x38, 0xf1, 0x46, 0x10], 4),
        (&[0x66, 0x0f, 0x38, 0xf0, 0x06], &[0x66, 0x0f, 0x38, 0xf1, 0x46, 0x10], 2),
    ] {
        let memory = [1, 2, 3, 4, 5, 6, 7, 8];
        m.write(DATA_GPA, &memory);
        m.write(DATA_GPA + 16, &[0xee; 8]);
        m.cpu.regs.rax = 0;
        m.done(load);
        let loaded = memory[..bytes].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        assert_eq!(m.cpu.regs.rax, loaded);
        m.done(store);
        let mut expected = [0xee; 8];
        expected[..bytes].copy_from_slice(&memory[..bytes]);
        assert_eq!(m.bytes(DATA_GPA + 16, 8), expected);
    }
}

#[test]
fn a_16_bit_result_keeps_the_rest_of_the_register() {
    let mut m = Machine::new();
    m.cpu.regs.rax = u64::MAX;
    m.cpu.regs.rbx = 1;
    m.done(&[0x66, 0xf3, 0x0f, 0xb8, 0xc3]);
    assert_eq!(m.cpu.regs.rax, 0xffff_ffff_ffff_0001);
}

#[test]
fn rdrand_and_rdseed_succeed_with_the_source_s_bits() {
    for modrm in [0xf0, 0xf8] {
        let mut m = Machine::new();
        m.cpu.regs.rflags = 0x8d6;
        m.done(&[0x48, 0x0f, 0xc7, modrm]);
        assert_eq!(m.cpu.regs.rax, 0x0123_4567_89ab_cdef);
        assert_eq!(m.cpu.regs.rflags & STATUS, CF);
        m.done(&[0x0f, 0xc7, modrm]);
        assert_eq!(m.cpu.regs.rax, 0x89ab_cdef);
    }
}

#[test]
fn cmpxchg16b_at_an_unaligned_address_is_a_general_protection_fault() {
    let mut m = Machine::new();
    m.cpu.regs.rsi = DATA + 8;
    assert_eq!(m.fault(&[0xf0, 0x48, 0x0f, 0xc7, 0x0e]), general_protection());
}

#[test]
fn cmpxchg8b_that_cannot_be_atomic_is_refused() {
    for offset in [4, 0xffc] {
        let mut m = Machine::new();
        m.cpu.regs.rsi = DATA + offset;
        let refused = m.run(&[0xf0, 0x0f, 0xc7, 0x0e]).unwrap_err();
        assert!(refused.to_string().contains("atomic"), "{refused}");
    }
}

#[test]
fn a_failed_comparison_still_needs_a_writable_page() {
    for bytes in [&[0xf0, 0x48, 0x0f, 0xc7, 0x0e][..], &[0xf0, 0x0f, 0xc7, 0x0e]] {
        let mut m = Machine::new();
        m.map(DATA, DATA_GPA, PRESENT);
        m.cpu.regs.rsi = DATA;
        m.cpu.regs.rax = 1;
        assert_eq!(m.fault(bytes), page_fault(3, DATA));
    }
}

#[test]
fn cmpxchg8b_loses_no_update_of_another_thread() {
    const TURNS: u64 = 60_000;
    let mut m = Machine::new();
    let mem = m.mem.clone();
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let other = thread::spawn(move || {
        let cell = atomic_u64(&mem, DATA_GPA).unwrap();
        let mut added = 0u32;
        while !stopped.load(Ordering::SeqCst) {
            cell.fetch_add(1 << 32, Ordering::SeqCst);
            added = added.wrapping_add(1);
            // Long enough apart for the other thread to succeed between two, and now and then at one.
            (0..500).for_each(|_| std::hint::spin_loop());
        }
        u64::from(added)
    });
    m.cpu.regs.rsi = DATA;
    let mut mine = 0;
    while mine < TURNS {
        let regs = &mut m.cpu.regs;
        (regs.rbx, regs.rcx) = (regs.rax + 1, regs.rdx);
        m.done(&[0xf0, 0x0f, 0xc7, 0x0e]);
        if m.cpu.regs.rflags & ZF != 0 {
            mine += 1;
            (m.cpu.regs.rax, m.cpu.regs.rdx) = (m.cpu.regs.rbx, m.cpu.regs.rcx);
        }
    }
    stop.store(true, Ordering::SeqCst);
    let theirs = other.join().unwrap();
    assert_eq!(m.read_u64(DATA_GPA), theirs << 32 | TURNS);
}
