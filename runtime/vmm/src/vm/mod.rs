//! A microVM: assembled from a checked configuration, then booted or restored, run by its vCPU threads and
//! event loop, gone when dropped.
//!
//! `VmConfig::check` refuses bad input before anything is spent; [`MicroVm`] is assembled in the one order
//! that works (the reasons stand at the steps); dropping it ends every thread and closes every descriptor.

mod capture;
mod config;
mod shared;

pub use capture::Paused;
pub use config::{CheckedConfig, DiskConfig, MAX_VCPUS, VmConfig, check_size, open_disks, open_kvm};
pub(crate) use shared::Shared;
use shared::lock;
pub use shared::{Stages, StopReason};

use crate::VmmError;
use crate::agent::{AGENT_PORT, Agent, AgentError, Boot, Identity};
use crate::arch::{boot, cmdline, layout, mptable};
use crate::assist::{Counters, HostCpu};
use crate::devices::mmio::State as DeviceState;
use crate::devices::{DevicesConfig, Disk, Interrupt};
use crate::doorbell;
use crate::event_loop::{self, Bus, LoopHandle};
use crate::host::KvmKind;
use crate::memory::{self, GuestMemory};
use crate::profile::{self, Symbols};
use crate::ring0::Ring0;
use crate::snapshot::{AgentState, Compat, MachineState, Snapshot, Stored};
use crate::stats;
use crate::sys::kvm as raw;
use crate::vcpu::{self, Vcpu};
use crate::vcpu_state::{self, Timer, VcpuSnapshot};
use kvm_bindings::kvm_clock_data;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use std::fs::File;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::{Bytes as _, GuestAddress};

/// Raises the guest's interrupt lines. All virtio lines are edge-triggered (see the MultiProcessor table),
/// so a pulse is an interrupt; no irqfd needs registering, and a fork has none to rebuild.
struct IrqLines {
    vm: Arc<VmFd>,
    shared: Arc<Shared>,
}

impl Interrupt for IrqLines {
    fn raise(&self, gsi: u32) {
        // Somebody has something for the guest, and may wait for it.
        self.shared.come_forward();
        // An error here would mean that the VM is gone, and its guest with it.
        let _ = self.vm.set_irq_line(gsi, true).and_then(|()| self.vm.set_irq_line(gsi, false));
    }
}

/// A running microVM.
pub struct MicroVm {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    sampler: Option<JoinHandle<()>>,
    event_loop: Arc<LoopHandle>,
    agents: Mutex<Receiver<UnixStream>>,
    /// Where a snapshot's conversation with the agent stood, until somebody takes it up.
    conversation: Mutex<Option<AgentState>>,
    /// The guest stands at its freeze point, and looks into the mailbox when it goes on.
    at_gate: AtomicBool,
    stages: Stages,
    statistics: Vec<File>,
    vcpus: u8,
    mem_mib: u64,
    disks_bytes: Vec<u64>,
    // Dropped last: KVM must never see its memory unmapped.
    vm: Arc<VmFd>,
    mem: GuestMemory,
}

/// What every microVM needs, whatever it will be: KVM's VM and the event loop's thread. Made before it is known which, it is not
/// on the way of a restore.
pub struct Shell {
    vm: VmFd,
    event_loop: event_loop::Idle,
}

impl Shell {
    /// Makes one.
    ///
    /// # Errors
    /// What KVM or the host refused.
    pub fn build(kvm: &Kvm) -> Result<Self, VmmError> {
        // The thread makes its ring meanwhile.
        let event_loop = event_loop::idle()?;
        Ok(Self { vm: create_vm(kvm)?, event_loop })
    }
}

/// The KVM objects of a microVM: memory, interrupt controllers and vCPUs, in their power-on state.
struct Machine {
    vm: Arc<VmFd>,
    mem: GuestMemory,
    vcpus: Vec<VcpuFd>,
    event_loop: event_loop::Idle,
    start: Instant,
}

