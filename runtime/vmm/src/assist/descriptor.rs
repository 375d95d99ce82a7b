//! LAR, LSL, VERR, VERW: questions about a segment descriptor. Kernels ask them too: LSL finds the CPU's
//! number on the way into an NMI, VERW is a mitigation.

use super::paging::{Access, Span};
use super::step::{Step, Stop};

const ZF: u64 = 1 << 6;

/// A segment descriptor (SDM vol. 3, 3.4.5) that the current and requested privilege may see.
struct Descriptor(u64);

impl Descriptor {
    /// S: code or data, not a system segment.
    fn is_code_or_data(&self) -> bool {
        self.0 >> 44 & 1 == 1
    }

    fn kind(&self) -> u64 {
        self.0 >> 40 & 15
    }

    fn is_code(&self) -> bool {
        self.is_code_or_data() && self.kind() & 8 != 0
    }

    fn is_conforming(&self) -> bool {
        self.is_code() && self.kind() & 4 != 0
    }

    fn privilege(&self) -> u64 {
        self.0 >> 45 & 3
    }

    /// Access rights as LAR gives them: the upper half, less base and limit.
    fn rights(&self) -> u64 {
        self.0 >> 32 & 0x00f0_ff00
    }

    fn limit(&self) -> u64 {
        let limit = self.0 & 0xffff | self.0 >> 32 & 0xf_0000;
        if self.0 >> 55 & 1 == 1 { limit << 12 | 0xfff } else { limit }
    }
}

/// The descriptor operand `operand` selects; none for a null selector, one beyond its table, or one that
/// the selector's RPL may not see (CPL is 0).
fn look_up(step: &mut Step<'_>, operand: u32) -> Result<Option<Descriptor>, Stop> {
    let selector = step.operand(operand)? & 0xffff;
    let sregs = step.cpu.sregs();
    let (base, limit) = match selector & 4 {
        0 => (sregs.gdt.base, u64::from(sregs.gdt.limit)),
        _ => (sregs.ldt.base, u64::from(sregs.ldt.limit)),
    };
    let offset = selector & !7;
    if selector & !3 == 0 || offset + 7 > limit {
        return Ok(None);
    }
    let at = base.wrapping_add(offset);
    let paging = step.paging()?;
    step.check_canonical(&paging, at, 8)?;
    let mut bytes = [0; 8];
    Span::open(&paging, at, 8, Access::Read)?.read(step.mem, 0, &mut bytes)?;
    let descriptor = Descriptor(u64::from_le_bytes(bytes));
    let visible = descriptor.is_conforming() || descriptor.privilege() >= selector & 3;
    Ok(visible.then_some(descriptor))
}

/// Sets ZF and, if there is an answer, the destination.
fn answer(step: &mut Step<'_>, value: Option<u64>) -> Result<(), Stop> {
    if let Some(value) = value {
        step.set_reg(step.insn.op0_register(), value);
    }
    verdict(step, value.is_some())
}

fn verdict(step: &mut Step<'_>, yes: bool) -> Result<(), Stop> {
    step.set_flags(ZF, if yes { ZF } else { 0 });
    Ok(())
}

/// System segments 64-bit LAR answers for: LDT, TSS, busy TSS, call gate (SDM vol. 2, LAR).
pub(super) fn lar(step: &mut Step<'_>) -> Result<(), Stop> {
    let found = look_up(step, 1)?.filter(|d| d.is_code_or_data() || matches!(d.kind(), 2 | 9 | 11 | 12));
    answer(step, found.map(|d| d.rights()))
}

/// The same less call gates, which have no limit.
pub(super) fn lsl(step: &mut Step<'_>) -> Result<(), Stop> {
    let found = look_up(step, 1)?.filter(|d| d.is_code_or_data() || matches!(d.kind(), 2 | 9 | 11));
    answer(step, found.map(|d| d.limit()))
}

pub(super) fn verr(step: &mut Step<'_>) -> Result<(), Stop> {
    let found = look_up(step, 0)?;
    // Bit 1 of a code segment's type is "readable"; data always is.
    verdict(step, found.is_some_and(|d| d.is_code_or_data() && (!d.is_code() || d.kind() & 2 != 0)))
}

pub(super) fn verw(step: &mut Step<'_>) -> Result<(), Stop> {
    let found = look_up(step, 0)?;
    verdict(step, found.is_some_and(|d| d.is_code_or_data() && !d.is_code() && d.kind() & 2 != 0))
}
