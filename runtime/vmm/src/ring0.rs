//! Ring 0 on software KVM: the vCPU thread's turns with the engine that runs it (`peregrine-ring0`), between those of
//! KVM.
//!
//! ```text
//!   KVM: ring 3 --trap; the kernel writes to TRAP_PORT--> engine: ring 0
//!   engine --back to ring 3--> KVM is shown what changed in page tables --> KVM: ring 3
//!   engine --HLT--> KVM sleeps --interrupt; TRAP_PORT--> engine
//!   engine --an instruction it does not know--> the assist, or KVM single-steps it --> engine
//! ```
//!
//! May touch: its vCPU, the engine, the assist. Must not: know what the guest is for.
//!
//! Two things hold throughout. The engine sees every store of ring 0 to a page table, because KVM runs no more of ring 0
//! than what leads to the next TRAP_PORT, a HLT, or one instruction. And registers are changed by the engine only
//! while KVM has no event on its way to the guest, which would be delivered to a place it was not meant for.

use crate::assist::{self, Exception};
use crate::assist_state::VcpuState;
use crate::code_book;
use crate::memory::GuestMemory;
use crate::sys::kick;
use crate::vcpu::{Next, Vcpu};
use crate::vm::StopReason;
use kvm_bindings::{
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_SINGLESTEP, Msrs, kvm_guest_debug,
    kvm_msr_entry, kvm_regs, kvm_sregs,
};
use kvm_ioctls::SyncReg;
use peregrine_ring0::{Code, Engine, Ram, Stop, Touch};
use std::io;
use std::sync::Arc;

const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const RFLAGS_IF: u64 = 1 << 9;
const RFLAGS_FIXED: u64 = 1 << 1;

/// Instructions between two looks at who waits: about a tenth of a millisecond.
const FUEL: u64 = 5_000;
/// Looks after which KVM is asked for interrupts, which costs as much as a thousand instructions.
const LOOKS: u32 = 8;
/// Entries to KVM that one instruction may take (a string instruction on a device's register).
const MOST_ENTRIES: u32 = 1 << 12;

/// `ring0_touch` of the guest kernel (patch 0040): `lock orq $0, (reg)` for these registers in this order, then a write to
/// [`peregrine_ring0::TOUCHED_PORT`].
const TOUCH_CODE: [&[u8]; 15] = [
    &[0xf0, 0x48, 0x83, 0x08, 0x00],       // RAX
    &[0xf0, 0x48, 0x83, 0x0b, 0x00],       // RBX
    &[0xf0, 0x48, 0x83, 0x09, 0x00],       // RCX
    &[0xf0, 0x48, 0x83, 0x0a, 0x00],       // RDX
    &[0xf0, 0x48, 0x83, 0x0e, 0x00],       // RSI
    &[0xf0, 0x48, 0x83, 0x0f, 0x00],       // RDI
    &[0xf0, 0x48, 0x83, 0x4d, 0x00, 0x00], // RBP
    &[0xf0, 0x49, 0x83, 0x08, 0x00],       // R8
    &[0xf0, 0x49, 0x83, 0x09, 0x00],
    &[0xf0, 0x49, 0x83, 0x0a, 0x00],
    &[0xf0, 0x49, 0x83, 0x0b, 0x00],
    &[0xf0, 0x49, 0x83, 0x0c, 0x24, 0x00], // R12
    &[0xf0, 0x49, 0x83, 0x4d, 0x00, 0x00], // R13
    &[0xf0, 0x49, 0x83, 0x0e, 0x00],
    &[0xf0, 0x49, 0x83, 0x0f, 0x00],
];
/// How far below IA32_LSTAR it may begin.
const TOUCH_DISTANCE: u64 = 512;

