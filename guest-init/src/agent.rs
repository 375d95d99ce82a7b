//! The event loop: what the host says, what the commands say, who has ended.
//!
//! It may touch the connection, the table of commands and the children. A turn does every kind of work
//! a bounded amount and then sends what came of it; only when nothing is left to do does it wait.

use guest_init::{
    ADOPT_FAILED_CLOCK, ADOPT_FAILED_ENTROPY, ADOPT_FAILED_HOSTNAME, ADOPT_FAILED_IDS, Adopt, Decoder,
    ErrorCode, Exec, ExecFailed, Exited, FRAME_MAX_BYTES, Frame, Hello, ID_BYTES, Stage, ToGuest, ToHost,
    VERSION, WireError,
};

use crate::exec::{self, Means};
use crate::ids::Ids;
use crate::outbox::{OUTBOX_BYTES, Outbox};
use crate::ring::{Overflow, Ring};
use crate::stream::{STREAMS_MAX, State, Stream};
use crate::sys::{
    self, ChildEvents, Epoll, Errno, Events, Fd, Gate, READABLE, Scratch, Socket, SpawnFailed, WRITABLE,
};
use crate::text::Text;

const CONNECTION_KEY: u64 = u64::MAX;
const CHILDREN_KEY: u64 = u64::MAX - 1;
const LISTENER_KEY: u64 = u64::MAX - 2;
/// Keys of a stream's files are its slot times this, plus which file.
const KEYS_PER_SLOT: u64 = 4;
/// Children reaped in one turn; under a fork bomb the host's frames must get their turn too.
const REAPED_PER_TURN: usize = 128;
const BUILD: &str = env!("CARGO_PKG_VERSION");

/// Memory made before it is needed; see [`crate::MEMORY`].
pub(crate) struct Memory {
    inbox: [u8; FRAME_MAX_BYTES],
    outbox: [u8; OUTBOX_BYTES],
    scratch: Scratch,
    streams: [Stream; STREAMS_MAX],
    rings: [Ring; STREAMS_MAX],
}

impl Memory {
    pub(crate) const ZERO: Memory = Memory {
        inbox: [0; FRAME_MAX_BYTES],
        outbox: [0; OUTBOX_BYTES],
        scratch: Scratch::ZERO,
        streams: [Stream::FREE; STREAMS_MAX],
        rings: [Ring::ZERO; STREAMS_MAX],
    };
}

/// What the agent is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// PID 1 of a microVM: owns clock, names and power, and never ends.
    Init,
    /// A process among others, in a test: leaves the machine alone, and ends with its last connection.
    Hosted,
}

struct Connection {
    socket: Socket,
    readable: bool,
    hung_up: bool,
    writable: bool,
    /// epoll also tells when it is writable; only while something waits to be sent.
    watched_for_room: bool,
}

/// Why a connection is given up.
enum Fault {
    Wire(WireError),
    StdinOverflow { stream: u32 },
}

impl From<WireError> for Fault {
    fn from(error: WireError) -> Fault {
        Fault::Wire(error)
    }
}

/// The agent. The inbox is apart because a frame in it is read while all the rest changes.
pub(crate) struct Agent<'m> {
    inbox: Decoder<&'m mut [u8]>,
    core: Core<'m>,
}

struct Core<'m> {
    role: Role,
    entered_ns: u64,
    epoll: Epoll,
    children: ChildEvents,
    children_due: bool,
    null: Fd,
    own: Fd,
    listener: Option<Fd>,
    accept_due: bool,
    connection: Option<Connection>,
    outbox: Outbox<'m>,
    gate: Option<Gate>,
    ids: Option<Ids>,
    /// The host wants the guest to stand still at the gate.
    freeze_due: bool,
    /// The agent lets others finish first (`peregrine.batch=1`), and its children must not.
    patient: bool,
    scratch: &'m mut Scratch,
    streams: &'m mut [Stream; STREAMS_MAX],
    rings: &'m mut [Ring; STREAMS_MAX],
    /// Slots from here on were never used, so nobody need look at them.
    slots_used: usize,
    turn: u64,
    /// A frame found no room in the outbox.
    unsettled: bool,
    /// Frames lie in the inbox because their answers would find no room.
    frames_waiting: bool,
}

