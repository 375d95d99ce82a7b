//! The conversation with the agent of a running sandbox: one task a sandbox, all its commands over one
//! connection.
//!
//! ```text
//! callers --Order--> task <==frames==> agent
//!         <--Event--        each command: output within its window, stdin within its credit
//! ```
//!
//! A command's output is granted as its reader takes it, so neither side ever holds more than a window. What
//! the guest sends is hostile: more than its window, or bytes that are no frame, end the conversation.
//!
//! May touch: its connection. Must not: know what a sandbox is.

mod line;
mod process;
mod tape;

pub use line::HUNG_UP;
pub use process::{Event, Input, Output, Process};
pub use tape::{Found, Record, Tape};

use line::{Line, Position};
use peregrine_vmm::agent::Command;
use peregrine_vmm::snapshot::AgentState;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use tokio::sync::{Notify, mpsc, oneshot};

/// The conversation is over: the guest or its worker has ended, or has broken the protocol.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the sandbox has ended: {0}")]
pub struct Ended(pub Rc<str>);

/// Why a command was not asked for.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// There is nobody to ask.
    #[error(transparent)]
    Ended(#[from] Ended),
    /// It does not fit the wire.
    #[error("the command cannot be sent: {0}")]
    Wire(#[from] guest_init::WireError),
}

/// What the task is asked to do.
enum Order {
    Exec {
        frame: Vec<u8>,
        stream: u32,
        entry: line::Entry,
    },
    Frame {
        stream: u32,
        message: Message,
    },
    /// Ends a command nobody reads any more.
    Abandon {
        stream: u32,
    },
    /// Stand still between frames until the other end of `resume` goes.
    Pause {
        state: oneshot::Sender<AgentState>,
        resume: oneshot::Receiver<()>,
    },
}

/// [`guest_init::ToGuest`] of one command, owning its bytes.
enum Message {
    Stdin(Vec<u8>),
    StdinEof,
    Signal(u32),
    Resize(u16, u16),
    Window(u32),
}

#[derive(Debug, Default)]
struct Shared {
    next_stream: Cell<u32>,
    adopted: Cell<bool>,
    ended: RefCell<Option<Ended>>,
    changed: Notify,
}

/// A sandbox's conversation; clones speak to the same. It ends when the last one is dropped.
#[derive(Clone)]
pub struct Conversation {
    orders: mpsc::UnboundedSender<Order>,
    shared: Rc<Shared>,
}

impl std::fmt::Debug for Conversation {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.shared.fmt(f)
    }
}

/// The conversation stands still, all frames whole, while this lives.
#[derive(Debug)]
pub struct Paused {
    /// Where it stands.
    pub state: AgentState,
    _resume: oneshot::Sender<()>,
}

impl Conversation {
    /// Takes a connection over whose first word will be that the guest has taken its identity.
    ///
    /// # Errors
    /// If the socket cannot be used here.
    pub fn start(socket: std::os::unix::net::UnixStream, state: AgentState) -> io::Result<Self> {
        let shared = Rc::new(Shared::default());
        shared.next_stream.set(state.next_stream);
        let (orders, receiver) = mpsc::unbounded_channel();
        let line = Line::new(Position { socket, bytes: 0, unread: state.unread }, Rc::clone(&shared))?;
        crate::executor::spawn(line.serve(receiver));
        Ok(Self { orders, shared })
    }

    /// Takes over the connection of an owner that was killed, `position` bytes of which it had read and `unread` of which
    /// come first. Its commands that have a tape go on, in the order given; the others end, as they do when their reader goes.
    ///
    /// # Errors
    /// If the socket cannot be used here.
    pub fn rejoin(
        socket: std::os::unix::net::UnixStream,
        (bytes, unread): (u32, Vec<u8>),
        taped: Vec<(u32, Rc<Tape>)>,
    ) -> io::Result<(Self, Vec<Process>)> {
        let shared = Rc::new(Shared::default());
        // Nobody knows which numbers are in use before the guest has said it. It refuses one that is.
        let mut random = [0; 4];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        shared.next_stream.set(u32::from_le_bytes(random) | 1 << 31);
        let (orders, receiver) = mpsc::unbounded_channel();
        let mut entries = HashMap::new();
        let mut processes = Vec::with_capacity(taped.len());
        for (stream, tape) in taped {
            let (process, entry) = process::taken_over(stream, orders.clone(), Rc::clone(&shared));
            entries.insert(stream, entry.taken_over(tape));
            processes.push(process);
        }
        let line = Line::new(Position { socket, bytes, unread }, Rc::clone(&shared))?.rejoin(entries)?;
        crate::executor::spawn(line.serve(receiver));
        Ok((Self { orders, shared }, processes))
    }

