//! The task that owns the connection.
//!
//! What it reads stays in the socket until it is dealt with: the next owner of the connection, should this one be killed,
//! finds whole frames, and of each either the frame or what came of it. What it writes is whole frames, each in one call of
//! a size that the kernel takes whole or not at all (up to about 48 KiB; only a longer Exec frame may be torn by
//! a kill, and costs that sandbox).

use super::process::{Credit, Event};
use super::{Message, Order, Shared, Tape};
use bytes::Bytes;
use guest_init::{
    Decoder, ErrorCode, FRAME_MAX_BYTES, HEADER_BYTES, INITIAL_WINDOW_BYTES, PAYLOAD_MAX_BYTES, ToGuest,
    ToHost, WireError,
};
use peregrine_vmm::agent::{Command, failed_text};
use peregrine_vmm::snapshot::AgentState;
use rustix::net::RecvFlags;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::rc::Rc;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot};

/// Answers that a guest may call for while a connection is taken over: more than it can have commands.
const MOST_REPLIES: usize = 4096;
/// Room for a message that is not standard input.
const SMALL_FRAME_BYTES: usize = 1024;

/// A command, as the task knows it.
pub(super) struct Entry {
    events: mpsc::UnboundedSender<Event>,
    credit: Rc<Credit>,
    /// Bytes of output that the guest may still send.
    window_bytes: usize,
    /// Where its output is kept for the connection's next owner.
    tape: Option<Rc<Tape>>,
    /// It was begun by an earlier owner, and the guest has not said that it still runs.
    in_doubt: bool,
}

impl Entry {
    pub(super) fn new(events: mpsc::UnboundedSender<Event>, credit: Rc<Credit>) -> Self {
        let window_bytes = INITIAL_WINDOW_BYTES as usize;
        Self { events, credit, window_bytes, tape: None, in_doubt: false }
    }

    pub(super) fn on_tape(self, tape: Option<Rc<Tape>>) -> Self {
        Self { tape, ..self }
    }

    /// A command of an earlier owner.
    pub(super) fn taken_over(self, tape: Rc<Tape>) -> Self {
        Self { tape: Some(tape), in_doubt: true, ..self }
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

/// Why a conversation is over when the agent's end of it has closed.
pub const HUNG_UP: &str = "the microVM stopped";

type Pause = (oneshot::Sender<AgentState>, oneshot::Receiver<()>);

/// A connection, and how far it has been read.
pub(super) struct Position {
    pub(super) socket: std::os::unix::net::UnixStream,
    /// Bytes read, modulo 2^32.
    pub(super) bytes: u32,
    /// Less than a frame, before the next byte.
    pub(super) unread: Vec<u8>,
}

/// What a frame from the guest calls for.
enum Reply {
    /// A command of an earlier owner goes on.
    Grant(u32),
    /// A command that nobody knows ends.
    Kill(u32),
    /// The guest has said who it is: then what it says of its commands is complete with its answer to this.
    Ping,
    /// That answer.
    Settle,
}

pub(super) struct Line {
    socket: UnixStream,
    decoder: Decoder<Vec<u8>>,
    /// Less than a frame, which comes before what is in the socket.
    unread: Vec<u8>,
    /// Bytes taken from the socket, modulo 2^32.
    position: u32,
    /// Bytes at the front of the socket that were looked at and are less than a frame.
    seen: usize,
    outbox: Outbox,
    commands: HashMap<u32, Entry>,
    /// Commands whose standard input is at its end once all frames are out.
    fed: Vec<Rc<Tape>>,
    /// While the guest says what it has, after an earlier owner: answers that it may still call for.
    rejoining: Option<usize>,
    shared: Rc<Shared>,
    pause: Option<Pause>,
}

/// Whole frames.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    /// Where they end, of those that are not out; the first `sent` bytes are.
    ends: VecDeque<usize>,
    sent: usize,
}

impl Line {
    pub(super) fn new(at: Position, shared: Rc<Shared>) -> io::Result<Self> {
        at.socket.set_nonblocking(true)?;
        let buffer = vec![0; 2 * FRAME_MAX_BYTES];
        Ok(Self {
            socket: UnixStream::from_std(at.socket)?,
            decoder: Decoder::new(buffer).map_err(io::Error::other)?,
            unread: at.unread,
            position: at.bytes,
            seen: 0,
            outbox: Outbox::default(),
            commands: HashMap::new(),
            fed: Vec::new(),
            rejoining: None,
            shared,
            pause: None,
        })
    }