impl Machine {
    fn build(shell: Shell, kvm: &Kvm, mem: GuestMemory, vcpus: u8, start: Instant) -> Result<Self, VmmError> {
        let Shell { vm, event_loop } = shell;
        let vm = Arc::new(vm);
        // Memslots first, registrations on KVM's I/O bus (the irqchip) after: the other way round each
        // memslot waits for a grace period, 7.5 ms where it was measured.
        raw::register_memslots(&vm, &mem)?;
        // Intel VT-x wants its real-mode pages placed before any vCPU; elsewhere the call does nothing.
        vm.set_tss_address(layout::KVM_TSS).map_err(VmmError::kvm("SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(VmmError::kvm("CREATE_IRQCHIP"))?;
        let cpuid = vcpu::supported_cpuid(kvm)?;
        let create = |index| vcpu::create(&vm, index, cpuid, vcpus);
        let vcpus = (0..vcpus).map(create).collect::<Result<Vec<_>, _>>()?;
        Ok(Self { vm, mem, vcpus, event_loop, start })
    }
}

/// How the devices of a microVM begin.
struct Begin {
    disks: Vec<Disk>,
    states: Vec<DeviceState>,
    shared: Arc<Shared>,
    /// The MSRs to save.
    msrs: Arc<[u32]>,
    /// What is left of each vCPU's timer that stands still.
    timers: Vec<Option<u64>>,
    /// The VMM runs ring 0 from the first instruction.
    in_ring0: bool,
}

impl MicroVm {
    /// Builds the microVM, loads its kernel, and starts its vCPUs.
    ///
    /// # Errors
    /// What could not be built; nothing is left behind then.
    pub fn boot(checked: CheckedConfig) -> Result<Self, VmmError> {
        let mem = memory::allocate(checked.mem_mib())?;
        Self::boot_in(checked, mem)
    }

    /// As [`MicroVm::boot`], with `image` as its memory: what the guest writes is in that file, ready to be a
    /// template's. Where ring 0 is the VMM's, what its kernel runs from the agent's first word on will be listed there too: the
    /// process that clones are forked from decodes it once for all.
    ///
    /// # Errors
    /// As [`MicroVm::boot`].
    pub fn boot_into(checked: CheckedConfig, image: &Arc<File>) -> Result<Self, VmmError> {
        let mem = memory::map_shared(checked.mem_mib(), image)?;
        let microvm = Self::boot_in(checked, mem)?;
        microvm.shared.want_code();
        Ok(microvm)
    }

    fn boot_in(checked: CheckedConfig, mem: GuestMemory) -> Result<Self, VmmError> {
        let start = Instant::now();
        let CheckedConfig { config, vcpus, mut kernel, disks, kvm } = checked;
        let machine = Machine::build(Shell::build(&kvm)?, &kvm, mem, vcpus, start)?;
        let entry = load_kernel(&machine.mem, &mut kernel, &config.kernel)?;
        for (index, fd) in machine.vcpus.iter().enumerate() {
            vcpu::set_boot_state(fd, index == 0, entry)?;
        }
        let shared = Arc::new(Shared::new(config.verbose));
        let mem = machine.mem.clone();
        let msrs = vcpu_state::saved_msrs(&kvm, &machine.vcpus[0])?;
        let in_ring0 = cmdline::gives_ring0(KvmKind::detect(), vcpus, &config.kernel_parameters);
        let begin = Begin { disks, states: Vec::new(), shared, msrs, timers: Vec::new(), in_ring0 };
        let (mut microvm, bus) = Self::assemble(machine, begin)?;
        let (kind, devices) = (KvmKind::detect(), bus.kernel_cmdline());
        let line = cmdline::build(kind, config.verbose, vcpus, &devices, &config.kernel_parameters)?;
        boot::write_boot_structures(&mem, &line)?;
        mptable::write(&mem, vcpus)?;
        if let Some(interval) = config.profile {
            microvm.sample(interval)?;
        }
        microvm.run();
        Ok(microvm)
    }

    /// Restores a snapshot as a new microVM with these disks. It is complete, and stands still until
    /// [`MicroVm::run`].
    ///
    /// # Errors
    /// What does not fit this host or could not be built; nothing is left behind then.
    pub fn restore(stored: &Stored, disks: Vec<Disk>, kvm: &Kvm) -> Result<Self, VmmError> {
        Self::restore_in(stored, disks, kvm, Shell::build(kvm)?)
    }

    /// As [`MicroVm::restore`], in a shell that is there already.
    pub(crate) fn restore_in(
        stored: &Stored,
        disks: Vec<Disk>,
        kvm: &Kvm,
        shell: Shell,
    ) -> Result<Self, VmmError> {
        let start = Instant::now();
        let Snapshot { compat, machine } = &stored.snapshot;
        compat.check_disks(&sizes(&disks))?;
        let mem = memory::map_private(compat.mem_mib, &stored.memory)?;
        if let Some(pages) = &stored.pages {
            memory::map_pages(&mem, pages, &machine.runs)?;
        }
        let fresh = Machine::build(shell, kvm, mem, compat.vcpus, start)?;
        Self::revive(compat, machine, disks, fresh)
    }

    /// As [`MicroVm::restore`], over memory that is there already.
    pub(crate) fn restore_over(
        mem: GuestMemory,
        compat: &Compat,
        state: &MachineState,
        disks: Vec<Disk>,
        kvm: &Kvm,
    ) -> Result<Self, VmmError> {
        let start = Instant::now();
        let machine = Machine::build(Shell::build(kvm)?, kvm, mem, compat.vcpus, start)?;
        Self::revive(compat, state, disks, machine)
    }

    /// Gives fresh KVM objects the state of a saved microVM.
    fn revive(
        compat: &Compat,
        state: &MachineState,
        disks: Vec<Disk>,
        machine: Machine,
    ) -> Result<Self, VmmError> {
        let mut area = raw::XsaveArea::new(&machine.vm);
        let mut timers = Vec::with_capacity(state.vcpus.len());
        for (fd, vcpu) in machine.vcpus.iter().zip(&state.vcpus) {
            compat.check_tsc(fd.get_tsc_khz().unwrap_or(0))?;
            let first = timers.is_empty();
            // The others are not let go before the gate opens, and have no first word to say.
            let timer = if state.at_gate && first { Timer::Held } else { Timer::Runs };
            timers.push(vcpu.restore(fd, &mut area, timer)?);
        }
        // Before the devices, whose first act may be an interrupt.
        for chip in &state.irqchips {
            machine.vm.set_irqchip(chip).map_err(VmmError::kvm("SET_IRQCHIP"))?;
        }
        let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
        machine.vm.set_clock(&clock).map_err(VmmError::kvm("SET_CLOCK"))?;
        let shared = Arc::new(Shared::new(false));
        // What was saved is what will be saved again: finding out takes longer than all the rest.
        let msrs = state.vcpus.first().map_or_else(Arc::default, VcpuSnapshot::msr_indices);
        let states = state.devices.clone();
        let begin = Begin { disks, states, shared, msrs, timers, in_ring0: false };
        let (microvm, _) = Self::assemble(machine, begin)?;
        *lock(&microvm.conversation) = Some(state.agent.clone());
        microvm.at_gate.store(state.at_gate, Ordering::Relaxed);
        Ok(microvm)
    }

    /// Devices, event loop and threads around the KVM objects; the gate is closed.
    fn assemble(machine: Machine, begin: Begin) -> Result<(Self, Arc<Bus>), VmmError> {
        let Machine { vm, mem, vcpus: fds, event_loop, start } = machine;
        let Begin { disks, states, shared, msrs, timers, in_ring0 } = begin;
        // The engine knows one processor.
        let runs_ring0 = fds.len() == 1 && KvmKind::detect() == KvmKind::Software;
        let mut timers = timers.into_iter();
        let disks_bytes = sizes(&disks);
        let devices =
            DevicesConfig { disks, mmio_base: layout::VIRTIO_MMIO, first_gsi: layout::FIRST_GSI, states };
        let lines = Arc::new(IrqLines { vm: Arc::clone(&vm), shared: Arc::clone(&shared) });
        let (bus, event_loop) = event_loop::start(event_loop, devices, mem.clone(), lines)?;
        let event_loop = Arc::new(event_loop);
        let agents = event_loop
            .listen(AGENT_PORT)
            .map_err(|source| VmmError::Os { what: "cannot listen for the agent", source })?;
        let statistics = fds.iter().filter_map(|fd| raw::stats_fd(fd).ok()).collect();
        let host = HostCpu::this();
        let stages = Stages { start, built: Instant::now(), entered: None, first_exit: None };
        let mut microvm = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            sampler: None,
            agents: Mutex::new(agents),
            conversation: Mutex::new(None),
            at_gate: AtomicBool::new(false),
            event_loop,
            stages,
            statistics,
            // At most MAX_VCPUS.
            vcpus: fds.len() as u8,
            mem_mib: memory::mib(&mem),
            disks_bytes,
            vm: Arc::clone(&vm),
            mem: mem.clone(),
        };
        let stopper = Arc::clone(&microvm.event_loop);
        *lock(&shared.on_stop) = Some(Box::new(move || stopper.stop()));
        let mem = Arc::new(mem);
        for (index, fd) in (0..).zip(fds) {
            let vcpu = Vcpu {
                fd,
                index,
                shared: Arc::clone(&shared),
                bus: Arc::clone(&bus),
                mem: Arc::clone(&mem),
                xsave: raw::XsaveArea::new(&vm),
                host: Arc::clone(&host),
                msrs: Arc::clone(&msrs),
                held_timer: timers.next().flatten(),
                comes_first: false,
                runs_ring0,
                ring0: in_ring0.then(|| Ring0::at_boot(&mem)),
                trapped: false,
            };
            microvm.threads.push(spawn(format!("vcpu{index}"), move || vcpu.run())?);
        }
        Ok((microvm, bus))
    }

    /// Samples the guest's instruction pointer this often from now on.
    ///
    /// # Errors
    /// If there can be no thread for it.
    pub fn sample(&mut self, interval: Duration) -> Result<(), VmmError> {
        self.shared.start_sampling();
        self.sampler = Some(start_sampler(Arc::clone(&self.shared), interval)?);
        Ok(())
    }

    /// Whether the guest stands at its freeze point, and will look into its mailbox when it goes on.
    #[must_use]
    pub fn is_at_gate(&self) -> bool {
        self.at_gate.load(Ordering::Relaxed)
    }

    /// Lets a restored microVM go, with whole frames in its mailbox.
    ///
    /// # Errors
    /// [`VmmError::OutOfRange`] for more than the mailbox holds.
    pub fn go(&self, frames: &[u8]) -> Result<(), VmmError> {
        let room = guest_init::GATE_MAILBOX_BYTES;
        if frames.len() > room {
            let limit = format!("0 to {room}");
            return Err(VmmError::OutOfRange { field: "mailbox (bytes)", value: frames.len() as u64, limit });
        }
        if !frames.is_empty() {
            let written = self.mem.write_slice(frames, GuestAddress(layout::MAILBOX));
            written.map_err(|e| VmmError::Memory(format!("mailbox: {e}")))?;
        }
        self.shared.fill_mailbox(frames.len() as u32);
        self.at_gate.store(false, Ordering::Relaxed);
        self.run();
        Ok(())
    }

    /// A restored guest that was let approach its gate stands back behind everybody else on this host once it has read its
    /// mailbox; from now on it is a guest like others.
    pub(crate) fn come_forward(&self) {
        self.shared.come_forward();
    }

    /// When the guest made its first VM exit or, where [`MicroVm::go`] gave it a mailbox, the exit with which it
    /// says that it has read that; waits for it, `timeout` at most.
    #[must_use]
    pub fn wait_first_exit(&self, mailbox: bool, timeout: Duration) -> Option<Instant> {
        self.shared.wait_first_exit(mailbox, timeout)
    }

    /// Lets a restored microVM that stands at its freeze point come as far as its look into the mailbox: KVM has built
    /// what it needs to run it, and the pages that the guest then touches are its own. It stands still there until
    /// [`MicroVm::go`]; only its first vCPU moved.
    pub(crate) fn approach(&self) {
        if self.is_at_gate() {
            // The mailbox's first page becomes this guest's own now rather than then.
            let _ = self.mem.write_slice(&[0], GuestAddress(layout::MAILBOX));
            self.shared.approach();
        }
    }

    /// Lets a restored microVM go.
    pub fn run(&self) {
        self.shared.open();
    }

    /// The event loop's handle: vsock connections are made through it.
    #[must_use]
    pub fn event_loop(&self) -> &LoopHandle {
        &self.event_loop
    }

    /// Waits for the guest's agent, and tells it who and when it is. Nothing runs in the guest before that.
    ///
    /// # Errors
    /// [`AgentError::Closed`] if the guest stopped first, [`AgentError::Timeout`] after `timeout`.
    pub fn connect_agent(&self, timeout: Duration) -> Result<(Agent, Boot), AgentError> {
        let (mut agent, boot) = self.greet_agent(timeout)?;
        self.shared.want_code_from_here();
        agent.adopt(&Identity::fresh().map_err(AgentError::Io)?)?;
        Ok((agent, boot))
    }

    /// Takes up a restored microVM's conversation with its agent, and tells the guest who it is now. The
    /// frame is in the guest's queue before the guest runs; nothing else is served before it is acknowledged.
    ///
    /// # Errors
    /// [`AgentError::Closed`] if the snapshot had no conversation or the guest stopped first,
    /// [`AgentError::Timeout`] after `timeout`.
    pub fn adopt(&self, identity: &Identity, timeout: Duration) -> Result<Agent, AgentError> {
        let saved = lock(&self.conversation).take().ok_or(AgentError::Closed)?;
        let socket = self.event_loop.restored_connection(AGENT_PORT).ok_or(AgentError::Closed)?;
        let mut agent = Agent::resume(socket, &saved)?;
        agent.set_timeout(Some(timeout))?;
        let mut frame = Agent::adopt_frame(identity)?;
        if !self.is_at_gate() {
            agent.send_frame(&frame)?;
            frame.clear();
        }
        self.go(&frame).map_err(|e| AgentError::Io(io::Error::other(e)))?;
        agent.end_adopt()?;
        agent.set_timeout(None)?;
        Ok(agent)
    }

    fn greet_agent(&self, timeout: Duration) -> Result<(Agent, Boot), AgentError> {
        let socket = lock(&self.agents).recv_timeout(timeout).map_err(|e| match e {
            RecvTimeoutError::Timeout => AgentError::Timeout(timeout),
            RecvTimeoutError::Disconnected => AgentError::Closed,
        })?;
        Agent::greet(socket, timeout)
    }

    /// Has a program in the guest exchange bytes with `socket` as the bulk stream of this number (see guest-init).
    ///
    /// # Errors
    /// [`VmmError::OutOfRange`] if there are too many at once.
    pub fn attach_bulk(&self, number: u64, socket: UnixStream) -> Result<(), VmmError> {
        self.shared.bulk.attach(number, socket)
    }

    /// The guest runs no further instruction, very soon; it is still all there.
    pub(crate) fn hold(&self) {
        self.shared.hold();
    }

    /// Ends the guest. The reason given first stays.
    pub fn stop(&self) {
        self.shared.stop(StopReason::Requested);
    }

    /// Why it stopped, or `None` while it runs.
    #[must_use]
    pub fn stop_reason(&self) -> Option<StopReason> {
        lock(&self.shared.reason).clone()
    }

    /// Waits until it stops, `timeout` at most.
    #[must_use]
    pub fn wait(&self, timeout: Duration) -> Option<StopReason> {
        let guard = lock(&self.shared.reason);
        let (guard, _) = self
            .shared
            .stopped
            .wait_timeout_while(guard, timeout, |reason| reason.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        guard.clone()
    }

    /// The guest's console so far, its last [`crate::console::RING_BYTES`] bytes.
    #[must_use]
    pub fn console_text(&self) -> String {
        self.shared.console().text()
    }

    /// The stages of its boot.
    #[must_use]
    pub fn stages(&self) -> Stages {
        let (entered, first_exit) = (*lock(&self.shared.entered), lock(&self.shared.firsts).exit);
        Stages { entered, first_exit, ..self.stages }
    }

    /// Instructions that the assist did, by kind.
    #[must_use]
    pub fn assists(&self) -> Counters {
        lock(&self.shared.assists).clone()
    }

    /// How often the guest rang the bulk-memory doorbell, and for how much.
    #[must_use]
    pub fn doorbell(&self) -> doorbell::Counters {
        *lock(&self.shared.doorbell)
    }

    /// Guest instructions that were emulated so far, by KVM and by the VMM, all vCPUs; `None` where KVM does not count
    /// its own.
    #[must_use]
    pub fn emulated_instructions(&self) -> Option<u64> {
        let by_kvm: Option<u64> =
            self.statistics.iter().map(|fd| stats::read(fd, stats::INSTRUCTIONS_EMULATED)).sum();
        by_kvm.map(|count| count + self.ring0_instructions())
    }

    /// Those of them that the VMM did.
    #[must_use]
    pub fn ring0_instructions(&self) -> u64 {
        self.shared.ring0_instructions.load(Ordering::Relaxed)
    }

    /// VM exits so far, all vCPUs; `None` where KVM does not count them.
    #[must_use]
    pub fn exits(&self) -> Option<u64> {
        self.statistics.iter().map(|fd| stats::read(fd, stats::EXITS)).sum()
    }

    /// Counters of the devices.
    #[must_use]
    pub fn device_stats(&self) -> crate::devices::Stats {
        self.event_loop.stats()
    }

    /// Samples of the guest so far, as folded stacks. `kernel` is what it was booted from.
    ///
    /// # Errors
    /// If that cannot be read again.
    pub fn folded_samples(&self, symbols: &Symbols, kernel: &Path) -> Result<String, VmmError> {
        // What the kernel gives back when it has started may be somebody else's in the guest.
        let fresh = memory::allocate(self.mem_mib)?;
        let mut file =
            File::open(kernel).map_err(|source| VmmError::Os { what: "cannot open the kernel", source })?;
        load_kernel(&fresh, &mut file, kernel)?;
        let samples = lock(&self.shared.samples).clone();
        Ok(samples.folded(symbols, &|at, len| {
            let mut bytes = vec![0; len];
            let gpa = GuestAddress(at.wrapping_sub(profile::TEXT_MAP));
            let mem = if symbols.is_init(at) { &fresh } else { &self.mem };
            if mem.read_slice(&mut bytes, gpa).is_ok() { bytes } else { Vec::new() }
        }))
    }
}

impl Drop for MicroVm {
    fn drop(&mut self) {
        self.shared.stop(StopReason::Requested);
        if let Some(sampler) = self.sampler.take() {
            let _ = sampler.join();
        }
        for thread in self.threads.drain(..) {
            // A vCPU thread that panicked has nothing to say that its message did not.
            let _ = thread.join();
        }
        // No thread is left to kick.
        lock(&self.shared.vcpus).clear();
    }
}

/// The disks' sizes in bytes.
fn sizes(disks: &[Disk]) -> Vec<u64> {
    disks.iter().map(|disk| disk.file.metadata().map_or(0, |m| m.len())).collect()
}

/// KVM_CREATE_VM starts a kernel thread and is interrupted by any signal meanwhile; trying again is right.
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(VmmError::kvm("CREATE_VM")),
        }
    }
}

fn load_kernel(mem: &GuestMemory, kernel: &mut File, path: &Path) -> Result<u64, VmmError> {
    let loaded = Elf::load(mem, None, kernel, Some(GuestAddress(layout::HIGH_MEMORY)));
    loaded.map(|l| l.kernel_load.0).map_err(|e| VmmError::Kernel {
        path: path.to_owned(),
        reason: format!("{e}; it must be an uncompressed 64-bit vmlinux that fits the guest's memory"),
    })
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, VmmError> {
    thread::Builder::new()
        .name(name)
        .spawn(body)
        .map_err(|source| VmmError::Os { what: "cannot start a thread", source })
}

fn start_sampler(shared: Arc<Shared>, interval: Duration) -> Result<JoinHandle<()>, VmmError> {
    spawn("sampler".to_owned(), move || {
        while !shared.stopping() {
            thread::sleep(interval);
            if let Some(kick) = lock(&shared.vcpus).get(&0) {
                kick.send();
            }
        }
    })
}
