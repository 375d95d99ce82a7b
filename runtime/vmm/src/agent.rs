//! The host's end of the conversation with PID 1: says who the guest is, starts commands, passes bytes on.
//!
//! Blocking, over the Unix stream that stands for a vsock connection. What a guest sends is checked by the
//! wire's decoder; a guest that breaks the protocol costs its own connection and nothing else.

use crate::event_loop::ring::peek_bytes;
use crate::snapshot::AgentState;
use guest_init::{
    Adopt, Decoder, EXEC_LAZY_STARTED, EXEC_PTY, EXEC_STDIN, ExecFailed, ExecRequest, Exited,
    FRAME_MAX_BYTES, ID_BYTES, INITIAL_WINDOW_BYTES, PAYLOAD_MAX_BYTES, ToGuest, ToHost, VERSION, WireError,
};
use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::ops::ControlFlow;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

pub use guest_init::{AGENT_PORT, Outcome, Stage};

/// What can go wrong between host and agent.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The connection ended; the microVM's stop reason says why.
    #[error("the guest closed the connection")]
    Closed,
    /// The guest did not say what was due in time.
    #[error("the guest did not answer within {0:?}")]
    Timeout(Duration),
    /// The connection failed.
    #[error("connection to the guest: {0}")]
    Io(io::Error),
    /// The guest broke the protocol.
    #[error("the guest broke the protocol: {0}")]
    Wire(#[from] WireError),
    /// The agent speaks another version.
    #[error("the guest's agent speaks version {guest} of the protocol, this host speaks {VERSION}")]
    Version {
        /// Its version.
        guest: u16,
    },
    /// The agent refused something.
    #[error("the guest's agent refused: {0}")]
    Refused(String),
}

impl AgentError {
    fn io(e: io::Error, timeout: Option<Duration>) -> Self {
        match (e.kind(), timeout) {
            (io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut, Some(t)) => Self::Timeout(t),
            (io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset, _) => Self::Closed,
            _ => Self::Io(e),
        }
    }
}

/// The sending half: may be cloned and used from other threads.
#[derive(Debug, Clone)]
pub struct AgentWriter {
    stream: Arc<Mutex<UnixStream>>,
}

impl AgentWriter {
    /// Sends one message about `stream` (0 where it is about none).
    ///
    /// # Errors
    /// [`AgentError::Closed`] when the guest is gone, [`AgentError::Wire`] when the message is too long.
    pub fn send(&self, stream: u32, message: &ToGuest<'_>) -> Result<(), AgentError> {
        let payload = if let ToGuest::Stdin(bytes) = message { bytes.len() } else { 1024 };
        let mut frame = vec![0; (payload + 64).min(FRAME_MAX_BYTES)];
        let len = message.encode(stream, &mut frame)?;
        self.write(&frame[..len])
    }

    fn exec<S: AsRef<[u8]>>(&self, stream: u32, request: &ExecRequest<'_, S>) -> Result<(), AgentError> {
        let mut frame = vec![0; FRAME_MAX_BYTES];
        let len = request.encode(stream, &mut frame)?;
        self.write(&frame[..len])
    }

    fn write(&self, frame: &[u8]) -> Result<(), AgentError> {
        let mut socket = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        socket.write_all(frame).map_err(|e| AgentError::io(e, None))
    }
}

/// What the agent said of itself when it connected.
#[derive(Debug, Clone, Copy)]
pub struct Boot {
    /// Guest boot clock at PID 1's first instruction.
    pub entered: Duration,
    /// Guest boot clock when it said hello.
    pub now: Duration,
    /// When the host heard that hello.
    pub heard: Instant,
}

impl Boot {
    /// When PID 1 executed its first instruction, on the host's clock: the guest's says how long before its
    /// hello that was.
    #[must_use]
    pub fn pid1(&self) -> Instant {
        let ago = self.now.saturating_sub(self.entered);
        self.heard.checked_sub(ago).unwrap_or(self.heard)
    }
}

