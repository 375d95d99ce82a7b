//! The event loop of a microVM: one thread, one io_uring, for everything but the vCPUs.
//!
//! It waits for block completions, the host's ends of vsock connections, doorbells that a vCPU
//! thread did not serve itself, and commands from other threads. It owns no device: it locks
//! one at a time, briefly. It may touch the ring and the devices; it must not touch KVM.
//!
//! Order on start: bus and devices, then the thread. On stop: the thread ends after the last
//! operation that may touch guest memory, then the devices go.

mod bell;
mod bus;
pub mod ring;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use self::bell::{ATTENTION, BITS_PER_DEVICE, Bell, COMMAND, MAX_DEVICES, STOP, bit};
pub use self::bus::Bus;
use self::bus::{Port, Slot};
use self::ring::{Completion, Op, Ring};
use crate::devices::block::Block;
use crate::devices::entropy::Entropy;
use crate::devices::mmio::{Device, Done, Line, Mmio, State, Wiring};
use crate::devices::virtqueue::Turn;
use crate::devices::vsock::{ConnectReply, HostEnd, Vsock};
use crate::devices::{Counters, DeviceError, DevicesConfig, GuestMemory, Interrupt, Stats};

/// Submission entries; more operations than that wait in a list of their own.
const RING_ENTRIES: u32 = 128;
/// Owner of the poll on the doorbell's eventfd.
const DOORBELL: u64 = u64::MAX;
/// How long the loop stays awake for a command that was announced: longer than it takes to stop a vCPU.
const ATTENTION_SPAN: Duration = Duration::from_micros(500);
/// How long [`LoopHandle::connect_when_ready`] first waits before it asks again.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
/// How long it waits at most: each question costs the guest an interrupt.
const LONGEST_PAUSE: Duration = Duration::from_millis(320);

enum Command {
    Listen { host_port: u32, reply: Sender<io::Result<Receiver<UnixStream>>> },
    Connect { guest_port: u32, reply: ConnectReply },
    Attend,
    Pause { reply: Sender<Vec<State>>, resume: Receiver<()> },
}