/// A vCPU's ring 0.
pub(crate) struct Ring0 {
    engine: Engine,
    /// Where the guest kernel has `ring0_touch`, once it was found.
    touch_code: Option<u64>,
    /// IA32_KERNEL_GS_BASE as KVM has it.
    kvm_kernel_gs: u64,
    /// Ring 0's segments as they were at the last trap.
    kernel_segments: kvm_sregs,
    touches: Vec<Touch>,
    /// The engine was stopped in the middle, and is to go on before KVM does.
    pub(crate) interrupted: bool,
    counted: u64,
    looks: u32,
}

fn io_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

fn lost(e: impl std::fmt::Display) -> Next {
    Next::Stop(StopReason::Host(format!("vCPU state: {e}")))
}

impl Vcpu {
    /// The guest kernel says that ring 3 has trapped into it, or that an interrupt has come: the engine's turn.
    pub(crate) fn trapped(&mut self) -> Next {
        let sregs = self.fd.sync_regs().sregs;
        if sregs.cs.selector & 3 != 0 || !self.runs_ring0 {
            // A program that was allowed to write to ports; or a kernel that was not asked to.
            return Next::Run;
        }
        if self.ring0.is_none() {
            match self.read_msr(KERNEL_GS_BASE) {
                Ok(kernel_gs) => {
                    self.ring0 = Some(Box::new(Ring0::new(Ram::new(Arc::clone(&self.mem)), kernel_gs)))
                }
                Err(e) => return lost(e),
            }
        }
        self.ring0()
    }

    /// Runs ring 0 until it is KVM's turn. KVM has left the registers in the run page.
    pub(crate) fn ring0(&mut self) -> Next {
        let Some(mut ring0) = self.ring0.take() else {
            return Next::Run;
        };
        let next = self.ring0_with(&mut ring0);
        self.shared.count_ring0(ring0.engine.instructions() - ring0.counted);
        ring0.counted = ring0.engine.instructions();
        self.ring0 = Some(ring0);
        next
    }

    fn ring0_with(&mut self, ring0: &mut Ring0) -> Next {
        ring0.interrupted = false;
        if !self.take_state(ring0) {
            return Next::Run;
        }
        if let Err(e) = self.know_star(ring0) {
            return lost(e);
        }
        if self.shared.code_afresh() {
            ring0.engine.forget_code();
        }
        // KVM has run ring 3 with these tables.
        ring0.engine.enter_ring3(&mut ring0.touches);
        loop {
            let next = match ring0.engine.run(FUEL) {
                Stop::Ring3 => return self.back_to_ring3(ring0),
                Stop::Halt => return self.give_state(ring0).map_or_else(lost, |()| Next::Run),
                Stop::TripleFault => {
                    let rip = ring0.engine.cpu().regs().rip;
                    return Next::Stop(StopReason::TripleFault { rip });
                }
                Stop::Foreign => self.foreign(ring0),
                Stop::Fuel => self.look_around(ring0),
            };
            if let Some(next) = next {
                return next;
            }
        }
    }

    /// Takes the registers from the run page; false if KVM has an interrupt on its way to the guest, which it must
    /// deliver first.
    fn take_state(&mut self, ring0: &mut Ring0) -> bool {
        let state = self.fd.sync_regs();
        if state.sregs.interrupt_bitmap != [0; 4] {
            return false;
        }
        let cpu = ring0.engine.cpu_mut();
        cpu.set_regs(&state.regs);
        cpu.set_sregs(&state.sregs);
        ring0.kernel_segments = state.sregs;
        true
    }

    /// Leaves the registers in the run page: KVM takes them when it is entered next.
    fn give_state(&mut self, ring0: &mut Ring0) -> io::Result<()> {
        let (regs, sregs) = (ring0.engine.cpu().regs(), ring0.engine.cpu().sregs);
        self.give_registers(regs, sregs);
        let kernel_gs = ring0.engine.cpu().kernel_gs;
        if kernel_gs != ring0.kvm_kernel_gs {
            self.write_msr(KERNEL_GS_BASE, kernel_gs)?;
            ring0.kvm_kernel_gs = kernel_gs;
        }
        Ok(())
    }

