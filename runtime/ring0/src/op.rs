//! A decoded instruction.

use crate::cpu::Cpu;
use crate::stop::Exec;

/// Does an instruction.
pub(crate) type Run = fn(&mut Cpu, &Op) -> Exec;

/// Operands below 16 are general registers; AH, CH, DH and BH follow.
pub(crate) const HIGH_BYTES: u8 = 16;
pub(crate) const LAST_HIGH_BYTE: u8 = 19;
/// The memory operand.
pub(crate) const MEMORY: u8 = 32;
/// The immediate operand.
pub(crate) const IMMEDIATE: u8 = 33;

/// No segment with a base.
pub(crate) const FLAT: u8 = 0;
/// See [`Op::segment`].
pub(crate) const FS: u8 = 1;
/// See [`Op::segment`].
pub(crate) const GS: u8 = 2;

/// See the module's text. Kept small: a guest's kernel is a few ten thousand of them.
#[derive(Clone, Copy)]
pub(crate) struct Op {
    pub(crate) run: Run,
    /// The immediate operand, sign-extended, or a branch's target.
    pub(crate) immediate: u64,
    pub(crate) disp: i32,
    /// Where in its page it begins.
    pub(crate) offset: u16,
    /// Bytes of it.
    pub(crate) len: u8,
    /// Bytes of its operands.
    pub(crate) bytes: u8,
    pub(crate) to: u8,
    pub(crate) from: u8,
    pub(crate) base: u8,
    pub(crate) index: u8,
    pub(crate) scale: u8,
    pub(crate) segment: u8,
    /// What else `run` wants to know: a condition, a kind of shift, the width of a source.
    pub(crate) kind: u8,
    pub(crate) locked: bool,
}

const _: () = assert!(size_of::<Op>() == 32);

impl Op {
    /// The address of the next instruction.
    #[inline]
    pub(crate) fn next(&self, cpu: &Cpu) -> u64 {
        cpu.gpr[crate::cpu::CODE_PAGE as usize]
            .wrapping_add(u64::from(self.offset))
            .wrapping_add(u64::from(self.len))
    }
}
