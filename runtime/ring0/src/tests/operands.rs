//! Operands for instructions under test: registers of each width, immediates, and memory in all its addressing forms.
//!
//! A memory operand is chosen first and registers are made to fit: whatever its form, it leads where it should.

use super::native::GS_BASE;
use super::random::Random;
use iced_x86::{Instruction, OpCodeOperandKind, OpKind, Register};

/// The registers of an instruction, and which of them must stay as they are.
pub(super) struct Registers {
    pub(super) values: [u64; 16],
    pinned: u16,
}

impl Registers {
    pub(super) fn new(random: &mut Random) -> Self {
        let mut values = [0; 16];
        for at in 0..16 {
            values[at] = if random.once_in(6) { values[random.below(16) as usize] } else { random.value() };
        }
        Self { values, pinned: 0 }
    }

    pub(super) fn pin(&mut self, number: u8, value: u64) {
        self.values[number as usize] = value;
        self.pinned |= 1 << number;
    }

    pub(super) fn is_pinned(&self, number: u8) -> bool {
        self.pinned >> number & 1 == 1
    }
}

/// A register that an operand's kind allows.
pub(super) fn register(random: &mut Random, kind: OpCodeOperandKind) -> Option<Register> {
    use OpCodeOperandKind as K;
    let number = random.below(16) as u32;
    Some(match kind {
        // AH to BH come after the four low ones.
        K::r8_reg | K::r8_opcode | K::r8_or_mem => Register::AL + random.below(20) as u32,
        K::r16_reg | K::r16_rm | K::r16_opcode | K::r16_or_mem => Register::AX + number,
        K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_or_mem => Register::EAX + number,
        K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_or_mem => Register::RAX + number,
        K::al => Register::AL,
        K::cl => Register::CL,
        K::ax => Register::AX,
        K::dx => Register::DX,
        K::eax => Register::EAX,
        K::rax => Register::RAX,
        _ => return None,
    })
}

/// That register, if an operand's kind allows it.
pub(super) fn same(register: Register, kind: OpCodeOperandKind) -> Option<Register> {
    use OpCodeOperandKind as K;
    // What names one register is no choice.
    (!matches!(kind, K::al | K::cl | K::ax | K::dx | K::eax | K::rax)).then_some(register)
}

/// Whether an operand of this kind can, or must, be memory.
pub(super) fn memory_kind(kind: OpCodeOperandKind) -> Option<bool> {
    use OpCodeOperandKind as K;
    match kind {
        K::r8_or_mem | K::r16_or_mem | K::r32_or_mem | K::r64_or_mem => Some(false),
        K::mem | K::mem_offs => Some(true),
        _ => None,
    }
}

/// An immediate operand; false if the kind is none.
pub(super) fn immediate(
    insn: &mut Instruction,
    number: u32,
    kind: OpCodeOperandKind,
    random: &mut Random,
) -> bool {
    use OpCodeOperandKind as K;
    let value = random.value();
    let op_kind = match kind {
        K::imm8 | K::imm8_const_1 => OpKind::Immediate8,
        K::imm8sex16 => OpKind::Immediate8to16,
        K::imm8sex32 => OpKind::Immediate8to32,
        K::imm8sex64 => OpKind::Immediate8to64,
        K::imm16 => OpKind::Immediate16,
        K::imm32 => OpKind::Immediate32,
        K::imm32sex64 => OpKind::Immediate32to64,
        K::imm64 => OpKind::Immediate64,
        _ => return false,
    };
    insn.set_op_kind(number, op_kind);
    match kind {
        K::imm8_const_1 => insn.set_immediate8(1),
        K::imm8 => insn.set_immediate8(value as u8),
        K::imm8sex16 => insn.set_immediate8to16(i16::from(value as i8)),
        K::imm8sex32 => insn.set_immediate8to32(i32::from(value as i8)),
        K::imm8sex64 => insn.set_immediate8to64(i64::from(value as i8)),
        K::imm16 => insn.set_immediate16(value as u16),
        K::imm32 => insn.set_immediate32(value as u32),
        K::imm32sex64 => insn.set_immediate32to64(i64::from(value as i32)),
        _ => insn.set_immediate64(value),
    }
    true
}