    fn give_registers(&mut self, regs: kvm_regs, sregs: kvm_sregs) {
        let state = self.fd.sync_regs_mut();
        state.regs = regs;
        state.sregs = sregs;
        // An interrupt on its way would be queued a second time.
        state.sregs.interrupt_bitmap = [0; 4];
        self.fd.set_sync_dirty_reg(SyncReg::Register);
        self.fd.set_sync_dirty_reg(SyncReg::SystemRegister);
    }

    /// Ring 0 has run for a while: is the guest to stand still, to be sampled, to be interrupted?
    fn look_around(&mut self, ring0: &mut Ring0) -> Option<Next> {
        if self.shared.sampling() && kick::take() {
            self.sample_ring0(ring0);
        }
        if self.shared.closed() || self.shared.stopping() {
            ring0.interrupted = true;
            return Some(self.give_state(ring0).map_or_else(lost, |()| Next::Run));
        }
        ring0.looks += 1;
        if ring0.looks < LOOKS || ring0.engine.cpu().regs().rflags & RFLAGS_IF == 0 {
            return None;
        }
        ring0.looks = 0;
        // KVM delivers what is due, or does the next instruction.
        self.single_step(ring0)
    }

    fn sample_ring0(&mut self, ring0: &mut Ring0) {
        let regs = ring0.engine.cpu().regs();
        let words = ring0.stack(regs.rsp);
        self.shared.sample(true, regs.rip, words.into_iter());
    }

    /// An instruction that the engine does not know: the assist does it or, mostly because it is a device's, KVM.
    fn foreign(&mut self, ring0: &mut Ring0) -> Option<Next> {
        let mut bytes = [0; assist::MAX_INSTRUCTION_BYTES];
        let len = ring0.fetch(&mut bytes);
        let (regs, sregs) = (ring0.engine.cpu().regs(), ring0.engine.cpu().sregs);
        let mut state = VcpuState::with(&mut self.fd, &mut self.xsave, regs, sregs);
        let done = assist::assist(&mut state, &self.host, &self.mem, &bytes[..len]);
        let (regs, sregs, exception) = state.into_parts();
        match done {
            Ok(op) => {
                self.shared.count_assist(op);
                let cpu = ring0.engine.cpu_mut();
                cpu.set_regs(&regs);
                cpu.set_sregs(&sregs);
                let Some(Exception { vector, error_code, cr2 }) = exception else {
                    // The next run has new fuel: ring 0 may be a loop around this one.
                    return self.look_around(ring0);
                };
                match ring0.engine.raise(vector, error_code, cr2.unwrap_or(0)) {
                    Ok(()) => None,
                    Err(_) => Some(Next::Stop(StopReason::TripleFault { rip: regs.rip })),
                }
            }
            Err(_) => self.single_step(ring0),
        }
    }

    /// KVM does the instruction at RIP, or delivers an interrupt in front of it.
    fn single_step(&mut self, ring0: &mut Ring0) -> Option<Next> {
        if let Err(e) = self.give_state(ring0).and_then(|()| self.set_single_step(true)) {
            return Some(lost(e));
        }
        let next = self.step_to_its_end();
        let settled = self.set_single_step(false).and_then(|()| self.end_shadow());
        if let Err(e) = settled {
            return Some(lost(e));
        }
        if let Some(reason) = next {
            return Some(Next::Stop(reason));
        }
        if let Err(e) = self.know_star(ring0) {
            return Some(lost(e));
        }
        if !self.take_state(ring0) {
            return Some(Next::Run);
        }
        if ring0.engine.cpu().sregs.cs.selector & 3 != 0 {
            return Some(self.back_to_ring3(ring0));
        }
        if self.shared.closed() || self.shared.stopping() {
            ring0.interrupted = true;
            return Some(Next::Run);
        }
        None
    }

    fn know_star(&self, ring0: &mut Ring0) -> io::Result<()> {
        let star = &mut ring0.engine.cpu_mut().star;
        if star.is_none() {
            *star = Some(self.read_msr(STAR)?);
        }
        Ok(())
    }

