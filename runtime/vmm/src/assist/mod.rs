//! The instruction assist: does, on a vCPU's state, the few ring 0 instructions that KVM's own
//! emulator lacks.
//!
//! On software KVM guest ring 0 is emulated. At an instruction the emulator does not know, KVM_RUN
//! returns KVM_EXIT_INTERNAL_ERROR, suberror 1 (KVM_INTERNAL_ERROR_EMULATION). [`assist`] decodes
//! that instruction, does its work on registers, extended state and guest memory, and leaves the
//! vCPU ready to be resumed. An instruction that faults is done too: the exception is injected and
//! RIP stays, so the guest kernel's own exception tables handle it. On hardware KVM none of this
//! ever runs.
//!
//! May touch: registers through [`CpuState`], guest RAM through vm-memory. Must not: hold state
//! between calls, use unsafe code, make a system call, panic on anything a guest can do.
//!
//! A new instruction is one line in `table.rs` and one function beside its relatives.
//!
//! | file | what |
//! |---|---|
//! | `table.rs` | which instruction is done by which function, and the counters |
//! | `step.rs` | operands, registers, effective addresses, faults of one instruction |
//! | `paging.rs` | the guest's page tables, and ranges translated before any byte is written |
//! | `xstate.rs` | the XSAVE image KVM gives and the component layout of the host |
//! | `xsave.rs`, `fxsave.rs` | the XSAVE and FXSAVE families |
//! | `integer.rs`, `system.rs` | general registers and flags; everything else |
//! | `descriptor.rs` | LAR, LSL, VERR, VERW |

mod descriptor;
#[cfg(test)]
pub(crate) mod fake;
mod fxsave;
mod integer;
mod paging;
mod refusal;
mod step;
mod system;
mod table;
#[cfg(test)]
pub(crate) mod tests;
mod xsave;
mod xstate;

use std::io;

use iced_x86::{Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{GuestAddress, GuestMemoryMmap};

use paging::Span;
pub(crate) use paging::{Access, Paging};
pub use refusal::{Reason, Unassisted};
use step::{Step, Stop};
pub use table::{Counters, Op};
pub use xstate::{HostCpu, XsaveLayout};

/// The longest x86 instruction (SDM vol. 2, 2.3.11).
pub const MAX_INSTRUCTION_BYTES: usize = 15;

/// CR0.PG: paging is on.
const CR0_PG: u64 = 1 << 31;
/// EFER.LMA: long mode is active.
const EFER_LMA: u64 = 1 << 10;

/// RFLAGS.RF: the next instruction hits no code breakpoint.
const RFLAGS_RF: u64 = 1 << 16;

/// An exception the guest is to take before its next instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, SDM vol. 3, 6.3.1.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// What CR2 must hold when the handler runs (page faults only).
    pub cr2: Option<u64>,
}

/// The state of one stopped vCPU, as the assist reads and writes it.
///
/// Everything written is in force when the vCPU runs next. `regs`, `sregs` and the XSAVE image may
/// be fetched lazily and written back once.
pub trait CpuState {
    /// General registers, RIP and RFLAGS.
    fn regs(&self) -> &kvm_regs;
    /// The same, to be changed.
    fn regs_mut(&mut self) -> &mut kvm_regs;
    /// Segments, control registers, EFER.
    fn sregs(&self) -> &kvm_sregs;
    /// The same, to be changed (only FS and GS base ever are).
    fn sregs_mut(&mut self) -> &mut kvm_sregs;
    /// The extended state in the standard (non-compacted) XSAVE format: what KVM_GET_XSAVE2
    /// returns. Bytes changed here count only after [`CpuState::commit_xsave`].
    fn xsave(&mut self) -> io::Result<&mut [u8]>;
    /// Makes the changed image the vCPU's state (KVM_SET_XSAVE).
    fn commit_xsave(&mut self) -> io::Result<()>;
    /// XCR0 (KVM_GET_XCRS).
    fn xcr0(&mut self) -> io::Result<u64>;
    /// A model-specific register (KVM_GET_MSRS): IA32_TIME_STAMP_COUNTER and IA32_TSC_AUX for RDTSCP and
    /// RDPID, IA32_XSS for XSAVES.
    fn msr(&mut self, index: u32) -> io::Result<u64>;
    /// 64 random bits (getrandom), for RDRAND and RDSEED.
    fn random(&mut self) -> io::Result<u64>;
    /// One atomic 16-byte compare and exchange in guest RAM: stores `new` at `at` if `old` is
    /// there, and returns what was there. `at` is 16-byte aligned.
    ///
    /// It must be atomic against the other vCPUs, so against native code on other threads:
    /// `core::arch::x86_64::cmpxchg16b` on the host address, which safe Rust cannot express.
    fn cmpxchg16(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        at: GuestAddress,
        old: u128,
        new: u128,
    ) -> io::Result<u128>;
    /// Makes the guest take `exception` before its next instruction (KVM_SET_VCPU_EVENTS, and CR2).
    ///
    /// Some KVMs queue a #UD when they exit for an instruction they cannot emulate. KVM_SET_REGS drops it, so
    /// the registers must be set even if nothing in them changed, and before the events.
    fn inject(&mut self, exception: Exception);
}

