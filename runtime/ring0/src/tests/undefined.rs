//! What the manual leaves undefined (SDM vol. 2, at each instruction): there is nothing to compare.

use crate::alu::{AF, ARITHMETIC, CF, OF, PF, SF, ZF};
use iced_x86::{Instruction, Mnemonic, OpKind};

/// Flags that mean nothing after an instruction; `cl` is the shift count it found.
pub(super) fn flags(insn: &Instruction, cl: u8) -> u64 {
    use Mnemonic as M;
    match insn.mnemonic() {
        M::And | M::Or | M::Xor | M::Test => AF,
        M::Mul | M::Imul => SF | ZF | AF | PF,
        M::Div | M::Idiv => ARITHMETIC,
        M::Bt | M::Bts | M::Btr | M::Btc => OF | SF | AF | PF,
        M::Bsf | M::Bsr => CF | OF | SF | AF | PF,
        M::Tzcnt | M::Lzcnt => OF | SF | AF | PF,
        M::Rol | M::Ror | M::Rcl | M::Rcr => match count(insn, 1, cl) {
            0 | 1 => 0,
            _ => OF,
        },
        M::Shl | M::Sal | M::Shr | M::Sar => shift(insn, count(insn, 1, cl)),
        M::Shld | M::Shrd => match count(insn, 2, cl) {
            0 => 0,
            1 => AF,
            _ => AF | OF,
        },
        _ => 0,
    }
}

fn shift(insn: &Instruction, count: u32) -> u64 {
    let overflow = if count == 1 { 0 } else { OF };
    // A count beyond the operand's width, which only narrow ones can have; at the width all processors agree.
    let carry = if count > bits(insn) && insn.mnemonic() != Mnemonic::Sar { CF } else { 0 };
    if count == 0 { 0 } else { AF | overflow | carry }
}

/// The shift count as the processor masks it.
fn count(insn: &Instruction, operand: u32, cl: u8) -> u32 {
    let count = if insn.op_kind(operand) == OpKind::Register { cl } else { insn.immediate8() };
    u32::from(count) & if bits(insn) == 64 { 63 } else { 31 }
}

/// The width of the first operand.
pub(super) fn bits(insn: &Instruction) -> u32 {
    let bytes = match insn.op0_kind() {
        OpKind::Register => insn.op0_register().size(),
        _ => insn.memory_size().size(),
    };
    8 * bytes as u32
}