/// Who a guest is told to be.
#[derive(Debug, Clone)]
pub struct Identity {
    /// Its host name.
    pub hostname: String,
    /// Fresh entropy, used once.
    pub entropy: [u8; 64],
    /// What its /etc/machine-id says.
    pub machine_id: [u8; ID_BYTES],
    /// What its /proc/sys/kernel/random/boot_id says.
    pub boot_id: [u8; ID_BYTES],
}

impl Identity {
    /// A new identity, all of it fresh from the host's kernel's random bytes.
    ///
    /// # Errors
    /// If the host's kernel gives no random bytes.
    pub fn fresh() -> io::Result<Self> {
        let mut random = [0_u8; 100];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let mut entropy = [0; 64];
        entropy.copy_from_slice(&random[..64]);
        let name: String = random[64..68].iter().map(|b| format!("{b:02x}")).collect();
        let (machine_id, boot_id) = (uuid(&random[68..84]), uuid(&random[84..100]));
        Ok(Self { hostname: format!("pg-{name}"), entropy, machine_id, boot_id })
    }
}

/// Random bytes as a UUID of version 4 (RFC 9562, 5.4).
fn uuid(random: &[u8]) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    id.copy_from_slice(random);
    id[6] = id[6] & 0x0f | 0x40;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

/// A connection to a guest's agent.
#[derive(Debug)]
pub struct Agent {
    socket: UnixStream,
    writer: AgentWriter,
    decoder: Decoder<Vec<u8>>,
    timeout: Option<Duration>,
    next_stream: u32,
    /// Commands that have not ended.
    streams: BTreeSet<u32>,
}

/// A command to start in the guest.
#[derive(Debug, Clone, Default)]
pub struct Command {
    /// The program and its arguments, without NUL.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE` each.
    pub env: Vec<Vec<u8>>,
    /// Working directory, absolute.
    pub cwd: Vec<u8>,
    /// Rows and columns of its pseudo-terminal, if it is to have one.
    pub terminal: Option<(u16, u16)>,
    /// Its standard input comes from the host; else it is `/dev/null`.
    pub stdin: bool,
    /// User and group number, if not root.
    pub user: Option<(u32, u32)>,
}

impl Command {
    /// A command with its arguments, in `/`, without standard input.
    #[must_use]
    pub fn new<S: AsRef<[u8]>>(argv: &[S]) -> Self {
        Self {
            argv: argv.iter().map(|a| a.as_ref().to_vec()).collect(),
            cwd: b"/".to_vec(),
            ..Self::default()
        }
    }

    /// What the wire asks for it, with more flags of `Exec` than follow from the command.
    #[must_use]
    pub fn request(&self, mut flags: u8) -> ExecRequest<'_, Vec<u8>> {
        flags |= EXEC_LAZY_STARTED;
        if self.terminal.is_some() {
            flags |= EXEC_PTY;
        }
        if self.stdin {
            flags |= EXEC_STDIN;
        }
        let (rows, cols) = self.terminal.unwrap_or((0, 0));
        ExecRequest { flags, rows, cols, user: self.user, cwd: &self.cwd, argv: &self.argv, env: &self.env }
    }
}

impl From<&Agent> for AgentState {
    fn from(agent: &Agent) -> Self {
        agent.own_state()
    }
}

impl AgentState {
    /// Adds what the connection holds unread, and keeps what is no whole frame.
    pub(crate) fn add_unread(&mut self, socket: &UnixStream) -> Result<(), AgentError> {
        self.unread.extend(peek_bytes(socket).map_err(AgentError::Io)?);
        let mut decoder = Decoder::new(vec![0; self.unread.len().max(FRAME_MAX_BYTES)])?;
        decoder.push(&self.unread);
        while decoder.next_frame()?.is_some() {}
        self.unread = decoder.pending().to_vec();
        Ok(())
    }
}

