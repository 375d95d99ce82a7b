//! The bulk-memory doorbell with any registers over any page tables.
//!
//! Promises: nothing but the guest's RAM is touched (guard pages), of that nothing that the page tables do
//! not let a supervisor write, and with the right bytes (an [`crate::oracle`] says which); only RCX changes;
//! one call does at most its share; it stops early only where an access would fault.

use crate::cpu::FakeCpu;
use crate::oracle::{Ram, Reached, Who, walk};
use crate::tables::{Machine, PAGE, address, compare, set_control, with_machine, write_tables};
use arbitrary::{Result, Unstructured};
use kvm_bindings::kvm_regs;
use peregrine_vmm::doorbell::{Counters, MAX_BYTES, ring};
use peregrine_vmm::memory::GuestMemory;

pub(crate) const COPY: u32 = 1;
pub(crate) const FILL: u32 = 2;

/// One execution.
pub fn target(data: &[u8]) {
    with_machine(data, execute);
}

fn execute(machine: &mut Machine, u: &mut Unstructured<'_>) -> Result<()> {
    let mut ram = machine.ram();
    let pkru = set_control(&mut machine.cpu, u)?;
    write_tables(&mut ram.ranges[0].1, Who::Supervisor, u)?;
    machine.load(&ram);
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
    let call = Call { what: What::of(operation, from), to, from, len, done, most: MAX_BYTES, pkru };
    call.check(&machine.cpu, ram, &machine.mem);
    Ok(())
}

pub(crate) fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=63)? {
        0 => u.arbitrary()?,
        1 => MAX_BYTES + u.int_in_range(0..=9)? - 5,
        2..=20 => u.int_in_range(0..=256)?,
        _ => u.int_in_range(0..=0x1_2000)?,
    })
}

/// What a call does with the bytes of its target.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum What {
    Copy,
    Fill(u8),
    /// The same in one access: all of it is done, or nothing.
    Store(u8),
    /// It knows no such operation.
    Nothing,
}

impl What {
    /// The doorbell's operation of this number.
    pub(crate) fn of(operation: u32, from: u64) -> Self {
        match operation {
            COPY => Self::Copy,
            FILL => Self::Fill(from.to_le_bytes()[0]),
            _ => Self::Nothing,
        }
    }
}

/// A supervisor's change of memory: the doorbell's, or an instruction's that is as simple.
pub(crate) struct Call {
    pub(crate) what: What,
    pub(crate) to: u64,
    pub(crate) from: u64,
    pub(crate) len: u64,
    pub(crate) done: u64,
    /// Bytes after which it may stop without a reason.
    pub(crate) most: u64,
    pub(crate) pkru: u32,
}

impl Call {
    /// Where a supervisor's access goes; `None` if it faults or leaves RAM.
    fn reach(&self, ram: &mut Ram, cpu: &FakeCpu, linear: u64, write: bool) -> Option<Reached> {
        let reached = walk(ram, cpu, self.pkru, Who::Supervisor, linear, write)?;
        ram.page(reached.gpa)?;
        Some(reached)
    }

    /// Panics unless memory, which was `ram`, is as this call must have left it.
    pub(crate) fn check(&self, cpu: &FakeCpu, mut ram: Ram, mem: &GuestMemory) {
        let Some(pieces) = self.pieces(cpu, &mut ram) else {
            // The call may have changed the tables it was walking.
            return;
        };
        self.check_end(cpu, &mut ram, &pieces);
        for &(to, from, len) in &pieces {
            let bytes = match (self.what, from.and_then(|from| Some((from, ram.page(from)?)))) {
                (_, Some((from, page))) => page[(from % PAGE) as usize..][..len].to_vec(),
                (What::Fill(byte) | What::Store(byte), None) => vec![byte; len],
                (What::Copy | What::Nothing, None) => unreachable!("a copy has a source"),
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
            let to = self.reach(ram, cpu, to_linear, true);
            let copies = self.what == What::Copy;
            let from = copies.then(|| self.reach(ram, cpu, from_linear, false));
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
        // A piece that takes its own page away is done in part.
        let end = if at < self.len && self.what != What::Nothing {
            self.reach(ram, cpu, self.to.wrapping_add(at), true)
        } else {
            None
        };
        let torn = end.is_some_and(|end| ram.is_table(end.gpa));
        (!torn && !tangled(ram, &pieces)).then_some(pieces)
    }

    /// Work that stopped early stopped for a reason.
    fn check_end(&self, cpu: &FakeCpu, ram: &mut Ram, pieces: &[(u64, Option<u64>, usize)]) {
        assert!(self.what != What::Nothing || self.done == 0, "an unknown operation did something");
        if self.what == What::Nothing || self.done == self.len.min(self.most) {
            return;
        }
        let to = self.reach(ram, cpu, self.to.wrapping_add(self.done), true);
        let from = self.reach(ram, cpu, self.from.wrapping_add(self.done), false);
        let stops = |end: Option<Reached>| end.is_none_or(|end| end.large);
        let mut reason = stops(to) || self.what == What::Copy && stops(from);
        if matches!(self.what, What::Store(_)) {
            assert_eq!(self.done, 0, "a store was done in part");
            reason |= self.reach(ram, cpu, self.to.wrapping_add(self.len - 1), true).is_none();
        }
        // Or the call wrote over the tables that lead to its end.
        let tangled = pieces.iter().any(|&(to, ..)| ram.is_table(to));
        assert!(reason || tangled, "stopped after {} for nothing", self.done);
    }
}
