//! Any page tables over guarded RAM, and the machine around them: what the targets share that read a guest's
//! memory by linear address.

use crate::cpu::{FakeCpu, intel, kernel, set_pkru};
use crate::guarded;
use crate::oracle::{Ram, Who};
use arbitrary::{Result, Unstructured};
use peregrine_vmm::assist::HostCpu;
use peregrine_vmm::memory::GuestMemory;
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress};

pub(crate) const PAGE: u64 = 4096;
/// RAM, with a hole between: 16 pages, the first six of them tables, and 16 pages.
const RAM: [(u64, usize); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];
const TABLES: u64 = 6;
const TABLES_BYTES: usize = (TABLES * PAGE) as usize;
const PML5: u64 = 0;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
pub(crate) const PD: u64 = 0x3000;
pub(crate) const PT0: u64 = 0x4000;
pub(crate) const PT1: u64 = 0x5000;
const ACCESSED_DIRTY: u64 = 0x60;
const USER: u64 = 4;

/// A guest of one vCPU.
pub(crate) struct Machine {
    pub(crate) cpu: FakeCpu,
    pub(crate) host: HostCpu,
    pub(crate) mem: Arc<GuestMemory>,
    /// RAM as every execution finds it, but for the tables.
    pristine: [Vec<u8>; 2],
}

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

