//! The instruction assist with any bytes, registers and page tables.
//!
//! Promises: no panic, nothing outside RAM touched (guard pages), at most one exception, an answer.

use crate::cpu::{OPCODES, PREFIXES, general, kernel, processor};
use crate::guarded;
use arbitrary::{Result, Unstructured};
use peregrine_vmm::assist::{HostCpu, assist};
use peregrine_vmm::memory::GuestMemory;
use std::cell::RefCell;
use vm_memory::{Bytes as _, GuestAddress};

const RAM: [(u64, usize); 2] = [(0, 0x8000), (0x1_0000, 0x8000)];
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT: u64 = 0x4000;
/// Where the first page of the second range is mapped.
const DATA: u64 = 0xffff_8800_0000_0000;

thread_local! {
    static MACHINE: RefCell<(HostCpu, GuestMemory)> = RefCell::new((processor(), guarded::memory(&RAM)));
}

/// One execution.
pub fn target(data: &[u8]) {
    MACHINE.with_borrow_mut(|(host, mem)| {
        let _ = execute(host, mem, &mut Unstructured::new(data));
    });
}

fn execute(host: &HostCpu, mem: &GuestMemory, u: &mut Unstructured<'_>) -> Result<()> {
    let mut cpu = kernel();
    let control: u64 = u.arbitrary()?;
    cpu.sregs.cr3 = PML4;
    // WP and TS; LA57, SMAP, PKE, OSFXSR and OSXSAVE; NXE.
    cpu.sregs.cr0 ^= control & (1 << 16 | 1 << 3);
    cpu.sregs.cr4 ^= control & (1 << 12 | 1 << 21 | 1 << 22 | 1 << 9 | 1 << 18);
    cpu.sregs.efer ^= control >> 32 & (1 << 11);
    if u.ratio(1, 4)? {
        cpu.xcr0 = u.arbitrary()?;
    }
    write_tables(mem, u)?;
    for register in general(&mut cpu.regs) {
        *register = number(u)?;
    }
    (cpu.regs.rip, cpu.regs.rflags) = (number(u)?, number(u)?);
    cpu.sregs.fs.base = number(u)?;
    cpu.sregs.gs.base = number(u)?;
    let opcode = if u.ratio(1, 16)? { &[] } else { *u.choose(OPCODES)? };
    let code = [*u.choose(PREFIXES)?, opcode, u.bytes(u.len().min(8))?].concat();
    let rip = cpu.regs.rip;
    let given = if u.ratio(1, 8)? { &[][..] } else { &code };
    match assist(&mut cpu, host, mem, given) {
        Ok(_) => assert!(cpu.injected.len() <= 1),
        Err(refused) => {
            assert!(cpu.injected.is_empty() && cpu.regs.rip == rip);
            assert!(!refused.to_string().is_empty());
        }
    }
    Ok(())
}

fn write_tables(mem: &GuestMemory, u: &mut Unstructured<'_>) -> Result<()> {
    let set = |at: u64, entry: u64| {
        mem.write_obj(entry, GuestAddress(at)).unwrap_or_else(|e| panic!("{e}"));
    };
    set(PML4 + 272 * 8, PDPT | 7);
    set(PML4 + 511 * 8, PML4 | 7);
    set(PDPT, PD | 7);
    set(PD, PT | 7);
    for index in 0..8 {
        set(PT + index * 8, (0x1_0000 + index * 0x1000) | 3);
    }
    for _ in 0..u.int_in_range(0..=2)? {
        let at = u.int_in_range(0x200..=0x9ff_u64)? * 8;
        set(at, u.arbitrary()?);
    }
    // An XSAVE area to restore from: header and a little of the rest.
    let header: [u8; 64] = u.arbitrary()?;
    mem.write_slice(&header, GuestAddress(0x1_0000 + 512)).unwrap_or_else(|e| panic!("{e}"));
    Ok(())
}

fn number(u: &mut Unstructured<'_>) -> Result<u64> {
    let offset: u16 = u.arbitrary()?;
    let offset = u64::from(offset);
    Ok(match u.int_in_range(0..=7)? {
        0 => u.arbitrary()?,
        1 => offset,
        2 => u64::MAX - offset,
        3 => 0x7fff_ffff_ffff - offset,
        4 => DATA + (offset & 0x1ff) * 64,
        5 => DATA,
        _ => DATA + (offset & 0x7fff),
    })
}
