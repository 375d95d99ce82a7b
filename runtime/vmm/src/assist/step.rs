//! One instruction being done: its operands, registers, effective addresses and faults.
//!
//! The only way from an instruction's function to registers and guest memory.

use std::io;

use iced_x86::{Instruction, OpKind, Register};
use kvm_bindings::kvm_regs;
use vm_memory::GuestMemoryMmap;

use super::paging::{Access, Paging, Span};
use super::xstate::HostCpu;
use super::{CpuState, Exception, Reason};

const VECTOR_UD: u8 = 6;
const VECTOR_NM: u8 = 7;
const VECTOR_SS: u8 = 12;
const VECTOR_GP: u8 = 13;
const VECTOR_PF: u8 = 14;

/// Why an instruction did not complete.
#[derive(Debug)]
pub(crate) enum Stop {
    /// It faults: the guest's handler runs with RIP at the instruction.
    Fault(Exception),
    /// The assist cannot do it.
    Refused(Reason),
}

impl From<Reason> for Stop {
    fn from(reason: Reason) -> Self {
        Self::Refused(reason)
    }
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Refused(Reason::State(error))
    }
}

fn fault(vector: u8, error_code: Option<u32>, cr2: Option<u64>) -> Stop {
    Stop::Fault(Exception { vector, error_code, cr2 })
}

pub(super) fn page_fault(linear: u64, error_code: u32) -> Stop {
    fault(VECTOR_PF, Some(error_code), Some(linear))
}

pub(super) fn general_protection() -> Stop {
    fault(VECTOR_GP, Some(0), None)
}

pub(super) fn undefined_opcode() -> Stop {
    fault(VECTOR_UD, None, None)
}

pub(super) fn device_not_available() -> Stop {
    fault(VECTOR_NM, None, None)
}

/// One instruction with all it may touch.
pub(super) struct Step<'a> {
    pub(super) cpu: &'a mut dyn CpuState,
    pub(super) host: &'a HostCpu,
    pub(super) mem: &'a GuestMemoryMmap<()>,
    pub(super) insn: Instruction,
}

impl<'a> Step<'a> {
    /// A general register, of any width, zero-extended.
    pub(super) fn reg(&self, register: Register) -> u64 {
        read_register(self.cpu.regs(), register)
    }

    /// Writes a general register as the processor does: 32-bit writes clear the upper half,
    /// narrower ones keep the rest (SDM vol. 1, 3.4.1.1).
    pub(super) fn set_reg(&mut self, register: Register, value: u64) {
        let regs = self.cpu.regs_mut();
        let Some(cell) = full_register(regs, register) else {
            return;
        };
        *cell = match register.size() {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => *cell & !0xffff | value & 0xffff,
            _ if is_high_byte(register) => *cell & !0xff00 | (value & 0xff) << 8,
            _ => *cell & !0xff | value & 0xff,
        };
    }

    /// Replaces the flags in `mask` by those in `set`.
    pub(super) fn set_flags(&mut self, mask: u64, set: u64) {
        let regs = self.cpu.regs_mut();
        regs.rflags = regs.rflags & !mask | set & mask;
    }

    /// Bytes an operand has.
    pub(super) fn operand_bytes(&self, operand: u32) -> usize {
        match self.insn.op_kind(operand) {
            OpKind::Register => self.insn.op_register(operand).size(),
            _ => self.insn.memory_size().size(),
        }
    }

    /// Reads a register or memory operand of up to 8 bytes, zero-extended.
    pub(super) fn operand(&mut self, operand: u32) -> Result<u64, Stop> {
        match self.insn.op_kind(operand) {
            OpKind::Register => Ok(self.reg(self.insn.op_register(operand))),
            OpKind::Memory => {
                let mut bytes = [0; 8];
                let len = self.operand_bytes(operand);
                let into = bytes.get_mut(..len).ok_or(Reason::Operand)?;
                self.span(operand, len, Access::Read)?.read(self.mem, 0, into)?;
                Ok(u64::from_le_bytes(bytes))
            }
            _ => Err(Reason::Operand.into()),
        }
    }

