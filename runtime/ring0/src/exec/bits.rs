//! Bit tests and scans.

use crate::alu::{self, AF, ARITHMETIC, CF, PF, SF, ZF, sign_extend};
use crate::cpu::Cpu;
use crate::op::{IMMEDIATE, MEMORY, Op};
use crate::stop::{Exec, Flow};

/// BT, BTS, BTR, BTC, by kind 0 to 3. A register as the bit's number reaches beyond the operand in memory.
pub(crate) fn test(cpu: &mut Cpu, op: &Op) -> Exec {
    let bits = u64::from(op.bytes) * 8;
    let number = cpu.get(op, op.from, op.bytes)?;
    let bit = 1_u64 << (number % bits);
    let change = |kind: u8, old: u64| match kind {
        0 => old,
        1 => old | bit,
        2 => old & !bit,
        _ => old ^ bit,
    };
    let note = |cpu: &mut Cpu, old: u64| {
        cpu.flags = (cpu.flags & !CF) | u64::from(old & bit != 0);
    };
    if op.to != MEMORY {
        let old = cpu.get(op, op.to, op.bytes)?;
        note(cpu, old);
        if op.kind != 0 {
            cpu.set(op, op.to, op.bytes, change(op.kind, old))?;
        }
        return Ok(Flow::Next);
    }
    let mut linear = cpu.address(op);
    if op.from != IMMEDIATE {
        let units = sign_extend(number, op.bytes) as i64 >> bits.trailing_zeros();
        linear = linear.wrapping_add((units * i64::from(op.bytes)) as u64);
    }
    if op.kind == 0 {
        let old = cpu.load(linear, op.bytes)?;
        note(cpu, old);
        return Ok(Flow::Next);
    }
    let place = cpu.place(linear, op.bytes)?;
    let kind = op.kind;
    cpu.modify_place(place, op.bytes, op.locked, |cpu, old| {
        note(cpu, old);
        change(kind, old)
    });
    Ok(Flow::Next)
}

/// BSF, or BSR if the kind is 1. Of zero there is no result: the register stays as it is, all of it.
pub(crate) fn scan(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, op.bytes)?;
    cpu.flags &= !ZF;
    if value == 0 {
        cpu.flags |= ZF;
        return Ok(Flow::Next);
    }
    let number = if op.kind == 1 { value.ilog2() } else { value.trailing_zeros() };
    cpu.set_reg(op.to, op.bytes, u64::from(number));
    Ok(Flow::Next)
}

/// POPCNT, TZCNT, LZCNT, by kind 0 to 2.
pub(crate) fn count(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, op.bytes)?;
    let bits = alu::top(op.bytes) + 1;
    let result = match op.kind {
        0 => value.count_ones(),
        1 => value.trailing_zeros().min(bits),
        _ => value.leading_zeros() - (64 - bits),
    };
    if op.kind == 0 {
        cpu.flags = (cpu.flags & !ARITHMETIC) | if value == 0 { ZF } else { 0 };
    } else {
        let zero = if result == 0 { ZF } else { 0 };
        cpu.flags = (cpu.flags & !(ZF | CF)) | zero | u64::from(result == bits);
    }
    cpu.set_reg(op.to, op.bytes, u64::from(result));
    Ok(Flow::Next)
}

/// BSWAP of 4 or 8 bytes.
pub(crate) fn swap(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.reg(op.to);
    let swapped = if op.bytes == 8 { value.swap_bytes() } else { u64::from((value as u32).swap_bytes()) };
    cpu.set_reg(op.to, op.bytes, swapped);
    Ok(Flow::Next)
}

/// LAHF, or SAHF if the kind is 1.
pub(crate) fn flags_and_ah(cpu: &mut Cpu, op: &Op) -> Exec {
    const LOW: u64 = SF | ZF | AF | PF | CF;
    if op.kind == 1 {
        let ah = cpu.get(op, crate::op::HIGH_BYTES, 1)?;
        cpu.flags = (cpu.flags & !LOW) | (ah & LOW);
    } else {
        let value = (cpu.flags & LOW) | crate::cpu::FIXED;
        cpu.set(op, crate::op::HIGH_BYTES, 1, value)?;
    }
    Ok(Flow::Next)
}