    /// Takes over from an owner that was killed; the commands in `entries` go on.
    pub(super) fn rejoin(mut self, entries: HashMap<u32, Entry>) -> io::Result<Self> {
        self.commands = entries;
        self.rejoining = Some(MOST_REPLIES);
        self.put(0, &ToGuest::Rejoin)?;
        Ok(self)
    }

    /// Serves until the guest ends or nobody is left who could ask for anything.
    pub(super) async fn serve(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let why = match self.converse(&mut orders).await {
            Ok(()) => "destroyed".to_owned(),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                format!("it broke the agent's protocol: {error}")
            }
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => HUNG_UP.to_owned(),
            Err(error) => format!("the microVM is gone: {error}"),
        };
        self.shared.end(&why);
        self.commands.values().for_each(Entry::end);
    }

    async fn converse(&mut self, orders: &mut mpsc::UnboundedReceiver<Order>) -> io::Result<()> {
        loop {
            let idle = self.outbox.ends.is_empty();
            if self.pause.is_some() && idle && self.shared.adopted.get() {
                self.stand_still().await;
            }
            let interest = if idle { Interest::READABLE } else { Interest::READABLE | Interest::WRITABLE };
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
                        self.receive(ready.is_read_closed())?;
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
            // What is in the socket, the worker sees.
            unread: self.unread.clone(),
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
                self.outbox.bytes.extend_from_slice(&frame);
                self.outbox.ends.push_back(self.outbox.bytes.len());
            }
            // One that has ended is no error: nobody could know yet.
            Order::Frame { stream, message } => {
                if let Some(entry) = self.commands.get_mut(&stream) {
                    let message = match &message {
                        Message::Stdin(bytes) => ToGuest::Stdin(bytes),
                        Message::StdinEof => {
                            self.fed.extend(entry.tape.clone());
                            ToGuest::StdinEof
                        }
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
                    self.kill(stream)?;
                }
            }
            Order::Pause { state, resume } => self.pause = Some((state, resume)),
        }
        Ok(())
    }

    fn kill(&mut self, stream: u32) -> io::Result<()> {
        // In this order: a closed stream takes no signals.
        self.put(stream, &ToGuest::Signal { signo: 9 })?;
        self.put(stream, &ToGuest::Close)
    }

    fn put(&mut self, stream: u32, message: &ToGuest<'_>) -> io::Result<()> {
        let room = if let ToGuest::Stdin(bytes) = message {
            bytes.len().min(PAYLOAD_MAX_BYTES) + SMALL_FRAME_BYTES
        } else {
            SMALL_FRAME_BYTES
        };
        let outbox = &mut self.outbox;
        let at = outbox.bytes.len();
        outbox.bytes.resize(at + room, 0);
        let len = message.encode(stream, &mut outbox.bytes[at..]).map_err(io::Error::other)?;
        outbox.bytes.truncate(at + len);
        outbox.ends.push_back(at + len);
        Ok(())
    }

