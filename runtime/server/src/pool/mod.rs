//! The prewarm pool at work: one task owns the state machine of the `prewarm` crate and does what it says with
//! worker processes. A miss is a refill that the caller waits for.
//!
//! May touch: worker processes that nobody owns yet. Must not: know sandboxes; a worker that is handed out is
//! the caller's, and the pool forgets it.

mod measure;
mod quiet;
mod shell;

pub use measure::Percentiles;
pub use shell::{Begun, Held, Shell};

use crate::executor;
use crate::places::Places;
use measure::Latencies;
use peregrine_vmm::DiskConfig;
use peregrine_vmm::worker::{Worker, WorkerError, Zygote};
use prewarm::{Action, Cause, Checkout, Depth, Limits, Policy, SlotId, Stock, Ticket};
use quiet::Quiet;
use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};

/// A template's name: its key in the cache.
pub type TemplateKey = Rc<str>;

/// What a worker is prepared with.
#[derive(Debug, Clone)]
pub struct Source {
    /// The snapshot's directory.
    pub dir: PathBuf,
    /// Its disks.
    pub disks: Vec<DiskConfig>,
    /// Who makes it good again when a worker refuses it. `None`: nobody can.
    pub mender: Option<Mender>,
}

/// Has a template looked at as its clones will, and made again if it is damaged or does not fit. May block as long as a boot.
#[derive(Clone)]
pub struct Mender(Arc<dyn Fn() -> Result<(), String> + Send + Sync>);

impl Mender {
    /// One that does it so, or says why it cannot.
    pub fn new(mend: impl Fn() -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Arc::new(mend))
    }
}

impl std::fmt::Debug for Mender {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Mender")
    }
}

/// What a caller gets.
#[derive(Debug)]
pub struct CheckedOut {
    /// A worker, prepared or not.
    pub shell: Shell,
    /// It was there.
    pub hit: bool,
}

/// Why there is none.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    /// Later there may be.
    #[error("{why}")]
    Busy {
        /// Why not now.
        why: String,
        /// When to ask again.
        retry_after: Duration,
    },
    /// The daemon is shutting down.
    #[error("the pool is shutting down")]
    Closed,
    /// A policy that cannot be.
    #[error("{0}")]
    Policy(#[from] prewarm::Error),
}

/// A template's counts.
#[derive(Debug, Clone)]
pub struct PoolStats {
    /// Counts and gauges of the state machine.
    pub counts: prewarm::Stats,
    /// From asking to having, of all checkouts.
    pub checkout_us: Percentiles,
}

enum Order {
    Checkout { key: TemplateKey, reply: oneshot::Sender<Result<CheckedOut, PoolError>> },
    Add { key: TemplateKey, source: Source, policy: Policy, reply: oneshot::Sender<Result<(), PoolError>> },
    Remove { key: TemplateKey },
    Stats { key: TemplateKey, reply: oneshot::Sender<Option<PoolStats>> },
    Built { slot: SlotId, result: Result<Shell, WorkerError> },
    Destroyed { slot: SlotId },
    Mended { template: TemplateKey, result: Result<(), String> },
    Drain { done: oneshot::Sender<()> },
    Bury { worker: Arc<Held<Worker>> },
}

/// The pool; clones are of the same one.
#[derive(Clone)]
pub struct Pool {
    orders: mpsc::UnboundedSender<Order>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pool")
    }
}

impl Pool {
    /// An empty pool whose workers come from `zygote`, and answer within `patience`.
    ///
    /// # Errors
    /// If a limit is out of range.
    pub fn start(
        limits: Limits,
        zygote: Arc<Zygote>,
        patience: Duration,
        places: Places,
    ) -> Result<Self, PoolError> {
        let pool = prewarm::Pool::new(limits)?;
        let (orders, receiver) = mpsc::unbounded_channel();
        let (burials, dead) = mpsc::unbounded_channel();
        let owner = Owner {
            pool,
            zygote,
            patience,
            places,
            epoch: Instant::now(),
            sources: HashMap::new(),
            shells: HashMap::new(),
            waiting: HashMap::new(),
            quiet: Rc::new(Quiet::new()),
            burials,
            latencies: HashMap::new(),
            orders: orders.downgrade(),
            drained: None,
        };
        executor::spawn(owner.serve(receiver));
        executor::spawn(bury(dead));
        Ok(Self { orders })
    }

    /// Keeps a template ready; one that is kept already gets the new policy.
    ///
    /// # Errors
    /// If the policy cannot be.
    pub async fn add(&self, key: TemplateKey, source: Source, policy: Policy) -> Result<(), PoolError> {
        let (reply, answer) = oneshot::channel();
        self.order(Order::Add { key, source, policy, reply })?;
        answer.await.map_err(|_| PoolError::Closed)?
    }

    /// Keeps it no longer.
    pub fn remove(&self, key: TemplateKey) {
        let _ = self.order(Order::Remove { key });
    }

