//! Commands whose output is followed while they run, and may be followed again from where a reader broke off.
//!
//! A command outlives its reader. What no reader has taken yet is held up to a bound, and then the command
//! waits; what was taken is kept up to another, for a reader who comes back. It outlives the daemon as well: what is held
//! is on a tape, which the next daemon reads.

use super::exec::ExecRequest;
use super::meter::instant_of;
use super::sandbox::Sandbox;
use super::{STREAMS, Service, ServiceError, ids, millis};
use crate::conversation::{Ended, Event, Found, Output, Process, Record, Tape};
use bytes::Bytes;
use peregrine_vmm::worker::monotonic_ns;
use serde::{Deserialize, Serialize};
use std::cell::{Cell, RefCell};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// Bytes that no reader has taken, before the command waits.
const AHEAD_BYTES: usize = 256 << 10;
/// Bytes that were taken and are kept.
const BEHIND_BYTES: usize = 256 << 10;
/// How long an ended command may still be read.
const AFTERLIFE: Duration = Duration::from_secs(60);

/// What a reader is told.
#[derive(Debug, Clone, PartialEq)]
pub enum StreamEvent {
    /// Bytes of standard output.
    Stdout(Bytes),
    /// Bytes of standard error.
    Stderr(Bytes),
    /// The end.
    Exit {
        /// As a shell gives it.
        code: u8,
        /// From the request to the end.
        took_ms: f64,
    },
    /// It was killed for its time, or the sandbox ended.
    Broken {
        /// What the API calls it.
        code: &'static str,
        /// Why.
        why: String,
    },
}

impl StreamEvent {
    fn bytes(&self) -> usize {
        match self {
            Self::Stdout(bytes) | Self::Stderr(bytes) => bytes.len(),
            _ => 0,
        }
    }

    /// Nothing comes after it.
    #[must_use]
    pub fn is_last(&self) -> bool {
        matches!(self, Self::Exit { .. } | Self::Broken { .. })
    }
}

/// A followed command.
#[derive(Debug)]
pub struct Stream {
    /// Its name.
    pub id: String,
    sandbox: Rc<str>,
    kept: RefCell<VecDeque<(u64, StreamEvent)>>,
    next_seq: Cell<u64>,
    /// The last event that a reader has taken.
    taken: Cell<u64>,
    changed: Notify,
    tape: Option<Rc<Tape>>,
}

/// What the next daemon has to know of a followed command: the first words of its tape.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Header {
    /// Its sandbox.
    pub(super) sandbox: String,
    /// Its number in the conversation.
    pub(super) stream: u32,
    /// It is given standard input.
    stdin: bool,
    /// When it was asked for, on CLOCK_MONOTONIC.
    begun_ns: u64,
    limit_ms: u64,
}

/// All followed commands.
#[derive(Debug, Default)]
pub(super) struct Streams(RefCell<HashMap<String, Rc<Stream>>>);

impl Service {
    /// Starts a command that is followed.
    ///
    /// # Errors
    /// If it cannot be asked for.
    pub fn exec_stream(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        request: &ExecRequest,
    ) -> Result<Rc<Stream>, ServiceError> {
        let (begun, limit) = (Instant::now(), self.exec_limit(request));
        let id = format!("x{}", ids::random_digits(16)?);
        let mut kept = None;
        let process = self.command_on(sandbox, request, request.stdin.is_some(), |number| {
            let header = Header {
                sandbox: sandbox.id.to_string(),
                stream: number,
                stdin: request.stdin.is_some(),
                begun_ns: monotonic_ns(),
                limit_ms: u64::try_from(limit.as_millis()).unwrap_or(u64::MAX),
            };
            // Without one, it ends with this daemon only if that is killed.
            let tape = Tape::create(&self.state.join(STREAMS).join(&id), &header)
                .inspect_err(|error| tracing::warn!(%error, "a command has no tape"));
            kept = tape.ok().map(Rc::new);
            kept.clone()
        })?;
        let stream = Rc::new(Stream {
            id,
            sandbox: Rc::clone(&sandbox.id),
            kept: RefCell::default(),
            next_seq: Cell::new(1),
            taken: Cell::new(0),
            changed: Notify::new(),
            tape: kept,
        });
        self.streams.0.borrow_mut().insert(stream.id.clone(), Rc::clone(&stream));
        if let Some(stdin) = request.stdin.clone() {
            let input = process.input.clone();
            crate::executor::spawn(async move {
                let _ = input.write(&stdin).await;
                let _ = input.end();
            });
        }
        self.follow(sandbox, Rc::clone(&stream), process.output, (begun, limit));
        Ok(stream)
    }

