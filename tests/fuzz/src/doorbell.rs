//! The bulk-memory doorbell with any registers over any page tables.
//!
//! Promises: nothing but the guest's RAM is touched (guard pages), of that nothing that the page tables do
//! not let a supervisor write, and with the right bytes (an [`crate::oracle`] says which); only RCX changes;
//! one call does at most its share; it stops early only where an access would fault.

use crate::cpu::{FakeCpu, kernel, processor, set_pkru};
use crate::guarded;
use crate::oracle::{Ram, walk};
use arbitrary::{Result, Unstructured};
use kvm_bindings::kvm_regs;
use peregrine_vmm::assist::HostCpu;
use peregrine_vmm::doorbell::{Counters, MAX_BYTES, ring};
use peregrine_vmm::memory::GuestMemory;
use std::cell::RefCell;
use std::collections::BTreeSet;
use vm_memory::{Bytes as _, GuestAddress};

const PAGE: u64 = 4096;
/// RAM, with a hole between: 16 pages, the first six of them tables, and 16 pages.
const RAM: [(u64, usize); 2] = [(0, 0x1_0000), (0x2_0000, 0x1_0000)];
const TABLES: u64 = 6;
const TABLES_BYTES: usize = (TABLES * PAGE) as usize;
const PML5: u64 = 0;
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PD: u64 = 0x3000;
const PT0: u64 = 0x4000;
const PT1: u64 = 0x5000;
const ACCESSED_DIRTY: u64 = 0x60;

const COPY: u32 = 1;
const FILL: u32 = 2;

struct Machine {
    cpu: FakeCpu,
    host: HostCpu,
    mem: GuestMemory,
    /// RAM as every execution finds it, but for the tables.
    pristine: [Vec<u8>; 2],
}

impl Machine {
    fn new() -> Self {
        let bytes = |(at, len): (u64, usize)| {
            (0..len as u64).map(|i| ((at + i) * 31 % 251) as u8 ^ ((at + i) >> 12) as u8).collect()
        };
        let mut pristine: [Vec<u8>; 2] = RAM.map(bytes);
        pristine[0][..TABLES_BYTES].fill(0);
        Self { cpu: kernel(), host: processor(), mem: guarded::memory(&RAM), pristine }
    }
}

thread_local! {
    static MACHINE: RefCell<Machine> = RefCell::new(Machine::new());
}

/// One execution.
pub fn target(data: &[u8]) {
    MACHINE.with_borrow_mut(|machine| {
        // Input that ends early reads as zeroes, so this is always an execution.
        let _ = execute(machine, &mut Unstructured::new(data));
    });
}

fn execute(machine: &mut Machine, u: &mut Unstructured<'_>) -> Result<()> {
    let ranges = RAM.map(|(at, _)| at).into_iter().zip(machine.pristine.clone()).collect();
    let mut ram = Ram { ranges, walked: BTreeSet::new() };
    let pkru = set_control(&mut machine.cpu, u)?;
    write_tables(&mut ram.ranges[0].1, u)?;
    for (at, bytes) in &ram.ranges {
        machine.mem.write_slice(bytes, GuestAddress(*at)).unwrap_or_else(|e| panic!("{e}"));
    }
    let any: u32 = u.arbitrary()?;
    let operation = *u.choose(&[COPY, COPY, COPY, COPY, FILL, FILL, FILL, any])?;
    let (to, from, len) = (address(u)?, address(u)?, length(u)?);
    let regs = &mut machine.cpu.regs;
    (regs.rdi, regs.rsi, regs.rcx) = (to, from, len);
    let before = *regs;

    let mut counters = Counters::default();
    ring(&mut machine.cpu, &machine.host, &machine.mem, operation, &mut counters);

    let left = machine.cpu.regs.rcx;
    assert_eq!(kvm_regs { rcx: len, ..machine.cpu.regs }, before, "only RCX changes");
    assert!(left <= len && len - left <= MAX_BYTES, "{len} asked for, {left} left");
    assert!(machine.cpu.injected.is_empty());
    let done = len - left;
    assert_eq!(counters.copied_bytes + counters.filled_bytes, done);
    let call = Call { operation, to, from, len, done, pkru };
    call.check(&machine.cpu, ram, &machine.mem);
    Ok(())
}

