//! Moves between registers, memory and stack.

use crate::alu::{condition, mask, sign_extend};
use crate::cpu::{Cpu, RBP, RSP};
use crate::op::{MEMORY, Op};
use crate::stop::{Exec, Flow};

/// MOV.
pub(crate) fn mov(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, op.bytes)?;
    cpu.set(op, op.to, op.bytes, value)?;
    Ok(Flow::Next)
}

/// MOV of 64-bit registers.
pub(crate) fn mov_register(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gpr[(op.to & 15) as usize] = cpu.gpr[(op.from & 15) as usize];
    Ok(Flow::Next)
}

/// MOV of 4 or 8 bytes from memory to a register.
pub(crate) fn load<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.gpr[(op.to & 15) as usize] = cpu.load(cpu.address(op), BYTES)?;
    Ok(Flow::Next)
}

/// MOV of 4 or 8 bytes from a register to memory.
pub(crate) fn store<const BYTES: u8>(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.gpr[(op.from & 15) as usize] & mask(BYTES);
    cpu.store(cpu.address(op), BYTES, value)?;
    Ok(Flow::Next)
}

/// MOVZX, from as many bytes as the kind says.
pub(crate) fn zero_extended(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, op.kind)?;
    cpu.set_reg(op.to, op.bytes, value);
    Ok(Flow::Next)
}

/// MOVSX and MOVSXD.
pub(crate) fn sign_extended(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = sign_extend(cpu.get(op, op.from, op.kind)?, op.kind);
    cpu.set_reg(op.to, op.bytes, value);
    Ok(Flow::Next)
}

/// LEA: no segment counts.
pub(crate) fn address(cpu: &mut Cpu, op: &Op) -> Exec {
    let base = cpu.reg(op.base).wrapping_add(op.disp as i64 as u64);
    let value = base.wrapping_add(cpu.reg(op.index) << op.scale);
    cpu.set_reg(op.to, op.bytes, value);
    Ok(Flow::Next)
}

/// XCHG; with memory it is locked always.
pub(crate) fn exchange(cpu: &mut Cpu, op: &Op) -> Exec {
    let ours = cpu.get(op, op.from, op.bytes)?;
    if op.to != MEMORY {
        let theirs = cpu.get(op, op.to, op.bytes)?;
        cpu.set(op, op.to, op.bytes, ours)?;
        cpu.set(op, op.from, op.bytes, theirs)?;
        return Ok(Flow::Next);
    }
    let found = std::cell::Cell::new(0);
    let place = cpu.place(cpu.address(op), op.bytes)?;
    cpu.modify_place(place, op.bytes, true, |_, theirs| {
        found.set(theirs);
        ours
    });
    cpu.set(op, op.from, op.bytes, found.get())?;
    Ok(Flow::Next)
}

/// SETcc.
pub(crate) fn set_if(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = u64::from(condition(op.kind, cpu.flags));
    cpu.set(op, op.to, 1, value)?;
    Ok(Flow::Next)
}

/// CMOVcc: the source is read, and a 32-bit register cut, either way.
pub(crate) fn move_if(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, op.bytes)?;
    let value = if condition(op.kind, cpu.flags) { value } else { cpu.reg(op.to) };
    cpu.set_reg(op.to, op.bytes, value);
    Ok(Flow::Next)
}

/// PUSH of 8 bytes.
pub(crate) fn push(cpu: &mut Cpu, op: &Op) -> Exec {
    let value = cpu.get(op, op.from, 8)?;
    cpu.push(value)?;
    Ok(Flow::Next)
}

/// POP of 8 bytes. An address with RSP as its base is meant as it is after the pop (SDM vol. 2, POP).
pub(crate) fn pop(cpu: &mut Cpu, op: &Op) -> Exec {
    let stack = cpu.reg(RSP);
    let value = cpu.load(stack, 8)?;
    cpu.gpr[RSP as usize] = stack.wrapping_add(8);
    if let Err(fault) = cpu.set(op, op.to, 8, value) {
        cpu.gpr[RSP as usize] = stack;
        return Err(fault);
    }
    Ok(Flow::Next)
}

/// LEAVE.
pub(crate) fn leave(cpu: &mut Cpu, _: &Op) -> Exec {
    let frame = cpu.reg(RBP);
    let caller = cpu.load(frame, 8)?;
    cpu.gpr[RSP as usize] = frame.wrapping_add(8);
    cpu.gpr[RBP as usize] = caller;
    Ok(Flow::Next)
}

impl Cpu {
    /// Stores below the stack pointer, and moves it.
    pub(crate) fn push(&mut self, value: u64) -> Result<(), crate::stop::Break> {
        let stack = self.reg(RSP).wrapping_sub(8);
        self.store(stack, 8, value)?;
        self.gpr[RSP as usize] = stack;
        Ok(())
    }
}
