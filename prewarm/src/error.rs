//! What the pool refuses, and why a caller's demand failed.

use crate::slot::{SlotId, State};
use std::fmt;
use std::time::Duration;

/// Why a build failed, or why a waiting caller gets no slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The template itself is bad (checksum, version, CPU mismatch). No attempt is made until it has been
    /// rebuilt.
    Template(String),
    /// The host could not build this one (descriptors, memory, a signal). Tried again after a back-off.
    Host(String),
    /// The template was removed while the caller waited.
    Removed,
    /// The pool was shut down while the caller waited.
    Drained,
}

impl fmt::Display for Cause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Template(text) => write!(f, "the template cannot be used: {text}"),
            Self::Host(text) => write!(f, "the host could not build a microVM: {text}"),
            Self::Removed => f.write_str("the template was removed"),
            Self::Drained => f.write_str("the pool is shutting down"),
        }
    }
}

/// What the pool refuses. A refused call leaves the pool as it was, its time included; only a checkout that
/// meets an open breaker or a full queue counts as demand.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A policy or limit is out of range.
    #[error("{field} {problem}")]
    Policy {
        /// The field at fault.
        field: &'static str,
        /// What is wrong with it and what it must be.
        problem: &'static str,
    },
    /// A template of this key is already here.
    #[error("the pool already has this template: remove it first")]
    Duplicate,
    /// No such template.
    #[error("the pool does not know this template: add it first")]
    UnknownTemplate,
    /// The pool takes no more work.
    #[error("the pool is shutting down")]
    Draining,
    /// As many callers wait for this template as its policy allows.
    #[error("{waiting} callers already wait for this template: try later, or raise max_waiters")]
    QueueFull {
        /// How many wait.
        waiting: usize,
    },
    /// Builds of this template fail; the breaker is open.
    #[error("no attempt is made now: {cause}")]
    Broken {
        /// What the last failed build said.
        cause: Cause,
        /// How long until the next attempt may be made; `None` while a rebuild of the template has to come
        /// first.
        retry_after: Option<Duration>,
    },
    /// The slot was never built here or is already destroyed.
    #[error("{0} is unknown: it was never built here, or it is already destroyed")]
    UnknownSlot(SlotId),
    /// The event does not fit the slot's state.
    #[error("{slot} is {state}, which `{event}` does not fit")]
    WrongState {
        /// The slot.
        slot: SlotId,
        /// Its state, which is unchanged.
        state: State,
        /// The event's name.
        event: &'static str,
    },
}
