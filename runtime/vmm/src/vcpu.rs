//! One virtual CPU: its first state, its thread and its exits.
//!
//! May touch: its own vCPU file descriptor, the console, the device bus, the assist. Must not: block on
//! anything but KVM_RUN (and, for a millisecond, a bulk stream's socket), nor know what the guest is for.

use crate::VmmError;
use crate::arch::{boot, layout};
use crate::assist::{self, Access, HostCpu, Paging};
use crate::assist_state::{VcpuState, share_registers};
use crate::bulk;
use crate::console::Console;
use crate::doorbell;
use crate::event_loop::Bus;

use crate::memory::GuestMemory;
use crate::profile;
use crate::ring0::Ring0;
use crate::sys::{kick, kvm as raw};
use crate::vcpu_state::{VcpuSnapshot, arm_timer};
use crate::vm::{Shared, StopReason};
use guest_init::{GATE_FREEZE, GATE_TAKEN};
use kvm_bindings::{CpuId, KVM_INTERNAL_ERROR_EMULATION, Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use std::sync::{Arc, OnceLock};
use vm_memory::{Bytes as _, GuestAddress};

/// Port of the keyboard controller's command register: Linux resets through it (`reboot=k`).
const RESET_PORT: u16 = 0x64;
const RESET_COMMAND: u8 = 0xfe;

/// The CPUID leaves that KVM can virtualise: asked once, it takes a third of a millisecond. Software KVM
/// takes and ignores them.
pub(crate) fn supported_cpuid(kvm: &Kvm) -> Result<&'static CpuId, VmmError> {
    static SUPPORTED: OnceLock<CpuId> = OnceLock::new();
    if let Some(cpuid) = SUPPORTED.get() {
        return Ok(cpuid);
    }
    let most = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
    let cpuid = kvm.get_supported_cpuid(most).map_err(VmmError::kvm("GET_SUPPORTED_CPUID"))?;
    Ok(SUPPORTED.get_or_init(|| cpuid))
}

/// Creates one of `vcpus` vCPUs. MSRs and CR4 bits are checked against CPUID, so it is set at once.
pub(crate) fn create(vm: &VmFd, index: u8, cpuid: &CpuId, vcpus: u8) -> Result<VcpuFd, VmmError> {
    let fd = vm.create_vcpu(u64::from(index)).map_err(VmmError::kvm("CREATE_VCPU"))?;
    fd.set_cpuid2(&cpuid_of(cpuid, index, vcpus)).map_err(VmmError::kvm("SET_CPUID2"))?;
    Ok(fd)
}

/// Gives a new vCPU its boot state, the first one the kernel's entry point. The order is MSRs, FPU, special
/// registers, registers, LAPIC.
pub(crate) fn set_boot_state(fd: &VcpuFd, first: bool, entry: u64) -> Result<(), VmmError> {
    set_boot_msrs(fd)?;
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    fd.set_fpu(&fpu).map_err(VmmError::kvm("SET_FPU"))?;
    if first {
        // The others wait for INIT and SIPI in KVM's LAPIC and take their state from there.
        let mut sregs = fd.get_sregs().map_err(VmmError::kvm("GET_SREGS"))?;
        boot::set_boot_sregs(&mut sregs);
        fd.set_sregs(&sregs).map_err(VmmError::kvm("SET_SREGS"))?;
        fd.set_regs(&boot::boot_regs(entry)).map_err(VmmError::kvm("SET_REGS"))?;
    }
    set_local_interrupts(fd)
}

/// Gives each vCPU its own APIC id and all of them one topology: `vcpus` cores of one thread.
fn cpuid_of(base: &CpuId, index: u8, vcpus: u8) -> CpuId {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    let mut cpuid = base.clone();
    for e in cpuid.as_mut_slice() {
        match e.function {
            // SDM vol. 2A, CPUID: initial APIC id and logical processor count.
            1 => {
                e.ebx = (e.ebx & 0xffff) | (u32::from(vcpus) << 16) | (u32::from(index) << 24);
                e.ecx |= TSC_DEADLINE | HYPERVISOR;
            }
            // Extended topology: x2APIC id.
            0xb | 0x1f => {
                e.edx = u32::from(index);
                match e.index {
                    0 => (e.eax, e.ebx, e.ecx) = (0, 1, 1 << 8),
                    1 => (e.eax, e.ebx, e.ecx) = (8, u32::from(vcpus), 1 | (2 << 8)),
                    n => (e.eax, e.ebx, e.ecx) = (0, 0, n),
                }
            }
            _ => {}
        }
    }
    cpuid
}

