//! destroy: the worker goes, and the guest with it. What was used is written down first.

use super::sandbox::{Sandbox, State};
use super::{Service, ServiceError};
use crate::registry::RunRow;
use serde_json::json;
use std::rc::Rc;

/// What a sandbox has cost.
#[derive(Debug, Clone, PartialEq)]
pub struct Destroyed {
    /// Its last row.
    pub row: RunRow,
}

impl Service {
    /// Ends a sandbox. A second time it says the same again.
    ///
    /// # Errors
    /// If there never was one, or its end cannot be written down: then it is still there.
    pub async fn destroy(self: &Rc<Self>, tenant: &str, id: &str) -> Result<Destroyed, ServiceError> {
        let Ok(sandbox) = self.sandbox(tenant, id) else { return self.was_destroyed(tenant, id) };
        let _turn = sandbox.turn().await;
        if matches!(*sandbox.state.borrow(), State::Ended) {
            return self.was_destroyed(tenant, id);
        }
        let usage = sandbox.meter.borrow_mut().stop();
        let data = json!({ "ran_ms": usage.ran.as_millis() as u64, "cpu_ms": usage.cpu.as_millis() as u64 });
        if let Err(error) = self.journal.append(tenant, id, "sandbox.destroyed", data) {
            if let Ok(running) = sandbox.running() {
                sandbox.meter.borrow_mut().start(running.pid);
            }
            return Err(error);
        }
        let before = sandbox.state.replace(State::Ended);
        self.sandboxes.borrow_mut().remove(id);
        if let State::Hibernated(dir) = &before {
            remove_dir(dir.clone());
        }
        if let State::Running(running) = before {
            running.conversation.end("it was destroyed");
            running.end(&self.pool);
        }
        let row = self.row(&sandbox);
        self.registry.put_run(&row)?;
        Ok(Destroyed { row })
    }

    fn was_destroyed(&self, tenant: &str, id: &str) -> Result<Destroyed, ServiceError> {
        let row = self.registry.run(tenant, id)?;
        let row = row.filter(|row| row.ended_us.is_some()).ok_or_else(|| ServiceError::no_sandbox(id))?;
        let destroyed = RunRow { status: "destroyed".to_owned(), ..row };
        if destroyed.reason.is_some() {
            // It was lost; now its tenant has taken note.
            self.registry.put_run(&RunRow { reason: None, ..destroyed.clone() })?;
        }
        Ok(Destroyed { row: destroyed })
    }

    /// The sandbox's worker `pid` has ended by itself.
    pub(super) fn lose(&self, sandbox: &Sandbox, pid: u32, why: &str) {
        let present = matches!(&*sandbox.state.borrow(), State::Running(running) if running.pid == pid);
        if !present {
            return;
        }
        tracing::warn!(id = %sandbox.id, why, "a sandbox is lost");
        sandbox.meter.borrow_mut().stop();
        sandbox.state.replace(State::Lost(why.to_owned()));
        match self.note(sandbox) {
            // From now on its row speaks for it.
            Ok(()) => drop(self.sandboxes.borrow_mut().remove(&sandbox.id)),
            Err(error) => tracing::error!(id = %sandbox.id, %error, "a lost sandbox cannot be written down"),
        }
    }
}

/// Removes a snapshot's directory beside the requests' way.
pub(super) fn remove_dir(dir: std::path::PathBuf) {
    crate::executor::blocking_detached(move || {
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(dir = %dir.display(), %error, "cannot be removed");
        }
    });
}
