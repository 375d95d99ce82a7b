//! Integer arithmetic, comparisons, shifts.

use crate::alu::{self, ARITHMETIC, CF, OF, ZF, mask, sign_extend};
use crate::cpu::{Cpu, RAX, RDX};
use crate::op::{MEMORY, Op};
use crate::stop::{Exec, Flow, divide_error};

/// ADD, OR, ADC, SBB, AND, SUB, XOR, by their numbers in the opcode.
pub(crate) fn binary<const KIND: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.get(op, op.from, op.bytes)?;
    let bytes = op.bytes;
    cpu.modify(op, op.to, bytes, |cpu, a| {
        let carry = cpu.flags & CF;
        let (result, flags) = match KIND {
            0 => alu::add(a, b, 0, bytes),
            1 => (a | b, alu::logic(a | b, bytes)),
            2 => alu::add(a, b, carry, bytes),
            3 => alu::sub(a, b, carry, bytes),
            4 => (a & b, alu::logic(a & b, bytes)),
            5 => alu::sub(a, b, 0, bytes),
            _ => (a ^ b, alu::logic(a ^ b, bytes)),
        };
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        result
    })?;
    Ok(Flow::Next)
}

/// CMP.
pub(crate) fn compare(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.get(op, op.from, op.bytes)?;
    let a = cpu.get(op, op.to, op.bytes)?;
    let (_, flags) = alu::sub(a, b, 0, op.bytes);
    cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
    Ok(Flow::Next)
}

/// TEST.
pub(crate) fn test(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.get(op, op.from, op.bytes)?;
    let a = cpu.get(op, op.to, op.bytes)?;
    cpu.flags = (cpu.flags & !ARITHMETIC) | alu::logic(a & b, op.bytes);
    Ok(Flow::Next)
}

/// INC, or DEC if the kind is 1: the carry stays.
pub(crate) fn step(cpu: &mut Cpu, op: &Op) -> Exec {
    let (bytes, down) = (op.bytes, op.kind == 1);
    cpu.modify(op, op.to, bytes, |cpu, a| {
        let (result, flags) = if down { alu::sub(a, 1, 0, bytes) } else { alu::add(a, 1, 0, bytes) };
        cpu.flags = (cpu.flags & !(ARITHMETIC & !CF)) | (flags & !CF);
        result
    })?;
    Ok(Flow::Next)
}