fn set_boot_msrs(fd: &VcpuFd) -> Result<(), VmmError> {
    const IA32_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRING: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = (1 << 11) | 6;
    let entries = [(IA32_MISC_ENABLE, FAST_STRING), (MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK)]
        .map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).map_err(|e| VmmError::Memory(format!("{e:?}")))?;
    let done = fd.set_msrs(&msrs).map_err(VmmError::kvm("SET_MSRS"))?;
    match entries.get(done) {
        Some(refused) => Err(VmmError::MsrsPartial { done, wanted: entries.len(), index: refused.index }),
        None => Ok(()),
    }
}

/// LINT0 takes the PIC's interrupts and LINT1 NMIs, as firmware would have left them (SDM vol. 3, 11.5.1).
fn set_local_interrupts(fd: &VcpuFd) -> Result<(), VmmError> {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const EXT_INT: u32 = 0x700;
    const NMI: u32 = 0x400;
    let mut lapic = fd.get_lapic().map_err(VmmError::kvm("GET_LAPIC"))?;
    set_lapic_mode(&mut lapic, LVT_LINT0, EXT_INT);
    set_lapic_mode(&mut lapic, LVT_LINT1, NMI);
    fd.set_lapic(&lapic).map_err(VmmError::kvm("SET_LAPIC"))
}

fn set_lapic_mode(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    for (i, byte) in mode.to_le_bytes().into_iter().enumerate() {
        let old = lapic.regs[register + i] as u8;
        let keep = !0x700_u32.to_le_bytes()[i];
        lapic.regs[register + i] = ((old & keep) | byte) as _;
    }
}

/// What is left to do after an exit.
pub(crate) enum Next {
    Run,
    /// The guest kernel wrote to the port at which the VMM takes over its ring 0.
    Trapped,
    /// A single step is done.
    Stepped,
    /// KVM_RUN ended without an exit of the guest's.
    Interrupted,
    Stop(StopReason),
}

/// Exits that one instruction may need to be complete: a string instruction's data come in portions.
const MOST_EXITS_TO_SETTLE: u32 = 1 << 16;

