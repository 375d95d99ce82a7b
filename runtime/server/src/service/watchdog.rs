//! The watchdog: while something is asked of a sandbox, its microVM's process must answer. One that does not is
//! stuck: what was asked ends with an error. The sandbox stays, and may come back; destroy ends it in any case.

use super::{Running, Sandbox, Service, ServiceError};
use crate::conversation::{Ended, Paused};
use futures_util::FutureExt as _;
use futures_util::future::{LocalBoxFuture, WeakShared};
use peregrine_vmm::worker::WorkerError;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::rc::Rc;
use tokio::sync::MutexGuard;

type Watch = LocalBoxFuture<'static, ()>;

/// Sandboxes that are watched: one watch, however much is asked of them at a time.
#[derive(Debug, Default)]
pub(super) struct Watches(RefCell<HashMap<Rc<str>, WeakShared<Watch>>>);

impl Watches {
    /// Forgets those that nobody waits for any more.
    pub(super) fn tidy(&self) {
        self.0.borrow_mut().retain(|_, watch| watch.upgrade().is_some());
    }
}

impl Service {
    /// Does `work` on a sandbox unless that is found to be stuck.
    ///
    /// # Errors
    /// What `work` says, or [`ServiceError::Stuck`].
    pub async fn unless_stuck<T, E: From<ServiceError>>(
        &self,
        sandbox: &Rc<Sandbox>,
        work: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        tokio::select! {
            biased;
            done = work => done,
            error = self.stuck(sandbox) => Err(error.into()),
        }
    }

    /// Waits until a sandbox is found to be stuck.
    pub async fn stuck(&self, sandbox: &Rc<Sandbox>) -> ServiceError {
        let known = self.watches.0.borrow().get(&sandbox.id).and_then(WeakShared::upgrade);
        let watch = known.unwrap_or_else(|| {
            let watch = self.watch_worker(sandbox).boxed_local().shared();
            let weak = watch.downgrade();
            self.watches.0.borrow_mut().extend(weak.map(|weak| (Rc::clone(&sandbox.id), weak)));
            watch
        });
        watch.await;
        ServiceError::Stuck
    }

    /// Waits for its turn on a sandbox. Given up while it waits, it is not done later.
    pub(super) async fn turn_on<'s>(
        &self,
        sandbox: &'s Rc<Sandbox>,
    ) -> Result<MutexGuard<'s, ()>, ServiceError> {
        self.unless_stuck(sandbox, async { Ok(sandbox.turn().await) }).await
    }

    /// Has a sandbox's conversation stand still. The outer error: it has ended.
    pub(super) async fn pause(
        &self,
        sandbox: &Rc<Sandbox>,
        running: &Running,
    ) -> Result<Result<Paused, WorkerError>, Ended> {
        tokio::select! {
            biased;
            paused = running.conversation.pause() => Ok(Ok(paused?)),
            _ = self.stuck(sandbox) => Ok(Err(WorkerError::Stuck)),
        }
    }

    /// Asks the sandbox's process for its counters now and then, until it does not answer.
    fn watch_worker(&self, sandbox: &Rc<Sandbox>) -> impl Future<Output = ()> + 'static {
        let (look_every, sandbox) = (self.config.limits.look_every(), Rc::downgrade(sandbox));
        async move {
            loop {
                tokio::time::sleep(look_every).await;
                let running = sandbox.upgrade().and_then(|sandbox| sandbox.running().ok());
                // What does not run does not hang.
                let Some(running) = running else { continue };
                if let Err(WorkerError::Stuck) = running.with_worker(|worker| worker.stats()).await {
                    return;
                }
            }
        }
    }
}
