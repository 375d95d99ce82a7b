//! hibernate: a snapshot, and then the end of the worker. resume: the same sandbox, from that snapshot.

use super::create::begin_conversation;
use super::destroy::remove_dir;
use super::fork::gone;
use super::sandbox::{Sandbox, State};
use super::snapshot::{After, save};
use super::{Service, ServiceError, ids};
use serde_json::json;
use std::rc::Rc;

impl Service {
    /// Puts a running sandbox to disk. Commands that run go on when it is resumed, without their readers.
    ///
    /// # Errors
    /// Why not; then it runs on.
    pub async fn hibernate(self: &Rc<Self>, sandbox: &Rc<Sandbox>) -> Result<(), ServiceError> {
        let _turn = self.turn_on(sandbox).await?;
        // Asked twice, it sleeps.
        if matches!(*sandbox.state.borrow(), State::Hibernated(_)) {
            return Ok(());
        }
        let running = sandbox.running()?;
        // Never the directory of an earlier sleep: until this one is complete, that is the old state.
        let name = format!("{}-{}", sandbox.id, ids::random_digits(8)?);
        let dir = self.state.join("hibernated").join(name);
        let paused = self.pause(sandbox, &running).await.map_err(|ended| gone(sandbox, ended))??;
        save(&running, paused, &dir, After::StandStill).await?;
        let logged = self.journal.append(&sandbox.tenant, &sandbox.id, "sandbox.hibernated", json!({}));
        if let Err(error) = logged {
            remove_dir(dir);
            return Err(error);
        }
        sandbox.meter.borrow_mut().stop();
        let before = sandbox.state.replace(State::Hibernated(dir.clone()));
        if let Err(error) = self.registry.put_run_durably(&self.row(sandbox)) {
            sandbox.meter.borrow_mut().start(running.pid);
            sandbox.state.replace(before);
            remove_dir(dir);
            return Err(error.into());
        }
        running.conversation.end("it was hibernated");
        drop(before);
        Ok(())
    }

    /// Lets a hibernated sandbox run again.
    ///
    /// # Errors
    /// Why not; then it sleeps on.
    pub async fn resume(self: &Rc<Self>, sandbox: &Rc<Sandbox>) -> Result<(), ServiceError> {
        let _turn = sandbox.turn().await;
        let dir = match &*sandbox.state.borrow() {
            State::Hibernated(dir) => dir.clone(),
            // Asked twice, or by twelve at a time, it runs once.
            State::Running(_) => return Ok(()),
            State::Lost(_) | State::Ended => return Err(sandbox.wrong_state("it cannot be resumed")),
        };
        self.admit(&sandbox.tenant, 1, &sandbox.spec.shape)?;
        let begun = self.wake(&sandbox.spec.shape, &dir, &sandbox.id).await?;
        self.journal.append(&sandbox.tenant, &sandbox.id, "sandbox.resumed", json!({}))?;
        sandbox.runs(begin_conversation(begun)?);
        self.note(sandbox)?;
        self.watch(sandbox);
        // The worker has the files open; what is written later goes into the next sleep's.
        remove_dir(dir);
        Ok(())
    }
}
