//! One command: its pipes or terminal, its credit, and how far its end has come. It may touch its
//! own files, its ring and the outbox; it does not wait.
//!
//! ```text
//! Free --Exec--> Live --reaped, and its output sent: Exited--> Discarding --all pipes ended--> Free
//!                  |                                                ^            (or the slot is needed)
//!                  +--Close: output is discarded from here on-------+ (Exited is still sent)
//! ```
//!
//! **When a command is over.** `Exited` is sent when its process was reaped and its output was sent. Usually
//! its pipes are at their end by then. If background processes still hold them, the output is what lay in the
//! pipes when the process was reaped: that much is sent, however much is written meanwhile, and `Exited`
//! follows. The background processes go on, as after `docker exec`, and what they write later is read and
//! thrown away, so that they neither block nor get SIGPIPE. On a terminal they get SIGHUP, as the kernel does
//! it when the session's leader ends.

use guest_init::{Exited, INITIAL_WINDOW_BYTES, Kind, Outcome, ToHost};

use crate::outbox::Outbox;
use crate::ring::{Overflow, Ring};
use crate::sys::{Epoll, Errno, Fd, READABLE, Ready, WRITABLE};

/// How many commands can be there at once.
pub(crate) const STREAMS_MAX: usize = 64;
/// Credit for stdin is given back in portions, not byte by byte.
const CREDIT_PORTION_BYTES: u32 = INITIAL_WINDOW_BYTES / 4;
/// What a pipe is widened to once a command has filled it: fewer switches between it and the agent.
const WIDE_PIPE_BYTES: usize = 1024 * 1024;
const DISCARD_BYTES: usize = 1024 * 1024;
const END_OF_FILE_CHARACTER: u8 = 4;
const STDIN: u64 = 2;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Free = 0,
    Live,
    Discarding,
}

/// stdout or stderr, or a terminal in stdout's place.
pub(crate) struct Output {
    fd: Option<Fd>,
    readable: bool,
    hung_up: bool,
    ended: bool,
    widened: bool,
    /// The process is reaped: so many bytes are its own, what comes after them is not.
    left: Option<usize>,
}

/// A command's place in the table. All-zero is a free one.
pub(crate) struct Stream {
    pub(crate) state: State,
    pub(crate) id: u32,
    /// 0 once it is reaped: the number may then be another's.
    pub(crate) pid: u32,
    /// When it began to be discarded, to find the oldest.
    pub(crate) discarded_at: u64,
    terminal: bool,
    outputs: [Output; 2],
    /// The pipe; a terminal is `outputs[0]`.
    stdin: Option<Fd>,
    stdin_open: bool,
    stdin_writable: bool,
    stdin_watched: bool,
    stdin_eof: bool,
    /// Stdin that was taken and not yet credited.
    credit_due: u32,
    window: u32,
    started_due: bool,
    started_lazy: bool,
    resumed: bool,
    pid_told: u32,
    closed: bool,
    /// How it ended, once `is_reaped`. Not an Option: None of that is not zero.
    exited: Exited,
    is_reaped: bool,
}

/// What a new command brings.
pub(crate) struct Wiring {
    pub(crate) outputs: [Option<Fd>; 2],
    pub(crate) stdin: Option<Fd>,
    pub(crate) terminal: bool,
    pub(crate) started_lazy: bool,
}

impl Output {
    const NONE: Output =
        Output { fd: None, readable: false, hung_up: false, ended: false, widened: false, left: None };

    fn new(fd: Option<Fd>) -> Output {
        let ended = fd.is_none();
        Output { fd, ended, ..Output::NONE }
    }

    /// Nothing more of this output will be sent.
    fn is_sent(&self) -> bool {
        self.ended || self.left == Some(0)
    }

    fn end(&mut self, keep_open: bool) {
        self.ended = true;
        self.readable = false;
        if !keep_open {
            self.fd = None;
        }
    }
}

impl Stream {
    pub(crate) const FREE: Stream = Stream {
        state: State::Free,
        id: 0,
        pid: 0,
        discarded_at: 0,
        terminal: false,
        outputs: [Output::NONE, Output::NONE],
        stdin: None,
        stdin_open: false,
        stdin_writable: false,
        stdin_watched: false,
        stdin_eof: false,
        credit_due: 0,
        window: 0,
        started_due: false,
        started_lazy: false,
        resumed: false,
        pid_told: 0,
        closed: false,
        exited: Exited { outcome: Outcome::Code(0), user_us: 0, sys_us: 0, max_rss_kib: 0 },
        is_reaped: false,
    };

    pub(crate) fn live(id: u32, pid: u32, wiring: Wiring) -> Stream {
        Stream {
            state: State::Live,
            id,
            pid,
            pid_told: pid,
            terminal: wiring.terminal,
            stdin_open: wiring.terminal || wiring.stdin.is_some(),
            // A fresh pipe or terminal takes bytes; if not, the first write says so.
            stdin_writable: true,
            stdin: wiring.stdin,
            outputs: wiring.outputs.map(Output::new),
            window: INITIAL_WINDOW_BYTES,
            started_due: true,
            started_lazy: wiring.started_lazy,
            ..Stream::FREE
        }
    }