/// How a command ended, and all it wrote.
#[derive(Debug)]
pub struct Output {
    /// Its exit code or signal; `Err` holds the exit code a shell would give for one that never started.
    pub exit: Result<Exited, u8>,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
}

impl Output {
    /// The code a shell would report: 128+n for signal n, 126 or 127 for a command that never started.
    #[must_use]
    pub fn code(&self) -> u8 {
        self.exit.map_or_else(|code| code, |exited| exited.shell_code())
    }
}

impl Agent {
    /// Takes over a fresh connection: reads the agent's hello within `timeout`.
    ///
    /// # Errors
    /// [`AgentError::Timeout`], [`AgentError::Version`], or what broke.
    pub fn greet(socket: UnixStream, timeout: Duration) -> Result<(Self, Boot), AgentError> {
        let clone = socket.try_clone().map_err(AgentError::Io)?;
        let mut agent = Self {
            socket,
            writer: AgentWriter { stream: Arc::new(Mutex::new(clone)) },
            decoder: Decoder::new(vec![0; 2 * FRAME_MAX_BYTES])?,
            timeout: None,
            next_stream: 1,
            streams: BTreeSet::new(),
        };
        agent.set_timeout(Some(timeout))?;
        let boot = agent.pump(|_, message| match message {
            ToHost::Hello(hello) if hello.version == VERSION => Ok(ControlFlow::Break(Boot {
                entered: Duration::from_nanos(hello.entered_ns),
                now: Duration::from_nanos(hello.now_ns),
                heard: Instant::now(),
            })),
            ToHost::Hello(hello) => Err(AgentError::Version { guest: hello.version }),
            other => Err(unexpected(&other)),
        })?;
        agent.set_timeout(None)?;
        Ok((agent, boot))
    }

    /// Takes over the restored end of a snapshot's connection: the conversation goes on where it stood. The
    /// commands that ran then go on too, but nobody here knows them: their output is discarded.
    ///
    /// # Errors
    /// If the socket refuses, or the saved bytes cannot be a frame.
    pub fn resume(socket: UnixStream, saved: &AgentState) -> Result<Self, AgentError> {
        let clone = socket.try_clone().map_err(AgentError::Io)?;
        let mut decoder = Decoder::new(vec![0; 2 * FRAME_MAX_BYTES])?;
        // Less than a frame.
        decoder.push(&saved.unread);
        let writer = AgentWriter { stream: Arc::new(Mutex::new(clone)) };
        for stream in &saved.streams {
            writer.send(*stream, &ToGuest::Close)?;
        }
        let streams = BTreeSet::new();
        Ok(Self { socket, writer, decoder, timeout: None, next_stream: saved.next_stream, streams })
    }

    /// Where the conversation stands: for a snapshot, while the microVM is paused. Whole frames that nobody
    /// has looked at are left out, as their streams are.
    ///
    /// # Errors
    /// What the guest sent that is no frame.
    pub fn state(&self) -> Result<AgentState, AgentError> {
        let mut state = self.own_state();
        state.add_unread(&self.socket)?;
        Ok(state)
    }

    /// The part of [`Agent::state`] that is known without looking at the connection.
    pub(crate) fn own_state(&self) -> AgentState {
        AgentState {
            next_stream: self.next_stream,
            streams: self.streams.iter().copied().collect(),
            unread: self.decoder.pending().to_vec(),
        }
    }

    /// The connection, and where the conversation on it stands: for an owner who does not block.
    #[must_use]
    pub fn into_parts(self) -> (UnixStream, AgentState) {
        let state = self.own_state();
        (self.socket, state)
    }

