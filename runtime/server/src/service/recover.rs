//! What an earlier daemon left: sandboxes that sleep are there again, those that ran are lost, since their
//! workers ended with it. What is on the disk and in no row goes.

use super::sandbox::{Sandbox, Spec, State, Tenant};
use super::templates::Shape;
use super::{Service, Usage};
use crate::images;
use crate::registry::{RegistryError, RunRow};
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

/// The running sandboxes' rows are written at least so often: what a crash may leave unbilled.
const NOTE_EVERY: Duration = Duration::from_secs(20);
/// Rows written in one sweep.
const NOTES_PER_SWEEP: usize = 50;

impl Service {
    /// Takes over what the registry says.
    pub(super) fn recover(self: &Rc<Self>) -> Result<(), RegistryError> {
        let mut asleep = BTreeSet::new();
        for row in self.registry.unended()? {
            match self.wake_row(&row) {
                Some(sandbox) => {
                    asleep.extend(row.sleeps_in.as_deref().and_then(Path::file_name).map(OsString::from));
                    self.sandboxes.borrow_mut().insert(Rc::clone(&sandbox.id), sandbox);
                }
                None => {
                    let reason = "the daemon ended while it ran".to_owned();
                    let ended_us = Some(Timestamp::now().as_microsecond());
                    tracing::warn!(id = row.id, reason, "a sandbox is lost");
                    let lost = RunRow { status: "lost".to_owned(), reason: Some(reason), ended_us, ..row };
                    self.registry.put_run(&lost)?;
                }
            }
        }
        remove_others(&self.state.join("hibernated"), &asleep);
        let snapshots = self.registry.snapshot_ids()?.into_iter().map(OsString::from).collect();
        remove_others(&self.state.join("snapshots"), &snapshots);
        Ok(())
    }

    /// The sandbox of a row, if it sleeps and still can wake.
    fn wake_row(&self, row: &RunRow) -> Option<Rc<Sandbox>> {
        let dir = row.sleeps_in.clone().filter(|dir| dir.join("state").is_file())?;
        let image = images::resolve(&row.image, &self.config.image_aliases, self.templates.artefacts())?;
        let timeout = row.timeout_s.map(Duration::from_secs);
        let spec = Spec {
            shape: Shape { image, vcpus: row.vcpus, mem_mib: row.mem_mib },
            disk_mib: row.disk_mib,
            timeout,
            sleeps_when_idle: row.sleeps_when_idle,
            env: row.env.clone(),
        };
        let before = Usage {
            ran: Duration::from_millis(row.ran_ms),
            cpu: Duration::from_millis(row.cpu_ms),
            mem_peak_bytes: row.mem_peak_bytes,
        };
        let created = Timestamp::from_microsecond(row.created_us).ok()?;
        let sandbox = Sandbox::new(&row.id, Tenant::from(row.tenant.as_str()), spec, created, before);
        sandbox.create.set(Duration::from_secs_f64(row.create_ms.clamp(0.0, 1e9) / 1000.0));
        *sandbox.state.borrow_mut() = State::Hibernated(dir);
        Some(Rc::new(sandbox))
    }

    /// Writes rows of running sandboxes that were not written for a while.
    pub(super) fn note_some(&self) {
        let all = self.sandboxes.borrow();
        let due = all.values().filter(|sandbox| {
            matches!(*sandbox.state.borrow(), State::Running(_))
                && sandbox.noted.get().elapsed() >= NOTE_EVERY
        });
        for sandbox in due.take(NOTES_PER_SWEEP) {
            if let Err(error) = self.note(sandbox) {
                tracing::error!(id = %sandbox.id, %error, "its use cannot be written down");
            }
        }
    }
}

/// Removes what a crash left half-made or half-removed.
fn remove_others(dir: &Path, known: &BTreeSet<OsString>) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if !known.contains(&entry.file_name()) {
            tracing::info!(path = %entry.path().display(), "left by an earlier daemon");
            super::destroy::remove_dir(entry.path());
        }
    }
}