    /// Takes note of an event; `which` of the files it is about is in the low bits of its key.
    pub(crate) fn mark(&mut self, which: u64, ready: Ready) {
        if which == STDIN || self.terminal {
            // Also when the reader is gone: the write then says so.
            self.stdin_writable |= ready.writable || ready.hung_up;
        }
        let Some(output) = self.outputs.get_mut(which as usize) else { return };
        if output.ended {
            return;
        }
        if ready.hung_up && !ready.readable && !self.terminal {
            // Nobody can write any more and nothing is left: no need to read that.
            return output.end(false);
        }
        output.readable |= ready.readable || ready.hung_up;
        output.hung_up |= ready.hung_up;
    }

    // Output.

    /// Is there output to read, and credit, or no need of it?
    pub(crate) fn wants_turn(&self, takes_output: bool) -> bool {
        let readable = self.outputs.iter().any(|output| output.readable && output.left != Some(0));
        match self.state {
            State::Free => false,
            State::Live if !self.closed => readable && self.window > 0 && takes_output,
            State::Live | State::Discarding => self.outputs.iter().any(|output| output.readable),
        }
    }

    /// Reads one chunk of each output that has some, as far as credit and room go.
    pub(crate) fn pump_outputs(&mut self, outbox: &mut Outbox<'_>) {
        for (which, kind) in [Kind::Stdout, Kind::Stderr].into_iter().enumerate() {
            let output = &mut self.outputs[which];
            if !output.readable || output.is_sent() || self.window == 0 || !outbox.takes_output() {
                continue;
            }
            let Some(fd) = output.fd.as_ref() else { continue };
            if self.started_due && !outbox.put(self.id, &started(self.pid_told, self.resumed)) {
                continue;
            }
            self.started_due = false;
            let most = (self.window as usize).min(output.left.unwrap_or(usize::MAX));
            let mut asked = 0;
            let result = outbox.put_output(kind, self.id, most, |space| {
                asked = space.len();
                fd.read(space)
            });
            match result {
                Ok(len) if len > 0 => {
                    self.window -= len as u32;
                    if let Some(left) = &mut output.left {
                        *left -= len.min(*left);
                    }
                    if len == crate::outbox::CHUNK_BYTES && !output.widened && !self.terminal {
                        output.widened = true;
                        fd.widen_pipe(WIDE_PIPE_BYTES);
                    }
                    // A pipe that gives less than was asked for is empty. A terminal gives what it likes.
                    if len < asked && !output.hung_up && !self.terminal {
                        output.readable = false;
                    }
                }
                Err(Errno::AGAIN) => {
                    output.readable = false;
                    // After the process's end there is nothing more to wait for.
                    if output.left.is_some() || (self.terminal && self.is_reaped) {
                        output.left = Some(0);
                    }
                }
                Err(Errno::INTR) => {}
                // The end; a terminal says so with EIO, and is kept because closing it is a hang-up.
                Ok(_) | Err(_) => output.end(self.terminal),
            }
        }
    }

    /// Throws output away that nobody wants.
    pub(crate) fn discard_outputs(&mut self, null: &Fd) {
        let wanted = self.state == State::Live && !self.closed;
        for output in &mut self.outputs {
            if wanted || !output.readable {
                continue;
            }
            let Some(fd) = output.fd.as_ref() else {
                output.end(false);
                continue;
            };
            match fd.discard_into(null, DISCARD_BYTES) {
                Ok(len) if len > 0 => {}
                Err(Errno::AGAIN) => output.readable = false,
                Err(Errno::INTR) => {}
                Ok(_) | Err(_) => output.end(false),
            }
        }
    }

    // Stdin.

    /// Takes stdin from the host: to the command at once if it can be, else into the ring.
    pub(crate) fn take_stdin(
        &mut self,
        mut bytes: &[u8],
        ring: &mut Ring,
        epoll: &Epoll,
        key: u64,
    ) -> Result<(), Overflow> {
        while self.takes_stdin() && ring.is_empty() && self.stdin_writable && !bytes.is_empty() {
            bytes = &bytes[self.write_stdin(bytes, epoll, key)..];
        }
        if !self.takes_stdin() {
            // The command has closed its stdin: the rest goes nowhere, and the host may go on.
            self.credit_due = self.credit_due.saturating_add(bytes.len() as u32);
            return Ok(());
        }
        ring.put(bytes)
    }

    fn takes_stdin(&self) -> bool {
        self.stdin_open && !self.stdin_eof
    }

    /// Gives the command what it can take of the ring, and its end.
    pub(crate) fn pump_stdin(&mut self, ring: &mut Ring, epoll: &Epoll, key: u64) {
        while self.stdin_open && self.stdin_writable && !ring.is_empty() {
            let taken = self.write_stdin(ring.front(), epoll, key);
            ring.consume(taken);
        }
        if !self.stdin_open {
            self.credit_due = self.credit_due.saturating_add(ring.len_u32());
            ring.clear();
        } else if self.stdin_eof && ring.is_empty() {
            self.stdin_open = false;
            self.stdin = None;
        }
    }

