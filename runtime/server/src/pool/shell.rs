//! A worker on its way: a process without a guest, then with one that stands still.

use super::Source;
use crate::executor;
use crate::places::Places;
use peregrine_vmm::agent::{Agent, Identity};
use peregrine_vmm::worker::{Parked, Rendezvous, Worker, WorkerError, Zygote};
use std::os::fd::AsFd as _;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

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
    Parked(Box<Parked>, Rendezvous),
}

/// A worker whose guest was told to go, and where the next daemon would find it.
#[derive(Debug)]
pub struct Begun {
    /// The worker.
    pub worker: Held<Worker>,
    /// Its guest's agent.
    pub agent: Agent,
    /// The worker's process.
    pub pid: u32,
    /// Its place.
    pub rendezvous: Rendezvous,
}

/// A guest that is told to go runs after 0.1 to 0.2 ms, unless its worker has to wait for a processor. It is hurried then, and
/// again after twice as long.
const HURRY: Duration = Duration::from_micros(500);
/// How often it is hurried.
const MOST_HURRIES: u32 = 8;

impl Held<Worker> {
    /// Waits until the guest of a worker that was told to let it go runs, `patience` at most; if that takes long, `hurry` is
    /// called now and then.
    ///
    /// # Errors
    /// What the worker said.
    pub async fn went(&self, patience: Duration, hurry: impl Fn()) -> Result<(), WorkerError> {
        let worker = self.get().ok_or_else(nothing)?;
        if !worker.has_answered()? {
            let control = worker.as_fd();
            // Unsound for a value that gives another descriptor each time; a borrowed one is always the same, and open.
            #[allow(deprecated)]
            let control = AsyncFd::with_interest(control, Interest::READABLE)?;
            let answered = async {
                for times in 0..MOST_HURRIES {
                    tokio::select! {
                        ready = control.readable() => return ready.map(drop),
                        waited = executor::nap(HURRY * (1 << times)) => match waited {
                            Ok(()) => hurry(),
                            // There is no descriptor for it: it waits without.
                            Err(_) => break,
                        },
                    }
                }
                control.readable().await.map(drop)
            };
            match tokio::time::timeout(patience, answered).await {
                Ok(ready) => ready?,
                Err(_) => return Err(WorkerError::Stuck),
            }
        }
        worker.went().map(drop)
    }
}

impl Shell {
    /// A process without a guest; how long it may take to answer from now on.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make(zygote: &Zygote, patience: Duration) -> Result<Self, WorkerError> {
        let worker = zygote.worker()?.with_patience(patience)?;
        Ok(Self(Held::new(Stage::Empty(worker))))
    }

    /// Blocks until the guest stands ready, with a place to be found at.
    ///
    /// # Errors
    /// What the worker said; it is gone.
    pub fn park(self, source: &Source, places: &Places) -> Result<Self, WorkerError> {
        let stage = match self.0.into_inner() {
            Some(Stage::Empty(worker)) => {
                let rendezvous = places.make()?;
                Stage::Parked(Box::new(worker.prepare(&source.dir, &source.disks)?), rendezvous)
            }
            Some(parked) => parked,
            None => return Err(nothing()),
        };
        Ok(Self(Held::new(stage)))
    }

    /// Whether it is parked.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        matches!(self.0.get(), Some(Stage::Parked(..)))
    }

    /// Lets the guest go in a parked one; [`Held::went`] is its answer.
    ///
    /// # Errors
    /// What the worker said; it is gone.
    pub fn begin(self, identity: &Identity) -> Result<Begun, WorkerError> {
        let Some(Stage::Parked(parked, rendezvous)) = self.0.into_inner() else { return Err(nothing()) };
        let pid = parked.pid();
        let (worker, agent) = parked.start(identity, Some(&rendezvous))?.into_parts();
        Ok(Begun { worker: Held::new(worker), agent, pid, rendezvous })
    }

    /// Ends it; blocks until the process is gone.
    pub(super) fn end(self) {
        drop(self.0.into_inner());
    }
}

fn nothing() -> WorkerError {
    WorkerError::OutOfTurn("nothing".to_owned())
}
