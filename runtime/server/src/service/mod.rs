//! The verbs, in order: create, restore, exec, fork, hibernate, resume, destroy. Over sandboxes, for tenants.
//!
//! ```text
//! api --> service --> pool ----> workers
//!            |  `---> conversation (commands, one connection a sandbox)
//!            `------> registry, journal
//! ```
//!
//! May touch: workers, the registry, the state directory. Must not: know HTTP or JSON's shapes.

mod create;
mod destroy;
mod error;
mod exec;
mod files;
mod fork;
mod hibernate;
mod ids;
mod journal;
mod meter;
mod pools;
mod port;
mod recover;
mod sandbox;
mod shell;
mod snapshot;
mod stream;
mod templates;
mod usage;
mod watchdog;

pub use create::{CreateRequest, idleness};
pub use destroy::Destroyed;
pub use error::{FileProblem, ServiceError};
pub use exec::{ExecRequest, Finished};
pub use files::{DirEntry, FileStat, Reading, Writing};
pub use ids::random_digits;
pub(crate) use journal::Journal;
pub use meter::Usage;
pub use pools::PoolView;
pub use sandbox::{Activity, Running, Sandbox, Spec, State, Tenant, millis};
pub use shell::{ShellReply, ShellSession};
pub use stream::{Stream, StreamEvent};
pub use templates::Shape;

use crate::artefacts::Artefacts;
use crate::config::{Config, OnStop};
use crate::executor;
use crate::places::Places;
use crate::pool::{Pool, PoolError};
use crate::registry::{Registry, RegistryError, RunRow};
use peregrine_vmm::worker::Zygote;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use templates::Templates;

/// The hidden verb of the process that workers are forked from.
pub const ZYGOTE_VERB: &str = "zygote";
/// How often the audit log is signed and made durable.
const SEAL_EVERY: Duration = Duration::from_secs(5);
/// Where running workers wait for the next daemon, in the state directory.
const WORKERS: &str = "workers";
/// Digits of randomness in the names of one daemon's places.
const PLACE_DIGITS: usize = 16;
/// Tapes of followed commands.
const STREAMS: &str = "streams";
/// How often idle sandboxes are looked for.
const SWEEP: Duration = Duration::from_millis(500);