    /// A worker for this template, which was added.
    ///
    /// # Errors
    /// [`PoolError::Busy`] with the reason.
    pub async fn checkout(&self, key: TemplateKey) -> Result<CheckedOut, PoolError> {
        let (reply, answer) = oneshot::channel();
        self.order(Order::Checkout { key, reply })?;
        answer.await.map_err(|_| PoolError::Closed)?
    }

    /// Ends a worker, whose guest stands still, in a pause between checkouts.
    pub fn bury(&self, worker: Arc<Held<Worker>>) {
        // After the pool's end, it ends at once.
        let _ = self.order(Order::Bury { worker });
    }

    /// How it goes with a template; `None` for one that was never added.
    pub async fn stats(&self, key: TemplateKey) -> Option<PoolStats> {
        let (reply, answer) = oneshot::channel();
        self.order(Order::Stats { key, reply }).ok()?;
        answer.await.ok()?
    }

    /// Ends every idle worker, and returns when they are gone.
    pub async fn drain(&self) {
        let (done, drained) = oneshot::channel();
        if self.order(Order::Drain { done }).is_ok() {
            let _ = drained.await;
        }
    }

    fn order(&self, order: Order) -> Result<(), PoolError> {
        self.orders.send(order).map_err(|_| PoolError::Closed)
    }
}

struct Waiting {
    key: TemplateKey,
    since: Instant,
    reply: oneshot::Sender<Result<CheckedOut, PoolError>>,
}

/// When a worker may be ended, and it.
type Burial = (Pin<Box<dyn Future<Output = ()>>>, Arc<Held<Worker>>);

/// The next worker waits so long for the end of the one before, which may hang in the host's kernel.
const MOST_OF_A_BURIAL: Duration = Duration::from_secs(1);

/// Ends workers, one after the other: all at once they would be in the way of the next create.
async fn bury(mut dead: mpsc::UnboundedReceiver<Burial>) {
    while let Some((pause, worker)) = dead.recv().await {
        pause.await;
        // Somebody who still asks it something ends it.
        let end = move || drop(Arc::into_inner(worker).and_then(Held::into_inner));
        let _ = tokio::time::timeout(MOST_OF_A_BURIAL, executor::in_the_background(end)).await;
    }
}

struct Owner {
    pool: prewarm::Pool<TemplateKey>,
    zygote: Arc<Zygote>,
    patience: Duration,
    places: Places,
    epoch: Instant,
    sources: HashMap<TemplateKey, Source>,
    shells: HashMap<SlotId, Shell>,
    waiting: HashMap<Ticket, Waiting>,
    /// When builds begin that nobody waits for.
    quiet: Rc<Quiet>,
    burials: mpsc::UnboundedSender<Burial>,
    latencies: HashMap<TemplateKey, Latencies>,
    /// Weak: the pool ends when nobody can ask it for anything.
    orders: mpsc::WeakUnboundedSender<Order>,
    drained: Option<oneshot::Sender<()>>,
}

