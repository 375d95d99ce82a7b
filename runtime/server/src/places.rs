//! Names for the places where running workers wait for the next daemon.

use peregrine_vmm::worker::Rendezvous;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One directory of places; clones share its numbers.
#[derive(Debug, Clone)]
pub struct Places(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    patience: Duration,
    prefix: String,
    next: AtomicU64,
}

impl Places {
    /// Places in `dir`, where a worker waits `patience` long. No earlier daemon's names begin with `prefix`.
    #[must_use]
    pub fn new(dir: PathBuf, patience: Duration, prefix: String) -> Self {
        Self(Arc::new(Inner { dir, patience, prefix, next: AtomicU64::new(0) }))
    }

    /// A place that no worker had before: one that ends and the next one of its sandbox overlap.
    ///
    /// # Errors
    /// If the directory is gone, or descriptors are exhausted.
    pub fn make(&self) -> io::Result<Rendezvous> {
        let number = self.0.next.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{number}", self.0.prefix);
        Rendezvous::new(self.0.dir.join(name), self.0.patience)
    }
}
