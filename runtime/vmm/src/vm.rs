//! A microVM: built from a checked configuration, run by its vCPU threads and event loop, gone when dropped.
//!
//! `VmConfig::check` refuses bad input before anything is spent; `MicroVm::boot` builds in the one order that
//! works (the reasons stand at the steps); dropping a `MicroVm` ends every thread and closes every descriptor.

use crate::VmmError;
use crate::agent::{AGENT_PORT, Agent, AgentError, Boot, Identity};
use crate::arch::{boot, cmdline, layout, mptable};
use crate::assist::{Counters, HostCpu, Op};
use crate::console::Console;
use crate::devices::{DevicesConfig, Disk, Interrupt};
use crate::doorbell;
use crate::event_loop::{self, LoopHandle};
use crate::host::KvmKind;
use crate::memory::{self, GuestMemory};
use crate::profile::Samples;
use crate::stats;
use crate::sys::{kick::Kick, kvm as raw};
use crate::vcpu::{self, Vcpu, VcpuSetup};
use kvm_ioctls::{Kvm, VmFd};
use linux_loader::loader::{Elf, KernelLoader};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use vm_memory::GuestAddress;

/// Most vCPUs of one microVM (the guest kernel is built for as many).
pub const MAX_VCPUS: u8 = 32;

/// A disk of the guest, in the order `vda`, `vdb`, ...
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The file behind it.
    pub path: PathBuf,
    /// Refuse writes, and open the file read-only.
    pub read_only: bool,
}

/// Everything a microVM is made from.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// [`memory::MIN_MIB`] to the host's memory, in MiB.
    pub mem_mib: u64,
    /// The guest's disks.
    pub disks: Vec<DiskConfig>,
    /// More kernel parameters, appended.
    pub kernel_parameters: String,
    /// Copy the guest's console to standard error, and let the kernel be talkative.
    pub verbose: bool,
    /// Sample the guest's instruction pointer this often.
    pub profile: Option<Duration>,
}

impl VmConfig {
    /// Checks every value and opens every file, without creating a VM.
    ///
    /// # Errors
    /// The first thing wrong, naming the field and its limit.
    pub fn check(&self) -> Result<CheckedConfig, VmmError> {
        let vcpus = check_size(self.vcpus, self.mem_mib)?;
        let kernel = open("kernel", &self.kernel, true)?;
        let disks = self
            .disks
            .iter()
            .map(|disk| {
                let file = open("disk", &disk.path, disk.read_only)?;
                let id = disk.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
                Ok(Disk { file, read_only: disk.read_only, id })
            })
            .collect::<Result<_, VmmError>>()?;
        Ok(CheckedConfig { config: self.clone(), vcpus, kernel, disks, kvm: open_kvm()? })
    }
}

/// A configuration that was checked, with its files open.
pub struct CheckedConfig {
    config: VmConfig,
    vcpus: u8,
    kernel: File,
    disks: Vec<Disk>,
    kvm: Kvm,
}

fn open(what: &'static str, path: &Path, read_only: bool) -> Result<File, VmmError> {
    File::options().read(true).write(!read_only).open(path).map_err(|source| VmmError::Open {
        what,
        path: path.to_owned(),
        source,
    })
}

/// Checks vCPU count and memory size alone, before anything else is spent; gives the count back.
///
/// # Errors
/// [`VmmError::OutOfRange`] naming the field and its limit.
pub fn check_size(vcpus: u32, mem_mib: u64) -> Result<u8, VmmError> {
    let count = u8::try_from(vcpus).ok().filter(|n| (1..=MAX_VCPUS).contains(n));
    let count = count.ok_or_else(|| VmmError::OutOfRange {
        field: "vcpus",
        value: u64::from(vcpus),
        limit: format!("1 to {MAX_VCPUS}"),
    })?;
    memory::check_size(mem_mib)?;
    Ok(count)
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`VmmError::KvmMissing`], [`VmmError::KvmPermission`], or what KVM said.
pub fn open_kvm() -> Result<Kvm, VmmError> {
    Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => VmmError::KvmMissing,
        libc::EACCES | libc::EPERM => VmmError::KvmPermission,
        _ => VmmError::Kvm { what: "open /dev/kvm", source: e },
    })
}

