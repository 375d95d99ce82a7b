//! What the vCPU threads and the microVM's owner share: the reason to stop, the gate at which they pause, the
//! counters.

use crate::VmmError;
use crate::assist::{Counters, Op};
use crate::bulk;
use crate::console::Console;
use crate::doorbell;
use crate::priority;
use crate::profile::Samples;
use crate::sys::kick::Kick;
use crate::sys::process::ThreadId;
use crate::vcpu_state::VcpuSnapshot;
use peregrine_ring0::Code;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

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
    /// The guest made its first VM exit.
    pub first_exit: Option<Instant>,
}

/// Where vCPU threads pause.
///
/// ```text
///   open --close, kick--> closed: each thread ends its exit, leaves its state, waits --open--> open
/// ```
///
/// A new microVM's gate is closed: nothing runs before it is complete.
struct Gate {
    /// Somebody waits for the threads' states.
    asked: bool,
    /// The first vCPU may go as far as the guest's look into the mailbox, and is held there.
    approach: bool,
    /// States that the threads have left, by vCPU index.
    parked: BTreeMap<u8, Result<VcpuSnapshot, VmmError>>,
}

/// When a guest did something for the first time.
#[derive(Clone, Copy, Default)]
pub(super) struct Firsts {
    /// A VM exit.
    pub(super) exit: Option<Instant>,
    /// The exit that says that it has read its mailbox.
    pub(super) taken: Option<Instant>,
    /// Somebody waits for the former, and not for the latter.
    exit_wanted: bool,
}

