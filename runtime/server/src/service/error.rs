//! Why a verb was not done. The API maps these to statuses; nothing here knows HTTP.

use crate::conversation::{Ended, ExecError};
use crate::pool::PoolError;
use crate::registry::RegistryError;
use crate::template::TemplateError;
use peregrine_vmm::worker::WorkerError;
use std::time::Duration;

/// A verb that was not done. What it was about is as it was, unless it says otherwise.
#[derive(Debug, thiserror::Error)]
pub enum ServiceError {
    /// The request makes no sense.
    #[error("{field}: {why}")]
    BadInput {
        /// Which part of it.
        field: &'static str,
        /// Why, and what would.
        why: String,
    },
    /// There is none of this name, or it is another tenant's.
    #[error("there is no {what} {name}")]
    NotFound {
        /// Of what.
        what: &'static str,
        /// The name.
        name: String,
    },
    /// Not in its present state.
    #[error("sandbox {id} is {state}: {hint}")]
    WrongState {
        /// Which.
        id: String,
        /// What it is.
        state: &'static str,
        /// What to do.
        hint: &'static str,
    },
    /// A file in the sandbox cannot be had so.
    #[error("{path}: {why}")]
    File {
        /// The path in the guest.
        path: String,
        /// Why.
        why: FileProblem,
    },
    /// The microVM has gone.
    #[error("sandbox {id} is gone: {why}")]
    Lost {
        /// Which.
        id: String,
        /// Why.
        why: String,
    },
    /// The image cannot be had.
    #[error(transparent)]
    Image(#[from] peregrine_image::Error),
    /// What was saved cannot be restored here.
    #[error("the snapshot is refused: {0}")]
    SnapshotRefused(String),
    /// As much as there may be.
    #[error("{what} are exhausted: {limit}")]
    Capacity {
        /// What there is too much of.
        what: &'static str,
        /// The limit.
        limit: String,
        /// When to ask again.
        retry_after: Duration,
    },
    /// Not now.
    #[error("{why}")]
    Unavailable {
        /// Why.
        why: String,
        /// When to ask again.
        retry_after: Duration,
    },
    /// It took too long.
    #[error("{what} took longer than {limit:?}")]
    Timeout {
        /// What.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// The microVM's process stands still.
    #[error(
        "the sandbox is stuck: its microVM's process does not answer; it may come back, and can be destroyed"
    )]
    Stuck,
    /// Nothing listens there.
    #[error("nothing listens on port {port} of the sandbox")]
    PortClosed {
        /// Where.
        port: u16,
    },
    /// The disk is full.
    #[error("no space left {place}")]
    NoSpace {
        /// Where.
        place: &'static str,
    },
    /// A key was used for another request.
    #[error("this Idempotency-Key was used for another request")]
    KeyReused,
    /// The audit log cannot be written, so nothing was done.
    #[error("the audit log cannot be written: {0}")]
    Audit(String),
    /// What should not be.
    #[error("{0}")]
    Internal(String),
}

/// What is wrong with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FileProblem {
    /// Nothing there.
    #[error("no such file or directory")]
    Missing,
    /// A directory, where a file is meant, or the other way round; or neither.
    #[error("{0}")]
    Kind(&'static str),
    /// The guest's kernel refuses.
    #[error("the guest's kernel refuses (error {0})")]
    Refused(u8),
}

impl ServiceError {
    /// No sandbox of this name.
    pub(crate) fn no_sandbox(id: &str) -> Self {
        Self::NotFound { what: "sandbox", name: id.to_owned() }
    }

    pub(crate) fn bad(field: &'static str, why: impl Into<String>) -> Self {
        Self::BadInput { field, why: why.into() }
    }

    /// The sandbox ended while something was done in it.
    pub(crate) fn lost(id: &str) -> impl FnOnce(Ended) -> Self {
        let id = id.to_owned();
        move |Ended(why)| Self::Lost { id, why: why.to_string() }
    }

    pub(crate) fn exec(id: &str) -> impl FnOnce(ExecError) -> Self {
        let id = id.to_owned();
        move |error| match error {
            ExecError::Ended(Ended(why)) => Self::Lost { id, why: why.to_string() },
            ExecError::Wire(error) => Self::bad("command", error.to_string()),
        }
    }
}

impl From<RegistryError> for ServiceError {
    fn from(error: RegistryError) -> Self {
        tracing::error!(%error, "registry");
        Self::Internal("the registry failed".to_owned())
    }
}

impl From<TemplateError> for ServiceError {
    fn from(error: TemplateError) -> Self {
        tracing::error!(%error, "template");
        let why = format!("the sandbox's template cannot be made: {error}");
        Self::Unavailable { why, retry_after: Duration::from_secs(5) }
    }
}

impl From<PoolError> for ServiceError {
    fn from(error: PoolError) -> Self {
        match error {
            PoolError::Busy { why, retry_after } => Self::Unavailable { why, retry_after },
            PoolError::Closed => Self::Unavailable {
                why: "the daemon is shutting down".to_owned(),
                retry_after: Duration::from_secs(5),
            },
            PoolError::Policy(error) => Self::bad("pool", error.to_string()),
        }
    }
}

impl From<WorkerError> for ServiceError {
    fn from(error: WorkerError) -> Self {
        tracing::error!(%error, "worker");
        match error {
            WorkerError::NoSpace(_) => Self::NoSpace { place: "on the host" },
            WorkerError::Stuck => Self::Stuck,
            WorkerError::Io(error) if is_full(&error) => Self::NoSpace { place: "on the host" },
            other => {
                let why = format!("the microVM's process: {other}");
                Self::Unavailable { why, retry_after: Duration::from_secs(1) }
            }
        }
    }
}

impl From<std::io::Error> for ServiceError {
    fn from(error: std::io::Error) -> Self {
        tracing::error!(%error, "host");
        if is_full(&error) {
            return Self::NoSpace { place: "on the host" };
        }
        Self::Unavailable { why: format!("the host: {error}"), retry_after: Duration::from_secs(1) }
    }
}

fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}