    /// Takes what a command writes, to its end.
    fn follow(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        pumped: Rc<Stream>,
        output: Output,
        (begun, limit): (Instant, Duration),
    ) {
        let (service, sandbox) = (Rc::clone(self), Rc::clone(sandbox));
        crate::executor::spawn(async move {
            let activity = sandbox.activity();
            let pumping =
                tokio::time::timeout(limit.saturating_sub(begun.elapsed()), pumped.pump(output, begun));
            let last = tokio::select! {
                ended = pumping => match ended {
                    Ok(Ok(code)) => StreamEvent::Exit { code, took_ms: millis(begun.elapsed()) },
                    Ok(Err(Ended(why))) => StreamEvent::Broken { code: "sandbox_lost", why: why.to_string() },
                    Err(_) => {
                        StreamEvent::Broken { code: "timeout", why: format!("the command ran over {limit:?}") }
                    }
                },
                error = service.stuck(&sandbox) => {
                    StreamEvent::Broken { code: "sandbox_stuck", why: error.to_string() }
                }
            };
            let code = if let StreamEvent::Exit { code, .. } = &last { Some(*code) } else { None };
            // The audit log comes before the word.
            match service.exited(&sandbox, code) {
                Ok(()) => {
                    pumped.tape.iter().for_each(|tape| tape.reported());
                    pumped.push(last);
                }
                Err(error) => {
                    pumped.push(StreamEvent::Broken { code: "audit_unavailable", why: error.to_string() });
                }
            }
            drop(activity);
            service.outlive(pumped);
        });
    }

    /// A command that has ended may be read for a while.
    fn outlive(self: &Rc<Self>, stream: Rc<Stream>) {
        let service = Rc::clone(self);
        crate::executor::spawn(async move {
            tokio::time::sleep(AFTERLIFE).await;
            service.streams.0.borrow_mut().remove(&stream.id);
            stream.tape.iter().for_each(|tape| tape.remove());
        });
    }

    /// A command that an earlier daemon followed: as far as its tape goes, and on from there if `process` is what is
    /// left of it.
    pub(super) fn follow_on(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        id: String,
        found: Found<Header>,
        process: Option<Process>,
    ) {
        let Found { tape, header, first_seq, records, reported, .. } = found;
        let stream = Rc::new(Stream {
            id,
            sandbox: Rc::clone(&sandbox.id),
            kept: RefCell::default(),
            next_seq: Cell::new(first_seq),
            taken: Cell::new(0),
            changed: Notify::new(),
            tape: Some(Rc::clone(&tape)),
        });
        self.streams.0.borrow_mut().insert(stream.id.clone(), Rc::clone(&stream));
        let begun = instant_of(header.begun_ns);
        let mut ended = None;
        for record in records {
            match record {
                Record::Stdout(bytes) => stream.push(StreamEvent::Stdout(bytes.into())),
                Record::Stderr(bytes) => stream.push(StreamEvent::Stderr(bytes.into())),
                Record::Exited(exited) => ended = Some(exited.shell_code()),
                Record::Failed(code, text) => {
                    stream.push(StreamEvent::Stderr(format!("{text}\n").into()));
                    ended = Some(code);
                }
            }
        }
        if let (None, Some(process)) = (ended, process) {
            let limit = Duration::from_millis(header.limit_ms);
            return self.follow(sandbox, stream, process.output, (begun, limit));
        }
        let last = match ended {
            Some(code) => StreamEvent::Exit { code, took_ms: millis(begun.elapsed()) },
            None => StreamEvent::Broken {
                code: "unavailable",
                why: "the daemon was replaced before the command had all of its standard input".to_owned(),
            },
        };
        // Killed between the two, the daemon before this one has written it down twice rather than never.
        if !reported && let Err(error) = self.exited(sandbox, ended) {
            tracing::error!(id = %sandbox.id, %error, "a command's end cannot be written down");
        }
        tape.reported();
        stream.push(last);
        self.outlive(stream);
    }

    /// A command that was followed before, of this sandbox.
    ///
    /// # Errors
    /// If there is none.
    pub fn stream(&self, sandbox: &Sandbox, id: &str) -> Result<Rc<Stream>, ServiceError> {
        let streams = self.streams.0.borrow();
        let found = streams.get(id).filter(|stream| stream.sandbox == sandbox.id);
        found.cloned().ok_or_else(|| ServiceError::NotFound { what: "command", name: id.to_owned() })
    }
}