/// The other threads' end of the event loop. Dropping it ends the loop.
pub struct LoopHandle {
    bell: Arc<Bell>,
    commands: Sender<Command>,
    counters: Arc<Counters>,
    host_ends: Mutex<Vec<HostEnd>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// A loop's thread with its ring, before there are devices: a quarter of a millisecond that need not be on
/// the way of a restore. Dropped, it ends.
pub struct Idle {
    thread: Option<JoinHandle<()>>,
    work: Option<Sender<Parts>>,
    ready: Receiver<io::Result<()>>,
}

/// Starts a loop's thread. Whether it could make its ring is known when it gets its devices.
pub fn idle() -> Result<Idle, DeviceError> {
    let (work, inbox) = channel::<Parts>();
    let (report, ready) = channel();
    let body = move || {
        // The ring belongs to the thread that makes it (IORING_SETUP_SINGLE_ISSUER).
        match Ring::new(RING_ENTRIES) {
            Ok(ring) => {
                // Nobody looks if there will be no devices.
                let _ = report.send(Ok(()));
                if let Ok(parts) = inbox.recv() {
                    let mut event_loop = EventLoop { parts, ring, pauses: Vec::new(), attends: None };
                    event_loop.arm_doorbell();
                    event_loop.run();
                }
            }
            Err(error) => {
                let _ = report.send(Err(error));
            }
        }
    };
    let thread = std::thread::Builder::new().name("vmm-loop".into()).spawn(body);
    let thread = thread.map_err(DeviceError::EventLoop)?;
    Ok(Idle { thread: Some(thread), work: Some(work), ready })
}

/// Makes the devices and has the loop serve them.
pub fn start(
    idle: Idle,
    config: DevicesConfig,
    mem: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
) -> Result<(Arc<Bus>, LoopHandle), DeviceError> {
    let most = MAX_DEVICES - 2;
    if config.disks.len() > most {
        return Err(DeviceError::TooManyDisks { count: config.disks.len(), most });
    }
    let counters = Arc::new(Counters::default());
    let bell = Arc::new(Bell::new(Arc::clone(&counters)).map_err(DeviceError::EventLoop)?);
    let mut build = Builder {
        mem: Arc::new(mem),
        interrupt,
        counters: Arc::clone(&counters),
        bell: Arc::clone(&bell),
        loop_ended: Arc::default(),
        first_gsi: config.first_gsi,
        states: config.states.into(),
        ports: Vec::new(),
    };
    let restores = !build.states.is_empty();
    let devices = config.disks.len() + 2;
    if restores && build.states.len() != devices {
        return Err(DeviceError::StateCount { states: build.states.len(), devices });
    }
    for disk in config.disks {
        let device = Block::new(disk)?;
        build.add(device)?;
    }
    let (vsock, host_ends) = match build.states.front() {
        Some(state) => Vsock::restored(state).map_err(DeviceError::EventLoop)?,
        None => (Vsock::default(), Vec::new()),
    };
    let vsock = build.add(vsock)?;
    build.add(Entropy)?;
    let Builder { loop_ended, ports, .. } = build;
    let bus = Arc::new(Bus::new(config.mmio_base, config.first_gsi, ports.clone()));
    let (commands, inbox) = channel();
    if restores {
        ports.iter().for_each(|port| port.renew_interrupt());
    }
    let parts = Parts { ports, vsock, bell: Arc::clone(&bell), inbox, loop_ended };
    let thread = idle.serve(parts)?;
    if restores {
        // Doorbells that were rung before the snapshot are not rung again.
        (0..devices)
            .for_each(|device| bell.ring((0..ATTENTION).fold(0, |bits, queue| bits | bit(device, queue))));
    }
    let host_ends = Mutex::new(host_ends);
    Ok((bus, LoopHandle { bell, commands, counters, host_ends, thread: Mutex::new(Some(thread)) }))
}

struct Builder {
    mem: Arc<GuestMemory>,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
    bell: Arc<Bell>,
    loop_ended: Arc<AtomicBool>,
    first_gsi: u32,
    states: std::collections::VecDeque<State>,
    ports: Vec<Arc<dyn Port>>,
}

impl Builder {
    fn add<D: Device + 'static>(&mut self, device: D) -> Result<Arc<Slot<D>>, DeviceError> {
        let index = self.ports.len();
        // At most MAX_DEVICES.
        let gsi = self.first_gsi + index as u32;
        let line = Arc::new(Line::new(gsi, Arc::clone(&self.interrupt), Arc::clone(&self.counters)));
        let wiring = Wiring {
            mem: Arc::clone(&self.mem),
            line: Arc::clone(&line),
            counters: Arc::clone(&self.counters),
        };
        let state = self.states.pop_front().unwrap_or_default();
        let mmio =
            Mmio::new(state, device, wiring).map_err(|why| DeviceError::BadState { device: index, why })?;
        let (bell, counters) = (Arc::clone(&self.bell), Arc::clone(&self.counters));
        let slot = Arc::new(Slot::new(index, mmio, line, bell, counters, Arc::clone(&self.loop_ended)));
        self.ports.push(Arc::clone(&slot) as Arc<dyn Port>);
        Ok(slot)
    }
}

/// What the loop thread takes over.
struct Parts {
    ports: Vec<Arc<dyn Port>>,
    vsock: Arc<Slot<Vsock>>,
    bell: Arc<Bell>,
    inbox: Receiver<Command>,
    loop_ended: Arc<AtomicBool>,
}

impl Idle {
    fn serve(mut self, parts: Parts) -> Result<JoinHandle<()>, DeviceError> {
        self.ready.recv().map_err(|_| DeviceError::Stopped)?.map_err(DeviceError::EventLoop)?;
        let work = self.work.take().ok_or(DeviceError::Stopped)?;
        work.send(parts).map_err(|_| DeviceError::Stopped)?;
        self.thread.take().ok_or(DeviceError::Stopped)
    }
}