/// Does the instruction at the vCPU's RIP.
///
/// `bytes` are the instruction bytes KVM gave with the exit; if they are empty or too few, they are
/// fetched through the guest's page tables. On success RIP is past the instruction, or an exception
/// was injected. On failure nothing was changed and the guest cannot go on.
pub fn assist(
    cpu: &mut dyn CpuState,
    host: &HostCpu,
    mem: &GuestMemoryMmap<()>,
    bytes: &[u8],
) -> Result<Op, Unassisted> {
    let rip = cpu.regs().rip;
    if let Err(reason) = check_mode(cpu.sregs()) {
        return Err(Unassisted::new(rip, bytes, None, reason));
    }
    let mut code = Code::given(bytes);
    let mut insn = code.decode(rip);
    if matches!(insn, Err(Reason::TooFewBytes)) {
        let fetched = Code::fetch(cpu, host, mem, rip);
        if fetched.len > code.len {
            code = fetched;
            insn = code.decode(rip);
        }
    }
    let insn = insn.map_err(|reason| Unassisted::new(rip, code.bytes(), None, reason))?;
    let refuse = |reason| Unassisted::new(rip, &code.bytes()[..insn.len()], Some(insn.mnemonic()), reason);
    let (op, run) = table::find(insn.mnemonic()).ok_or_else(|| refuse(Reason::Unknown))?;
    let mut step = Step { cpu, host, mem, insn };
    match run(&mut step) {
        Ok(()) => {
            let regs = step.cpu.regs_mut();
            regs.rip = insn.next_ip();
            // A completed instruction clears RF (SDM vol. 3, 18.3.1.1).
            regs.rflags &= !RFLAGS_RF;
        }
        Err(Stop::Fault(exception)) => step.cpu.inject(exception),
        Err(Stop::Refused(reason)) => return Err(refuse(reason)),
    }
    Ok(op)
}

/// The assist does 64-bit supervisor code only: ring 3 runs natively, and a Linux guest booted at
/// its 64-bit entry never leaves long mode.
fn check_mode(sregs: &kvm_sregs) -> Result<(), Reason> {
    if sregs.efer & EFER_LMA == 0 || sregs.cr0 & CR0_PG == 0 || sregs.cs.l == 0 {
        return Err(Reason::NotLongMode);
    }
    match sregs.cs.selector & 3 {
        0 => Ok(()),
        ring => Err(Reason::NotRing0(ring)),
    }
}

/// The bytes of one instruction, and perhaps of what follows it.
#[derive(Default)]
struct Code {
    bytes: [u8; MAX_INSTRUCTION_BYTES],
    len: usize,
}

impl Code {
    fn given(bytes: &[u8]) -> Self {
        let bytes = &bytes[..bytes.len().min(MAX_INSTRUCTION_BYTES)];
        let mut code = Self { len: bytes.len(), ..Self::default() };
        code.bytes[..bytes.len()].copy_from_slice(bytes);
        code
    }

    /// Reads at RIP as far as pages are mapped. A page that is missing only ends the bytes: KVM
    /// fetched the instruction before it gave up, so what it needs is there.
    fn fetch(cpu: &mut dyn CpuState, host: &HostCpu, mem: &GuestMemoryMmap<()>, rip: u64) -> Self {
        let mut code = Self::default();
        let Ok(paging) = Paging::new(cpu, host, mem) else {
            return code;
        };
        for at in 0..MAX_INSTRUCTION_BYTES {
            let byte = &mut code.bytes[at..=at];
            let linear = rip.wrapping_add(at as u64);
            let read = Span::open(&paging, linear, 1, Access::Fetch).and_then(|span| span.read(mem, 0, byte));
            if read.is_err() {
                break;
            }
            code.len = at + 1;
        }
        code
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn decode(&self, rip: u64) -> Result<Instruction, Reason> {
        let mut decoder = Decoder::with_ip(64, self.bytes(), rip, DecoderOptions::NONE);
        let insn = decoder.decode();
        match decoder.last_error() {
            DecoderError::None if insn.mnemonic() != Mnemonic::INVALID => Ok(insn),
            DecoderError::NoMoreBytes => Err(Reason::TooFewBytes),
            _ => Err(Reason::Undecodable),
        }
    }
}