impl Stream {
    async fn pump(&self, mut output: Output, begun: Instant) -> Result<u8, Ended> {
        loop {
            while self.ahead_bytes() >= AHEAD_BYTES {
                self.changed.notified().await;
            }
            match output.next().await? {
                Event::Stdout(bytes) => self.push(StreamEvent::Stdout(bytes)),
                Event::Stderr(bytes) => self.push(StreamEvent::Stderr(bytes)),
                Event::Exited(exited) => return Ok(exited.shell_code()),
                Event::Failed { code, text } => {
                    tracing::debug!(text, ms = millis(begun.elapsed()), "a command did not start");
                    self.push(StreamEvent::Stderr(format!("{text}\n").into()));
                    return Ok(code);
                }
            }
        }
    }

    fn push(&self, event: StreamEvent) {
        let seq = self.next_seq.replace(self.next_seq.get() + 1);
        self.kept.borrow_mut().push_back((seq, event));
        self.changed.notify_waiters();
    }

    fn ahead_bytes(&self) -> usize {
        let taken = self.taken.get();
        self.kept.borrow().iter().filter(|(seq, _)| *seq > taken).map(|(_, event)| event.bytes()).sum()
    }

    /// The event after `seq`, when there is one.
    ///
    /// # Errors
    /// It was given out long ago and is not kept any more.
    pub async fn after(&self, seq: u64) -> Result<(u64, StreamEvent), ServiceError> {
        loop {
            let changed = self.changed.notified();
            if seq >= self.next_seq.get() {
                return Err(ServiceError::bad("Last-Event-ID", "is from the future"));
            }
            let next = {
                let kept = self.kept.borrow();
                match kept.front() {
                    Some((first, _)) if *first > seq + 1 => {
                        return Err(ServiceError::bad(
                            "Last-Event-ID",
                            format!("events before {first} are not kept any more"),
                        ));
                    }
                    Some((first, _)) => kept.get((seq + 1 - first) as usize).cloned(),
                    None => None,
                }
            };
            if let Some((at, event)) = next {
                self.take(at);
                return Ok((at, event));
            }
            changed.await;
        }
    }

    fn take(&self, seq: u64) {
        self.taken.set(self.taken.get().max(seq));
        let mut kept = self.kept.borrow_mut();
        let taken = self.taken.get();
        let mut behind: usize =
            kept.iter().filter(|(seq, _)| *seq <= taken).map(|(_, event)| event.bytes()).sum();
        // The last event always stays, for whoever comes back for it.
        while behind > BEHIND_BYTES && kept.len() > 1 {
            behind -= kept.pop_front().map_or(0, |(_, event)| event.bytes());
        }
        if let (Some(tape), Some((first, _))) = (&self.tape, kept.front()) {
            tape.forget_before(*first);
        }
        drop(kept);
        self.changed.notify_waiters();
    }
}

impl Header {
    /// The command had been given all it is given: only then can it go on under another daemon.
    pub(super) fn is_fed(&self, stdin_done: bool) -> bool {
        !self.stdin || stdin_done
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn stream() -> Stream {
        Stream {
            id: "x".to_owned(),
            sandbox: "run".into(),
            kept: RefCell::default(),
            next_seq: Cell::new(1),
            taken: Cell::new(0),
            changed: Notify::new(),
            tape: None,
        }
    }

    #[test]
    fn a_reader_who_comes_back_goes_on_where_it_was() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let stream = stream();
            for text in ["a", "b", "c"] {
                stream.push(StreamEvent::Stdout(text.into()));
            }
            assert_eq!(stream.after(0).await.unwrap(), (1, StreamEvent::Stdout("a".into())));
            assert_eq!(stream.after(2).await.unwrap(), (3, StreamEvent::Stdout("c".into())));
            assert_eq!(stream.after(1).await.unwrap(), (2, StreamEvent::Stdout("b".into())));
            assert!(stream.after(4).await.is_err());
        });
    }

    #[test]
    fn what_was_taken_is_kept_up_to_a_bound_and_then_said_to_be_gone() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let stream = stream();
            let portion = Bytes::from(vec![0; BEHIND_BYTES / 2]);
            for _ in 0..4 {
                stream.push(StreamEvent::Stdout(portion.clone()));
            }
            assert!(stream.ahead_bytes() > AHEAD_BYTES);
            for seq in 0..4 {
                stream.after(seq).await.unwrap();
            }
            assert_eq!(stream.ahead_bytes(), 0);
            assert!(stream.after(0).await.unwrap_err().to_string().contains("not kept"));
            assert!(stream.after(3).await.is_ok());
        });
    }
}
