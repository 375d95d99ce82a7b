//! What an earlier daemon left: sandboxes that sleep are there again; those that ran still do, their workers wait for
//! this daemon, and the commands that were followed go on where their readers were. A worker that has ended is lost.
//! What is on the disk and in no row goes.

use super::meter::Meter;
use super::sandbox::{Running, Sandbox, Spec, State, Tenant};
use super::stream::Header;
use super::templates::Shape;
use super::{STREAMS, Service, ServiceError, Usage, WORKERS};
use crate::conversation::{Conversation, Found, Tape};
use crate::pool::Held;
use crate::registry::{RegistryError, RunRow};
use jiff::Timestamp;
use peregrine_vmm::worker::{Attached, Rendezvous, Worker};
use serde_json::json;
use std::collections::{BTreeSet, HashMap};
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
        let (mut asleep, mut awake) = (BTreeSet::new(), BTreeSet::new());
        let mut tapes = self.tapes();
        for row in self.registry.unended()? {
            if let Some(sandbox) = self.wake_row(&row) {
                asleep.extend(row.sleeps_in.as_deref().and_then(Path::file_name).map(OsString::from));
                self.sandboxes.borrow_mut().insert(Rc::clone(&sandbox.id), sandbox);
                continue;
            }
            match self.adopt(&row, tapes.remove(&row.id).unwrap_or_default()) {
                Ok(()) => awake.extend(row.found_at.map(OsString::from)),
                Err(why) => {
                    let reason = format!("the daemon ended while it ran, and its worker is gone: {why}");
                    let ended_us = Some(Timestamp::now().as_microsecond());
                    tracing::warn!(id = row.id, reason, "a sandbox is lost");
                    let lost = RunRow { status: "lost".to_owned(), reason: Some(reason), ended_us, ..row };
                    self.registry.put_run(&lost)?;
                }
            }
        }
        // Of sandboxes that nobody was told of, or that are gone.
        tapes.into_values().flatten().for_each(|(_, found)| found.tape.remove());
        self.end_others(&awake);
        remove_others(&self.state.join("hibernated"), &asleep);
        let snapshots = self.registry.snapshot_ids()?.into_iter().map(OsString::from).collect();
        remove_others(&self.state.join("snapshots"), &snapshots);
        Ok(())
    }

    /// Takes over a sandbox that runs, and the commands in it that were followed.
    fn adopt(self: &Rc<Self>, row: &RunRow, tapes: Vec<(String, Found<Header>)>) -> Result<(), ServiceError> {
        let missing = || ServiceError::Internal("its row does not say where it is".to_owned());
        let (place, meter) = row.found_at.as_ref().zip(row.running.as_ref()).ok_or_else(missing)?;
        let path = self.state.join(WORKERS).join(place);
        let Attached { worker, pid, connection, position, unread } =
            Worker::attach(&path, self.config.limits.patience())?;
        let sandbox = sandbox_of(row).ok_or_else(missing)?;
        let taped = |(_, found): &(String, Found<Header>)| {
            let goes_on = !found.tape.is_over() && found.header.is_fed(found.stdin_done);
            goes_on.then(|| (found.header.stream, Rc::clone(&found.tape)))
        };
        let taped: Vec<_> = tapes.iter().map(taped).collect();
        let going_on: Vec<bool> = taped.iter().map(Option::is_some).collect();
        let taped = taped.into_iter().flatten().collect();
        let (conversation, processes) = Conversation::rejoin(connection, (position, unread), taped)?;
        *sandbox.meter.borrow_mut() = Meter::taken_over(meter, pid);
        sandbox.runs_on(Running::new(Held::new(worker), conversation, pid, Rendezvous::of_worker(path)));
        self.journal.append(&sandbox.tenant, &sandbox.id, "sandbox.adopted", json!({}))?;
        self.sandboxes.borrow_mut().insert(Rc::clone(&sandbox.id), Rc::clone(&sandbox));
        self.watch(&sandbox);
        let mut processes = processes.into_iter();
        for ((id, found), goes_on) in tapes.into_iter().zip(going_on) {
            let process = if goes_on { processes.next() } else { None };
            self.follow_on(&sandbox, id, found, process);
        }
        tracing::info!(id = %sandbox.id, pid, "a running sandbox was taken over");
        Ok(())
    }

    /// Tapes of followed commands, by sandbox, under the commands' names.
    fn tapes(&self) -> HashMap<String, Vec<(String, Found<Header>)>> {
        let mut tapes: HashMap<_, Vec<_>> = HashMap::new();
        for entry in std::fs::read_dir(self.state.join(STREAMS)).into_iter().flatten().flatten() {
            match Tape::open::<Header>(&entry.path()) {
                Ok(found) => {
                    let id = entry.file_name().to_string_lossy().into_owned();
                    tapes.entry(found.header.sandbox.clone()).or_default().push((id, found));
                }
                Err(error) => {
                    tracing::warn!(path = %entry.path().display(), %error, "a command's tape cannot be read");
                    let _ = std::fs::remove_file(entry.path());
                }
            }
        }
        tapes
    }

    /// Ends the workers of sandboxes that nobody was told of.
    fn end_others(&self, known: &BTreeSet<OsString>) {
        for entry in std::fs::read_dir(self.state.join(WORKERS)).into_iter().flatten().flatten() {
            if !known.contains(&entry.file_name()) {
                let place = Rendezvous::of_worker(entry.path());
                if let Ok(attached) = Worker::attach(place.path(), self.config.limits.patience()) {
                    tracing::info!(pid = attached.pid, "a worker of no sandbox");
                }
            }
        }
    }

    /// The sandbox of a row, if it sleeps and still can wake.
    fn wake_row(&self, row: &RunRow) -> Option<Rc<Sandbox>> {
        let dir = row.sleeps_in.clone().filter(|dir| dir.join("state").is_file())?;
        let sandbox = sandbox_of(row)?;
        *sandbox.state.borrow_mut() = State::Hibernated(dir);
        Some(sandbox)
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

/// A sandbox as its row says, which is not at anything yet.
fn sandbox_of(row: &RunRow) -> Option<Rc<Sandbox>> {
    let spec = Spec {
        shape: Shape { image: row.root.clone(), vcpus: row.vcpus, mem_mib: row.mem_mib },
        disk_mib: row.disk_mib,
        timeout: row.timeout_s.map(Duration::from_secs),
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
    sandbox.made_with.replace(row.made_with.clone());
    sandbox.create.set(Duration::from_secs_f64(row.create_ms.clamp(0.0, 1e9) / 1000.0));
    Some(Rc::new(sandbox))
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
