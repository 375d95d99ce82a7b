//! A worker on its way: a process without a guest, then with one that stands still.

use super::Source;
use crate::executor;
use peregrine_vmm::agent::Identity;
use peregrine_vmm::worker::{Going, Parked, Rendezvous, Worker, WorkerError};
use std::ffi::OsStr;
use std::path::Path;
use std::time::Duration;

/// A value whose end blocks (a killed process is waited for): it ends on a thread that may block.
#[derive(Debug)]
pub struct Held<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Held<T> {
    /// Takes the value.
    pub fn new(value: T) -> Self {
        Self(Some(value))
    }

    /// Gives it back; `None` never happens but in a drop.
    pub fn into_inner(mut self) -> Option<T> {
        self.0.take()
    }

    /// Looks at it.
    pub fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let Some(value) = self.0.take() {
            // On a thread that blocks already, and after the runtime's end, it goes here and now.
            match tokio::runtime::Handle::try_current() {
                Ok(_) => executor::blocking_detached(move || drop(value)),
                Err(_) => drop(value),
            }
        }
    }
}

/// A worker that nobody's guest runs in yet.
#[derive(Debug)]
pub struct Shell(Held<Stage>);

#[derive(Debug)]
enum Stage {
    Empty(Worker),
    Parked(Box<Parked>),
}

impl Shell {
    /// A process without a guest; how long it may take to answer from now on.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn spawn(program: &Path, patience: Duration) -> Result<Self, WorkerError> {
        let worker = Worker::spawn(program, &[OsStr::new("worker")])?.with_patience(patience)?;
        Ok(Self(Held::new(Stage::Empty(worker))))
    }

    /// Blocks until the guest stands ready.
    pub(super) fn park(self, source: &Source) -> Result<Self, WorkerError> {
        let parked = self.into_parked(source)?;
        Ok(Self(Held::new(Stage::Parked(Box::new(parked)))))
    }

    fn into_parked(self, source: &Source) -> Result<Parked, WorkerError> {
        match self.0.into_inner() {
            Some(Stage::Empty(worker)) => worker.prepare(&source.dir, &source.disks),
            Some(Stage::Parked(parked)) => Ok(*parked),
            None => Err(WorkerError::OutOfTurn("nothing".to_owned())),
        }
    }

    /// Lets a guest go in it; `source` is for a worker that has none yet. Blocks for about a millisecond. The
    /// process id is the worker's.
    ///
    /// # Errors
    /// What the worker said; it is gone.
    pub fn begin(
        self,
        source: &Source,
        identity: &Identity,
        rendezvous: &Rendezvous,
    ) -> Result<(Going, u32), WorkerError> {
        let parked = self.into_parked(source)?;
        let pid = parked.pid();
        Ok((parked.begin_at(identity, Some(rendezvous))?, pid))
    }

    /// Ends it; blocks until the process is gone.
    pub(super) fn end(self) {
        drop(self.0.into_inner());
    }
}