/// Makes an operand the memory at `target`, by a random addressing form. `None` if the form does not lead there.
pub(super) fn memory(
    insn: &mut Instruction,
    number: u32,
    target: u64,
    registers: &mut Registers,
    random: &mut Random,
) -> Option<()> {
    insn.set_op_kind(number, OpKind::Memory);
    insn.set_memory_displ_size(8);
    let gs = random.once_in(6);
    insn.set_segment_prefix(if gs { Register::GS } else { random.pick(&[Register::None, Register::DS]) });
    let address = if gs { target.wrapping_sub(GS_BASE) } else { target };
    match random.below(8) {
        0 => absolute(insn, address)?,
        1 => {
            insn.set_memory_base(Register::RIP);
            insn.set_memory_displacement64(address);
        }
        2 => indexed(insn, address, None, registers, random)?,
        3 | 4 => based(insn, address, 0, random.below(16) as u8, registers, random)?,
        _ => {
            let base = random.below(16) as u8;
            indexed(insn, address, Some(base), registers, random)?;
        }
    }
    Some(())
}

/// The accumulator's moves: an address of 64 bits in the instruction.
pub(super) fn far_address(insn: &mut Instruction, number: u32, target: u64) {
    insn.set_op_kind(number, OpKind::Memory);
    insn.set_memory_displ_size(8);
    insn.set_memory_displacement64(target);
}

fn absolute(insn: &mut Instruction, address: u64) -> Option<()> {
    i32::try_from(address as i64).ok()?;
    insn.set_memory_displacement64(address);
    Some(())
}

/// A base register and a displacement, beside what the index adds.
fn based(
    insn: &mut Instruction,
    address: u64,
    index: u64,
    base: u8,
    registers: &mut Registers,
    random: &mut Random,
) -> Option<()> {
    let disp = if registers.is_pinned(base) {
        let disp = address.wrapping_sub(index).wrapping_sub(registers.values[base as usize]);
        i32::try_from(disp as i64).ok()?
    } else {
        let disp = match random.below(3) {
            0 => 0,
            1 => i32::from(random.value() as i8),
            _ => random.value() as i32,
        };
        registers.pin(base, address.wrapping_sub(index).wrapping_sub(disp as i64 as u64));
        disp
    };
    insn.set_memory_base(Register::RAX + u32::from(base));
    insn.set_memory_displacement64(disp as i64 as u64);
    // RBP and R13 as a base have a displacement always.
    let none = disp == 0 && base & 7 != 5 && random.once_in(2);
    let short = i8::try_from(disp).is_ok() && !random.once_in(4);
    insn.set_memory_displ_size(if none { 0 } else { u32::from(!short) * 7 + 1 });
    Some(())
}

/// An index with a scale, and perhaps a base.
fn indexed(
    insn: &mut Instruction,
    address: u64,
    base: Option<u8>,
    registers: &mut Registers,
    random: &mut Random,
) -> Option<()> {
    let index = random.below(16) as u8;
    if index == crate::cpu::RSP {
        return None;
    }
    let scale = random.below(4) as u32;
    insn.set_memory_index(Register::RAX + u32::from(index));
    insn.set_memory_index_scale(1 << scale);
    match base {
        Some(base) if base != index => {
            let held = registers.values[index as usize];
            registers.pin(index, held);
            based(insn, address, held << scale, base, registers, random)
        }
        // The index decides, or both do as one: the displacement makes up for it.
        _ => {
            if registers.is_pinned(index) {
                return None;
            }
            let value = random.below(1 << 20);
            registers.pin(index, value);
            let own = if base.is_some() { value } else { 0 };
            let disp = address.wrapping_sub(value << scale).wrapping_sub(own);
            i32::try_from(disp as i64).ok()?;
            insn.set_memory_displacement64(disp);
            if base.is_some() {
                insn.set_memory_base(Register::RAX + u32::from(index));
            }
            Some(())
        }
    }
}