/// A restore that failed leaves no thread behind.
impl Drop for Idle {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct EventLoop {
    parts: Parts,
    ring: Ring,
    /// Pauses that wait for operations in flight.
    pauses: Vec<(Sender<Vec<State>>, Receiver<()>)>,
    /// Until when not to sleep.
    attends: Option<Instant>,
}

impl EventLoop {
    fn arm_doorbell(&mut self) {
        let fd = self.parts.bell.pollable();
        // Multishot: an eventfd reports every write, so its counter need not be read.
        self.ring.push(DOORBELL, Op::Poll { token: 0, fd, events: libc::POLLIN, multi: true });
    }

    fn run(&mut self) {
        let mut completions = Vec::new();
        loop {
            let pending = self.parts.bell.take();
            if pending & STOP != 0 {
                break;
            }
            self.serve(pending);
            if pending & COMMAND != 0 {
                self.obey();
            }
            self.pause_when_drained();
            let entered = if !self.attending() && self.parts.bell.may_sleep() {
                self.ring.wait()
            } else {
                self.ring.submit()
            };
            if entered.is_err() {
                // The ring is unusable: without it no request would ever be answered.
                break;
            }
            self.ring.drain(&mut completions);
            for completion in completions.drain(..) {
                self.dispatch(completion);
            }
        }
        self.parts.loop_ended.store(true, Ordering::SeqCst);
        self.parts.ports.iter().for_each(|port| port.abandon());
    }

    /// Whether a command is on its way that shall not wait for this thread to wake up.
    fn attending(&mut self) -> bool {
        self.attends = self.attends.filter(|until| Instant::now() < *until);
        if self.attends.is_some() {
            // Whoever else wants this CPU may have it.
            std::thread::yield_now();
        }
        self.attends.is_some()
    }

    fn serve(&mut self, pending: u64) {
        let mut ops = Vec::new();
        for (device, port) in self.parts.ports.iter().enumerate() {
            let bits = pending >> (device * BITS_PER_DEVICE) & ((1 << BITS_PER_DEVICE) - 1);
            if bits != 0 {
                port.service(bits, &mut ops);
                submit(&mut self.ring, device, &mut ops);
            }
        }
    }

    fn dispatch(&mut self, completion: Completion) {
        let Completion { owner, result, more, buffers } = completion;
        if owner == DOORBELL {
            if !more {
                self.arm_doorbell();
            }
            return;
        }
        let mut ops = Vec::new();
        // The reverse of `submit`.
        let device = usize::try_from(owner >> 32).unwrap_or(usize::MAX);
        if let Some(port) = self.parts.ports.get(device) {
            port.complete(Done { token: owner as u32, result, more, buffers }, &mut ops);
            submit(&mut self.ring, device, &mut ops);
        }
    }

    fn obey(&mut self) {
        while let Ok(command) = self.parts.inbox.try_recv() {
            match command {
                // Askers that have gone need no answer.
                Command::Listen { host_port, reply } => {
                    let _ = reply.send(self.parts.vsock.lock().device().listen(host_port));
                }
                Command::Connect { guest_port, reply } => self.connect(guest_port, reply),
                Command::Attend => self.attends = Some(Instant::now() + ATTENTION_SPAN),
                Command::Pause { reply, resume } => {
                    self.attends = None;
                    self.pauses.push((reply, resume));
                }
            }
        }
    }

    fn connect(&mut self, guest_port: u32, reply: ConnectReply) {
        // The vsock device stands before the entropy device.
        let device = self.parts.ports.len() - 2;
        let mut mmio = self.parts.vsock.lock();
        let turn = mmio.with_device(|vsock, host| vsock.connect(guest_port, reply, host));
        let mut ops = mmio.take_ops();
        drop(mmio);
        submit(&mut self.ring, device, &mut ops);
        if turn == Some(Turn::More) {
            self.parts.bell.ring(bit(device, 0));
        }
    }

