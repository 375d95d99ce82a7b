//! Instructions on general registers, flags and plain memory.

use std::sync::atomic::Ordering;

use vm_memory::GuestAddress;

use super::Reason;
use super::paging::{Access, Span, atomic_u64};
use super::step::{Step, Stop, general_protection};

const CF: u64 = 1;
const PF: u64 = 1 << 2;
const AF: u64 = 1 << 4;
const ZF: u64 = 1 << 6;
const SF: u64 = 1 << 7;
const OF: u64 = 1 << 11;

/// CRC-32C's polynomial, bits reflected (SDM vol. 2, CRC32).
const CRC32C_REFLECTED: u32 = 0x82f6_3b78;

fn flag(condition: bool, bit: u64) -> u64 {
    if condition { bit } else { 0 }
}

pub(super) fn popcnt(step: &mut Step<'_>) -> Result<(), Stop> {
    let source = step.operand(1)?;
    step.set_reg(step.insn.op0_register(), u64::from(source.count_ones()));
    step.set_flags(OF | SF | ZF | AF | CF | PF, flag(source == 0, ZF));
    Ok(())
}

pub(super) fn tzcnt(step: &mut Step<'_>) -> Result<(), Stop> {
    count_zeros(step, |source, bits| source.trailing_zeros().min(bits))
}

pub(super) fn lzcnt(step: &mut Step<'_>) -> Result<(), Stop> {
    count_zeros(step, |source, bits| source.leading_zeros() - (64 - bits))
}

fn count_zeros(step: &mut Step<'_>, count: fn(u64, u32) -> u32) -> Result<(), Stop> {
    let source = step.operand(1)?;
    let zeros = count(source, step.operand_bytes(0) as u32 * 8);
    step.set_reg(step.insn.op0_register(), u64::from(zeros));
    step.set_flags(CF | ZF, flag(source == 0, CF) | flag(zeros == 0, ZF));
    Ok(())
}

pub(super) fn andn(step: &mut Step<'_>) -> Result<(), Stop> {
    let bits = step.operand_bytes(0) * 8;
    let value = !step.operand(1)? & step.operand(2)?;
    let value = if bits == 32 { value & 0xffff_ffff } else { value };
    step.set_reg(step.insn.op0_register(), value);
    let sign = value >> (bits - 1) & 1 == 1;
    step.set_flags(OF | SF | ZF | CF, flag(value == 0, ZF) | flag(sign, SF));
    Ok(())
}

pub(super) fn shlx(step: &mut Step<'_>) -> Result<(), Stop> {
    shift(step, |value, by, _| value << by)
}

pub(super) fn shrx(step: &mut Step<'_>) -> Result<(), Stop> {
    shift(step, |value, by, _| value >> by)
}

pub(super) fn sarx(step: &mut Step<'_>) -> Result<(), Stop> {
    shift(step, |value, by, bits| {
        let unused = 64 - bits;
        (((value << unused) as i64 >> unused) >> by) as u64
    })
}

/// BMI2 shifts: the count is masked to the operand's width, no flags (SDM vol. 2).
fn shift(step: &mut Step<'_>, shifted: fn(u64, u32, u32) -> u64) -> Result<(), Stop> {
    let bits = step.operand_bytes(0) as u32 * 8;
    let value = step.operand(1)?;
    let by = step.operand(2)? as u32 & (bits - 1);
    step.set_reg(step.insn.op0_register(), shifted(value, by, bits));
    Ok(())
}

pub(super) fn movbe(step: &mut Step<'_>) -> Result<(), Stop> {
    let bits = step.operand_bytes(0) * 8;
    let value = step.operand(1)?.swap_bytes() >> (64 - bits);
    step.set_operand(0, value)
}

pub(super) fn crc32(step: &mut Step<'_>) -> Result<(), Stop> {
    let len = step.operand_bytes(1);
    let source = step.operand(1)?.to_le_bytes();
    let mut crc = step.operand(0)? as u32;
    for byte in source.iter().take(len) {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            let carry = crc & 1;
            crc = (crc >> 1) ^ (CRC32C_REFLECTED * carry);
        }
    }
    step.set_reg(step.insn.op0_register(), u64::from(crc));
    Ok(())
}

/// RDRAND and RDSEED always succeed, so CF is set and the other flags are clear (SDM vol. 2).
pub(super) fn random(step: &mut Step<'_>) -> Result<(), Stop> {
    let value = step.cpu.random()?;
    step.set_reg(step.insn.op0_register(), value);
    step.set_flags(OF | SF | ZF | AF | PF | CF, CF);
    Ok(())
}

/// CMPXCHG8B. The processor writes even if the comparison fails, so the page must be writable.
pub(super) fn cmpxchg8b(step: &mut Step<'_>) -> Result<(), Stop> {
    let span = step.span(0, 8, Access::Write)?;
    let regs = step.cpu.regs();
    let low = |value: u64| value & 0xffff_ffff;
    let old = regs.rdx << 32 | low(regs.rax);
    let new = regs.rcx << 32 | low(regs.rbx);
    let cell = atomic_u64(step.mem, single(step, &span, 8)?)?;
    let found = cell.compare_exchange(old, new, Ordering::SeqCst, Ordering::SeqCst);
    if let Err(found) = found {
        let regs = step.cpu.regs_mut();
        regs.rax = low(found);
        regs.rdx = found >> 32;
    }
    step.set_flags(ZF, flag(found.is_ok(), ZF));
    Ok(())
}

/// CMPXCHG16B: unaligned is #GP (SDM vol. 2).
pub(super) fn cmpxchg16b(step: &mut Step<'_>) -> Result<(), Stop> {
    if step.linear(0)? % 16 != 0 {
        return Err(general_protection());
    }
    let span = step.span(0, 16, Access::Write)?;
    let at = GuestAddress(single(step, &span, 16)?);
    let wide = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let regs = step.cpu.regs();
    let old = wide(regs.rdx, regs.rax);
    let new = wide(regs.rcx, regs.rbx);
    let found = step.cpu.cmpxchg16(step.mem, at, old, new)?;
    if found != old {
        let regs = step.cpu.regs_mut();
        regs.rax = found as u64;
        regs.rdx = (found >> 64) as u64;
    }
    step.set_flags(ZF, flag(found == old, ZF));
    Ok(())
}

/// The guest-physical address of a naturally aligned operand.
fn single(step: &Step<'_>, span: &Span, bytes: u64) -> Result<u64, Stop> {
    match span.single() {
        Some(at) if at % bytes == 0 => Ok(at),
        _ => Err(Reason::Unaligned(step.linear(0)?).into()),
    }
}
