//! The task that owns the connection.

use super::process::{Credit, Event};
use super::{Message, Order, Shared};
use bytes::Bytes;
use guest_init::{
    Decoder, ErrorCode, FRAME_MAX_BYTES, INITIAL_WINDOW_BYTES, PAYLOAD_MAX_BYTES, ToGuest, ToHost, WireError,
};
use peregrine_vmm::agent::{Command, failed_text};
use peregrine_vmm::snapshot::AgentState;
use std::collections::HashMap;
use std::io;
use std::rc::Rc;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// Room for a message that is not standard input.
const SMALL_FRAME_BYTES: usize = 1024;

/// A command, as the task knows it.
pub(super) struct Entry {
    events: mpsc::UnboundedSender<Event>,
    credit: Rc<Credit>,
    /// Bytes of output that the guest may still send.
    window_bytes: usize,
}

impl Entry {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>, credit: Rc<Credit>) -> Self {
        Self { events, credit, window_bytes: INITIAL_WINDOW_BYTES as usize }
    }

    fn end(&self) {
        self.credit.over.set(true);
        self.credit.changed.notify_waiters();
    }
}

/// The `Exec` frame of a command.
pub(super) fn exec_frame(stream: u32, command: &Command, flags: u8) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; FRAME_MAX_BYTES];
    let len = command.request(flags).encode(stream, &mut frame)?;
    frame.truncate(len);
    Ok(frame)
}

type Pause = (oneshot::Sender<AgentState>, oneshot::Receiver<()>);

pub(super) struct Line {
    socket: UnixStream,
    decoder: Decoder<Vec<u8>>,
    /// Whole frames, of which the first `sent` bytes are out.
    outbox: Vec<u8>,
    sent: usize,
    commands: HashMap<u32, Entry>,
    shared: Rc<Shared>,
    pause: Option<Pause>,
}

impl Line {
    pub(super) fn new(
        socket: std::os::unix::net::UnixStream,
        state: &AgentState,
        shared: Rc<Shared>,
    ) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        let buffer = vec![0; 2 * FRAME_MAX_BYTES];
        let mut decoder = Decoder::new(buffer).map_err(io::Error::other)?;
        // Less than a frame.
        decoder.push(&state.unread);
        Ok(Self {
            socket: UnixStream::from_std(socket)?,
            decoder,
            outbox: Vec::new(),
            sent: 0,
            commands: HashMap::new(),
            shared,
            pause: None,
        })
    }

    /// Serves until the guest ends or nobody is left who could ask for anything.
    pub(super) async fn serve(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let why = match self.converse(&mut orders).await {
            Ok(()) => "destroyed".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                format!("it broke the agent's protocol: {error}")
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => "the microVM stopped".to_owned(),
            Err(error) => format!("the microVM is gone: {error}"),
        };
        self.shared.end(&why);
        self.commands.values().for_each(Entry::end);
    }

    async fn converse(&mut self, orders: &mut mpsc::UnboundedReceiver<Order>) -> io::Result<()> {
        loop {
            if self.pause.is_some() && self.sent == self.outbox.len() && self.shared.adopted.get() {
                self.stand_still().await;
            }
            let interest = if self.sent < self.outbox.len() {
                Interest::READABLE | Interest::WRITABLE
            } else {
                Interest::READABLE
            };
            tokio::select! {
                // While a pause is due, orders wait.
                order = orders.recv(), if self.pause.is_none() => {
                    let Some(order) = order else { return Ok(()) };
                    self.obey(order)?;
                    while self.pause.is_none() && let Ok(order) = orders.try_recv() {
                        self.obey(order)?;
                    }
                    // Most often there is room, and epoll need not be asked.
                    self.send()?;
                }
                ready = self.socket.ready(interest) => {
                    let ready = ready?;
                    if ready.is_writable() {
                        self.send()?;
                    }
                    if ready.is_readable() || ready.is_read_closed() {
                        self.receive()?;
                    }
                }
            }
        }
    }

    async fn stand_still(&mut self) {
        let Some((state, resume)) = self.pause.take() else { return };
        let here = AgentState {
            next_stream: self.shared.next_stream.get(),
            streams: self.commands.keys().copied().collect(),
            unread: self.decoder.pending().to_vec(),
        };
        if state.send(here).is_ok() {
            // Sent or dropped, both mean: go on.
            let _ = resume.await;
        }
    }

    fn obey(&mut self, order: Order) -> io::Result<()> {
        match order {
            Order::Exec { frame, stream, entry } => {
                self.commands.insert(stream, entry);
                self.outbox.extend_from_slice(&frame);
            }
            // One that has ended is no error: nobody could know yet.
            Order::Frame { stream, message } => {
                if let Some(entry) = self.commands.get_mut(&stream) {
                    let message = match &message {
                        Message::Stdin(bytes) => ToGuest::Stdin(bytes),
                        Message::StdinEof => ToGuest::StdinEof,
                        Message::Signal(signo) => ToGuest::Signal { signo: *signo },
                        Message::Resize(rows, cols) => ToGuest::Resize { rows: *rows, cols: *cols },
                        Message::Window(bytes) => {
                            entry.window_bytes += *bytes as usize;
                            ToGuest::Window { bytes: *bytes }
                        }
                    };
                    self.put(stream, &message)?;
                }
            }
            Order::Abandon { stream } => {
                if let Some(entry) = self.commands.remove(&stream) {
                    entry.end();
                    // In this order: a closed stream takes no signals.
                    self.put(stream, &ToGuest::Signal { signo: 9 })?;
                    self.put(stream, &ToGuest::Close)?;
                }
            }
            Order::Pause { state, resume } => self.pause = Some((state, resume)),
        }
        Ok(())
    }

    fn put(&mut self, stream: u32, message: &ToGuest<'_>) -> io::Result<()> {
        let room = if let ToGuest::Stdin(bytes) = message {
            bytes.len().min(PAYLOAD_MAX_BYTES) + SMALL_FRAME_BYTES
        } else {
            SMALL_FRAME_BYTES
        };
        let at = self.outbox.len();
        self.outbox.resize(at + room, 0);
        let len = message.encode(stream, &mut self.outbox[at..]).map_err(io::Error::other)?;
        self.outbox.truncate(at + len);
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        while self.sent < self.outbox.len() {
            match self.socket.try_write(&self.outbox[self.sent..]) {
                Ok(len) => self.sent += len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(e) => return Err(e),
            }
        }
        self.outbox.clear();
        self.sent = 0;
        if self.outbox.capacity() > 4 * FRAME_MAX_BYTES {
            self.outbox.shrink_to(FRAME_MAX_BYTES);
        }
        Ok(())
    }

    fn receive(&mut self) -> io::Result<()> {
        match self.socket.try_read(self.decoder.space()) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => self.decoder.filled(len),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        }
        let broken = |error: WireError| io::Error::new(io::ErrorKind::InvalidData, error);
        while let Some(frame) = self.decoder.next_frame().map_err(broken)? {
            let (stream, message) = (frame.stream, ToHost::parse(&frame).map_err(broken)?);
            hear(&mut self.commands, &self.shared, stream, &message)?;
        }
        Ok(())
    }
}

