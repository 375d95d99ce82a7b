//! One command: what it writes, and what it is sent.

use super::line::Entry;
use super::{Ended, Message, Order, Shared};
use bytes::Bytes;
use guest_init::{Exited, INITIAL_WINDOW_BYTES};
use std::cell::Cell;
use std::rc::Rc;
use tokio::sync::{Notify, mpsc};

/// Credit is granted in portions: each grant is a packet that wakes the guest.
const PORTION_BYTES: u32 = INITIAL_WINDOW_BYTES / 4;

/// Standard input in one frame, which the kernel takes whole or not at all.
const STDIN_BYTES: usize = 32 * 1024;

/// What a command says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Bytes of its standard output, or of its terminal.
    Stdout(Bytes),
    /// Bytes of its standard error.
    Stderr(Bytes),
    /// Its end; all it wrote came before.
    Exited(Exited),
    /// It could not be started: a shell's exit code, and why.
    Failed {
        /// 126 or 127.
        code: u8,
        /// In a shell's words.
        text: String,
    },
}

/// Credit for standard input.
#[derive(Debug)]
pub(super) struct Credit {
    pub(super) bytes: Cell<usize>,
    pub(super) over: Cell<bool>,
    pub(super) changed: Notify,
}

/// A command's two ends.
#[derive(Debug)]
pub struct Process {
    /// What it writes.
    pub output: Output,
    /// What it is sent.
    pub input: Input,
}

/// What a command writes. Dropped before its end, the command is killed.
pub struct Output {
    stream: u32,
    orders: mpsc::UnboundedSender<Order>,
    events: mpsc::UnboundedReceiver<Event>,
    shared: Rc<Shared>,
    owed_bytes: u32,
    over: bool,
}

impl std::fmt::Debug for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Output({})", self.stream)
    }
}

/// What a command is sent; clones are of the same command.
#[derive(Clone)]
pub struct Input {
    stream: u32,
    orders: mpsc::UnboundedSender<Order>,
    credit: Rc<Credit>,
    shared: Rc<Shared>,
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input({})", self.stream)
    }
}

pub(super) fn new(stream: u32, orders: mpsc::UnboundedSender<Order>, shared: Rc<Shared>) -> (Process, Entry) {
    pair(stream, orders, shared, INITIAL_WINDOW_BYTES as usize)
}

/// A command of an earlier owner: the guest will say how much standard input it takes.
pub(super) fn taken_over(
    stream: u32,
    orders: mpsc::UnboundedSender<Order>,
    shared: Rc<Shared>,
) -> (Process, Entry) {
    pair(stream, orders, shared, 0)
}

fn pair(
    stream: u32,
    orders: mpsc::UnboundedSender<Order>,
    shared: Rc<Shared>,
    credit_bytes: usize,
) -> (Process, Entry) {
    let (sender, events) = mpsc::unbounded_channel();
    let bytes = Cell::new(credit_bytes);
    let credit = Rc::new(Credit { bytes, over: Cell::new(false), changed: Notify::new() });
    let input =
        Input { stream, orders: orders.clone(), credit: Rc::clone(&credit), shared: Rc::clone(&shared) };
    let output = Output { stream, orders, events, shared, owed_bytes: 0, over: false };
    (Process { output, input }, Entry::new(sender, credit))
}

impl Output {
    /// The next event. Asking for it says that the last one's bytes are used up.
    ///
    /// # Errors
    /// If the sandbox ends first.
    pub async fn next(&mut self) -> Result<Event, Ended> {
        if self.owed_bytes >= PORTION_BYTES {
            let message = Message::Window(std::mem::take(&mut self.owed_bytes));
            let _ = self.orders.send(Order::Frame { stream: self.stream, message });
        }
        let shared = Rc::clone(&self.shared);
        let event = loop {
            let changed = shared.changed.notified();
            match self.events.try_recv() {
                Ok(event) => break event,
                // The end of the conversation is the end of all its commands, whoever still holds one.
                Err(mpsc::error::TryRecvError::Disconnected) => return Err(self.lost()),
                Err(mpsc::error::TryRecvError::Empty) if shared.ended.borrow().is_some() => {
                    return Err(self.lost());
                }
                Err(mpsc::error::TryRecvError::Empty) => {}
            }
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => break event,
                    None => return Err(self.lost()),
                },
                () = changed => {}
            }
        };
        match &event {
            // A window is less than 4 GiB.
            Event::Stdout(bytes) | Event::Stderr(bytes) => self.owed_bytes += bytes.len() as u32,
            Event::Exited(_) | Event::Failed { .. } => self.over = true,
        }
        Ok(event)
    }
}

impl Output {
    fn lost(&mut self) -> Ended {
        self.over = true;
        self.shared.why()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.over {
            let _ = self.orders.send(Order::Abandon { stream: self.stream });
        }
    }
}

impl Input {
    /// Sends bytes to its standard input, as its window lets them through. Bytes for a command that has
    /// ended are lost.
    ///
    /// # Errors
    /// If the sandbox ends first.
    pub async fn write(&self, mut bytes: &[u8]) -> Result<(), Ended> {
        while !bytes.is_empty() {
            let changed = self.credit.changed.notified();
            if self.credit.over.get() {
                return Ok(());
            }
            let credit = self.credit.bytes.get();
            if credit == 0 {
                changed.await;
                continue;
            }
            let (now, rest) = bytes.split_at(bytes.len().min(credit).min(STDIN_BYTES));
            self.credit.bytes.set(credit - now.len());
            self.send(Message::Stdin(now.to_vec()))?;
            bytes = rest;
        }
        Ok(())
    }

    /// It takes no more: it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.credit.over.get()
    }

    /// No more standard input.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub fn end(&self) -> Result<(), Ended> {
        self.send(Message::StdinEof)
    }

    /// Sends a signal to its process group.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub fn signal(&self, signo: u32) -> Result<(), Ended> {
        self.send(Message::Signal(signo))
    }

    /// Its terminal has a new size.
    ///
    /// # Errors
    /// If the sandbox has ended.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), Ended> {
        self.send(Message::Resize(rows, cols))
    }

    fn send(&self, message: Message) -> Result<(), Ended> {
        let order = Order::Frame { stream: self.stream, message };
        self.orders.send(order).map_err(|_| self.shared.why())
    }
}