    fn send(&mut self) -> io::Result<()> {
        let Outbox { bytes, ends, sent } = &mut self.outbox;
        while let Some(&end) = ends.front() {
            match self.socket.try_write(&bytes[*sent..end]) {
                Ok(len) => *sent += len,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(e) if e.kind() == io::ErrorKind::BrokenPipe => {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                Err(e) => return Err(e),
            }
            if *sent == end {
                ends.pop_front();
            }
        }
        bytes.clear();
        *sent = 0;
        self.fed.drain(..).for_each(|tape| tape.stdin_done());
        if bytes.capacity() > 4 * FRAME_MAX_BYTES {
            bytes.shrink_to(FRAME_MAX_BYTES);
        }
        Ok(())
    }

    /// Looks at what is in the socket, deals with the whole frames, and takes them out.
    fn receive(&mut self, closed: bool) -> io::Result<()> {
        self.decoder.reset();
        self.decoder.push(&self.unread);
        let (socket, space, seen) = (&self.socket, self.decoder.space(), self.seen);
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        let looked = socket.try_io(Interest::READABLE, || {
            let len = rustix::io::retry_on_intr(|| rustix::net::recv(socket, &mut *space, flags))?.0;
            // Nothing new: only now does the runtime wait for more.
            if len > 0 && len == seen { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(len) }
        });
        let len = match looked {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::WouldBlock && closed && seen > 0 => {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(e) => return Err(e),
        };
        self.decoder.filled(len);
        let before = self.unread.len();
        let mut done = 0;
        let mut replies = Vec::new();
        let broken = |error: WireError| io::Error::new(io::ErrorKind::InvalidData, error);
        while let Some(frame) = self.decoder.next_frame().map_err(broken)? {
            done += HEADER_BYTES + frame.payload.len();
            // At the end of this frame, and it is longer than what was left of it.
            let position = self.position.wrapping_add((done - before) as u32);
            let (stream, message) = (frame.stream, ToHost::parse(&frame).map_err(broken)?);
            replies.extend(hear(&mut self.commands, &self.shared, (stream, position), &message)?);
        }
        if done > 0 {
            self.take(done - before)?;
            self.unread.clear();
        }
        self.seen = before + len - done - self.unread.len();
        for reply in replies {
            self.answer(&reply)?;
        }
        self.send()
    }

    /// Takes bytes out of the socket that were looked at.
    fn take(&mut self, mut len: usize) -> io::Result<()> {
        self.position = self.position.wrapping_add(len as u32);
        self.decoder.reset();
        while len > 0 {
            let space = self.decoder.space();
            let most = space.len().min(len);
            let into = &mut space[..most];
            let taken = rustix::io::retry_on_intr(|| {
                rustix::net::recv(&self.socket, &mut *into, RecvFlags::DONTWAIT)
            });
            match taken?.0 {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                taken => len -= taken,
            }
        }
        Ok(())
    }

    fn answer(&mut self, reply: &Reply) -> io::Result<()> {
        // At any other time nobody has asked for what calls for these, and they would cost memory.
        let Some(left) = &mut self.rejoining else { return Ok(()) };
        let too_many = || io::Error::new(io::ErrorKind::InvalidData, "more commands than it can have");
        *left = left.checked_sub(1).ok_or_else(too_many)?;
        match *reply {
            Reply::Grant(stream) => self.put(stream, &ToGuest::Window { bytes: INITIAL_WINDOW_BYTES }),
            Reply::Kill(stream) => self.kill(stream),
            Reply::Ping => self.put(0, &ToGuest::Ping { nonce: 0 }),
            Reply::Settle => {
                self.rejoining = None;
                // The guest has neither told their end nor that they run: they were never asked for.
                for (_, entry) in self.commands.extract_if(|_, entry| entry.in_doubt) {
                    let text = "the daemon was replaced before the command began".to_owned();
                    let _ = entry.events.send(Event::Failed { code: 126, text });
                    entry.end();
                }
                self.shared.adopted.set(true);
                self.shared.changed.notify_waiters();
                Ok(())
            }
        }
    }
}

fn hear(
    commands: &mut HashMap<u32, Entry>,
    shared: &Shared,
    (stream, position): (u32, u32),
    message: &ToHost<'_>,
) -> io::Result<Option<Reply>> {
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
            let Some(entry) = commands.get_mut(&stream) else { return Ok(None) };
            entry.output(matches!(message, ToHost::Stdout(_)), bytes, position)?;
        }
        ToHost::StdinWindow { bytes } => {
            if let Some(entry) = commands.get(&stream) {
                entry.credit.bytes.set(entry.credit.bytes.get().saturating_add(*bytes as usize));
                entry.credit.changed.notify_waiters();
            }
        }
        ToHost::Exited(exited) => {
            end(commands, stream, Event::Exited(*exited), |tape| tape.exited(exited, position));
        }
        ToHost::ExecFailed(failed) => {
            let (code, text) = (failed.shell_code(), failed_text(failed));
            end(commands, stream, Event::Failed { code, text: text.clone() }, |tape| {
                tape.failed(code, &text, position);
            });
        }
        // Of one that nobody knows, the reader went with the earlier owner.
        ToHost::Started { resumed: true, .. } if !commands.contains_key(&stream) => {
            return Ok(Some(Reply::Kill(stream)));
        }
        ToHost::Started { resumed: true, .. } => return Ok(resumed(commands, stream)),
        ToHost::Hello(_) => return Ok(Some(Reply::Ping)),
        ToHost::Pong { .. } => return Ok(Some(Reply::Settle)),
        // A signal to a command that had just ended, for one.
        ToHost::Error { .. } | ToHost::Started { .. } => {}
    }
    Ok(None)
}