    /// Stands still while somebody holds a [`Paused`], with no lock held.
    fn pause_when_drained(&mut self) {
        if self.pauses.is_empty() {
            return;
        }
        let states: Option<Vec<State>> = self.parts.ports.iter().map(|port| port.settled_state()).collect();
        let Some(states) = states else { return };
        for (reply, resume) in self.pauses.drain(..) {
            if reply.send(states.clone()).is_ok() {
                // Nothing is ever sent: this ends when the other end is dropped.
                let _ = resume.recv();
            }
        }
    }
}

fn submit(ring: &mut Ring, device: usize, ops: &mut Vec<Op>) {
    for op in ops.drain(..) {
        let token = op.token();
        ring.push((device as u64) << 32 | u64::from(token), op);
    }
}

impl LoopHandle {
    /// Connections that the guest makes to `host_port`; at most 16 wait to be taken.
    ///
    /// The cheapest way to talk to a guest agent: it connects when it is ready, nobody polls.
    pub fn listen(&self, host_port: u32) -> io::Result<Receiver<UnixStream>> {
        let (reply, answer) = channel();
        self.command(Command::Listen { host_port, reply })?;
        answer.recv().map_err(|_| stopped())?
    }

    /// The host's end of the connection that the snapshot had to `host_port`, once.
    pub fn restored_connection(&self, host_port: u32) -> Option<UnixStream> {
        let mut ends = self.host_ends.lock().unwrap_or_else(PoisonError::into_inner);
        let index = ends.iter().position(|end| end.host_port == host_port)?;
        Some(ends.swap_remove(index).stream)
    }

    /// Connects to `guest_port`; refused if nobody listens there.
    ///
    /// A guest without a driver yet does not refuse: the request waits for it, up to `timeout`.
    pub fn connect(&self, guest_port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let (reply, answer) = channel();
        self.command(Command::Connect { guest_port, reply })?;
        match answer.recv_timeout(timeout) {
            Ok(outcome) => outcome,
            // If the guest answers later, it finds the other end closed.
            Err(RecvTimeoutError::Timeout) => Err(io::ErrorKind::TimedOut.into()),
            Err(RecvTimeoutError::Disconnected) => Err(stopped()),
        }
    }

    /// Connects to `guest_port` as soon as somebody listens there.
    ///
    /// Asks again and again, ever more slowly; prefer [`LoopHandle::listen`].
    pub fn connect_when_ready(&self, guest_port: u32, timeout: Duration) -> io::Result<UnixStream> {
        let deadline = Instant::now() + timeout;
        let mut pause = FIRST_PAUSE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.connect(guest_port, left) {
                Err(error) if error.kind() == io::ErrorKind::ConnectionRefused && left > pause => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
                outcome => return outcome,
            }
        }
    }

    /// Wakes the loop for a [`LoopHandle::pause`] that is about to come: its thread wakes up while the vCPUs stop,
    /// not after.
    pub(crate) fn attend(&self) {
        // A loop that has ended says so when it is to pause.
        let _ = self.command(Command::Attend);
    }

    /// Waits for the I/O in flight, then holds the loop still until the guard is dropped.
    ///
    /// The vCPUs must be paused before. I/O that ends here raises interrupts, so this comes before the
    /// interrupt controllers are saved; guest memory does not change while the guard lives.
    pub fn pause(&self) -> Result<Paused, DeviceError> {
        let (reply, answer) = channel();
        let (hold, resume) = channel();
        self.command(Command::Pause { reply, resume }).map_err(|_| DeviceError::Stopped)?;
        let states = answer.recv().map_err(|_| DeviceError::Stopped)?;
        Ok(Paused { states, _hold: hold })
    }

    /// What has been done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.counters.snapshot()
    }

    /// Asks the loop to end; does not wait.
    pub fn stop(&self) {
        self.bell.ring(STOP);
    }

    /// Waits until the loop has ended; no operation touches guest memory afterwards.
    pub fn join(&self) {
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = thread {
            // A panic in the loop has been reported by the thread itself.
            let _ = thread.join();
        }
    }

    fn command(&self, command: Command) -> io::Result<()> {
        self.commands.send(command).map_err(|_| stopped())?;
        self.bell.ring(COMMAND);
        Ok(())
    }
}

/// The loop stands still as long as this lives.
#[derive(Debug)]
pub struct Paused {
    states: Vec<State>,
    _hold: Sender<()>,
}

impl Paused {
    /// The devices' states, in bus order.
    #[must_use]
    pub fn states(&self) -> &[State] {
        &self.states
    }
}

impl Drop for LoopHandle {
    fn drop(&mut self) {
        self.stop();
        self.join();
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, DeviceError::Stopped)
}
