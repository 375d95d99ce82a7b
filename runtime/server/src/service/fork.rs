//! fork: children that have the sandbox's memory and files, and from then on each its own.

use super::create::{begin_conversation, identity};
use super::sandbox::{Running, Sandbox};
use super::{Service, ServiceError, ids};
use crate::conversation::Paused;
use crate::executor;
use crate::places::Places;
use crate::pool::{Begun, Held};
use crate::registry::MadeWith;
use jiff::Timestamp;
use peregrine_vmm::agent::Identity;
use peregrine_vmm::worker::{Going, MOST_CHILDREN, WorkerError};
use serde_json::json;
use std::rc::Rc;
use std::time::Instant;

impl Service {
    /// Forks a running sandbox into `count` more. It stands still for the fork of its process only.
    ///
    /// # Errors
    /// Why not; then there are none, and the sandbox is as it was.
    pub async fn fork(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        count: usize,
        made_with: Option<MadeWith>,
    ) -> Result<Vec<Rc<Sandbox>>, ServiceError> {
        if !(1..=MOST_CHILDREN).contains(&count) {
            return Err(ServiceError::bad("count", format!("{count}, but must be 1 to {MOST_CHILDREN}")));
        }
        let begun = Instant::now();
        let _turn = self.turn_on(sandbox).await?;
        let _activity = sandbox.activity();
        let running = sandbox.running()?;
        self.admit(&sandbox.tenant, count, &sandbox.spec.shape)?;
        let mut names = Vec::with_capacity(count);
        for _ in 0..count {
            let id = ids::run_id(self.config.node)?;
            names.push((identity(&id)?, id));
        }
        let paused = self.pause(sandbox, &running).await.map_err(|error| gone(sandbox, error))??;
        let children = fork_running(&running, paused, self.places.clone(), names).await?;
        let mut made = Vec::with_capacity(count);
        for (id, guest) in children {
            let spec = super::Spec { timeout: sandbox.timeout(), ..sandbox.spec.clone() };
            let child = Sandbox::new(
                &id,
                Rc::clone(&sandbox.tenant),
                spec,
                Timestamp::now(),
                super::Usage::default(),
            );
            child.runs(begin_conversation(guest)?);
            child.create.set(begun.elapsed());
            child.made_with.replace(made_with.clone());
            made.push(Rc::new(child));
        }
        // Nobody knows them if this fails, and they end here.
        self.publish(&made, "sandbox.forked", json!({ "parent": &*sandbox.id }))?;
        Ok(made)
    }
}

type Child = (String, Begun);

/// Forks the worker while the conversation stands still; the children take their identities beside it.
async fn fork_running(
    running: &Running,
    paused: Paused,
    places: Places,
    names: Vec<(Identity, String)>,
) -> Result<Vec<Child>, WorkerError> {
    let (state, count) = (paused.state.clone(), names.len());
    let forked = running.with_worker(move |worker| worker.begin_fork(state, count)).await;
    // The parent's conversation goes on; what the children need is in their own state.
    drop(paused);
    let forking = forked?;
    let begin = move || {
        let fork = forking.finish()?;
        fork.children
            .into_iter()
            .zip(names)
            .map(|(child, (identity, id))| {
                let (pid, rendezvous) = (child.pid(), places.make()?);
                let going = child.begin_at(&identity, Some(&rendezvous))?;
                let Going { worker, agent, .. } = going;
                Ok((id, Begun { worker: Held::new(worker), agent, pid, rendezvous }))
            })
            .collect()
    };
    executor::blocking(begin).await
}

pub(super) fn gone(sandbox: &Sandbox, ended: crate::conversation::Ended) -> ServiceError {
    ServiceError::lost(&sandbox.id)(ended)
}