/// A command of an earlier owner still runs, and what it has written since has been heard.
fn resumed(commands: &mut HashMap<u32, Entry>, stream: u32) -> Option<Reply> {
    let entry = commands.get_mut(&stream)?;
    // Once: a guest must not give itself credit.
    entry.in_doubt.then(|| {
        entry.in_doubt = false;
        entry.window_bytes = INITIAL_WINDOW_BYTES as usize;
        Reply::Grant(stream)
    })
}

impl Entry {
    fn output(&mut self, stdout: bool, bytes: &[u8], position: u32) -> io::Result<()> {
        let too_much = || io::Error::new(io::ErrorKind::InvalidData, "more output than its window");
        self.window_bytes = self.window_bytes.checked_sub(bytes.len()).ok_or_else(too_much)?;
        // The last owner may have been killed between writing it down and taking it.
        let known = self.tape.as_ref().is_some_and(|tape| tape.has(position));
        if bytes.is_empty() || known {
            return Ok(());
        }
        if let Some(tape) = &self.tape {
            if stdout { tape.stdout(bytes, position) } else { tape.stderr(bytes, position) }
        }
        let copy = Bytes::copy_from_slice(bytes);
        let _ = self.events.send(if stdout { Event::Stdout(copy) } else { Event::Stderr(copy) });
        Ok(())
    }
}