    /// Gives up waiting for the guest after `timeout` without a byte from it; `None` waits for ever.
    ///
    /// # Errors
    /// If the socket refuses.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) -> Result<(), AgentError> {
        self.timeout = timeout;
        self.socket.set_read_timeout(timeout).map_err(AgentError::Io)
    }

    /// Tells the guest who it is and what time it is. Nothing may run in it before this is acknowledged.
    ///
    /// # Errors
    /// [`AgentError::Refused`] naming what the guest could not do.
    pub fn adopt(&mut self, identity: &Identity) -> Result<(), AgentError> {
        self.send_frame(&Self::adopt_frame(identity)?)?;
        self.end_adopt()
    }

    /// Sends a frame that is encoded already.
    pub(crate) fn send_frame(&self, frame: &[u8]) -> Result<(), AgentError> {
        self.writer.write(frame)
    }

    /// The new identity as a frame.
    pub(crate) fn adopt_frame(identity: &Identity) -> Result<Vec<u8>, AgentError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let adopt = Adopt {
            entropy: &identity.entropy,
            wall_clock_ns: u64::try_from(now.as_nanos()).unwrap_or(u64::MAX),
            hostname: identity.hostname.as_bytes(),
            machine_id: identity.machine_id,
            boot_id: identity.boot_id,
        };
        let mut frame = vec![0; 1024];
        let len = ToGuest::Adopt(adopt).encode(0, &mut frame)?;
        frame.truncate(len);
        Ok(frame)
    }

    /// Waits until the guest has taken it.
    pub(crate) fn end_adopt(&mut self) -> Result<(), AgentError> {
        self.pump(|stream, message| match message {
            // In a fork, commands that ran in its parent may end before it is adopted.
            _ if stream != 0 => Ok(ControlFlow::Continue(())),
            ToHost::Adopted { failed: 0 } => Ok(ControlFlow::Break(())),
            ToHost::Adopted { failed } => {
                Err(AgentError::Refused(format!("adopt failed (parts {failed:#x})")))
            }
            other => Err(unexpected(&other)),
        })
    }

    /// The sending half.
    #[must_use]
    pub fn writer(&self) -> AgentWriter {
        self.writer.clone()
    }

    /// Asks the guest to start `command` and returns the number of its stream.
    ///
    /// # Errors
    /// [`AgentError::Wire`] for a command that does not fit one frame or holds a NUL.
    pub fn exec(&mut self, command: &Command) -> Result<u32, AgentError> {
        let stream = self.next_stream;
        self.next_stream += 1;
        self.writer.exec(stream, &command.request(0))?;
        self.streams.insert(stream);
        Ok(stream)
    }

    /// Hands every message of the guest to `on`, until it breaks with a value.
    ///
    /// # Errors
    /// What `on` returns, or what ended the connection.
    pub fn pump<T>(
        &mut self,
        mut on: impl FnMut(u32, ToHost<'_>) -> Result<ControlFlow<T>, AgentError>,
    ) -> Result<T, AgentError> {
        loop {
            while let Some(frame) = self.decoder.next_frame()? {
                let message = ToHost::parse(&frame)?;
                if let ToHost::Error { code, text } = message {
                    let text = String::from_utf8_lossy(text);
                    return Err(AgentError::Refused(format!("{code:?}: {text}")));
                }
                if matches!(message, ToHost::Exited(_) | ToHost::ExecFailed(_)) {
                    self.streams.remove(&frame.stream);
                }
                if let ControlFlow::Break(value) = on(frame.stream, message)? {
                    return Ok(value);
                }
            }
            match self.socket.read(self.decoder.space()) {
                Ok(0) => return Err(AgentError::Closed),
                Ok(len) => self.decoder.filled(len),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(AgentError::io(e, self.timeout)),
            }
        }
    }

    /// Runs `command` to its end with `stdin` as its input, and keeps all it writes in memory.
    ///
    /// # Errors
    /// What ended the connection first.
    pub fn output(&mut self, command: &Command, stdin: &[u8]) -> Result<Output, AgentError> {
        let with_stdin = Command { stdin: !stdin.is_empty() || command.stdin, ..command.clone() };
        let stream = self.exec(&with_stdin)?;
        let writer = self.writer();
        let mut feed = Feed::new(stream, stdin, with_stdin.stdin);
        feed.send(&writer)?;
        let mut grants = Grants::new(stream);
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = self.pump(|from, message| {
            if from != stream {
                return Ok(ControlFlow::Continue(()));
            }
            match message {
                ToHost::Stdout(bytes) => {
                    stdout.extend_from_slice(bytes);
                    grants.taken(bytes.len(), &writer)?;
                }
                ToHost::Stderr(bytes) => {
                    stderr.extend_from_slice(bytes);
                    grants.taken(bytes.len(), &writer)?;
                }
                ToHost::StdinWindow { bytes } => {
                    feed.credit += bytes as usize;
                    feed.send(&writer)?;
                }
                ToHost::Exited(exited) => return Ok(ControlFlow::Break(Ok(exited))),
                ToHost::ExecFailed(failed) => {
                    stderr.extend_from_slice(failed_text(&failed).as_bytes());
                    return Ok(ControlFlow::Break(Err(failed.shell_code())));
                }
                _ => {}
            }
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(Output { exit, stdout, stderr })
    }
}

/// Why a command did not start, in a shell's words.
#[must_use]
pub fn failed_text(failed: &ExecFailed<'_>) -> String {
    let reason = io::Error::from_raw_os_error(failed.errno.cast_signed());
    let text = String::from_utf8_lossy(failed.text);
    let stage = if failed.stage == Stage::Exec { String::new() } else { format!(" ({:?})", failed.stage) };
    format!("{text}: {reason}{stage}")
}

/// Credit owed to a command for output that was taken. It is granted in portions: each grant is a packet that
/// wakes the guest.
#[derive(Debug)]
pub struct Grants {
    stream: u32,
    owed: u32,
}

impl Grants {
    /// A quarter of the window: the guest never waits for credit while the host keeps up.
    const PORTION: u32 = INITIAL_WINDOW_BYTES / 4;

    /// No credit owed yet to `stream`.
    #[must_use]
    pub fn new(stream: u32) -> Self {
        Self { stream, owed: 0 }
    }

    /// Says that `bytes` of output were taken, and grants credit if a portion of it is owed.
    ///
    /// # Errors
    /// As [`AgentWriter::send`].
    pub fn taken(&mut self, bytes: usize, writer: &AgentWriter) -> Result<(), AgentError> {
        self.owed += bytes as u32;
        if self.owed < Self::PORTION {
            return Ok(());
        }
        let bytes = std::mem::take(&mut self.owed);
        writer.send(self.stream, &ToGuest::Window { bytes })
    }
}

fn unexpected(message: &ToHost<'_>) -> AgentError {
    AgentError::Refused(format!("unexpected message {message:?}"))
}

/// Standard input on its way to a command, never more than its window.
struct Feed<'a> {
    stream: u32,
    rest: &'a [u8],
    credit: usize,
    open: bool,
}

impl<'a> Feed<'a> {
    fn new(stream: u32, bytes: &'a [u8], open: bool) -> Self {
        Self { stream, rest: bytes, credit: INITIAL_WINDOW_BYTES as usize, open }
    }

    fn send(&mut self, writer: &AgentWriter) -> Result<(), AgentError> {
        while self.open && !self.rest.is_empty() && self.credit > 0 {
            let len = self.rest.len().min(self.credit).min(PAYLOAD_MAX_BYTES);
            let (now, rest) = self.rest.split_at(len);
            writer.send(self.stream, &ToGuest::Stdin(now))?;
            self.rest = rest;
            self.credit -= len;
        }
        if self.open && self.rest.is_empty() {
            self.open = false;
            writer.send(self.stream, &ToGuest::StdinEof)?;
        }
        Ok(())
    }
}