impl<'m> Agent<'m> {
    pub(crate) fn new(
        memory: &'m mut Memory,
        role: Role,
        entered_ns: u64,
        patient: bool,
        gate: Option<Gate>,
        ids: Option<Ids>,
    ) -> Result<Self, Errno> {
        let Memory { inbox, outbox, scratch, streams, rings } = memory;
        let null = Fd::null()?;
        let own = Fd::own_program()?;
        let children = ChildEvents::new()?;
        let epoll = Epoll::new()?;
        epoll.watch(children.fd(), READABLE, CHILDREN_KEY)?;
        let inbox = Decoder::new(&mut inbox[..]).map_err(|_| Errno::TOOBIG)?;
        let core = Core {
            role,
            entered_ns,
            epoll,
            children,
            children_due: false,
            null,
            own,
            listener: None,
            accept_due: false,
            connection: None,
            outbox: Outbox::new(outbox),
            gate,
            ids,
            freeze_due: false,
            patient,
            scratch,
            streams,
            rings,
            slots_used: 0,
            turn: 0,
            unsettled: false,
            frames_waiting: false,
        };
        Ok(Agent { inbox, core })
    }

    /// A connection to the host; it takes the place of one that there may be.
    pub(crate) fn connected(&mut self, socket: Socket) {
        self.inbox.reset();
        self.core.disconnected();
        self.core.connected(socket);
    }

    /// A socket for later connections.
    pub(crate) fn listen_on(&mut self, listener: Fd) {
        // Without it the present connection is the last; that is better than none.
        if self.core.epoll.watch(&listener, READABLE, LISTENER_KEY).is_ok() {
            self.core.listener = Some(listener);
        }
    }

    /// Serves for ever.
    pub(crate) fn serve(&mut self) -> ! {
        let mut events = Events::new();
        loop {
            if self.core.role == Role::Hosted
                && self.core.connection.is_none()
                && self.core.listener.is_none()
            {
                self.core.end_hosted();
            }
            let busy = self.core.has_work();
            if !busy {
                self.core.stop_watching_for_room();
            }
            // It can fail only by a bug (EBADF, EFAULT); PID 1 goes on with what it knows to be ready.
            if self.core.epoll.wait(&mut events, busy).is_ok() {
                self.core.mark(&events);
            }
            self.take_turn();
        }
    }

    fn take_turn(&mut self) {
        self.core.turn += 1;
        // Room first, if the host has taken something since.
        self.core.flush();
        if self.core.accept_due {
            self.accept();
        }
        if let Err(fault) = self.receive() {
            self.core.give_up(&fault);
        }
        self.core.pump();
        self.core.reap();
        self.core.settle();
        self.core.flush();
        self.freeze();
    }

    /// Stands at the gate, if the host has asked for it and has been sent everything.
    fn freeze(&mut self) {
        if !self.core.freeze_due || !self.core.outbox.pending().is_empty() {
            return;
        }
        self.core.freeze_due = false;
        if let Some(gate) = self.core.gate {
            let len = gate.freeze(self.inbox.space());
            self.inbox.filled(len);
            self.core.frames_waiting |= len > 0;
        }
    }

    fn accept(&mut self) {
        let Some(listener) = self.core.listener.as_ref() else { return };
        match Socket::accept(listener) {
            // The newest is the one that somebody is at the other end of: after a restore the old one's
            // host is gone, and nothing in the guest has heard of it.
            Ok(Some(socket)) => self.connected(socket),
            Ok(None) | Err(Errno::INTR) => {}
            // None waiting; or no memory, and the next one is a new event.
            Err(_) => self.core.accept_due = false,
        }
    }