/// NEG.
pub(crate) fn negate(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    cpu.modify(op, op.to, bytes, |cpu, a| {
        let (result, flags) = alu::sub(0, a, 0, bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        result
    })?;
    Ok(Flow::Next)
}

/// NOT.
pub(crate) fn invert(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    cpu.modify(op, op.to, bytes, |_, a| !a & mask(bytes))?;
    Ok(Flow::Next)
}

/// The shifts and rotations; the kind is the number in the opcode.
pub(crate) fn shift(cpu: &mut Cpu, op: &Op) -> Exec {
    let count = cpu.get(op, op.from, 1)? as u8;
    let (bytes, kind) = (op.bytes, op.kind);
    cpu.modify(op, op.to, bytes, |cpu, a| {
        let (result, flags) = alu::shift(kind, a, count, cpu.flags, bytes);
        cpu.flags = flags;
        result
    })?;
    Ok(Flow::Next)
}

/// SHLD by CL or an immediate, or SHRD: bit 7 of the kind says which, bit 6 that the count is CL.
pub(crate) fn double_shift(cpu: &mut Cpu, op: &Op) -> Exec {
    let from = cpu.get(op, op.from, op.bytes)?;
    let count = if op.kind & 0x40 != 0 { cpu.reg(crate::cpu::RCX) as u8 } else { op.immediate as u8 };
    let (bytes, left) = (op.bytes, op.kind & 0x80 != 0);
    cpu.modify(op, op.to, bytes, |cpu, a| {
        let (result, flags) = alu::double_shift(left, a, from, count, cpu.flags, bytes);
        cpu.flags = flags;
        result
    })?;
    Ok(Flow::Next)
}

/// MUL, or IMUL if the kind is 1, of one operand.
pub(crate) fn multiply(cpu: &mut Cpu, op: &Op) -> Exec {
    let b = cpu.get(op, op.from, op.bytes)?;
    let a = cpu.reg(RAX) & mask(op.bytes);
    let (low, high, more) =
        if op.kind == 1 { alu::multiply_signed(a, b, op.bytes) } else { alu::multiply(a, b, op.bytes) };
    if op.bytes == 1 {
        cpu.set_reg(RAX, 2, low | (high << 8));
    } else {
        cpu.set_reg(RAX, op.bytes, low);
        cpu.set_reg(RDX, op.bytes, high);
    }
    set_product_flags(cpu, more);
    Ok(Flow::Next)
}

/// IMUL of two or three operands: `to` is a register, the factors are `from` and `to`, or `from` and the immediate.
pub(crate) fn multiply_into(cpu: &mut Cpu, op: &Op) -> Exec {
    let a = cpu.get(op, op.from, op.bytes)?;
    let b = if op.kind == 3 { op.immediate & mask(op.bytes) } else { cpu.reg(op.to) & mask(op.bytes) };
    let (low, _, more) = alu::multiply_signed(a, b, op.bytes);
    cpu.set_reg(op.to, op.bytes, low);
    set_product_flags(cpu, more);
    Ok(Flow::Next)
}

fn set_product_flags(cpu: &mut Cpu, more: bool) {
    cpu.flags = (cpu.flags & !(CF | OF)) | if more { CF | OF } else { 0 };
}

/// DIV, or IDIV if the kind is 1.
pub(crate) fn divide(cpu: &mut Cpu, op: &Op) -> Exec {
    let by = cpu.get(op, op.from, op.bytes)?;
    let (high, low) = if op.bytes == 1 {
        ((cpu.reg(RAX) >> 8) & 0xff, cpu.reg(RAX) & 0xff)
    } else {
        (cpu.reg(RDX) & mask(op.bytes), cpu.reg(RAX) & mask(op.bytes))
    };
    let done = if op.kind == 1 {
        alu::divide_signed(high, low, by, op.bytes)
    } else {
        alu::divide(high, low, by, op.bytes)
    };
    let (quotient, remainder) = done.ok_or_else(divide_error)?;
    if op.bytes == 1 {
        cpu.set_reg(RAX, 2, quotient | (remainder << 8));
    } else {
        cpu.set_reg(RAX, op.bytes, quotient);
        cpu.set_reg(RDX, op.bytes, remainder);
    }
    Ok(Flow::Next)
}

/// CBW, CWDE, CDQE: the accumulator's lower half, sign-extended.
pub(crate) fn widen(cpu: &mut Cpu, op: &Op) -> Exec {
    let half = op.bytes / 2;
    let value = sign_extend(cpu.reg(RAX) & mask(half), half);
    cpu.set_reg(RAX, op.bytes, value);
    Ok(Flow::Next)
}

/// CWD, CDQ, CQO: RDX is the accumulator's sign.
pub(crate) fn spread_sign(cpu: &mut Cpu, op: &Op) -> Exec {
    let negative = cpu.reg(RAX) >> alu::top(op.bytes) & 1 == 1;
    cpu.set_reg(RDX, op.bytes, if negative { u64::MAX } else { 0 });
    Ok(Flow::Next)
}

/// CMPXCHG.
pub(crate) fn compare_exchange(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    let expected = cpu.reg(RAX) & mask(bytes);
    let new = cpu.get(op, op.from, bytes)?;
    if op.to != MEMORY {
        let old = cpu.get(op, op.to, bytes)?;
        let (_, flags) = alu::sub(expected, old, 0, bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        // Unlike memory, a register that is not equal is not written: its upper half stays.
        if flags & ZF != 0 {
            cpu.set(op, op.to, bytes, new)?;
        } else {
            cpu.set_reg(RAX, bytes, old);
        }
        return Ok(Flow::Next);
    }
    // What was there is left in RAX afterwards, so it is noted on the way.
    let found = std::cell::Cell::new(0);
    cpu.modify(op, op.to, bytes, |cpu, old| {
        found.set(old);
        let (_, flags) = alu::sub(expected, old, 0, bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        if flags & ZF != 0 { new } else { old }
    })?;
    if cpu.flags & ZF == 0 {
        cpu.set_reg(RAX, bytes, found.get());
    }
    Ok(Flow::Next)
}

/// XADD.
pub(crate) fn exchange_add(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    let b = cpu.get(op, op.from, bytes)?;
    let found = std::cell::Cell::new(0);
    if op.to != MEMORY {
        let a = cpu.get(op, op.to, bytes)?;
        let (sum, flags) = alu::add(a, b, 0, bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        // Of one register with itself the sum is left (SDM vol. 2, XADD).
        cpu.set(op, op.from, bytes, a)?;
        cpu.set(op, op.to, bytes, sum)?;
        return Ok(Flow::Next);
    }
    cpu.modify(op, op.to, bytes, |cpu, a| {
        found.set(a);
        let (sum, flags) = alu::add(a, b, 0, bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        sum
    })?;
    cpu.set(op, op.from, bytes, found.get())?;
    Ok(Flow::Next)
}

/// CLC, STC, CMC, CLD, STD, by kind: bits 0 to 4 are the flag's number, bit 5 sets, bit 6 turns over.
pub(crate) fn flag(cpu: &mut Cpu, op: &Op) -> Exec {
    let flag = 1 << (op.kind & 31);
    match op.kind >> 5 {
        0 => cpu.flags &= !flag,
        1 => cpu.flags |= flag,
        _ => cpu.flags ^= flag,
    }
    Ok(Flow::Next)
}