/// What the vCPU threads and the owner share.
pub(crate) struct Shared {
    console: Mutex<Console>,
    stopping: AtomicBool,
    pub(super) reason: Mutex<Option<StopReason>>,
    pub(super) stopped: Condvar,
    closed: AtomicBool,
    gate: Mutex<Gate>,
    gate_moved: Condvar,
    /// The guest was asked to freeze.
    freeze_wanted: AtomicBool,
    /// Bytes in the mailbox that the guest has not taken.
    mailbox_bytes: AtomicU32,
    /// The vCPU thread that everybody else comes before, as long as it does and has not ended.
    back: Mutex<Option<ThreadId>>,
    pub(super) vcpus: Mutex<BTreeMap<u8, Kick>>,
    pub(super) assists: Mutex<Counters>,
    pub(super) doorbell: Mutex<doorbell::Counters>,
    /// Instructions of ring 0 that the VMM did itself.
    pub(super) ring0_instructions: AtomicU64,
    pub(super) entered: Mutex<Option<Instant>>,
    pub(super) firsts: Mutex<Firsts>,
    exited: Condvar,
    sampling: AtomicBool,
    pub(super) samples: Mutex<Samples>,
    pub(crate) bulk: bulk::Streams,
    /// Code that the first vCPU's engine has decoded, once that was asked for.
    code: Mutex<Option<Vec<Code>>>,
    code_afresh: AtomicBool,
    pub(super) on_stop: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

/// A panic while a lock is held leaves plain data behind it that is still good to read.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(echo: bool) -> Self {
        Self {
            console: Mutex::new(Console::new(echo)),
            stopping: AtomicBool::new(false),
            reason: Mutex::new(None),
            stopped: Condvar::new(),
            closed: AtomicBool::new(true),
            gate: Mutex::new(Gate { asked: false, approach: false, parked: BTreeMap::new() }),
            gate_moved: Condvar::new(),
            freeze_wanted: AtomicBool::new(false),
            mailbox_bytes: AtomicU32::new(0),
            back: Mutex::new(None),
            vcpus: Mutex::new(BTreeMap::new()),
            assists: Mutex::new(Counters::default()),
            doorbell: Mutex::new(doorbell::Counters::default()),
            ring0_instructions: AtomicU64::new(0),
            entered: Mutex::new(None),
            firsts: Mutex::default(),
            exited: Condvar::new(),
            sampling: AtomicBool::new(false),
            samples: Mutex::new(Samples::default()),
            bulk: bulk::Streams::default(),
            code: Mutex::new(None),
            code_afresh: AtomicBool::new(false),
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

    pub(crate) fn note_first_exit(&self) {
        let wanted = {
            let mut firsts = lock(&self.firsts);
            firsts.exit.get_or_insert_with(Instant::now);
            firsts.exit_wanted
        };
        if wanted {
            self.exited.notify_all();
        }
    }

    /// The guest has read its mailbox, on this vCPU. The others leave KVM_RUN to hear it, once: kicks are queued, and
    /// a guest may say so as often as it likes.
    pub(crate) fn note_taken(&self, index: u8) {
        {
            let mut firsts = lock(&self.firsts);
            if firsts.taken.is_some() {
                return;
            }
            firsts.taken = Some(Instant::now());
        }
        self.exited.notify_all();
        let vcpus = lock(&self.vcpus);
        vcpus.iter().filter(|(other, _)| **other != index).for_each(|(_, kick)| kick.send());
    }

    /// Whether it has.
    pub(crate) fn is_taken(&self) -> bool {
        lock(&self.firsts).taken.is_some()
    }

    /// When the guest made its first exit or, if it has a mailbox, the one with which it says that it has read that.
    pub(super) fn wait_first_exit(&self, mailbox: bool, timeout: Duration) -> Option<Instant> {
        let mut guard = lock(&self.firsts);
        guard.exit_wanted = !mailbox;
        let of = |firsts: &Firsts| if mailbox { firsts.taken } else { firsts.exit };
        let waiting = |firsts: &mut Firsts| of(firsts).is_none();
        let (firsts, _) =
            self.exited.wait_timeout_while(guard, timeout, waiting).unwrap_or_else(PoisonError::into_inner);
        let first = of(&firsts);
        drop(firsts);
        if first.is_none() {
            // One that makes none must not keep its place before others.
            self.kick_all();
        }
        first
    }

    /// Whether vCPU threads must come to the gate.
    pub(crate) fn closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// A vCPU thread waits here while the gate is closed, and leaves its state once each time it is asked for.
    pub(crate) fn park(&self, index: u8, mut capture: impl FnMut() -> Result<VcpuSnapshot, VmmError>) {
        let mut gate = lock(&self.gate);
        while self.closed() && !self.stopping() && !(gate.approach && index == 0) {
            if gate.asked && !gate.parked.contains_key(&index) {
                gate.parked.insert(index, capture());
                self.gate_moved.notify_all();
            }
            gate = self.gate_moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// vCPUs come to the gate and stay there; nobody wants their states.
    pub(super) fn hold(&self) {
        {
            let _gate = lock(&self.gate);
            self.closed.store(true, Ordering::Release);
        }
        self.kick_all();
    }

    /// The first vCPU is to leave the code that it knows, when it leaves its state.
    pub(super) fn want_code(&self) {
        lock(&self.code).get_or_insert_default();
    }

    /// What it has met up to here is not wanted.
    pub(super) fn want_code_from_here(&self) {
        self.code_afresh.store(lock(&self.code).is_some(), Ordering::Relaxed);
    }

    /// Whether code that is known already is to be met again, for once.
    pub(crate) fn code_afresh(&self) -> bool {
        self.code_afresh.load(Ordering::Relaxed) && self.code_afresh.swap(false, Ordering::Relaxed)
    }

    /// That code, if it is wanted.
    pub(crate) fn leave_code(&self, code: impl FnOnce() -> Vec<Code>) {
        if let Some(left) = &mut *lock(&self.code) {
            *left = code();
        }
    }

    /// What was left.
    pub(super) fn take_code(&self) -> Vec<Code> {
        lock(&self.code).take().unwrap_or_default()
    }

    /// The guest will be asked to freeze.
    pub(super) fn want_freeze(&self) {
        self.freeze_wanted.store(true, Ordering::Release);
    }

    /// The guest has come to its freeze point: nobody goes on. A guest that was not asked is not heard, or it
    /// could stop itself where nobody looks.
    pub(crate) fn freeze(&self) {
        if self.freeze_wanted.swap(false, Ordering::AcqRel) {
            let _gate = lock(&self.gate);
            self.closed.store(true, Ordering::Release);
            self.gate_moved.notify_all();
        }
    }

    /// Waits until the guest has come to its freeze point, `timeout` at most.
    pub(super) fn wait_frozen(&self, timeout: Duration) -> bool {
        let gate = lock(&self.gate);
        let waiting = |_: &mut Gate| !self.closed() && !self.stopping();
        let (_gate, _) = self
            .gate_moved
            .wait_timeout_while(gate, timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        self.freeze_wanted.store(false, Ordering::Release);
        self.closed()
    }

    /// Says that the mailbox holds so many bytes.
    pub(super) fn fill_mailbox(&self, bytes: u32) {
        self.mailbox_bytes.store(bytes, Ordering::Release);
    }

    /// Lets the first vCPU of a restored guest go as far as its look into the mailbox.
    pub(super) fn approach(&self) {
        lock(&self.gate).approach = true;
        self.gate_moved.notify_all();
    }

    /// Whether [`Shared::approach`] was the last word.
    pub(crate) fn approaches(&self) -> bool {
        lock(&self.gate).approach
    }

    /// The guest looks into the mailbox: how many bytes are there. Waits if it has only been let go so far; a thread that
    /// has waited comes before other guests' (`true`), because somebody waits for it, and gives that back at its guest's
    /// next exit.
    pub(crate) fn take_mailbox(&self) -> (u32, bool) {
        let gate = lock(&self.gate);
        let waiting = |gate: &mut Gate| gate.approach && !self.stopping();
        let comes_first = gate.approach && priority::first().is_ok();
        let _gate = self.gate_moved.wait_while(gate, waiting).unwrap_or_else(PoisonError::into_inner);
        (self.mailbox_bytes.swap(0, Ordering::AcqRel), comes_first)
    }

    /// The calling thread has come first, and nobody waits for its guest now: it makes room for who does, until
    /// [`Shared::come_forward`].
    pub(crate) fn stand_back(&self) {
        {
            let mut back = lock(&self.back);
            match priority::stand_back() {
                Ok(thread) => *back = Some(thread),
                Err(_) => drop(priority::guest()),
            }
        }
        priority::let_in();
    }

    /// If a thread stands back, it has its share of a processor again.
    pub(super) fn come_forward(&self) {
        let mut back = lock(&self.back);
        if let Some(thread) = back.take() {
            // While the lock is held it does not end.
            let _ = priority::come_forward(thread);
        }
    }

    /// The first vCPU's thread is about to end.
    pub(crate) fn leave(&self) {
        lock(&self.back).take();
    }

    /// Closes the gate and waits until all `vcpus` threads have left their states. Everybody else must keep
    /// from opening it meanwhile.
    ///
    /// # Errors
    /// The first state that could not be taken, or that the microVM has stopped.
    pub(super) fn close(&self, vcpus: u8) -> Result<Vec<VcpuSnapshot>, VmmError> {
        let mut gate = lock(&self.gate);
        gate.asked = true;
        gate.parked.clear();
        self.closed.store(true, Ordering::Release);
        self.kick_all();
        self.gate_moved.notify_all();
        while gate.parked.len() < usize::from(vcpus) {
            if self.stopping() {
                return Err(VmmError::Stopped);
            }
            gate = self.gate_moved.wait(gate).unwrap_or_else(PoisonError::into_inner);
        }
        // A thread that wakes up later must not take its state again: it would hold the gate meanwhile.
        gate.asked = false;
        std::mem::take(&mut gate.parked).into_values().collect()
    }

    /// Opens the gate.
    pub(super) fn open(&self) {
        {
            let mut gate = lock(&self.gate);
            gate.approach = false;
            self.closed.store(false, Ordering::Release);
        }
        // Who is woken wants the gate at once.
        self.gate_moved.notify_all();
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn start_sampling(&self) {
        self.sampling.store(true, Ordering::Relaxed);
    }

    pub(crate) fn sampling(&self) -> bool {
        self.sampling.load(Ordering::Relaxed)
    }

    pub(crate) fn sample(&self, kernel: bool, rip: u64, stack: impl Iterator<Item = u64>) {
        lock(&self.samples).add(kernel, rip, stack);
    }

    pub(crate) fn count_assist(&self, op: Op) {
        lock(&self.assists).count(op);
    }

    pub(crate) fn count_ring0(&self, instructions: u64) {
        self.ring0_instructions.fetch_add(instructions, Ordering::Relaxed);
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
        let _gate = lock(&self.gate);
        self.gate_moved.notify_all();
    }

    pub(super) fn kick_all(&self) {
        for kick in lock(&self.vcpus).values() {
            kick.send();
        }
    }
}