    /// Handles the frames that are there, and reads more once.
    fn receive(&mut self) -> Result<(), Fault> {
        if self.core.frames_waiting {
            self.handle_frames()?;
        }
        let Some(connection) = self.core.connection.as_mut() else { return Ok(()) };
        if !connection.readable || !self.core.outbox.takes_small() {
            return Ok(());
        }
        let space = self.inbox.space();
        match connection.socket.receive(space) {
            Ok(len) if len > 0 => {
                // A stream socket that gives less than was asked for is empty.
                connection.readable = len == space.len() || connection.hung_up;
                self.inbox.filled(len);
                self.handle_frames()
            }
            Err(Errno::AGAIN) => {
                connection.readable = false;
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Ok(_) | Err(_) => {
                self.core.disconnected();
                Ok(())
            }
        }
    }

    fn handle_frames(&mut self) -> Result<(), Fault> {
        // Each frame causes at most one small frame at once.
        self.core.frames_waiting = true;
        while self.core.outbox.takes_small() {
            let Some(frame) = self.inbox.next_frame()? else {
                self.core.frames_waiting = false;
                break;
            };
            self.core.handle(&frame)?;
        }
        Ok(())
    }
}

impl Core<'_> {
    // Waiting.

    fn mark(&mut self, events: &Events) {
        for (key, ready) in events.iter() {
            match key {
                CONNECTION_KEY => {
                    if let Some(connection) = self.connection.as_mut() {
                        connection.readable |= ready.readable || ready.hung_up;
                        connection.writable |= ready.writable || ready.hung_up;
                        connection.hung_up |= ready.hung_up;
                    }
                }
                CHILDREN_KEY => {
                    self.children.clear();
                    self.children_due = true;
                }
                LISTENER_KEY => self.accept_due = true,
                key => {
                    if let Some(stream) = self.streams.get_mut((key / KEYS_PER_SLOT) as usize) {
                        stream.mark(key % KEYS_PER_SLOT, ready);
                    }
                }
            }
        }
    }

    /// Is there something to do that no new event will announce?
    fn has_work(&self) -> bool {
        let connection = self.connection.as_ref();
        let takes_small = self.outbox.takes_small();
        let takes_output = self.outbox.takes_output();
        self.children_due
            || self.accept_due
            || ((self.unsettled || self.frames_waiting) && takes_small)
            || connection.is_some_and(|connection| {
                (connection.readable && takes_small)
                    || (connection.writable && !self.outbox.pending().is_empty())
            })
            || self.streams[..self.slots_used].iter().any(|stream| stream.wants_turn(takes_output))
    }

    // The connection.

    fn connected(&mut self, socket: Socket) {
        if self.epoll.watch(socket.fd(), READABLE, CONNECTION_KEY).is_err() {
            return;
        }
        self.connection = Some(Connection {
            socket,
            readable: false,
            hung_up: false,
            writable: true,
            watched_for_room: false,
        });
        self.greet();
        self.settle();
        self.flush();
    }

    /// Says who this is and which commands there are, to a host that knows neither.
    fn greet(&mut self) {
        let (user_us, sys_us) = sys::usage_us();
        let hello = Hello {
            version: VERSION,
            entered_ns: self.entered_ns,
            now_ns: sys::boottime_ns(),
            user_us,
            sys_us,
            build: BUILD,
        };
        self.outbox.put(0, &ToHost::Hello(hello));
        for (stream, ring) in self.streams[..self.slots_used].iter_mut().zip(self.rings.iter()) {
            if stream.state == State::Live {
                stream.resume(ring);
            }
        }
    }

    /// Commands go on; their output stays in their pipes until somebody grants a window.
    fn disconnected(&mut self) {
        self.connection = None;
        self.frames_waiting = false;
        self.outbox.clear();
        for stream in &mut self.streams[..self.slots_used] {
            stream.disconnected();
        }
    }

    /// Says why, as far as the socket takes it, and closes the connection.
    fn give_up(&mut self, fault: &Fault) {
        match *fault {
            Fault::Wire(error) => self.refuse(0, ErrorCode::Protocol, format_args!("{error}")),
            Fault::StdinOverflow { stream } => {
                self.refuse(stream, ErrorCode::StdinOverflow, format_args!("more stdin than its window"));
            }
        }
        self.flush();
        self.disconnected();
    }

