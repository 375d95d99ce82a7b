//! String instructions, and the bulk-memory doorbell, which is two of them in one.
//!
//! With a REP prefix a page's worth is done at once where that is the same as turn by turn. Registers are those of the
//! rounds done when a fault ends them.

use crate::alu::{self, ARITHMETIC, ZF, mask};
use crate::cpu::{Cpu, DF, RAX, RCX, RDI, RSI};
use crate::op::Op;
use crate::ram::PAGE;
use crate::stop::{Break, Exec, Flow};
use crate::tlb::Access;

/// In an op's kind: it has a REP (or REPE) prefix.
pub(crate) const REP: u8 = 1;
/// In an op's kind: it has a REPNE prefix.
pub(crate) const REPNE: u8 = 2;
/// Most fuel that one instruction takes before the engine looks around; it goes on with the rest.
const MOST_FUEL: u64 = 1 << 14;
/// Fuel after which no more of a block is done.
const LONG: u64 = 64;
/// What a round takes at least, in the bytes that could be moved meanwhile.
const ROUND_BYTES: u64 = 64;
/// Most of one ring of the doorbell, as its other end says (the VMM's `doorbell`).
const MOST_DOORBELL_BYTES: u64 = 4 << 20;

/// One round's distance.
fn step(cpu: &Cpu, bytes: u8) -> u64 {
    if cpu.flags & DF == 0 { u64::from(bytes) } else { u64::from(bytes).wrapping_neg() }
}

fn advance(cpu: &mut Cpu, number: u8, by: u64) {
    let cell = &mut cpu.gpr[number as usize];
    *cell = cell.wrapping_add(by);
}

/// Bytes from `linear` to the end of its page.
fn left_in_page(linear: u64) -> u64 {
    PAGE as u64 - linear % PAGE as u64
}

/// Does `round` once or, with a prefix, RCX times; a long one is continued after a look around.
fn rounds(cpu: &mut Cpu, op: &Op, mut round: impl FnMut(&mut Cpu, u64) -> Result<u64, Break>) -> Exec {
    if op.kind & (REP | REPNE) == 0 {
        round(cpu, 1)?;
        return Ok(Flow::Next);
    }
    let begun = cpu.spent();
    while cpu.reg(RCX) != 0 {
        if cpu.spent() - begun >= MOST_FUEL {
            return again(cpu, op);
        }
        let done = round(cpu, cpu.reg(RCX))?;
        cpu.gpr[RCX as usize] -= done;
        cpu.spend((done * u64::from(op.bytes)).max(ROUND_BYTES));
    }
    go_on(cpu, op, begun)
}

/// The same instruction again: RCX says how much is left.
fn again(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = op.next(cpu).wrapping_sub(u64::from(op.len));
    Ok(Flow::Jump)
}

/// The next instruction, after a look at the fuel if this one took long: a block could have many of them.
fn go_on(cpu: &mut Cpu, op: &Op, begun: u64) -> Exec {
    if cpu.spent() - begun <= LONG {
        return Ok(Flow::Next);
    }
    cpu.rip = op.next(cpu);
    Ok(Flow::Jump)
}

/// MOVS.
pub(crate) fn movs(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    let segment = source_base(cpu, op);
    rounds(cpu, op, |cpu, most| {
        let (to, from) = (cpu.reg(RDI), cpu.reg(RSI).wrapping_add(segment));
        let fit = (left_in_page(to).min(left_in_page(from)) / u64::from(bytes)).min(most);
        let total = fit * u64::from(bytes);
        // A copy upwards onto itself repeats what it has just written.
        let repeats = to.wrapping_sub(from) < total;
        if fit < 2 || cpu.flags & DF != 0 || repeats {
            let value = cpu.load(from, bytes)?;
            cpu.store(to, bytes, value)?;
            let by = step(cpu, bytes);
            advance(cpu, RSI, by);
            advance(cpu, RDI, by);
            return Ok(1);
        }
        let source = cpu.translate(from, Access::Read)?;
        let done = copy_in_page(cpu, to, source, total)?;
        advance(cpu, RSI, done);
        advance(cpu, RDI, done);
        Ok(done / u64::from(bytes))
    })
}

/// STOS.
pub(crate) fn stos(cpu: &mut Cpu, op: &Op) -> Exec {
    let bytes = op.bytes;
    let value = cpu.reg(RAX) & mask(bytes);
    let same = mask(bytes) / 0xff * (value & 0xff) == value;
    rounds(cpu, op, |cpu, most| {
        let to = cpu.reg(RDI);
        let fit = (left_in_page(to) / u64::from(bytes)).min(most);
        if fit < 2 || cpu.flags & DF != 0 || !same {
            cpu.store(to, bytes, value)?;
            let by = step(cpu, bytes);
            advance(cpu, RDI, by);
            return Ok(1);
        }
        let total = fit * u64::from(bytes);
        let done = fill_in_page(cpu, to, value as u8, total)?;
        advance(cpu, RDI, done);
        Ok(done / u64::from(bytes))
    })
}

