//! One sandbox.
//!
//! ```text
//!            hibernate               resume
//!   running ----------> hibernated ----------> running
//!      |  \                |
//!      |   `-- its worker ends by itself --> lost
//!      `-- destroy --> ended <-- destroy --'
//! ```
//!
//! Fork, snapshot, hibernate, resume and destroy take turns ([`Sandbox::turn`]); commands do not wait for them.

use super::ServiceError;
use super::meter::{Meter, Usage};
use super::templates::Shape;
use crate::conversation::Conversation;
use crate::pool::{Held, Pool};
use crate::registry::{MadeWith, RunRow};
use jiff::Timestamp;
use peregrine_vmm::worker::{Rendezvous, Worker, WorkerError};
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, MutexGuard};

/// Whose.
pub type Tenant = Rc<str>;

/// What a sandbox is made as.
#[derive(Debug, Clone)]
pub struct Spec {
    /// Image, vCPUs, memory.
    pub shape: Shape,
    /// Disk it may use.
    pub disk_mib: u64,
    /// Idleness after which it ends; `None` never.
    pub timeout: Option<Duration>,
    /// Idle for its timeout, it hibernates and does not end.
    pub sleeps_when_idle: bool,
    /// Environment of its commands, `NAME=VALUE`.
    pub env: Vec<String>,
}

/// A worker whose guest runs, and the conversation with it.
#[derive(Debug, Clone)]
pub struct Running {
    worker: Arc<Held<Worker>>,
    rendezvous: Rc<Rendezvous>,
    /// Commands go here.
    pub conversation: Conversation,
    /// The worker's process.
    pub pid: u32,
}

impl Running {
    pub(super) fn new(
        worker: Held<Worker>,
        conversation: Conversation,
        pid: u32,
        rendezvous: Rendezvous,
    ) -> Self {
        Self { worker: Arc::new(worker), rendezvous: Rc::new(rendezvous), conversation, pid }
    }

    /// Waits until its guest, which was told to go, runs; see [`Held::went`].
    pub(super) async fn went(&self, patience: Duration, hurry: impl Fn()) -> Result<(), WorkerError> {
        self.worker.went(patience, hurry).await
    }

    /// Its rendezvous, as the registry keeps it: a name in the directory of all.
    fn place(&self) -> Option<String> {
        Some(self.rendezvous.path().file_name()?.to_str()?.to_owned())
    }

    /// The guest stands still from now on; its process goes when it is in nobody's way.
    pub(super) fn end(self, pool: &Pool) {
        if let Some(worker) = self.worker.get() {
            worker.halt();
        }
        pool.bury(self.worker);
    }

    /// Has the worker do something that blocks.
    pub(super) async fn with_worker<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Worker) -> Result<T, WorkerError> + Send + 'static,
    ) -> Result<T, WorkerError> {
        let worker = Arc::clone(&self.worker);
        crate::executor::blocking(move || match worker.get() {
            Some(worker) => work(worker),
            None => Err(WorkerError::OutOfTurn("nothing".to_owned())),
        })
        .await
    }
}

/// What it is at.
#[derive(Debug)]
pub enum State {
    /// Commands can run.
    Running(Running),
    /// It lies in this directory.
    Hibernated(PathBuf),
    /// Its worker ended by itself.
    Lost(String),
    /// It is gone.
    Ended,
}

impl State {
    /// As the API calls it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Running(_) => "running",
            Self::Hibernated(_) => "hibernated",
            Self::Lost(_) => "lost",
            Self::Ended => "destroyed",
        }
    }
}

/// A sandbox, from its making to its end.
#[derive(Debug)]
pub struct Sandbox {
    /// Its name.
    pub id: Rc<str>,
    /// Whose it is.
    pub tenant: Tenant,
    /// What it was made as.
    pub spec: Spec,
    /// From the request to the answer.
    pub create: Cell<Duration>,
    /// When it was made.
    pub created: Timestamp,
    /// The request that made it, if it had a key.
    pub(super) made_with: RefCell<Option<MadeWith>>,
    pub(super) timeout: Cell<Option<Duration>>,
    pub(super) state: RefCell<State>,
    pub(super) meter: RefCell<Meter>,
    /// When its row was written last.
    pub(super) noted: Cell<Instant>,
    turn: Mutex<()>,
    idle_since: Cell<Instant>,
    busy: Cell<usize>,
}

/// Something goes on in the sandbox, so it is not idle; its end counts as the last sign of life.
#[derive(Debug)]
pub struct Activity(Rc<Sandbox>);

impl Drop for Activity {
    fn drop(&mut self) {
        self.0.busy.set(self.0.busy.get() - 1);
        self.0.idle_since.set(Instant::now());
    }
}

