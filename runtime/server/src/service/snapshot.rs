//! Snapshots: a sandbox as it was, kept until it is deleted; and restore, a new sandbox from one.

use super::create::identity;
use super::destroy::remove_dir;
use super::fork::gone;
use super::sandbox::{Running, Sandbox, Spec, Tenant};
use super::templates::Shape;
use super::{Service, ServiceError, ids};
use crate::conversation::Paused;
use crate::executor;
use crate::pool::{Begun, Shell, Source};
use crate::registry::SnapshotRow;
use jiff::Timestamp;
use peregrine_vmm::snapshot::Stored;
use peregrine_vmm::worker::WorkerError;
use serde_json::json;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Bytes of a block as stat(2) counts them.
const BLOCK_BYTES: u64 = 512;

impl Service {
    /// Saves a running sandbox, which goes on: durable when this returns.
    ///
    /// # Errors
    /// Why not; then nothing of it is left, and the sandbox is as it was.
    pub async fn snapshot(self: &Rc<Self>, sandbox: &Rc<Sandbox>) -> Result<SnapshotRow, ServiceError> {
        let _turn = self.turn_on(sandbox).await?;
        let _activity = sandbox.activity();
        let running = sandbox.running()?;
        let id = ids::snapshot_id(self.config.node)?;
        let dir = self.state.join("snapshots").join(&id);
        let paused = self.pause(sandbox, &running).await.map_err(|ended| gone(sandbox, ended))??;
        save(&running, paused, &dir, After::GoOn).await?;
        let spec = &sandbox.spec;
        let row = SnapshotRow {
            size_bytes: size_bytes(&dir),
            id: id.clone(),
            tenant: sandbox.tenant.to_string(),
            run_id: sandbox.id.to_string(),
            created_us: Timestamp::now().as_microsecond(),
            dir: dir.clone(),
            image: spec.shape.image.name.clone(),
            root: spec.shape.image.clone(),
            vcpus: spec.shape.vcpus,
            mem_mib: spec.shape.mem_mib,
            disk_mib: spec.disk_mib,
            timeout_s: sandbox.timeout().map(|timeout| timeout.as_secs()),
            env: spec.env.clone(),
        };
        let written = self
            .journal
            .append(&sandbox.tenant, &sandbox.id, "snapshot.created", json!({ "snapshot_id": id }))
            .and_then(|()| Ok(self.registry.put_snapshot(&row)?));
        if let Err(error) = written {
            remove_dir(dir);
            return Err(error);
        }
        Ok(row)
    }

    /// A tenant's snapshots, newest first.
    ///
    /// # Errors
    /// If the registry fails.
    pub fn snapshots(&self, tenant: &str) -> Result<Vec<SnapshotRow>, ServiceError> {
        Ok(self.registry.snapshots(tenant)?)
    }

    /// Deletes a snapshot. Sandboxes made from it go on.
    ///
    /// # Errors
    /// If there is none of this name that is theirs.
    pub fn delete_snapshot(&self, tenant: &str, id: &str) -> Result<(), ServiceError> {
        let row = self.stored(tenant, id)?;
        self.journal.append(tenant, &row.run_id, "snapshot.deleted", json!({ "snapshot_id": id }))?;
        self.registry.remove_snapshot(tenant, id)?;
        remove_dir(row.dir);
        Ok(())
    }

    /// Makes a new sandbox from a snapshot.
    ///
    /// # Errors
    /// Why not; then there is none.
    pub async fn restore(self: &Rc<Self>, tenant: &Tenant, id: &str) -> Result<Rc<Sandbox>, ServiceError> {
        let begun = Instant::now();
        let row = self.stored(tenant, id)?;
        let shape = Shape { image: row.root, vcpus: row.vcpus, mem_mib: row.mem_mib };
        self.admit(tenant, 1, &shape)?;
        let spec = Spec {
            shape,
            disk_mib: row.disk_mib,
            timeout: row.timeout_s.map(Duration::from_secs),
            sleeps_when_idle: false,
            env: row.env,
        };
        let id = ids::run_id(self.config.node)?;
        let woken = self.wake(&spec.shape, &row.dir, &id).await?;
        let sandbox = self.settle(&id, tenant, spec, woken)?;
        sandbox.create.set(begun.elapsed());
        self.publish(std::slice::from_ref(&sandbox), "sandbox.restored", json!({ "snapshot_id": row.id }))?;
        Ok(sandbox)
    }

    fn stored(&self, tenant: &str, id: &str) -> Result<SnapshotRow, ServiceError> {
        let found = self.registry.snapshot(tenant, id)?;
        found.ok_or_else(|| ServiceError::NotFound { what: "snapshot", name: id.to_owned() })
    }

    /// Restores what lies in `dir` into a new worker, after checking that it is whole.
    pub(super) async fn wake(&self, shape: &Shape, dir: &Path, id: &str) -> Result<Begun, ServiceError> {
        let disks = self.templates.disks(&shape.image);
        let source = Source { dir: dir.to_owned(), disks, mender: None };
        let (identity, zygote, places) = (identity(id)?, Arc::clone(&self.zygote), self.places.clone());
        let patience = self.config.limits.patience();
        let park = move || {
            let verified = Stored::open(&source.dir).and_then(|stored| stored.verify_memory());
            verified.map_err(|error| WorkerError::Refused(error.to_string()))?;
            Shell::make(&zygote, patience)?.park(&source, &places)
        };
        let begin = async {
            let begun = executor::blocking(park).await?.begin(&identity)?;
            begun.worker.went(patience, || ()).await.map(|()| begun)
        };
        begin.await.map_err(|error| match error {
            WorkerError::Refused(why) => ServiceError::SnapshotRefused(why),
            other => other.into(),
        })
    }
}

/// What becomes of the conversation while the snapshot is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum After {
    /// It goes on with the guest.
    GoOn,
    /// It stands still to the end: nothing is acknowledged that the snapshot does not have.
    StandStill,
}

/// Saves what runs in `dir`, durably.
pub(super) async fn save(
    running: &Running,
    paused: Paused,
    dir: &Path,
    after: After,
) -> Result<(), ServiceError> {
    if let Some(parent) = dir.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let (state, dir, partial) = (paused.state.clone(), dir.to_owned(), partial(dir));
    let saving = running.with_worker(move |worker| worker.begin_snapshot(state, &dir)).await?;
    let paused = (after == After::StandStill).then_some(paused);
    let saved = executor::blocking(move || saving.finish()).await;
    drop(paused);
    if saved.is_err() {
        // What a killed writer leaves.
        remove_dir(partial);
    }
    saved.map(drop).map_err(ServiceError::from)
}

/// Where a snapshot is written before it has its name.
fn partial(dir: &Path) -> PathBuf {
    let mut name = dir.as_os_str().to_owned();
    name.push(".partial");
    name.into()
}

fn size_bytes(dir: &Path) -> u64 {
    let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
    files.filter_map(|file| Some(file.metadata().ok()?.blocks() * BLOCK_BYTES)).sum()
}