    fn step_to_its_end(&mut self) -> Option<StopReason> {
        for entry in 0..MOST_ENTRIES {
            // Data from a device are taken by an entry that does nothing else.
            self.fd.set_kvm_immediate_exit(u8::from(entry > 0));
            let next = self.step();
            self.fd.set_kvm_immediate_exit(0);
            match next {
                Next::Stop(reason) => return Some(reason),
                Next::Stepped | Next::Trapped | Next::Interrupted => break,
                Next::Run if self.wrote_to_port() => break,
                Next::Run => {}
            }
        }
        None
    }

    /// The last exit was a write to a port, which is complete with the exit.
    fn wrote_to_port(&mut self) -> bool {
        let run = self.fd.get_kvm_run();
        run.exit_reason == KVM_EXIT_IO && crate::sys::kvm::io_direction(run) == KVM_EXIT_IO_OUT as u8
    }

    /// Ends the interrupt shadow that an STI or a MOV to SS leaves: KVM would emulate one more instruction because of it, and
    /// the next may be a program's, of a kind that its emulator does not know.
    fn end_shadow(&mut self) -> io::Result<()> {
        let mut events = self.fd.get_vcpu_events().map_err(io_error)?;
        if events.interrupt.shadow != 0 {
            events.interrupt.shadow = 0;
            self.fd.set_vcpu_events(&events).map_err(io_error)?;
        }
        Ok(())
    }

    fn set_single_step(&mut self, on: bool) -> io::Result<()> {
        let control = if on { KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP } else { 0 };
        self.fd.set_guest_debug(&kvm_guest_debug { control, ..Default::default() }).map_err(io_error)
    }

    /// A program goes on; before that KVM forgets what it must no longer believe.
    fn back_to_ring3(&mut self, ring0: &mut Ring0) -> Next {
        ring0.engine.enter_ring3(&mut ring0.touches);
        if !ring0.touches.is_empty() {
            let touches = std::mem::take(&mut ring0.touches);
            for some in touches.chunks(TOUCH_CODE.len()) {
                if let Err(reason) = self.touch(ring0, some) {
                    return Next::Stop(reason);
                }
            }
            ring0.touches = touches;
            ring0.touches.clear();
        }
        self.give_state(ring0).map_or_else(lost, |()| Next::Run)
    }

    /// Has KVM emulate stores to these places, which change nothing.
    fn touch(&mut self, ring0: &mut Ring0, touches: &[Touch]) -> Result<(), StopReason> {
        let host = |e: io::Error| StopReason::Host(format!("vCPU state: {e}"));
        let refused = |what: &str| StopReason::Emulation(format!("page tables: {what}"));
        if ring0.touch_code.is_none() {
            let lstar = self.read_msr(LSTAR).map_err(host)?;
            ring0.touch_code = ring0.find_touch_code(lstar);
        }
        let code = ring0.touch_code.ok_or_else(|| refused("this kernel has no ring0_touch"))?;
        let cpu = ring0.engine.cpu_mut();
        let moved = touches.iter().any(|touch| cpu.locate(touch.linear) != Some(touch.at));
        if moved {
            return Err(refused("written where they cannot be reached any more"));
        }
        let skipped = TOUCH_CODE.len() - touches.len();
        let before: usize = TOUCH_CODE[..skipped].iter().map(|code| code.len()).sum();
        let mut regs = kvm_regs { rip: code + before as u64, rflags: RFLAGS_FIXED, ..Default::default() };
        let place = [
            &mut regs.rax,
            &mut regs.rbx,
            &mut regs.rcx,
            &mut regs.rdx,
            &mut regs.rsi,
            &mut regs.rdi,
            &mut regs.rbp,
            &mut regs.r8,
            &mut regs.r9,
            &mut regs.r10,
            &mut regs.r11,
            &mut regs.r12,
            &mut regs.r13,
            &mut regs.r14,
            &mut regs.r15,
        ];
        for (register, touch) in place.into_iter().skip(skipped).zip(touches) {
            *register = touch.linear;
        }
        let now = &ring0.engine.cpu().sregs;
        let sregs = kvm_sregs { cs: ring0.kernel_segments.cs, ss: ring0.kernel_segments.ss, ..*now };
        self.give_registers(regs, sregs);
        for _ in 0..MOST_ENTRIES {
            match self.step() {
                Next::Stop(reason) => return Err(reason),
                Next::Run if self.wrote_to_port() => return Ok(()),
                // A kick; the gate is looked at afterwards.
                Next::Interrupted => {}
                _ => break,
            }
        }
        Err(refused("KVM did not do the stores"))
    }