    fn flush(&mut self) {
        let Some(connection) = self.connection.as_mut() else { return };
        while connection.writable && !self.outbox.pending().is_empty() {
            match connection.socket.send(self.outbox.pending()) {
                Ok(len) => self.outbox.sent(len),
                Err(Errno::AGAIN) => connection.writable = false,
                Err(Errno::INTR) => {}
                Err(_) => return self.disconnected(),
            }
        }
        if !connection.writable && !connection.watched_for_room {
            let fd = connection.socket.fd();
            connection.watched_for_room = true;
            if self.epoll.change(fd, READABLE | WRITABLE, CONNECTION_KEY).is_err() {
                self.disconnected();
            }
        }
    }

    /// While the host keeps up, its taking of bytes is no event worth waking up for.
    fn stop_watching_for_room(&mut self) {
        let Some(connection) = self.connection.as_mut() else { return };
        if connection.watched_for_room && self.outbox.pending().is_empty() {
            let changed = self.epoll.change(connection.socket.fd(), READABLE, CONNECTION_KEY);
            connection.watched_for_room = changed.is_err();
        }
    }

    fn end_hosted(&self) -> ! {
        for stream in self.streams.iter().filter(|stream| stream.pid != 0) {
            sys::kill_if_alive(stream.pid);
        }
        sys::exit(0)
    }

    // Commands.

    /// One bounded portion of every command's bytes, either way.
    fn pump(&mut self) {
        let connected = self.connection.is_some();
        for (slot, stream) in self.streams[..self.slots_used].iter_mut().enumerate() {
            if stream.state == State::Free {
                continue;
            }
            stream.pump_stdin(&mut self.rings[slot], &self.epoll, key(slot));
            if connected && stream.state == State::Live {
                stream.pump_outputs(&mut self.outbox);
            }
            stream.discard_outputs(&self.null);
        }
    }

    fn reap(&mut self) {
        if !self.children_due {
            return;
        }
        for _ in 0..REAPED_PER_TURN {
            let Some(child) = sys::reap() else {
                self.children_due = false;
                return;
            };
            // Others are orphans, or children that could not execute their program.
            if let Some(stream) =
                self.streams[..self.slots_used].iter_mut().find(|stream| stream.pid == child.pid)
            {
                stream.reaped(Exited {
                    outcome: child.outcome(),
                    user_us: child.user_us,
                    sys_us: child.sys_us,
                    max_rss_kib: child.max_rss_kib,
                });
            }
        }
    }

    fn settle(&mut self) {
        self.unsettled = false;
        let connected = self.connection.is_some();
        for stream in &mut self.streams[..self.slots_used] {
            if connected {
                self.unsettled |= stream.settle(&mut self.outbox, self.turn);
            }
            if stream.is_done() {
                *stream = Stream::FREE;
            }
        }
    }

    fn find(&mut self, id: u32) -> Option<(usize, &mut Stream)> {
        let mut live = self.streams[..self.slots_used].iter_mut().enumerate();
        live.find(|(_, stream)| stream.state == State::Live && stream.id == id)
    }

    /// The first free slot, whose memory was used before; or that of the command whose
    /// background processes have been discarded longest, which then get SIGPIPE.
    fn free_slot(&mut self) -> Option<usize> {
        let free = self.streams.iter().position(|stream| stream.state == State::Free);
        let slot = free.or_else(|| {
            let discarding =
                self.streams.iter().enumerate().filter(|(_, stream)| stream.state == State::Discarding);
            discarding.min_by_key(|(_, stream)| stream.discarded_at).map(|(slot, _)| slot)
        })?;
        self.streams[slot] = Stream::FREE;
        self.rings[slot].clear();
        self.slots_used = self.slots_used.max(slot + 1);
        Some(slot)
    }

    // Frames.

    fn handle(&mut self, frame: &Frame<'_>) -> Result<(), Fault> {
        let id = frame.stream;
        let message = ToGuest::parse(frame)?;
        match message {
            ToGuest::Exec(exec) => self.exec(id, &exec),
            ToGuest::Ping { nonce } => {
                self.outbox.put(0, &ToHost::Pong { nonce });
            }
            ToGuest::Adopt(adopt) => self.adopt(&adopt),
            ToGuest::Freeze => self.freeze_due = self.gate.is_some(),
            ToGuest::Rejoin => self.greet(),
            ToGuest::Shutdown => match self.role {
                Role::Init => sys::reboot(),
                Role::Hosted => self.end_hosted(),
            },
            ToGuest::Stdin(_)
            | ToGuest::StdinEof
            | ToGuest::Signal { .. }
            | ToGuest::Resize { .. }
            | ToGuest::Window { .. }
            | ToGuest::Close => self.handle_for(id, &message)?,
        }
        Ok(())
    }