/// One execution, on this thread's machine. Input that ends early reads as zeroes, so it always is one.
pub(crate) fn with_machine(
    data: &[u8],
    execute: impl FnOnce(&mut Machine, &mut Unstructured<'_>) -> Result<()>,
) {
    let _ = MACHINE.with_borrow_mut(|machine| execute(machine, &mut Unstructured::new(data)));
}

impl Machine {
    pub(crate) fn new() -> Self {
        let bytes = |(at, len): (u64, usize)| {
            (0..len as u64).map(|i| ((at + i) * 31 % 251) as u8 ^ ((at + i) >> 12) as u8).collect()
        };
        let mut pristine: [Vec<u8>; 2] = RAM.map(bytes);
        pristine[0][..TABLES_BYTES].fill(0);
        Self { cpu: kernel(), host: intel(), mem: Arc::new(guarded::memory(&RAM)), pristine }
    }

    /// RAM as every execution finds it, for tables to be written to.
    pub(crate) fn ram(&self) -> Ram {
        let ranges = RAM.map(|(at, _)| at).into_iter().zip(self.pristine.clone()).collect();
        Ram { ranges, walked: BTreeSet::new() }
    }

    /// Makes that the guest's memory.
    pub(crate) fn load(&self, ram: &Ram) {
        for (at, bytes) in &ram.ranges {
            self.mem.write_slice(bytes, GuestAddress(*at)).unwrap_or_else(|e| panic!("{e}"));
        }
    }

    /// RAM as it is.
    pub(crate) fn snapshot(&self) -> Ram {
        let ranges = RAM.map(|(at, len)| (at, read(&self.mem, at, len))).into();
        Ram { ranges, walked: BTreeSet::new() }
    }
}

/// Control bits that change what a supervisor or a program may do; gives PKRU.
pub(crate) fn set_control(cpu: &mut FakeCpu, u: &mut Unstructured<'_>) -> Result<u32> {
    let bits: u8 = u.arbitrary()?;
    let bit = |n: u8| u64::from(bits >> n & 1);
    let defaults = kernel();
    cpu.sregs.cr0 = defaults.sregs.cr0 & !(1 << 16) | bit(0) << 16;
    cpu.sregs.cr4 = defaults.sregs.cr4 | bit(1) << 12 | bit(2) << 21 | bit(3) << 22;
    cpu.sregs.efer = 0x500 | bit(4) << 11;
    cpu.regs.rflags = 2 | bit(5) << 18;
    let top = if bit(1) == 1 { PML5 } else { PML4 };
    cpu.sregs.cr3 = if u.ratio(1, 32)? { u.arbitrary()? } else { top | u64::from(bits) & 0x18 };
    let pkru = if u.arbitrary()? { u.arbitrary()? } else { 0 };
    set_pkru(cpu, pkru);
    Ok(pkru)
}

/// A hierarchy that leads to RAM, some entries of it bent; most pages are open to `who`.
pub(crate) fn write_tables(ram: &mut [u8], who: Who, u: &mut Unstructured<'_>) -> Result<()> {
    let mut set = |table: u64, index: u64, entry: u64| {
        let at = (table + index * 8) as usize;
        ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    };
    for index in [0, 511] {
        set(PML5, index, PML4 | 7);
        set(PDPT, index, PD | 7);
        set(PML4, index, PDPT | 7);
    }
    set(PML4, 272, PDPT | 7);
    for (index, table) in [(0, PT0), (1, PT1), (511, PT1), (510, PT0)] {
        set(PD, index, table | 7);
    }
    // Runs of pages at both ends of both tables, with a hole here and there.
    for index in 0..16_u64 {
        for (table, index) in [(PT0, index), (PT0, 511 - index), (PT1, index), (PT1, 511 - index)] {
            set(table, index, leaf(who, u)?);
        }
    }
    // Any entry of any table may be anything, so that tables may loop, overlap and be written to.
    for _ in 0..u.int_in_range(0..=3)? {
        let table = *u.choose(&[PML5, PML4, PDPT, PD, PT0, PT1])?;
        let index = *u.choose(&[0_u64, 1, 272, 510, 511])?;
        let entry = match u.int_in_range(0..=4)? {
            0 => u.arbitrary()?,
            // A large page; of RAM only its front is there.
            1 | 2 => u.int_in_range(0..=3_u64)? << 21 | 0x83 | u.arbitrary::<u8>()? as u64,
            _ => u.int_in_range(0..=15_u64)? << 12 | 7,
        };
        set(table, index, entry);
    }
    Ok(())
}

/// Pages wherever both tables have an entry, so that a call may be as long as calls are.
pub(crate) fn fill_tables(ram: &mut [u8], who: Who, u: &mut Unstructured<'_>) -> Result<()> {
    // One page, pages in order, or in no order.
    let step = *u.choose(&[0, 1, 3])?;
    let (hole, has_hole) = (u.int_in_range(0..=1023_u64)?, u.arbitrary::<bool>()?);
    let rights = if who == Who::User { 7 } else { 3 };
    for index in 0..1024_u64 {
        let table = if index < 512 { PT0 } else { PT1 };
        let entry = if has_hole && index == hole { 0 } else { (0x20 + index * step % 16) << 12 | rights };
        let at = (table + index % 512 * 8) as usize;
        ram[at..at + 8].copy_from_slice(&entry.to_le_bytes());
    }
    Ok(())
}

fn leaf(who: Who, u: &mut Unstructured<'_>) -> Result<u64> {
    let bits: u16 = u.arbitrary()?;
    let frame = match bits & 31 {
        n @ 0..16 => 0x20 + n,
        n @ 16..26 => n - 10,
        26 => 0x12,
        27 => 0x30,
        n => n - 28,
    };
    let flags = match bits >> 5 & 7 {
        0..=3 => 3,
        4 => 7,
        5 => 1,
        6 => 5,
        _ => u64::from(bits >> 8),
    };
    let flags = match who {
        Who::Supervisor | Who::Fetch => flags,
        Who::User => flags ^ USER,
    };
    let high = match bits >> 13 {
        7 => 1 << 63,
        6 => 1 << 59,
        5 => 3 << 60,
        4 if bits & 0x300 == 0 => 1 << 50,
        _ => 0,
    };
    Ok(u64::from(frame) << 12 | flags | high)
}

/// Mostly one in, or near, the runs of pages.
pub(crate) fn address(u: &mut Unstructured<'_>) -> Result<u64> {
    if u.ratio(1, 32)? {
        return u.arbitrary();
    }
    let base = *u.choose(&[
        0_u64,
        0x1f_8000,
        0xffff_8800_0000_0000,
        0xffff_8800_001f_8000,
        0xffff_ffff_ffdf_8000,
        0xffff_ffff_ffff_0000,
    ])?;
    let offset: u16 = u.arbitrary()?;
    Ok(base.wrapping_add(offset.into()))
}

/// Guest memory must be `expected`, but for accessed and dirty bits that were set.
pub(crate) fn compare(expected: &Ram, mem: &GuestMemory) {
    for (at, bytes) in &expected.ranges {
        let found = read(mem, *at, bytes.len());
        if found == *bytes {
            continue;
        }
        for (index, (old, new)) in bytes.chunks_exact(8).zip(found.chunks_exact(8)).enumerate() {
            let word = |bytes: &[u8]| bytes.try_into().map_or(0, u64::from_le_bytes);
            let (old, new) = (word(old), word(new));
            let gpa = at + index as u64 * 8;
            let marks = if expected.walked.contains(&gpa) && old & 1 == 1 { ACCESSED_DIRTY } else { 0 };
            let right = old == new || new & !marks == old & !marks && new & old == old;
            assert!(right, "{gpa:#x} holds {new:#x}, not {old:#x}");
        }
    }
}

/// So many bytes of guest memory.
pub(crate) fn read(mem: &GuestMemory, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    mem.read_slice(&mut bytes, GuestAddress(at)).unwrap_or_else(|e| panic!("{e}"));
    bytes
}