    fn read_msr(&self, index: u32) -> io::Result<u64> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::InvalidInput)?;
        match self.fd.get_msrs(&mut msrs).map_err(io_error)? {
            1 => Ok(msrs.as_slice()[0].data),
            _ => Err(io::Error::other(format!("KVM has no MSR {index:#x}"))),
        }
    }

    fn write_msr(&self, index: u32, data: u64) -> io::Result<()> {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::InvalidInput)?;
        match self.fd.set_msrs(&msrs).map_err(io_error)? {
            1 => Ok(()),
            _ => Err(io::Error::other(format!("KVM refuses MSR {index:#x}"))),
        }
    }
}

impl Ring0 {
    /// One for a guest that boots: its first instruction is the engine's.
    pub(crate) fn at_boot(mem: &Arc<GuestMemory>) -> Box<Self> {
        Box::new(Self { interrupted: true, ..Self::new(Ram::new(Arc::clone(mem)), 0) })
    }

    /// An engine that has seen nothing; KVM has `kernel_gs` in IA32_KERNEL_GS_BASE.
    pub(crate) fn new(ram: Ram, kernel_gs: u64) -> Self {
        let mut engine = Engine::with_book(ram, code_book::book());
        engine.cpu_mut().kernel_gs = kernel_gs;
        Self {
            engine,
            touch_code: None,
            kvm_kernel_gs: kernel_gs,
            kernel_segments: kvm_sregs::default(),
            touches: Vec::new(),
            interrupted: false,
            counted: 0,
            looks: 0,
        }
    }

    /// What it has decoded.
    pub(crate) fn code(&mut self) -> Vec<Code> {
        self.engine.code()
    }

    /// The bytes at RIP, as far as they are mapped.
    fn fetch(&mut self, bytes: &mut [u8]) -> usize {
        let rip = self.engine.cpu().regs().rip;
        self.read(rip, bytes)
    }

    fn read(&mut self, linear: u64, bytes: &mut [u8]) -> usize {
        let cpu = self.engine.cpu_mut();
        for (index, byte) in bytes.iter_mut().enumerate() {
            match cpu.locate(linear.wrapping_add(index as u64)) {
                Some(at) => *byte = cpu.ram().load(at, 1) as u8,
                None => return index,
            }
        }
        bytes.len()
    }

    fn find_touch_code(&mut self, lstar: u64) -> Option<u64> {
        let wanted = TOUCH_CODE.concat();
        let mut bytes = [0; TOUCH_DISTANCE as usize];
        let start = lstar.wrapping_sub(TOUCH_DISTANCE);
        let len = self.read(start, &mut bytes);
        let found = bytes[..len].windows(wanted.len()).position(|window| window == wanted)?;
        Some(start + found as u64)
    }

    /// The rest of the kernel stack that RSP points into.
    fn stack(&mut self, rsp: u64) -> Vec<u64> {
        let start = rsp & !7;
        let words = crate::profile::MOST_WORDS as u64;
        let left = words - start / 8 % words;
        let mut bytes = vec![0; left as usize * 8];
        let len = self.read(start, &mut bytes);
        bytes.truncate(len);
        bytes.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes)).collect()
    }
}
