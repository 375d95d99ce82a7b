//! Commands whose output is followed while they run, and may be followed again from where a reader broke off.
//!
//! A command outlives its reader. What no reader has taken yet is held up to a bound, and then the command
//! waits; what was taken is kept up to another, for a reader who comes back.

use super::exec::ExecRequest;
use super::sandbox::Sandbox;
use super::{Service, ServiceError, ids, millis};
use crate::conversation::{Ended, Event, Output};
use bytes::Bytes;
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
        let begun = Instant::now();
        let process = self.command(sandbox, request, request.stdin.is_some())?;
        let stream = Rc::new(Stream {
            id: format!("x{}", ids::random_digits(16)?),
            sandbox: Rc::clone(&sandbox.id),
            kept: RefCell::default(),
            next_seq: Cell::new(1),
            taken: Cell::new(0),
            changed: Notify::new(),
        });
        self.streams.0.borrow_mut().insert(stream.id.clone(), Rc::clone(&stream));
        if let Some(stdin) = request.stdin.clone() {
            let input = process.input.clone();
            crate::executor::spawn(async move {
                let _ = input.write(&stdin).await;
                let _ = input.end();
            });
        }
        let (service, sandbox, pumped) = (Rc::clone(self), Rc::clone(sandbox), Rc::clone(&stream));
        let limit = self.exec_limit(request);
        crate::executor::spawn(async move {
            let activity = sandbox.activity();
            let pumping = tokio::time::timeout(limit, pumped.pump(process.output, begun));
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
                Ok(()) => pumped.push(last),
                Err(error) => {
                    pumped.push(StreamEvent::Broken { code: "audit_unavailable", why: error.to_string() });
                }
            }
            drop(activity);
            tokio::time::sleep(AFTERLIFE).await;
            service.streams.0.borrow_mut().remove(&pumped.id);
        });
        Ok(stream)
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
        drop(kept);
        self.changed.notify_waiters();
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