    /// What is about one command. One that has just ended is no error: the host cannot know yet.
    fn handle_for(&mut self, id: u32, message: &ToGuest<'_>) -> Result<(), Fault> {
        let Some((slot, _)) = self.find(id) else { return Ok(()) };
        let (stream, ring) = (&mut self.streams[slot], &mut self.rings[slot]);
        let mut result = Ok(());
        match *message {
            ToGuest::Stdin(bytes) => stream
                .take_stdin(bytes, ring, &self.epoll, key(slot))
                .map_err(|Overflow| Fault::StdinOverflow { stream: id })?,
            ToGuest::StdinEof => stream.end_stdin(ring),
            ToGuest::Window { bytes } => stream.add_window(bytes),
            ToGuest::Resize { rows, cols } => result = stream.resize(rows, cols),
            ToGuest::Signal { signo } if stream.pid != 0 => result = sys::kill_group(stream.pid, signo),
            ToGuest::Close => stream.close(),
            _ => {}
        }
        if let Err(Errno(number)) = result {
            self.refuse(id, ErrorCode::Refused, format_args!("{:?}: errno {number}", message.kind()));
        }
        Ok(())
    }

    fn refuse(&mut self, id: u32, code: ErrorCode, what: core::fmt::Arguments<'_>) {
        let mut text = Text::new();
        text.add(what);
        self.outbox.put(id, &ToHost::Error { code, text: text.bytes() });
    }

    fn exec(&mut self, id: u32, exec: &Exec<'_>) {
        if self.find(id).is_some() {
            return self.refuse(id, ErrorCode::StreamInUse, format_args!("stream {id} has a command"));
        }
        let started = match self.free_slot() {
            Some(slot) => {
                let means = Means {
                    epoll: &self.epoll,
                    null: &self.null,
                    own: &self.own,
                    patient: self.patient,
                    scratch: self.scratch,
                };
                exec::start(id, exec, key(slot), means).map(|stream| self.streams[slot] = stream)
            }
            None => Err(SpawnFailed { errno: Errno::AGAIN, stage: Stage::Limits }),
        };
        if let Err(SpawnFailed { errno: Errno(number), stage }) = started {
            let mut text = Text::new();
            let about = if stage == Stage::Cwd { exec.cwd } else { exec.argv.iter().next().unwrap_or(c"") };
            text.add_bytes(about.to_bytes());
            self.outbox
                .put(id, &ToHost::ExecFailed(ExecFailed { errno: number as u32, stage, text: text.bytes() }));
        }
    }

    fn adopt(&mut self, adopt: &Adopt<'_>) {
        let mut failed = 0;
        let mut attempt = |flag: u8, wanted: bool, action: &dyn Fn() -> Result<(), Errno>| {
            let allowed = if self.role == Role::Init { Ok(()) } else { Err(Errno::PERM) };
            if wanted && allowed.and_then(|()| action()).is_err() {
                failed |= flag;
            }
        };
        attempt(ADOPT_FAILED_CLOCK, adopt.wall_clock_ns != 0, &|| sys::set_wall_clock(adopt.wall_clock_ns));
        attempt(ADOPT_FAILED_HOSTNAME, !adopt.hostname.is_empty(), &|| sys::set_hostname(adopt.hostname));
        attempt(ADOPT_FAILED_IDS, adopt.machine_id != [0; ID_BYTES], &|| {
            self.ids.as_ref().ok_or(Errno::NOENT)?.set(adopt.machine_id, adopt.boot_id)
        });
        attempt(ADOPT_FAILED_ENTROPY, !adopt.entropy.is_empty(), &|| sys::add_entropy(adopt.entropy));
        self.outbox.put(0, &ToHost::Adopted { failed });
    }
}

/// The key of the first of a stream's files.
fn key(slot: usize) -> u64 {
    slot as u64 * KEYS_PER_SLOT
}