    pub(crate) fn end_stdin(&mut self, ring: &mut Ring) {
        // A program that reads a terminal sees the end only by this character (termios(3), VEOF).
        if self.terminal && !self.stdin_eof {
            // No room for it: the program has not read for so long that its end is not news.
            let _ = ring.put(&[END_OF_FILE_CHARACTER]);
        }
        self.stdin_eof = true;
    }

    fn write_stdin(&mut self, bytes: &[u8], epoll: &Epoll, key: u64) -> usize {
        let fd = if self.terminal { self.outputs[0].fd.as_ref() } else { self.stdin.as_ref() };
        match fd.map(|fd| (fd, fd.write(bytes))) {
            Some((_, Ok(len))) => {
                self.credit_due = self.credit_due.saturating_add(len as u32);
                len
            }
            Some((fd, Err(Errno::AGAIN))) => {
                self.stdin_writable = false;
                // Only now is it worth a system call to hear when there is room.
                let watched = match (self.stdin_watched, self.terminal) {
                    (true, _) => Ok(()),
                    (false, true) => epoll.change(fd, READABLE | WRITABLE, key),
                    (false, false) => epoll.watch(fd, WRITABLE, key | STDIN),
                };
                self.stdin_watched = watched.is_ok();
                if watched.is_err() {
                    self.stdin_open = false;
                }
                0
            }
            Some((_, Err(Errno::INTR))) => 0,
            None | Some((_, Err(_))) => {
                self.stdin_open = false;
                self.stdin = None;
                0
            }
        }
    }

    // The host.

    pub(crate) fn add_window(&mut self, bytes: u32) {
        self.window = self.window.saturating_add(bytes);
    }

    pub(crate) fn resize(&self, rows: u16, cols: u16) -> Result<(), Errno> {
        match self.outputs[0].fd.as_ref() {
            Some(fd) if self.terminal => fd.set_size(rows, cols),
            _ => Ok(()),
        }
    }

    /// The host wants no more output.
    pub(crate) fn close(&mut self) {
        self.closed = true;
        self.stdin_open = false;
        self.stdin = None;
        for output in &mut self.outputs {
            if self.terminal {
                // Closing the terminal is the hang-up that a program expects from that.
                output.end(false);
            }
            output.readable = !output.ended;
        }
    }

    /// A new connection: it is told of this command, and begins without credit.
    pub(crate) fn resume(&mut self, ring: &Ring) {
        self.started_due = true;
        self.started_lazy = false;
        self.resumed = true;
        self.window = 0;
        self.credit_due = if self.stdin_open && !self.stdin_eof { ring.room() as u32 } else { 0 };
    }

    pub(crate) fn disconnected(&mut self) {
        self.window = 0;
    }

    // Its end.

    /// The process is reaped.
    pub(crate) fn reaped(&mut self, exited: Exited) {
        self.pid = 0;
        self.exited = exited;
        self.is_reaped = true;
        self.stdin_open = false;
        self.stdin = None;
        for output in &mut self.outputs {
            if output.ended {
                continue;
            }
            output.readable = true;
            if let (false, Some(fd)) = (self.terminal, output.fd.as_ref()) {
                output.left = Some(fd.bytes_waiting().unwrap_or(0));
            }
        }
    }

    /// Puts the frames that are due in the outbox. True if there is no room for one of them.
    pub(crate) fn settle(&mut self, outbox: &mut Outbox<'_>, turn: u64) -> bool {
        if self.state != State::Live {
            return false;
        }
        let over = self.closed || self.outputs.iter().all(Output::is_sent);
        let exited = (self.is_reaped && over).then_some(self.exited);
        if self.started_due && (!self.started_lazy || exited.is_some()) {
            if !outbox.put(self.id, &started(self.pid_told, self.resumed)) {
                return true;
            }
            self.started_due = false;
        }
        if self.credit_due >= CREDIT_PORTION_BYTES && exited.is_none() {
            if !outbox.put(self.id, &ToHost::StdinWindow { bytes: self.credit_due }) {
                return true;
            }
            self.credit_due = 0;
        }
        if let Some(exited) = exited {
            if !outbox.put(self.id, &ToHost::Exited(exited)) {
                return true;
            }
            self.discard_from(turn);
        }
        false
    }

    fn discard_from(&mut self, turn: u64) {
        self.state = State::Discarding;
        self.discarded_at = turn;
        for output in &mut self.outputs {
            if self.terminal {
                output.end(false);
            }
            output.readable = !output.ended;
        }
    }

    /// Is nothing left of it?
    pub(crate) fn is_done(&self) -> bool {
        self.state == State::Discarding && self.outputs.iter().all(|output| output.ended)
    }
}

fn started(pid: u32, resumed: bool) -> ToHost<'static> {
    ToHost::Started { pid, resumed }
}