    /// Asks for a command. That it could not be started is an event of it.
    ///
    /// # Errors
    /// If the sandbox has ended, or the command does not fit a frame.
    pub fn exec(&self, command: &Command) -> Result<Process, ExecError> {
        self.exec_flags(command, 0, |_| None)
    }

    /// As [`Conversation::exec`]; `tape` is told the command's number, and may give a tape for what it writes.
    ///
    /// # Errors
    /// As for [`Conversation::exec`].
    pub fn exec_on(
        &self,
        command: &Command,
        tape: impl FnOnce(u32) -> Option<Rc<Tape>>,
    ) -> Result<Process, ExecError> {
        self.exec_flags(command, 0, tape)
    }

    /// As [`Conversation::exec`], of the agent's own program: `verb` and `arguments` of
    /// [`guest_init::TOOL_ARGV`].
    ///
    /// # Errors
    /// As for [`Conversation::exec`].
    pub fn tool(&self, verb: &str, arguments: &[&[u8]], stdin: bool) -> Result<Process, ExecError> {
        let [name, tool] = guest_init::TOOL_ARGV;
        let argv = [&[name.as_bytes(), tool.as_bytes(), verb.as_bytes()], arguments].concat();
        let command = Command { stdin, ..Command::new(&argv) };
        self.exec_flags(&command, guest_init::EXEC_SELF, |_| None)
    }

    fn exec_flags(
        &self,
        command: &Command,
        flags: u8,
        tape: impl FnOnce(u32) -> Option<Rc<Tape>>,
    ) -> Result<Process, ExecError> {
        if let Some(ended) = self.shared.ended.borrow().clone() {
            return Err(ended.into());
        }
        let stream = self.shared.next_stream.get();
        let frame = line::exec_frame(stream, command, flags)?;
        let (process, entry) = process::new(stream, self.orders.clone(), Rc::clone(&self.shared));
        self.shared.next_stream.set(stream.wrapping_add(1).max(1));
        let order = Order::Exec { frame, stream, entry: entry.on_tape(tape(stream)) };
        self.orders.send(order).map_err(|_| ExecError::Ended(self.why()))?;
        Ok(process)
    }

    /// Waits for frames on their way, then stands still: nothing is read or sent until the value is dropped.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub async fn pause(&self) -> Result<Paused, Ended> {
        let (state, paused) = oneshot::channel();
        let (resume, resumed) = oneshot::channel();
        let order = Order::Pause { state, resume: resumed };
        self.orders.send(order).map_err(|_| self.why())?;
        let state = paused.await.map_err(|_| self.why())?;
        Ok(Paused { state, _resume: resume })
    }

    /// Waits until the guest has taken its identity.
    ///
    /// # Errors
    /// If it ends first.
    pub async fn adopted(&self) -> Result<(), Ended> {
        loop {
            let changed = self.shared.changed.notified();
            if let Some(ended) = self.shared.ended.borrow().clone() {
                return Err(ended);
            }
            if self.shared.adopted.get() {
                return Ok(());
            }
            changed.await;
        }
    }

    /// Waits for the end, and says why.
    pub async fn ended(&self) -> Ended {
        loop {
            let changed = self.shared.changed.notified();
            if let Some(ended) = self.shared.ended.borrow().clone() {
                return ended;
            }
            changed.await;
        }
    }

    /// Ends it for everybody who still waits for something, before its worker has gone.
    pub fn end(&self, why: &str) {
        self.shared.end(why);
    }

    /// Why it is over, if it is.
    #[must_use]
    pub fn is_over(&self) -> Option<Ended> {
        self.shared.ended.borrow().clone()
    }

    fn why(&self) -> Ended {
        self.shared.why()
    }
}

impl Shared {
    fn why(&self) -> Ended {
        self.ended.borrow().clone().unwrap_or_else(|| Ended("its worker is gone".into()))
    }

    fn end(&self, why: &str) {
        self.ended.borrow_mut().get_or_insert_with(|| Ended(why.into()));
        self.changed.notify_waiters();
    }
}
