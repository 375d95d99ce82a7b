//! A host for tests: starts the agent as an ordinary process on a socket pair, and speaks the wire with it.
#![allow(dead_code, missing_docs, unreachable_pub, clippy::unwrap_used)]

use std::io::{ErrorKind, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Duration;

use guest_init::{
    Decoder, ExecFailed, ExecRequest, Exited, FRAME_MAX_BYTES, Frame, Kind, PAYLOAD_MAX_BYTES, ToGuest,
    ToHost,
};

/// PID 1 ignores no signal; whoever runs the tests in the background of a script makes them ignore some.
const DEFAULT_SIGNALS: [&str; 2] = ["env", "--default-signal=HUP,INT,QUIT"];
/// Only so that a hung agent fails a test instead of hanging it.
const PATIENCE: Duration = Duration::from_secs(60);

/// More than any test's command writes.
const OUTPUT_MAX_BYTES: usize = 64 << 20;

/// A frame that owns its payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owned {
    pub kind: Kind,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Owned {
    pub fn message(&self) -> ToHost<'_> {
        let Owned { kind, flags, stream, ref payload } = *self;
        ToHost::parse(&Frame { kind, flags, stream, payload }).unwrap()
    }
}

/// One connection to an agent.
pub struct Line {
    socket: UnixStream,
    frames: Receiver<Owned>,
}

/// An agent, and the first connection to it.
pub struct Agent {
    pub line: Line,
    pub process: Child,
    path: Option<PathBuf>,
}

#[derive(Debug, Default)]
pub struct Ran {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub exited: Option<Exited>,
    pub failed: Option<(u32, u8, Vec<u8>)>,
}

impl Ran {
    /// As a shell would give it.
    pub fn code(&self) -> u8 {
        self.exited.unwrap_or_else(|| panic!("no exit: {:?}", self.failed)).shell_code()
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.stdout.clone()).unwrap()
    }
}

/// The program under test: the debug build, or the static one if the environment names it.
pub fn program() -> PathBuf {
    std::env::var_os("GUEST_INIT_UNDER_TEST").map_or(env!("CARGO_BIN_EXE_guest-init").into(), PathBuf::from)
}

impl Line {
    pub fn new(socket: UnixStream) -> Line {
        // Bounded, as any host's memory should be; deep enough for all that a window lets through.
        let (sender, frames) = sync_channel(8192);
        let mut reader = socket.try_clone().unwrap();
        std::thread::spawn(move || {
            let mut decoder = Decoder::new(vec![0; FRAME_MAX_BYTES]).unwrap();
            loop {
                match reader.read(decoder.space()) {
                    Ok(len) if len > 0 => decoder.filled(len),
                    _ => return,
                }
                while let Some(frame) = decoder.next_frame().unwrap() {
                    let Frame { kind, flags, stream, payload } = frame;
                    if sender.send(Owned { kind, flags, stream, payload: payload.to_vec() }).is_err() {
                        return;
                    }
                }
            }
        });
        Line { socket, frames }
    }

    pub fn send(&mut self, stream: u32, message: &ToGuest<'_>) {
        let mut buffer = vec![0; FRAME_MAX_BYTES];
        let len = message.encode(stream, &mut buffer).unwrap();
        self.send_raw(&buffer[..len]);
    }

    pub fn send_raw(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    /// Sends to an agent that may hang up meanwhile; says whether it still listened.
    pub fn send_if_heard(&mut self, stream: u32, message: &ToGuest<'_>) -> bool {
        let mut buffer = vec![0; FRAME_MAX_BYTES];
        let len = message.encode(stream, &mut buffer).unwrap();
        match self.socket.write_all(&buffer[..len]) {
            Ok(()) => true,
            Err(error) if matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset) => false,
            Err(error) => panic!("{error}"),
        }
    }

    pub fn exec(&mut self, stream: u32, request: &ExecRequest<'_, &str>) {
        let mut buffer = vec![0; FRAME_MAX_BYTES];
        let len = request.encode(stream, &mut buffer).unwrap();
        self.send_raw(&buffer[..len]);
    }

    /// The next frame; None when the agent has closed the connection.
    pub fn next(&mut self) -> Option<Owned> {
        match self.frames.recv_timeout(PATIENCE) {
            Ok(frame) => Some(frame),
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => None,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("the agent says nothing"),
        }
    }

    /// What is there, without waiting longer than given.
    pub fn next_within(&mut self, patience: Duration) -> Option<Owned> {
        self.frames.recv_timeout(patience).ok()
    }

    pub fn expect(&mut self, kind: Kind) -> Owned {
        let frame = self.next().unwrap_or_else(|| panic!("closed, and no {kind:?}"));
        assert_eq!(frame.kind, kind, "{frame:?}");
        frame
    }