fn hear(
    commands: &mut HashMap<u32, Entry>,
    shared: &Shared,
    stream: u32,
    message: &ToHost<'_>,
) -> io::Result<()> {
    let broken = |what: &'static str| io::Error::new(io::ErrorKind::InvalidData, what);
    match message {
        ToHost::Adopted { failed: 0 } => {
            shared.adopted.set(true);
            shared.changed.notify_waiters();
        }
        ToHost::Adopted { .. } => return Err(broken("it did not take its identity")),
        ToHost::Error { code: ErrorCode::Protocol | ErrorCode::StdinOverflow, text } => {
            tracing::error!(text = %String::from_utf8_lossy(text), "the agent objects");
            return Err(broken("its agent understood nothing"));
        }
        ToHost::Stdout(bytes) | ToHost::Stderr(bytes) => {
            // One that was abandoned may still have had some under way.
            let Some(entry) = commands.get_mut(&stream) else { return Ok(()) };
            entry.window_bytes = entry
                .window_bytes
                .checked_sub(bytes.len())
                .ok_or_else(|| broken("more output than its window"))?;
            let copy = Bytes::copy_from_slice(bytes);
            let event =
                if matches!(message, ToHost::Stdout(_)) { Event::Stdout(copy) } else { Event::Stderr(copy) };
            let _ = entry.events.send(event);
        }
        ToHost::StdinWindow { bytes } => {
            if let Some(entry) = commands.get(&stream) {
                entry.credit.bytes.set(entry.credit.bytes.get().saturating_add(*bytes as usize));
                entry.credit.changed.notify_waiters();
            }
        }
        ToHost::Exited(exited) => end(commands, stream, Event::Exited(*exited)),
        ToHost::ExecFailed(failed) => {
            let event = Event::Failed { code: failed.shell_code(), text: failed_text(failed) };
            end(commands, stream, event);
        }
        // A signal to a command that had just ended, for one.
        ToHost::Error { .. } | ToHost::Started { .. } | ToHost::Pong { .. } | ToHost::Hello(_) => {}
    }
    Ok(())
}

fn end(commands: &mut HashMap<u32, Entry>, stream: u32, event: Event) {
    if let Some(entry) = commands.remove(&stream) {
        let _ = entry.events.send(event);
        entry.end();
    }
}
