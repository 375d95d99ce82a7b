//! What can go wrong in this room.

use std::io;
use std::path::PathBuf;

/// Why the log cannot be opened, written or read. Tampering is no error but a [`crate::Verdict`].
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// A file refused.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process writes this log.
    #[error("{}: another process writes this audit log; stop it first", .0.display())]
    Busy(PathBuf),
    /// A file of the log does not hold what this room writes.
    #[error("{}: {what}; restore it from a backup, or verify the log and begin a new one", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// An entry is longer than the log takes.
    #[error("an audit entry of {bytes} bytes; at most {limit} are written")]
    TooLong {
        /// Its length.
        bytes: usize,
        /// The limit.
        limit: usize,
    },
    /// An earlier write failed halfway and could not be taken back: nothing can follow it.
    #[error("the audit log ends in a torn entry that could not be removed; restart after making room")]
    Poisoned,
    /// The log cannot be encoded.
    #[error("an audit entry cannot be encoded: {0}")]
    Encoding(#[from] serde_json::Error),
}

impl AuditError {
    pub(crate) fn file(path: &std::path::Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { path, source }
    }

    pub(crate) fn malformed(path: &std::path::Path, what: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_owned(), what: what.into() }
    }
}