    pub fn grant(&mut self, stream: u32, bytes: usize) {
        self.send(stream, &ToGuest::Window { bytes: bytes as u32 });
    }

    /// Reads one command to its end, giving credit for what arrives.
    pub fn finish(&mut self, stream: u32) -> Ran {
        let mut ran = Ran::default();
        while ran.exited.is_none() && ran.failed.is_none() {
            let frame = self.next().expect("the command's end");
            assert_eq!(frame.stream, stream, "{frame:?}");
            self.collect(&frame, &mut ran);
        }
        ran
    }

    pub fn collect(&mut self, frame: &Owned, ran: &mut Ran) {
        // A broken agent must fail a test, not fill this machine's memory.
        assert!(ran.stdout.len() + ran.stderr.len() < OUTPUT_MAX_BYTES, "output without end");
        match frame.message() {
            ToHost::Stdout(bytes) => {
                ran.stdout.extend_from_slice(bytes);
                self.grant(frame.stream, bytes.len());
            }
            ToHost::Stderr(bytes) => {
                ran.stderr.extend_from_slice(bytes);
                self.grant(frame.stream, bytes.len());
            }
            ToHost::Exited(exited) => ran.exited = Some(exited),
            ToHost::ExecFailed(ExecFailed { errno, stage, text }) => {
                ran.failed = Some((errno, stage as u8, text.to_vec()));
            }
            _ => {}
        }
    }

    pub fn run(&mut self, stream: u32, argv: &[&str]) -> Ran {
        self.run_request(stream, &ExecRequest { argv, ..ExecRequest::default() })
    }

    pub fn run_request(&mut self, stream: u32, request: &ExecRequest<'_, &str>) -> Ran {
        self.exec(stream, request);
        self.finish(stream)
    }

    /// Sends stdin within its window while output comes back, until the command's end.
    pub fn feed(&mut self, stream: u32, mut input: &[u8], ran: &mut Ran) {
        let mut credit = guest_init::INITIAL_WINDOW_BYTES as usize;
        let mut ended = false;
        while ran.exited.is_none() && ran.failed.is_none() {
            while credit > 0 && !input.is_empty() {
                let (now, later) = input.split_at(input.len().min(credit).min(PAYLOAD_MAX_BYTES));
                self.send(stream, &ToGuest::Stdin(now));
                credit -= now.len();
                input = later;
            }
            if input.is_empty() && !ended {
                self.send(stream, &ToGuest::StdinEof);
                ended = true;
            }
            let frame = self.next().expect("the command's end");
            if let ToHost::StdinWindow { bytes } = frame.message() {
                credit += bytes as usize;
            }
            self.collect(&frame, ran);
        }
    }

    /// Closes it, so that also the agent sees the end.
    pub fn hang_up(self) {
        self.socket.shutdown(std::net::Shutdown::Both).unwrap();
    }
}

impl Agent {
    /// An agent that has said Hello.
    pub fn start() -> Agent {
        Agent::start_program(&program())
    }

    pub fn start_program(program: &Path) -> Agent {
        Agent::start_command(Command::new(DEFAULT_SIGNALS[0]).args(&DEFAULT_SIGNALS[1..]).arg(program))
    }

    /// One whose program and arguments come last on a given command line.
    pub fn start_command(command: &mut Command) -> Agent {
        Agent::start_with(command, None)
    }

    /// One that also takes later connections.
    pub fn start_listening(name: &str) -> Agent {
        let path = std::env::temp_dir().join(format!("guest-init-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Agent::start_with(&mut Command::new(program()), Some(path))
    }

    fn start_with(command: &mut Command, path: Option<PathBuf>) -> Agent {
        let (ours, theirs) = UnixStream::pair().unwrap();
        command.args(["--serve-fd", "0"]).stdin(OwnedFd::from(theirs));
        if let Some(path) = &path {
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            command.args(["--listen-fd", "1"]).stdout(Stdio::from(OwnedFd::from(listener)));
        }
        let process = command.spawn().unwrap();
        let mut line = Line::new(ours);
        let hello = line.expect(Kind::Hello);
        let ToHost::Hello(hello) = hello.message() else { panic!("{hello:?}") };
        assert_eq!(hello.version, guest_init::VERSION);
        assert!(hello.entered_ns <= hello.now_ns);
        Agent { line, process, path }
    }

    /// A new connection, whose Hello was read.
    pub fn reconnect(&self) -> Line {
        let mut line = Line::new(UnixStream::connect(self.path.as_ref().unwrap()).unwrap());
        line.expect(Kind::Hello);
        line
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = std::fs::remove_file(path);
        }
        if std::thread::panicking() {
            let _ = self.process.kill();
            let _ = self.process.wait();
            return;
        }
        assert!(self.process.try_wait().unwrap().is_none_or(|status| status.success()), "the agent has died");
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