/// LODS.
pub(crate) fn lods(cpu: &mut Cpu, op: &Op) -> Exec {
    let segment = source_base(cpu, op);
    rounds(cpu, op, |cpu, _| {
        let value = cpu.load(cpu.reg(RSI).wrapping_add(segment), op.bytes)?;
        cpu.set_reg(RAX, op.bytes, value);
        let by = step(cpu, op.bytes);
        advance(cpu, RSI, by);
        Ok(1)
    })
}

/// SCAS, and CMPS if bit 7 of the kind is set.
pub(crate) fn compare(cpu: &mut Cpu, op: &Op) -> Exec {
    let two = op.kind & 0x80 != 0;
    let segment = source_base(cpu, op);
    let repeated = op.kind & (REP | REPNE) != 0;
    let begun = cpu.spent();
    while !repeated || cpu.reg(RCX) != 0 {
        let a = if two { cpu.load(cpu.reg(RSI).wrapping_add(segment), op.bytes)? } else { cpu.reg(RAX) };
        let b = cpu.load(cpu.reg(RDI), op.bytes)?;
        let (_, flags) = alu::sub(a & mask(op.bytes), b, 0, op.bytes);
        cpu.flags = (cpu.flags & !ARITHMETIC) | flags;
        let by = step(cpu, op.bytes);
        advance(cpu, RDI, by);
        if two {
            advance(cpu, RSI, by);
        }
        if !repeated {
            break;
        }
        cpu.gpr[RCX as usize] -= 1;
        cpu.spend(ROUND_BYTES);
        let equal = flags & ZF != 0;
        if equal == (op.kind & REPNE != 0) {
            break;
        }
        if cpu.spent() - begun >= MOST_FUEL {
            return again(cpu, op);
        }
    }
    go_on(cpu, op, begun)
}

fn source_base(cpu: &Cpu, op: &Op) -> u64 {
    match op.segment {
        crate::op::FS => cpu.sregs.fs.base,
        crate::op::GS => cpu.sregs.gs.base,
        _ => 0,
    }
}

/// Copies up to `len` bytes of a page of RAM to an address; neither leaves its page. Says how many: of a page that is
/// watched eight, for each store to a page table can take long.
fn copy_in_page(cpu: &mut Cpu, to: u64, source: usize, len: u64) -> Result<u64, Break> {
    let target = cpu.translate(to, Access::Write)?;
    if !cpu.shadow.watches(target) {
        cpu.ram.copy(target, source, len as usize);
        return Ok(len);
    }
    let len = len.min(8);
    let mut part = [0; 8];
    cpu.ram.read(source, &mut part[..len as usize]);
    store_watched(cpu, to, &part[..len as usize])?;
    Ok(len)
}

/// The same with one byte for all.
fn fill_in_page(cpu: &mut Cpu, to: u64, byte: u8, len: u64) -> Result<u64, Break> {
    let target = cpu.translate(to, Access::Write)?;
    if !cpu.shadow.watches(target) {
        cpu.ram.fill(target, byte, len as usize);
        return Ok(len);
    }
    let len = len.min(8);
    store_watched(cpu, to, &[byte; 8][..len as usize])?;
    Ok(len)
}

fn store_watched(cpu: &mut Cpu, to: u64, bytes: &[u8]) -> Result<(), Break> {
    if let Ok(all) = <[u8; 8]>::try_from(bytes) {
        return cpu.store(to, 8, u64::from_le_bytes(all));
    }
    for (at, &byte) in (0..).zip(bytes) {
        cpu.store(to + at, 1, u64::from(byte))?;
    }
    Ok(())
}

/// The bulk-memory doorbell: RCX bytes are copied from RSI to RDI (EAX is 1), or set to RSI's lowest byte (2). RCX
/// comes back as the bytes not done: those from the first page that would fault, or that would take too long.
pub(crate) fn doorbell(cpu: &mut Cpu, op: &Op) -> Exec {
    let begun = cpu.spent();
    let (to, from) = (cpu.reg(RDI), cpu.reg(RSI));
    let most = cpu.reg(RCX).min(MOST_DOORBELL_BYTES);
    let mut done = 0;
    while done < most && cpu.spent() - begun < MOST_DOORBELL_BYTES / 64 {
        let target = to.wrapping_add(done);
        let mut len = left_in_page(target).min(most - done);
        let piece = match cpu.reg(RAX) as u32 {
            1 => {
                let source = from.wrapping_add(done);
                len = len.min(left_in_page(source));
                cpu.translate(source, Access::Read).and_then(|at| copy_in_page(cpu, target, at, len))
            }
            2 => fill_in_page(cpu, target, from as u8, len),
            _ => break,
        };
        let Ok(len) = piece else {
            break;
        };
        done += len;
        cpu.spend(len.max(ROUND_BYTES));
    }
    cpu.gpr[RCX as usize] -= done;
    go_on(cpu, op, begun)
}