impl Owner {
    async fn serve(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        loop {
            let wakeup = self.pool.next_wakeup().map(|at| (self.epoch + at).into());
            let sleep = tokio::time::sleep_until(wakeup.unwrap_or_else(tokio::time::Instant::now));
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => return,
                },
                () = sleep, if wakeup.is_some() => self.pool.tick(self.epoch.elapsed()),
            }
            self.act();
            if self.pool.is_drained()
                && let Some(done) = self.drained.take()
            {
                let _ = done.send(());
            }
        }
    }

    fn obey(&mut self, order: Order) {
        let now = self.epoch.elapsed();
        match order {
            Order::Checkout { key, reply } => self.checkout(now, key, reply),
            Order::Add { key, source, policy, reply } => {
                if self.pool.stats(&key).is_some() {
                    let _ = self.pool.remove(now, &key);
                }
                let added = self.pool.add(now, Rc::clone(&key), policy);
                if added.is_ok() {
                    self.sources.insert(key, source);
                }
                let _ = reply.send(added.map_err(PoolError::from));
            }
            Order::Remove { key } => {
                let _ = self.pool.remove(now, &key);
                self.sources.remove(&key);
                self.latencies.remove(&key);
            }
            Order::Stats { key, reply } => {
                let latencies = self.latencies.get(&key).map(Latencies::percentiles).unwrap_or_default();
                let stats = self.pool.stats(&key).map(|counts| PoolStats { counts, checkout_us: latencies });
                let _ = reply.send(stats);
            }
            Order::Built { slot, result } => {
                let told = match result {
                    Ok(shell) => {
                        self.shells.insert(slot, shell);
                        self.pool.built(now, slot)
                    }
                    Err(error) => {
                        tracing::warn!(%slot, %error, "a worker could not be built");
                        self.pool.build_failed(now, slot, cause(&error))
                    }
                };
                if let Err(error) = told {
                    tracing::error!(%error, "the pool's bookkeeping");
                }
            }
            Order::Destroyed { slot } => {
                let _ = self.pool.destroyed(now, slot);
            }
            Order::Mended { template, result } => {
                if let Err(why) = &result {
                    tracing::error!(%template, why, "a template cannot be made again");
                }
                self.pool.rebuilt(now, &template, result.map_err(Cause::Template));
            }
            Order::Bury { worker } => {
                let _ = self.burials.send((Box::pin(self.quiet.pause(false)), worker));
            }
            Order::Drain { done } => {
                self.pool.drain(now);
                self.drained = Some(done);
            }
        }
    }

    fn checkout(
        &mut self,
        now: Duration,
        key: TemplateKey,
        reply: oneshot::Sender<Result<CheckedOut, PoolError>>,
    ) {
        let since = Instant::now();
        match self.pool.checkout(now, &key) {
            Ok(Checkout::Hit { slot, .. }) => {
                self.quiet.checkout(self.is_short(&key));
                self.hand_out(slot, Waiting { key, since, reply }, true);
            }
            Ok(Checkout::Wait(ticket)) => {
                self.quiet.hurry();
                self.waiting.insert(ticket, Waiting { key, since, reply });
            }
            Err(error) => {
                let _ = reply.send(Err(refusal(&error)));
            }
        }
    }

    fn is_short(&self, key: &TemplateKey) -> bool {
        self.pool.stock(key).is_some_and(Stock::is_short)
    }

    fn hand_out(&mut self, slot: SlotId, waiting: Waiting, hit: bool) {
        let Waiting { key, since, reply } = waiting;
        if let Some(shell) = self.shells.remove(&slot) {
            self.latencies.entry(key).or_default().add(since.elapsed());
            // If the caller has gone, the worker ends with the value.
            let _ = reply.send(Ok(CheckedOut { shell, hit }));
        }
        // From here on it is the caller's: the pool forgets it.
        let _ = self.pool.returned(self.epoch.elapsed(), slot);
    }

    fn act(&mut self) {
        while let Some(action) = self.pool.next_action() {
            match action {
                Action::Build { slot, template, to } => self.build(slot, &template, to),
                Action::Destroy { slot, .. } => match (self.shells.remove(&slot), self.orders.upgrade()) {
                    (Some(shell), Some(orders)) => {
                        executor::spawn(async move {
                            executor::blocking(move || shell.end()).await;
                            let _ = orders.send(Order::Destroyed { slot });
                        });
                    }
                    _ => {
                        let _ = self.pool.destroyed(self.epoch.elapsed(), slot);
                    }
                },
                Action::Serve { ticket, slot, .. } => {
                    if let Some(waiting) = self.waiting.remove(&ticket) {
                        self.hand_out(slot, waiting, false);
                    }
                }
                Action::Fail { ticket, cause } => {
                    if let Some(waiting) = self.waiting.remove(&ticket) {
                        let retry_after = Duration::from_secs(1);
                        let why = cause.to_string();
                        let _ = waiting.reply.send(Err(PoolError::Busy { why, retry_after }));
                    }
                }
                Action::Rebuild { template, cause } => {
                    tracing::error!(%template, %cause, "a template is refused: it is made again if it must be");
                    self.mend(template);
                }
            }
        }
    }

    fn mend(&mut self, template: TemplateKey) {
        let mender = self.sources.get(&template).and_then(|source| source.mender.clone());
        let (Some(orders), Some(Mender(mend))) = (self.orders.upgrade(), mender) else {
            self.pool.rebuilt(self.epoch.elapsed(), &template, Ok(()));
            return;
        };
        executor::spawn(async move {
            let result = executor::in_the_background(move || mend()).await;
            let _ = orders.send(Order::Mended { template, result });
        });
    }

    fn build(&mut self, slot: SlotId, template: &TemplateKey, to: Depth) {
        let (Some(orders), source) = (self.orders.upgrade(), self.sources.get(template).cloned()) else {
            return;
        };
        let (zygote, begun, patience) = (Arc::clone(&self.zygote), self.shells.remove(&slot), self.patience);
        let places = self.places.clone();
        let pause = self.waiting.is_empty().then(|| self.quiet.pause(self.is_short(template)));
        executor::spawn(async move {
            if let Some(pause) = pause {
                pause.await;
            }
            let result = executor::in_the_background(move || {
                let shell = match begun {
                    Some(shell) => shell,
                    None => Shell::make(&zygote, patience)?,
                };
                match (to, source) {
                    (Depth::Parked, Some(source)) => shell.park(&source, &places),
                    _ => Ok(shell),
                }
            });
            let _ = orders.send(Order::Built { slot, result: result.await });
        });
    }
}

fn cause(error: &WorkerError) -> Cause {
    match error {
        // The worker is well and says why it cannot restore this.
        WorkerError::Refused(why) => Cause::Template(why.clone()),
        other => Cause::Host(other.to_string()),
    }
}

fn refusal(error: &prewarm::Error) -> PoolError {
    let retry_after = match error {
        prewarm::Error::Broken { retry_after: Some(after), .. } => *after,
        _ => Duration::from_secs(1),
    };
    match error {
        prewarm::Error::Draining => PoolError::Closed,
        other => PoolError::Busy { why: other.to_string(), retry_after },
    }
}