    /// Writes a register or memory operand of up to 8 bytes.
    pub(super) fn set_operand(&mut self, operand: u32, value: u64) -> Result<(), Stop> {
        match self.insn.op_kind(operand) {
            OpKind::Register => {
                self.set_reg(self.insn.op_register(operand), value);
                Ok(())
            }
            OpKind::Memory => {
                let bytes = value.to_le_bytes();
                let bytes = bytes.get(..self.operand_bytes(operand)).ok_or(Reason::Operand)?;
                self.span(operand, bytes.len(), Access::Write)?.write(self.mem, 0, bytes)
            }
            _ => Err(Reason::Operand.into()),
        }
    }

    /// The linear address of a memory operand.
    pub(super) fn linear(&self, operand: u32) -> Result<u64, Stop> {
        if self.insn.op_kind(operand) != OpKind::Memory {
            return Err(Reason::Operand.into());
        }
        let sregs = self.cpu.sregs();
        let address = self.insn.virtual_address(operand, 0, |register, _, _| {
            Some(match register {
                Register::FS => sregs.fs.base,
                Register::GS => sregs.gs.base,
                // The other segments have base 0 in 64-bit mode (SDM vol. 1, 3.3.4).
                segment if segment.is_segment_register() => 0,
                general => read_register(self.cpu.regs(), general),
            })
        });
        address.ok_or_else(|| Reason::Operand.into())
    }

    /// How the guest's pages are walked now.
    pub(super) fn paging(&mut self) -> Result<Paging<'a>, Stop> {
        Paging::new(self.cpu, self.host, self.mem)
    }

    /// Translates a memory operand of `len` bytes.
    pub(super) fn span(&mut self, operand: u32, len: usize, access: Access) -> Result<Span, Stop> {
        let linear = self.linear(operand)?;
        let paging = self.paging()?;
        self.check_canonical(&paging, linear, len)?;
        Span::open(&paging, linear, len, access)
    }

    /// Faults on a non-canonical operand: #SS through the stack segment, else #GP
    /// (SDM vol. 3, 6.15).
    pub(super) fn check_canonical(&self, paging: &Paging<'_>, linear: u64, len: usize) -> Result<(), Stop> {
        match (paging.is_canonical(linear, len), self.insn.memory_segment()) {
            (true, _) => Ok(()),
            (false, Register::SS) => Err(fault(VECTOR_SS, Some(0), None)),
            (false, _) => Err(general_protection()),
        }
    }
}

fn read_register(regs: &kvm_regs, register: Register) -> u64 {
    // A copy, because the one table of registers gives out mutable places.
    let mut regs = *regs;
    let Some(value) = full_register(&mut regs, register).map(|cell| *cell) else {
        return 0;
    };
    match register.size() {
        8 => value,
        4 => value & 0xffff_ffff,
        2 => value & 0xffff,
        _ if is_high_byte(register) => value >> 8 & 0xff,
        _ => value & 0xff,
    }
}

fn is_high_byte(register: Register) -> bool {
    matches!(register, Register::AH | Register::BH | Register::CH | Register::DH)
}

fn full_register(regs: &mut kvm_regs, register: Register) -> Option<&mut u64> {
    Some(match register.full_register() {
        Register::RAX => &mut regs.rax,
        Register::RCX => &mut regs.rcx,
        Register::RDX => &mut regs.rdx,
        Register::RBX => &mut regs.rbx,
        Register::RSP => &mut regs.rsp,
        Register::RBP => &mut regs.rbp,
        Register::RSI => &mut regs.rsi,
        Register::RDI => &mut regs.rdi,
        Register::R8 => &mut regs.r8,
        Register::R9 => &mut regs.r9,
        Register::R10 => &mut regs.r10,
        Register::R11 => &mut regs.r11,
        Register::R12 => &mut regs.r12,
        Register::R13 => &mut regs.r13,
        Register::R14 => &mut regs.r14,
        Register::R15 => &mut regs.r15,
        _ => return None,
    })
}