/// Why the service does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The state directory.
    #[error("cannot use the state directory {path}: {source}")]
    State {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// Somebody else does.
    #[error("another peregrine serves the state directory {0}: end it first, or give another with --state")]
    Locked(PathBuf),
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The pool.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// The service: one a daemon.
#[derive(Debug)]
pub struct Service {
    /// As it was started with.
    pub config: Config,
    pub(crate) pool: Pool,
    pub(crate) registry: Registry,
    pub(crate) journal: Journal,
    templates: Templates,
    streams: stream::Streams,
    watches: watchdog::Watches,
    pools: RefCell<BTreeMap<String, pools::Kept>>,
    sandboxes: RefCell<HashMap<Rc<str>, Rc<Sandbox>>>,
    /// Sandboxes that are being made: they count against the limits.
    making: Cell<usize>,
    state: PathBuf,
    places: Places,
    zygote: Arc<Zygote>,
    /// Held while the daemon lives.
    _lock: File,
}

/// Builds in flight are bound by the host's processors: more of them take as long in all, and whatever a request wakes
/// waits for more of them. Half of the processors are left to requests and guests.
fn pool_limits(config: &Config) -> prewarm::Limits {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    prewarm::Limits {
        max_bytes: config.limits.pool_mib << 20,
        max_builds: 2 * processors,
        refill_builds: (processors / 2).max(1),
    }
}

impl Service {
    /// Takes the state directory over and starts the pool; `program zygote` makes workers, `program
    /// make-template` a template.
    ///
    /// # Errors
    /// Why not.
    pub fn start(
        config: Config,
        state: &Path,
        artefacts: Artefacts,
        program: &Path,
    ) -> Result<Rc<Self>, StartError> {
        let failed = |source| StartError::State { path: state.to_owned(), source };
        for dir in [state.to_owned(), state.join(WORKERS), state.join(STREAMS)] {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        let lock = File::options().create(true).append(true).open(state.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => return Err(StartError::Locked(state.to_owned())),
            Err(std::fs::TryLockError::Error(source)) => return Err(failed(source)),
        }
        let limits = pool_limits(&config);
        let prefix = ids::random_digits(PLACE_DIGITS).map_err(failed)?;
        let places = Places::new(state.join(WORKERS), Duration::from_secs(config.limits.orphan_s), prefix);
        // The state directory says in lists of processes whose they are.
        let arguments = vec!["--state".into(), state.into(), ZYGOTE_VERB.into()];
        let zygote = Arc::new(Zygote::new(program.to_owned(), arguments));
        let service = Rc::new(Self {
            pool: Pool::start(limits, Arc::clone(&zygote), config.limits.patience(), places.clone())?,
            places,
            templates: Templates::new(artefacts, program, Arc::clone(&zygote)),
            zygote,
            registry: Registry::open(&state.join("registry.db"))?,
            journal: Journal::open(&state.join("audit")).map_err(failed)?,
            streams: stream::Streams::default(),
            watches: watchdog::Watches::default(),
            pools: RefCell::default(),
            sandboxes: RefCell::default(),
            making: Cell::new(0),
            state: state.to_owned(),
            config,
            _lock: lock,
        });
        service.recover()?;
        let sweeping = Rc::downgrade(&service);
        executor::spawn(async move {
            loop {
                tokio::time::sleep(SWEEP).await;
                let Some(service) = sweeping.upgrade() else { return };
                service.end_idle();
                service.note_some();
                service.watches.tidy();
            }
        });
        let sealing = Rc::downgrade(&service);
        executor::spawn(async move {
            loop {
                tokio::time::sleep(SEAL_EVERY).await;
                let Some(service) = sealing.upgrade() else { return };
                executor::in_the_background(service.journal.seal()).await;
            }
        });
        Ok(service)
    }

    /// A tenant's sandbox.
    ///
    /// # Errors
    /// If there is none of this name that is theirs.
    pub fn sandbox(&self, tenant: &str, id: &str) -> Result<Rc<Sandbox>, ServiceError> {
        let found = self.sandboxes.borrow().get(id).filter(|sandbox| &*sandbox.tenant == tenant).cloned();
        match found {
            Some(sandbox) => Ok(sandbox),
            None => Err(match self.lost(tenant, id)? {
                Some(row) => ServiceError::Lost { id: id.to_owned(), why: row.reason.unwrap_or_default() },
                None => ServiceError::no_sandbox(id),
            }),
        }
    }

    /// The row of a tenant's sandbox that has ended by itself and was not deleted since.
    ///
    /// # Errors
    /// If the registry fails.
    pub fn lost(&self, tenant: &str, id: &str) -> Result<Option<RunRow>, ServiceError> {
        Ok(self.registry.run(tenant, id)?.filter(|row| row.status == "lost"))
    }

    /// A tenant's sandboxes, oldest first.
    #[must_use]
    pub fn sandboxes(&self, tenant: &str) -> Vec<Rc<Sandbox>> {
        let all = self.sandboxes.borrow();
        let mut theirs: Vec<_> = all.values().filter(|s| &*s.tenant == tenant).cloned().collect();
        theirs.sort_by_key(|sandbox| sandbox.created);
        theirs
    }

    /// How many sandboxes there are, of all tenants, by state.
    #[must_use]
    pub fn count_by_state(&self) -> [(&'static str, usize); 2] {
        let all = self.sandboxes.borrow();
        ["running", "hibernated"]
            .map(|state| (state, all.values().filter(|sandbox| sandbox.status() == state).count()))
    }

    /// Sets the idleness after which a sandbox ends.
    ///
    /// # Errors
    /// If there is no such sandbox, or the registry fails.
    pub fn set_timeout(
        &self,
        tenant: &str,
        id: &str,
        timeout: Option<Duration>,
    ) -> Result<Rc<Sandbox>, ServiceError> {
        let sandbox = self.sandbox(tenant, id)?;
        sandbox.timeout.set(timeout);
        // A sign of life.
        drop(sandbox.activity());
        self.note(&sandbox)?;
        Ok(sandbox)
    }

    /// Writes a sandbox's row as of now.
    fn note(&self, sandbox: &Sandbox) -> Result<(), ServiceError> {
        sandbox.noted.set(Instant::now());
        Ok(self.registry.put_run(&self.row(sandbox))?)
    }

    fn row(&self, sandbox: &Sandbox) -> RunRow {
        self.row_with(sandbox, sandbox.usage())
    }

    fn row_with(&self, sandbox: &Sandbox, usage: Usage) -> RunRow {
        let prices = self.config.prices;
        sandbox.row(usage, |spec, ran| prices.cents(spec.shape.vcpus, spec.shape.mem_mib, ran))
    }

    fn end_idle(self: &Rc<Self>) {
        let overdue = |sandbox: &&Rc<Sandbox>| {
            sandbox.timeout().zip(sandbox.idle()).is_some_and(|(timeout, idle)| idle >= timeout)
        };
        let idle: Vec<_> = self.sandboxes.borrow().values().filter(overdue).cloned().collect();
        for sandbox in idle {
            let service = Rc::clone(self);
            executor::spawn(async move {
                tracing::info!(id = %sandbox.id, "idle for its timeout");
                let ended = if sandbox.spec.sleeps_when_idle {
                    service.hibernate(&sandbox).await
                } else {
                    service.destroy(&sandbox.tenant, &sandbox.id).await.map(drop)
                };
                if let Err(error) = ended {
                    tracing::warn!(id = %sandbox.id, %error, "an idle sandbox cannot be ended");
                }
            });
        }
    }

    /// Ends everything: the pool's workers and, unless the next daemon is to have them, all sandboxes that run.
    pub async fn shut_down(self: &Rc<Self>) {
        let keep = self.config.on_stop == OnStop::Keep;
        let all: Vec<_> = self.sandboxes.borrow().values().cloned().collect();
        let mut turns = Vec::new();
        for sandbox in &all {
            if keep {
                // Nothing changes it any more.
                turns.push(sandbox.turn().await);
                continue;
            }
            if let Err(error) = self.destroy(&sandbox.tenant, &sandbox.id).await {
                tracing::warn!(id = %sandbox.id, %error, "at shutdown");
            }
        }
        self.pool.drain().await;
        executor::blocking(self.journal.seal()).await;
        if keep {
            // Dropped, a sandbox ends.
            tracing::info!(sandboxes = turns.len(), "they run on for the next daemon");
            std::process::exit(0);
        }
    }
}
