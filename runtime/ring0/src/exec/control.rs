//! Jumps, calls, returns.

use crate::alu::{ZF, condition};
use crate::cpu::{Cpu, RCX, RSP};
use crate::op::Op;
use crate::stop::{Exec, Flow};

/// JMP to a known address.
pub(crate) fn jump(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = op.immediate;
    Ok(Flow::Jump)
}

/// JMP to an address in a register or in memory.
pub(crate) fn jump_to(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = cpu.get(op, op.from, 8)?;
    Ok(Flow::Jump)
}

/// Jcc.
pub(crate) fn jump_if(cpu: &mut Cpu, op: &Op) -> Exec {
    if condition(op.kind, cpu.flags) {
        cpu.rip = op.immediate;
        return Ok(Flow::Jump);
    }
    Ok(Flow::Next)
}

/// JRCXZ, LOOPNE, LOOPE, LOOP, by kind 0 to 3.
pub(crate) fn jump_by_count(cpu: &mut Cpu, op: &Op) -> Exec {
    let zero = cpu.flags & ZF != 0;
    let taken = if op.kind == 0 {
        cpu.reg(RCX) == 0
    } else {
        let left = cpu.reg(RCX).wrapping_sub(1);
        cpu.gpr[RCX as usize] = left;
        left != 0 && (op.kind == 3 || zero == (op.kind == 2))
    };
    if taken {
        cpu.rip = op.immediate;
        return Ok(Flow::Jump);
    }
    Ok(Flow::Next)
}

/// CALL of a known address.
pub(crate) fn call(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.push(op.next(cpu))?;
    cpu.rip = op.immediate;
    Ok(Flow::Jump)
}

/// CALL of an address in a register or in memory.
pub(crate) fn call_to(cpu: &mut Cpu, op: &Op) -> Exec {
    let target = cpu.get(op, op.from, 8)?;
    cpu.push(op.next(cpu))?;
    cpu.rip = target;
    Ok(Flow::Jump)
}

/// RET, which takes the immediate's bytes off the stack too.
pub(crate) fn ret(cpu: &mut Cpu, op: &Op) -> Exec {
    let stack = cpu.reg(RSP);
    cpu.rip = cpu.load(stack, 8)?;
    cpu.gpr[RSP as usize] = stack.wrapping_add(8).wrapping_add(op.immediate);
    Ok(Flow::Jump)
}