/// Why a microVM stopped.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StopReason {
    /// Its owner ended it.
    #[error("stopped by its owner")]
    Requested,
    /// The guest kernel panicked.
    #[error("guest kernel panic: {0}")]
    Panic(String),
    /// The guest reset or powered itself off.
    #[error("the guest reset itself")]
    Reset,
    /// The guest CPU met an exception it could not deliver.
    #[error("guest triple fault at RIP {rip:#x}")]
    TripleFault {
        /// The instruction pointer then.
        rip: u64,
    },
    /// KVM could not emulate an instruction, and neither could the assist.
    #[error("guest emulation failure: {0}")]
    Emulation(String),
    /// The host's side failed.
    #[error("host failure: {0}")]
    Host(String),
}

/// Moments of a boot, on the host's monotonic clock.
#[derive(Debug, Clone, Copy)]
pub struct Stages {
    /// The configuration was checked and building began.
    pub start: Instant,
    /// VM, memory, irqchip and devices exist and the kernel is in guest memory.
    pub built: Instant,
    /// The boot processor was about to enter the kernel.
    pub entered: Option<Instant>,
}

/// What the vCPU threads and the owner share.
pub(crate) struct Shared {
    console: Mutex<Console>,
    stopping: AtomicBool,
    reason: Mutex<Option<StopReason>>,
    stopped: Condvar,
    vcpus: Mutex<BTreeMap<u8, Kick>>,
    assists: Mutex<Counters>,
    doorbell: Mutex<doorbell::Counters>,
    entered: Mutex<Option<Instant>>,
    sampling: AtomicBool,
    samples: Mutex<Samples>,
    on_stop: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

/// A panic while a lock is held leaves plain data behind it that is still good to read.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn new(echo: bool, sampling: bool) -> Self {
        Self {
            console: Mutex::new(Console::new(echo)),
            stopping: AtomicBool::new(false),
            reason: Mutex::new(None),
            stopped: Condvar::new(),
            vcpus: Mutex::new(BTreeMap::new()),
            assists: Mutex::new(Counters::default()),
            doorbell: Mutex::new(doorbell::Counters::default()),
            entered: Mutex::new(None),
            sampling: AtomicBool::new(sampling),
            samples: Mutex::new(Samples::default()),
            on_stop: Mutex::new(None),
        }
    }

    pub(crate) fn console(&self) -> MutexGuard<'_, Console> {
        lock(&self.console)
    }

    pub(crate) fn register_vcpu(&self, index: u8, kick: Kick) {
        lock(&self.vcpus).insert(index, kick);
    }

    pub(crate) fn note_entry(&self) {
        lock(&self.entered).get_or_insert_with(Instant::now);
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(crate) fn sampling(&self) -> bool {
        self.sampling.load(Ordering::Relaxed)
    }

    pub(crate) fn sample(&self, kernel: bool, rip: u64) {
        lock(&self.samples).add(kernel, rip);
    }

    pub(crate) fn count_assist(&self, op: Op) {
        lock(&self.assists).count(op);
    }

    pub(crate) fn count_doorbell(&self, counters: &doorbell::Counters) {
        lock(&self.doorbell).add(counters);
    }

    /// The guest pulled its reset line: a panic if the console says so.
    pub(crate) fn reset_reason(&self) -> StopReason {
        self.console().panic_reason().map_or(StopReason::Reset, StopReason::Panic)
    }

    /// Ends the microVM; the first reason given is the one kept.
    pub(crate) fn stop(&self, reason: StopReason) {
        lock(&self.reason).get_or_insert(reason);
        self.stopping.store(true, Ordering::Release);
        self.kick_all();
        if let Some(on_stop) = lock(&self.on_stop).take() {
            on_stop();
        }
        self.stopped.notify_all();
    }

    fn kick_all(&self) {
        for kick in lock(&self.vcpus).values() {
            kick.send();
        }
    }
}

/// Raises the guest's interrupt lines. All virtio lines are edge-triggered (see the MultiProcessor table),
/// so a pulse is an interrupt; no irqfd needs registering, and a fork has none to rebuild.
struct IrqLines {
    vm: Arc<VmFd>,
}