/// Control bits that change what a supervisor may do; gives PKRU.
fn set_control(cpu: &mut FakeCpu, u: &mut Unstructured<'_>) -> Result<u32> {
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

/// A hierarchy that leads to RAM, some entries of it bent.
fn write_tables(ram: &mut [u8], u: &mut Unstructured<'_>) -> Result<()> {
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
            set(table, index, leaf(u)?);
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

fn leaf(u: &mut Unstructured<'_>) -> Result<u64> {
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
    let high = match bits >> 13 {
        7 => 1 << 63,
        6 => 1 << 59,
        5 => 3 << 60,
        4 if bits & 0x300 == 0 => 1 << 50,
        _ => 0,
    };
    Ok(u64::from(frame) << 12 | flags | high)
}

fn address(u: &mut Unstructured<'_>) -> Result<u64> {
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

fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=63)? {
        0 => u.arbitrary()?,
        1 => MAX_BYTES + u.int_in_range(0..=9)? - 5,
        2..=20 => u.int_in_range(0..=256)?,
        _ => u.int_in_range(0..=0x1_2000)?,
    })
}

struct Call {
    operation: u32,
    to: u64,
    from: u64,
    len: u64,
    done: u64,
    pkru: u32,
}

impl Call {
    fn check(&self, cpu: &FakeCpu, mut ram: Ram, mem: &GuestMemory) {
        let Some(pieces) = self.pieces(cpu, &mut ram) else {
            // The call may have changed the tables it was walking.
            return;
        };
        self.check_end(cpu, &mut ram, &pieces);
        for &(to, from, len) in &pieces {
            let byte = self.from.to_le_bytes()[0];
            let bytes = match from.and_then(|from| Some((from, ram.page(from)?))) {
                Some((from, page)) => page[(from % PAGE) as usize..][..len].to_vec(),
                None => vec![byte; len],
            };
            if let Some(page) = ram.page(to) {
                page[(to % PAGE) as usize..][..len].copy_from_slice(&bytes);
            }
        }
        compare(&ram, mem);
    }

    /// What was done, in pieces of one page on either side: target, source, length. `None` if its outcome
    /// depends on the order of things: tables or its own source among what it wrote.
    fn pieces(&self, cpu: &FakeCpu, ram: &mut Ram) -> Option<Vec<(u64, Option<u64>, usize)>> {
        let mut pieces: Vec<(u64, Option<u64>, usize)> = Vec::new();
        let tangled = |ram: &Ram, pieces: &[(u64, Option<u64>, usize)]| {
            let source =
                |gpa: u64| pieces.iter().any(|(_, from, _)| from.is_some_and(|f| f / PAGE == gpa / PAGE));
            let table = pieces.iter().any(|(_, from, _)| from.is_some_and(|from| ram.is_table(from)));
            table || pieces.iter().any(|&(to, ..)| ram.is_table(to) || source(to))
        };
        let mut at = 0;
        while at < self.done {
            let to_linear = self.to.wrapping_add(at);
            let from_linear = self.from.wrapping_add(at);
            let to = walk(ram, cpu, self.pkru, to_linear, true);
            let copies = self.operation == COPY;
            let from = copies.then(|| walk(ram, cpu, self.pkru, from_linear, false));
            let (Some(to), None | Some(Some(_))) = (&to, &from) else {
                assert!(tangled(ram, &pieces), "from {from_linear:#x} to {to_linear:#x} is not allowed");
                return None;
            };
            let (to, from) = (to.gpa, from.flatten().map(|from| from.gpa));
            let left = PAGE - (to % PAGE).max(from.unwrap_or(0) % PAGE);
            let len = left.min(self.done - at);
            pieces.push((to, from, len as usize));
            at += len;
        }
        (!tangled(ram, &pieces)).then_some(pieces)
    }

    /// Work that stopped early stopped for a reason.
    fn check_end(&self, cpu: &FakeCpu, ram: &mut Ram, pieces: &[(u64, Option<u64>, usize)]) {
        let known = matches!(self.operation, COPY | FILL);
        assert!(known || self.done == 0, "an unknown operation did something");
        if !known || self.done == self.len.min(MAX_BYTES) {
            return;
        }
        let reached = |ram: &mut Ram, linear: u64, write| walk(ram, cpu, self.pkru, linear, write);
        let to = reached(ram, self.to.wrapping_add(self.done), true);
        let from = reached(ram, self.from.wrapping_add(self.done), false);
        let stops = |end: Option<crate::oracle::Reached>| end.is_none_or(|end| end.large);
        let reason = stops(to) || self.operation == COPY && stops(from);
        // Or the call wrote over the tables that lead to its end.
        let tangled = pieces.iter().any(|&(to, ..)| ram.is_table(to));
        assert!(reason || tangled, "stopped after {} for nothing", self.done);
    }
}

/// Guest memory must be `expected`, but for accessed and dirty bits that were set.
fn compare(expected: &Ram, mem: &GuestMemory) {
    for (at, bytes) in &expected.ranges {
        let mut found = vec![0; bytes.len()];
        mem.read_slice(&mut found, GuestAddress(*at)).unwrap_or_else(|e| panic!("{e}"));
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