/// A thread that stands back must say that it ends, however it does.
struct Leaves(Arc<Shared>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A vCPU on its own thread.
pub(crate) struct Vcpu {
    pub(crate) fd: VcpuFd,
    pub(crate) index: u8,
    pub(crate) shared: Arc<Shared>,
    pub(crate) bus: Arc<Bus>,
    pub(crate) mem: Arc<GuestMemory>,
    pub(crate) xsave: raw::XsaveArea,
    pub(crate) host: Arc<HostCpu>,
    /// The MSRs to save.
    pub(crate) msrs: Arc<[u32]>,
    /// What is left of its timer, which stands still until the guest has read its mailbox.
    pub(crate) held_timer: Option<u64>,
    /// It has priority until its guest's next exit.
    pub(crate) comes_first: bool,
    /// Its ring 0 is the VMM's where the guest kernel says so.
    pub(crate) runs_ring0: bool,
    pub(crate) ring0: Option<Box<Ring0>>,
    /// The last exit was such a word of the kernel's.
    pub(crate) trapped: bool,
}

impl Vcpu {
    /// Runs until the microVM stops; the first vCPU to see a reason to stop says it for all.
    pub(crate) fn run(mut self) {
        match kick::prepare(&self.fd) {
            Ok(kick) => self.shared.register_vcpu(self.index, kick),
            Err(e) => {
                self.shared.stop(StopReason::Host(format!("vCPU signals: {e}")));
                return;
            }
        }
        share_registers(&mut self.fd);
        self.pause();
        if self.index == 0 {
            self.shared.note_entry();
        }
        if self.ring0.is_some() {
            // KVM leaves the registers where the engine finds them.
            self.settle();
        }
        let _leaves = (self.index == 0).then(|| Leaves(Arc::clone(&self.shared)));
        let mut exited = false;
        while !self.shared.stopping() {
            // Whichever vCPU has read the mailbox: the agent may run on another.
            if self.held_timer.is_some() && self.shared.is_taken() {
                self.release_timer();
            }
            let came_first = self.comes_first;
            let next = self.turn();
            if came_first {
                self.comes_first = false;
                self.shared.stand_back();
            }
            self.trapped = matches!(next, Next::Trapped);
            match next {
                Next::Run | Next::Trapped if !exited => {
                    exited = true;
                    self.shared.note_first_exit();
                }
                Next::Run | Next::Trapped | Next::Stepped | Next::Interrupted => {}
                Next::Stop(reason) => self.shared.stop(reason),
            }
            if self.shared.closed() {
                if !self.shared.approaches() {
                    self.release_timer();
                }
                self.settle();
                self.pause();
            }
        }
    }

    /// One turn of KVM's or, after a trap and where it was interrupted, of the engine's.
    fn turn(&mut self) -> Next {
        if std::mem::take(&mut self.trapped) {
            return self.trapped();
        }
        match &self.ring0 {
            Some(ring0) if ring0.interrupted => self.ring0(),
            _ => self.step(),
        }
    }

    /// Stands at the gate, its state taken, until the gate opens.
    fn pause(&mut self) {
        let Self { fd, xsave, msrs, shared, ring0, .. } = self;
        shared.park(self.index, || {
            if let Some(ring0) = ring0 {
                shared.leave_code(|| ring0.code());
            }
            VcpuSnapshot::capture(fd, xsave, msrs)
        });
        // The guest's watchdogs must not take the pause for a hang. It fails only for guests without
        // kvm-clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    fn release_timer(&mut self) {
        if let Some(ticks) = self.held_timer.take()
            && let Err(e) = arm_timer(&self.fd, ticks)
        {
            self.shared.stop(StopReason::Host(format!("the timer: {e}")));
        }
    }

    /// Completes the instruction that the last exit left half done: KVM finishes it on entry, and then
    /// returns at once.
    fn settle(&mut self) {
        self.fd.set_kvm_immediate_exit(1);
        for _ in 0..MOST_EXITS_TO_SETTLE {
            match self.step() {
                Next::Run | Next::Trapped | Next::Stepped => {}
                Next::Interrupted => break,
                Next::Stop(reason) => {
                    self.shared.stop(reason);
                    break;
                }
            }
        }
        self.fd.set_kvm_immediate_exit(0);
    }

    /// One entry to KVM, and what its exit asks for.
    pub(crate) fn step(&mut self) -> Next {
        let exit = self.fd.run();
        match exit {
            Ok(VcpuExit::IoOut(RESET_PORT, [RESET_COMMAND])) => Next::Stop(self.shared.reset_reason()),
            Ok(VcpuExit::IoOut(doorbell::PORT, &[a, b, c, d])) => {
                let operation = u32::from_le_bytes([a, b, c, d]);
                self.doorbell(operation)
            }
            Ok(VcpuExit::IoOut(port, [_])) if port == u16::from(peregrine_ring0::TRAP_PORT) => Next::Trapped,
            Ok(VcpuExit::Debug(_)) => Next::Stepped,
            Ok(VcpuExit::IoOut(port, data)) => {
                if Console::owns(port) {
                    self.shared.console().write(port, data);
                }
                Next::Run
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                if Console::owns(port) {
                    self.shared.console().read(port, data);
                } else {
                    // An absent device floats high, except the keyboard controller, which is idle.
                    data.fill(if port == RESET_PORT { 0 } else { 0xff });
                }
                Next::Run
            }
            Ok(VcpuExit::MmioRead(layout::GATE_REGISTER, data)) => {
                let (bytes, comes_first) = self.shared.take_mailbox();
                self.comes_first = comes_first;
                data.fill(0);
                data.iter_mut().zip(bytes.to_le_bytes()).for_each(|(to, byte)| *to = byte);
                Next::Run
            }
            Ok(VcpuExit::MmioWrite(layout::GATE_REGISTER, data)) => {
                match data.try_into().map(u32::from_le_bytes) {
                    Ok(GATE_FREEZE) => self.shared.freeze(),
                    Ok(GATE_TAKEN) => self.shared.note_taken(self.index),
                    _ => {}
                }
                Next::Run
            }
            Ok(VcpuExit::MmioRead(address, [_, _, _, _])) if bulk::owns(address) => self.bulk(address),
            Ok(VcpuExit::MmioRead(address, data)) => {
                if !self.bus.read(address, data) {
                    data.fill(0xff);
                }
                Next::Run
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                self.bus.write(address, data);
                Next::Run
            }
            Ok(VcpuExit::InternalError) => self.internal_error(),
            Ok(VcpuExit::Shutdown) => Next::Stop(StopReason::TripleFault { rip: self.rip() }),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Next::Stop(StopReason::Host(format!(
                "KVM could not enter the guest on CPU {cpu}: hardware reason {reason:#x}"
            ))),
            Ok(VcpuExit::Hlt | VcpuExit::Intr) => Next::Run,
            Ok(other) => {
                let text = format!("unexpected VM exit {other:?}");
                Next::Stop(StopReason::Host(text))
            }
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {
                self.kicked();
                Next::Interrupted
            }
            Err(e) => Next::Stop(StopReason::Host(format!("KVM_RUN failed: {e}"))),
        }
    }

    fn kicked(&mut self) {
        kick::consume();
        // The kick interrupted KVM_RUN; whoever sent it may want to know where the guest was.
        if self.index == 0
            && self.shared.sampling()
            && let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs())
        {
            let kernel = sregs.cs.dpl == 0 && sregs.ss.dpl == 0;
            let stack = if kernel { self.stack(regs.rsp) } else { Vec::new() };
            let words = stack.chunks_exact(8).map(|word| word.try_into().map_or(0, u64::from_le_bytes));
            self.shared.sample(kernel, regs.rip, words);
        }
    }

    /// The rest of the kernel stack that RSP points into: to the next multiple of its size.
    fn stack(&mut self, rsp: u64) -> Vec<u8> {
        const STACK_BYTES: u64 = profile::MOST_WORDS as u64 * 8;
        let start = rsp & !7;
        let left = STACK_BYTES - start % STACK_BYTES;
        let mut state = VcpuState::load(&mut self.fd, &mut self.xsave);
        let Ok(paging) = Paging::new(&mut state, &self.host, &self.mem) else {
            return Vec::new();
        };
        let Some((gpa, mapped)) = paging.reach(start, Access::Read) else {
            return Vec::new();
        };
        let mut bytes = vec![0; left.min(mapped) as usize];
        match self.mem.read_slice(&mut bytes, GuestAddress(gpa)) {
            Ok(()) => bytes,
            Err(_) => Vec::new(),
        }
    }

    /// The guest asked for its memory to be copied or filled.
    fn doorbell(&mut self, operation: u32) -> Next {
        let mut counters = doorbell::Counters::default();
        let mut state = VcpuState::load(&mut self.fd, &mut self.xsave);
        doorbell::ring(&mut state, &self.host, &self.mem, operation, &mut counters);
        let done = state.store();
        self.shared.count_doorbell(&counters);
        match done {
            Ok(()) => Next::Run,
            Err(e) => Next::Stop(StopReason::Host(format!("vCPU state: {e}"))),
        }
    }

    /// A program in the guest has bytes moved between its memory and a bulk stream.
    fn bulk(&mut self, address: u64) -> Next {
        let mut state = VcpuState::load(&mut self.fd, &mut self.xsave);
        let answer = self.shared.bulk.transfer(address, &mut state, &self.host, &self.mem);
        raw::answer_mmio(self.fd.get_kvm_run(), answer);
        Next::Run
    }

    fn rip(&self) -> u64 {
        self.fd.get_regs().map_or(0, |regs| regs.rip)
    }

    /// KVM met an instruction that it cannot emulate: the assist does it, or the guest is dead.
    fn internal_error(&mut self) -> Next {
        let error = raw::internal_error(self.fd.get_kvm_run());
        if error.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return Next::Stop(StopReason::Host(format!(
                "KVM internal error {} at RIP {:#x}",
                error.suberror,
                self.rip()
            )));
        }
        let host_failure = |e| Next::Stop(StopReason::Host(format!("vCPU state: {e}")));
        let mut state = VcpuState::load(&mut self.fd, &mut self.xsave);
        let outcome = assist::assist(&mut state, &self.host, &self.mem, &error.instruction());
        match outcome {
            Ok(op) => {
                if let Err(e) = state.store() {
                    return host_failure(e);
                }
                self.shared.count_assist(op);
                Next::Run
            }
            Err(unassisted) => Next::Stop(StopReason::Emulation(unassisted.to_string())),
        }
    }
}