impl Sandbox {
    pub(super) fn new(id: &str, tenant: Tenant, spec: Spec, created: Timestamp, before: Usage) -> Self {
        Self {
            id: id.into(),
            tenant,
            timeout: Cell::new(spec.timeout),
            spec,
            create: Cell::default(),
            created,
            made_with: RefCell::default(),
            state: RefCell::new(State::Ended),
            meter: RefCell::new(Meter::new(before)),
            noted: Cell::new(Instant::now()),
            turn: Mutex::new(()),
            idle_since: Cell::new(Instant::now()),
            busy: Cell::new(0),
        }
    }

    /// It runs in this worker now.
    pub(super) fn runs(&self, running: Running) {
        self.meter.borrow_mut().start(running.pid);
        self.runs_on(running);
    }

    /// It has run in this worker all along; its meter was never stopped.
    pub(super) fn runs_on(&self, running: Running) {
        self.idle_since.set(Instant::now());
        *self.state.borrow_mut() = State::Running(running);
    }

    /// What it is at, as the API calls it.
    #[must_use]
    pub fn status(&self) -> &'static str {
        self.state.borrow().name()
    }

    /// Why it is lost, if it is.
    #[must_use]
    pub fn reason(&self) -> Option<String> {
        match &*self.state.borrow() {
            State::Lost(why) => Some(why.clone()),
            _ => None,
        }
    }

    /// Idleness after which it ends.
    #[must_use]
    pub fn timeout(&self) -> Option<Duration> {
        self.timeout.get()
    }

    /// What it has used so far.
    #[must_use]
    pub fn usage(&self) -> Usage {
        self.meter.borrow().read()
    }

    /// Waits for its turn: one verb changes a sandbox at a time.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    /// It is in use while the value lives.
    #[must_use]
    pub fn activity(self: &Rc<Self>) -> Activity {
        self.busy.set(self.busy.get() + 1);
        Activity(Rc::clone(self))
    }

    /// For how long nothing has gone on in it, if it runs.
    #[must_use]
    pub fn idle(&self) -> Option<Duration> {
        let running = matches!(*self.state.borrow(), State::Running(_));
        (running && self.busy.get() == 0).then(|| self.idle_since.get().elapsed())
    }

    /// Its worker and conversation.
    ///
    /// # Errors
    /// If it does not run.
    pub fn running(&self) -> Result<Running, ServiceError> {
        match &*self.state.borrow() {
            State::Running(running) => Ok(running.clone()),
            State::Hibernated(_) => Err(self.wrong_state("resume it first")),
            State::Lost(why) => Err(ServiceError::Lost { id: self.id.to_string(), why: why.clone() }),
            State::Ended => Err(ServiceError::no_sandbox(&self.id)),
        }
    }

    pub(super) fn wrong_state(&self, hint: &'static str) -> ServiceError {
        ServiceError::WrongState { id: self.id.to_string(), state: self.status(), hint }
    }

    /// Its row with this usage; `cost_cents` is what its time so far costs.
    pub(super) fn row(&self, usage: Usage, cost_cents: impl FnOnce(&Spec, Duration) -> f64) -> RunRow {
        let state = self.state.borrow();
        let ended = matches!(*state, State::Lost(_) | State::Ended);
        RunRow {
            id: self.id.to_string(),
            tenant: self.tenant.to_string(),
            status: state.name().to_owned(),
            reason: if let State::Lost(why) = &*state { Some(why.clone()) } else { None },
            image: self.spec.shape.image.name.clone(),
            root: self.spec.shape.image.clone(),
            vcpus: self.spec.shape.vcpus,
            mem_mib: self.spec.shape.mem_mib,
            disk_mib: self.spec.disk_mib,
            create_ms: millis(self.create.get()),
            timeout_s: self.timeout.get().map(|timeout| timeout.as_secs()),
            sleeps_when_idle: self.spec.sleeps_when_idle,
            env: self.spec.env.clone(),
            created_us: self.created.as_microsecond(),
            ended_us: ended.then(|| Timestamp::now().as_microsecond()),
            ran_ms: u64::try_from(usage.ran.as_millis()).unwrap_or(u64::MAX),
            cpu_ms: u64::try_from(usage.cpu.as_millis()).unwrap_or(u64::MAX),
            mem_peak_bytes: usage.mem_peak_bytes,
            cost_cents: cost_cents(&self.spec, usage.ran),
            sleeps_in: if let State::Hibernated(dir) = &*state { Some(dir.clone()) } else { None },
            found_at: if let State::Running(running) = &*state { running.place() } else { None },
            running: self.meter.borrow().running(),
            made_with: self.made_with.borrow().clone(),
        }
    }
}

/// Milliseconds to the microsecond, as JSON wants them.
#[must_use]
pub fn millis(time: Duration) -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let us = time.as_micros() as f64;
    us / 1000.0
}