impl Interrupt for IrqLines {
    fn raise(&self, gsi: u32) {
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
    stages: Stages,
    statistics: Vec<File>,
    // Dropped last: KVM must never see its memory unmapped.
    _vm: Arc<VmFd>,
    _mem: GuestMemory,
}

impl MicroVm {
    /// Builds the microVM, loads its kernel, and starts its vCPUs.
    ///
    /// # Errors
    /// What could not be built; nothing is left behind then.
    pub fn boot(checked: CheckedConfig) -> Result<Self, VmmError> {
        let start = Instant::now();
        let CheckedConfig { config, vcpus, mut kernel, disks, kvm } = checked;
        let mem = memory::allocate(config.mem_mib)?;
        let vm = Arc::new(create_vm(&kvm)?);
        // Memslots first, registrations on KVM's I/O bus (the irqchip) after: the other way round each memslot
        // waits for a grace period, 7.5 ms where it was measured.
        raw::register_memslots(&vm, &mem)?;
        // Intel VT-x wants its real-mode pages placed before any vCPU; elsewhere the call does nothing.
        vm.set_tss_address(layout::KVM_TSS).map_err(VmmError::kvm("SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(VmmError::kvm("CREATE_IRQCHIP"))?;

        let entry = load_kernel(&mem, &mut kernel, &config.kernel)?;
        let shared = Arc::new(Shared::new(config.verbose, config.profile.is_some()));
        let devices = DevicesConfig {
            disks,
            mmio_base: layout::VIRTIO_MMIO,
            first_gsi: layout::FIRST_GSI,
            states: Vec::new(),
        };
        let lines = Arc::new(IrqLines { vm: Arc::clone(&vm) });
        let (bus, event_loop) = event_loop::start(devices, mem.clone(), lines)?;
        let event_loop = Arc::new(event_loop);
        let agents = event_loop
            .listen(AGENT_PORT)
            .map_err(|source| VmmError::Os { what: "cannot listen for the agent", source })?;
        let line = cmdline::build(
            KvmKind::detect(),
            config.verbose,
            &bus.kernel_cmdline(),
            &config.kernel_parameters,
        )?;
        boot::write_boot_structures(&mem, &line)?;
        mptable::write(&mem, vcpus)?;

        let cpuid = vcpu::supported_cpuid(&kvm)?;
        let setup = VcpuSetup { cpuid: &cpuid, vcpus, entry };
        let fds = (0..vcpus).map(|index| vcpu::create(&vm, index, &setup)).collect::<Result<Vec<_>, _>>()?;
        let statistics = fds.iter().filter_map(|fd| raw::stats_fd(fd).ok()).collect();
        let host = Arc::new(HostCpu::detect());
        let stages = Stages { start, built: Instant::now(), entered: None };
        let mut microvm = Self {
            shared: Arc::clone(&shared),
            threads: Vec::new(),
            sampler: None,
            agents: Mutex::new(agents),
            event_loop,
            stages,
            statistics,
            _vm: Arc::clone(&vm),
            _mem: mem.clone(),
        };
        let stopper = Arc::clone(&microvm.event_loop);
        *lock(&shared.on_stop) = Some(Box::new(move || stopper.stop()));
        for (index, fd) in (0..vcpus).zip(fds) {
            let vcpu = Vcpu {
                fd,
                index,
                shared: Arc::clone(&shared),
                bus: Arc::clone(&bus),
                mem: mem.clone(),
                xsave: raw::XsaveArea::new(&vm),
                host: Arc::clone(&host),
            };
            microvm.threads.push(spawn(format!("vcpu{index}"), move || vcpu.run())?);
        }
        if let Some(interval) = config.profile {
            microvm.sampler = Some(start_sampler(Arc::clone(&shared), interval)?);
        }
        Ok(microvm)
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
        let socket = lock(&self.agents).recv_timeout(timeout).map_err(|e| match e {
            RecvTimeoutError::Timeout => AgentError::Timeout(timeout),
            RecvTimeoutError::Disconnected => AgentError::Closed,
        })?;
        let (mut agent, boot) = Agent::greet(socket, timeout)?;
        agent.adopt(&Identity::fresh().map_err(AgentError::Io)?)?;
        Ok((agent, boot))
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
        Stages { entered: *lock(&self.shared.entered), ..self.stages }
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

    /// Guest instructions that KVM emulated so far, all vCPUs; `None` where KVM does not count them.
    #[must_use]
    pub fn emulated_instructions(&self) -> Option<u64> {
        self.statistics.iter().map(|fd| stats::read(fd, stats::INSTRUCTIONS_EMULATED)).sum()
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

    /// Samples of the guest's instruction pointer so far.
    #[must_use]
    pub fn samples(&self) -> Samples {
        lock(&self.shared.samples).clone()
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