fn end(commands: &mut HashMap<u32, Entry>, stream: u32, event: Event, record: impl FnOnce(&Tape)) {
    if let Some(entry) = commands.remove(&stream) {
        if let Some(tape) = entry.tape.as_deref().filter(|tape| !tape.is_over()) {
            record(tape);
        }
        let _ = entry.events.send(event);
        entry.end();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use crate::conversation::{Conversation, Event, Tape};
    use guest_init::{FRAME_MAX_BYTES, INITIAL_WINDOW_BYTES, ToHost};
    use peregrine_vmm::agent::Command;
    use peregrine_vmm::snapshot::AgentState;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixStream;
    use std::rc::Rc;

    fn frame(stream: u32, message: &ToHost<'_>) -> Vec<u8> {
        let mut bytes = vec![0; FRAME_MAX_BYTES];
        let len = message.encode(stream, &mut bytes).unwrap();
        bytes.truncate(len);
        bytes
    }

    fn run<F: Future>(test: F) -> F::Output {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, test)
    }

    #[test]
    fn a_guest_cannot_give_itself_credit() {
        run(async {
            let (ours, mut guest) = UnixStream::pair().unwrap();
            let state = AgentState { next_stream: 1, streams: Vec::new(), unread: Vec::new() };
            let conversation = Conversation::start(ours, state).unwrap();
            let _process = conversation.exec(&Command::new(&["yes"])).unwrap();
            let writing = std::thread::spawn(move || {
                let portion = vec![b'y'; 32 << 10];
                // Until it is hung up on.
                for _ in 0..10_000 {
                    let said = [
                        frame(1, &ToHost::Started { pid: 1, resumed: true }),
                        frame(9, &ToHost::Started { pid: 1, resumed: true }),
                        frame(1, &ToHost::Stdout(&portion)),
                    ];
                    if guest.write_all(&said.concat()).is_err() {
                        return true;
                    }
                }
                false
            });
            assert!(conversation.ended().await.0.contains("more output than its window"));
            drop((conversation, _process));
            tokio::task::yield_now().await;
            assert!(writing.join().unwrap());
        });
    }

    #[test]
    fn what_was_read_and_not_dealt_with_is_there_for_the_next_owner_and_nothing_comes_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tape");
        let tape = Rc::new(Tape::create(&path, &()).unwrap());
        let (ours, mut guest) = UnixStream::pair().unwrap();
        let said: Vec<Vec<u8>> =
            (0..50_u8).map(|n| frame(1, &ToHost::Stdout(&vec![n; 100 + usize::from(n)]))).collect();
        let all = said.concat();
        let cut = all.len() / 2;
        guest.write_all(&all[..cut]).unwrap();
        let kept = ours.try_clone().unwrap();
        run(async {
            let state = AgentState { next_stream: 1, streams: Vec::new(), unread: Vec::new() };
            let conversation = Conversation::start(ours, state).unwrap();
            let mut process =
                conversation.exec_on(&Command::new(&["x"]), |_| Some(Rc::clone(&tape))).unwrap();
            for _ in 0..10 {
                process.output.next().await.unwrap();
            }
        });
        drop(tape);
        // The next owner: what is on the tape, and what is still to come, is everything once.
        let found = Tape::open::<()>(&path).unwrap();
        let mut waiting = vec![0; all.len()];
        kept.set_nonblocking(true).unwrap();
        let left =
            rustix::net::recv(&kept, &mut waiting[..], rustix::net::RecvFlags::PEEK).map_or(0, |r| r.0);
        let position = (cut - left) as u32;
        let mut bytes = 0;
        for record in &found.records {
            if let crate::conversation::Record::Stdout(output) = record {
                bytes += output.len();
            }
        }
        run(async {
            let taped = vec![(1, Rc::clone(&found.tape))];
            let (_conversation, mut processes) =
                Conversation::rejoin(kept, (position, Vec::new()), taped).unwrap();
            guest.write_all(&all[cut..]).unwrap();
            let exited = guest_init::Exited {
                outcome: guest_init::Outcome::Code(3),
                user_us: 0,
                sys_us: 0,
                max_rss_kib: 0,
            };
            guest.write_all(&frame(1, &ToHost::Exited(exited))).unwrap();
            loop {
                match processes[0].output.next().await.unwrap() {
                    Event::Stdout(output) => bytes += output.len(),
                    Event::Exited(exited) => break assert_eq!(exited.shell_code(), 3),
                    other => panic!("{other:?}"),
                }
            }
        });
        assert_eq!(bytes, said.iter().map(|frame| frame.len() - guest_init::HEADER_BYTES).sum::<usize>());
        assert!(bytes < INITIAL_WINDOW_BYTES as usize);
        guest.set_nonblocking(true).unwrap();
        let mut heard = vec![0; 1 << 16];
        assert!(guest.read(&mut heard).unwrap() > 0, "it was asked what it has");
    }
}
