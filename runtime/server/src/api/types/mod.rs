//! What requests and answers look like in JSON. Unknown fields are ignored, on purpose: clients are older and
//! newer than this.

mod streams;

pub(crate) use streams::*;

use crate::conversation::{Ended, Input};
use crate::pool::Percentiles;
use crate::registry::{RunRow, SnapshotRow};
use crate::service::{PoolView, Sandbox, ShellReply, millis};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// A number that some clients send as text.
#[derive(Debug, Clone, Deserialize, Serialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum Number {
    /// As JSON has it.
    Number(f64),
    /// In quotes.
    Text(String),
}

impl Number {
    pub(crate) fn value(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            Self::Text(text) => text.trim().parse().ok(),
        }
    }
}

/// What happens to a sandbox that is idle for its timeout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub(crate) enum IdleAction {
    /// It ends.
    Destroy,
    /// It is put to disk.
    Hibernate,
}

/// `POST /v1/runs`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct CreateBody {
    /// Image; the configuration's default if none is named.
    pub(crate) image: Option<String>,
    /// Virtual CPUs.
    #[serde(alias = "cpus")]
    pub(crate) vcpus: Option<u32>,
    /// Memory.
    #[serde(alias = "memMiB", alias = "memory_mib")]
    pub(crate) mem_mib: Option<u64>,
    /// Disk.
    #[serde(alias = "diskMiB")]
    pub(crate) disk_mib: Option<u64>,
    /// Seconds of idleness after which it ends; 0 or -1 never.
    #[serde(alias = "timeoutSec", alias = "timeout_s")]
    pub(crate) timeout: Option<Number>,
    /// What happens then: `destroy` or `hibernate`.
    pub(crate) idle_action: Option<IdleAction>,
    /// Environment of every command.
    pub(crate) env: Option<BTreeMap<String, String>>,
    /// What it may reach. Without it nothing.
    #[schema(value_type = Option<Object>)]
    pub(crate) network: Option<serde_json::Value>,
    /// A named policy.
    #[serde(alias = "networkProfile")]
    pub(crate) network_profile: Option<String>,
    /// Secrets that its requests to services get, outside the sandbox.
    #[schema(value_type = Option<Object>)]
    pub(crate) credentials: Option<serde_json::Value>,
}

/// A sandbox.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Run {
    /// Its name.
    pub(crate) id: String,
    /// `running`, `hibernated`, `lost` or `destroyed`.
    pub(crate) status: String,
    /// Why it is lost.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reason: Option<String>,
    /// Image.
    pub(crate) image: String,
    /// Where it runs.
    pub(crate) region: String,
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// Memory.
    pub(crate) mem_mib: u64,
    /// Disk.
    pub(crate) disk_mib: u64,
    /// From the request to a running guest.
    pub(crate) create_ms: f64,
    /// When.
    pub(crate) created_at: String,
    /// Seconds of idleness after which it ends; `null` never.
    pub(crate) timeout: Option<u64>,
}

impl Run {
    pub(crate) fn of(sandbox: &Sandbox, region: &str) -> Self {
        let shape = &sandbox.spec.shape;
        Self {
            id: sandbox.id.to_string(),
            status: sandbox.status().to_owned(),
            reason: sandbox.reason(),
            image: shape.image.name.clone(),
            region: region.to_owned(),
            vcpus: shape.vcpus,
            mem_mib: shape.mem_mib,
            disk_mib: sandbox.spec.disk_mib,
            create_ms: millis(sandbox.create.get()),
            created_at: time(sandbox.created.as_microsecond()),
            timeout: sandbox.timeout().map(|timeout| timeout.as_secs()),
        }
    }
}

impl Run {
    pub(crate) fn of_row(row: RunRow, region: &str) -> Self {
        Self {
            id: row.id,
            status: row.status,
            reason: row.reason,
            image: row.image,
            region: region.to_owned(),
            vcpus: row.vcpus,
            mem_mib: row.mem_mib,
            disk_mib: row.disk_mib,
            create_ms: row.create_ms,
            created_at: time(row.created_us),
            timeout: row.timeout_s,
        }
    }
}

/// `GET /v1/runs`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Runs {
    /// Oldest first.
    pub(crate) runs: Vec<Run>,
}

/// `PATCH /v1/runs/{id}`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct PatchBody {
    /// Seconds of idleness after which it ends; 0 or -1 never.
    #[serde(alias = "timeoutSec", alias = "timeout_s")]
    pub(crate) timeout: Option<Number>,
}

/// `DELETE /v1/runs/{id}`: what it has cost.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct DestroyedRun {
    /// `destroyed`.
    pub(crate) status: String,
    /// CPU time.
    pub(crate) cpu_ms: u64,
    /// Most memory its microVM had resident.
    pub(crate) mem_peak_bytes: u64,
    /// What it wrote to its disk; its writable layer lies in memory so far, so 0.
    pub(crate) disk_used_bytes: u64,
    /// How long it has run.
    pub(crate) uptime_ms: u64,
    /// What that costs.
    pub(crate) cost_cents: f64,
}

impl From<RunRow> for DestroyedRun {
    fn from(row: RunRow) -> Self {
        Self {
            status: row.status,
            cpu_ms: row.cpu_ms,
            mem_peak_bytes: row.mem_peak_bytes,
            disk_used_bytes: 0,
            uptime_ms: row.ran_ms,
            cost_cents: row.cost_cents,
        }
    }
}

/// A command: a line for the shell, or a program with its arguments.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum CommandLine {
    /// For `/bin/sh -c`.
    Line(String),
    /// As it is.
    Argv(Vec<String>),
}

/// `POST /v1/runs/{id}/exec` and `/exec/stream`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ExecBody {
    /// What to run.
    #[serde(alias = "cmd")]
    pub(crate) command: Option<CommandLine>,
    /// Seconds it may run.
    #[serde(alias = "timeoutSec", alias = "timeout_s")]
    pub(crate) timeout: Option<Number>,
    /// More environment.
    #[serde(default)]
    pub(crate) env: BTreeMap<String, String>,
    /// Where.
    #[serde(default, alias = "workdir")]
    pub(crate) cwd: Option<String>,
    /// For its standard input.
    #[serde(default)]
    pub(crate) stdin: Option<String>,
}

/// How a command ended.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ExecAnswer {
    /// As a shell gives it.
    pub(crate) exit_code: u8,
    /// What it wrote; what is not UTF-8 is replaced, see `stdout_base64`.
    pub(crate) stdout: String,
    /// Likewise.
    pub(crate) stderr: String,
    /// The bytes, where they are not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stdout_base64: Option<String>,
    /// Likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stderr_base64: Option<String>,
    /// There was more.
    pub(crate) truncated: bool,
    /// From the request to its end.
    pub(crate) duration_ms: f64,
}

/// `GET /v1/runs/history`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct History {
    /// Newest first.
    pub(crate) sandboxes: Vec<PastRun>,
    /// Give it as `after` for the next page; absent on the last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) next: Option<String>,
}

/// A sandbox that has ended.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct PastRun {
    /// Its name.
    pub(crate) id: String,
    /// `destroyed` or `lost`.
    pub(crate) status: String,
    /// Image.
    pub(crate) image: String,
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// Memory.
    pub(crate) mem_mib: u64,
    /// From the request to a running guest.
    pub(crate) create_ms: f64,
    /// When it began.
    pub(crate) created_at: String,
    /// When it ended.
    pub(crate) destroyed_at: String,
    /// How long it has run.
    pub(crate) uptime_ms: u64,
    /// CPU time.
    pub(crate) cpu_ms: u64,
    /// Most memory its microVM had resident.
    pub(crate) mem_peak_bytes: u64,
    /// What it has cost.
    pub(crate) cost_cents: f64,
}

impl From<RunRow> for PastRun {
    fn from(row: RunRow) -> Self {
        Self {
            id: row.id,
            status: row.status,
            image: row.image,
            vcpus: row.vcpus,
            mem_mib: row.mem_mib,
            create_ms: row.create_ms,
            created_at: time(row.created_us),
            destroyed_at: time(row.ended_us.unwrap_or_default()),
            uptime_ms: row.ran_ms,
            cpu_ms: row.cpu_ms,
            mem_peak_bytes: row.mem_peak_bytes,
            cost_cents: row.cost_cents,
        }
    }
}

/// `GET /v1/usage`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct UsageAnswer {
    /// Sandboxes that are there.
    pub(crate) active_sandboxes: usize,
    /// Sandboxes that have ended.
    pub(crate) history_sandboxes: u64,
    /// What the first have cost so far.
    pub(crate) active_cost_cents: f64,
    /// What the second have cost.
    pub(crate) history_cost_cents: f64,
    /// Both.
    pub(crate) total_cost_cents: f64,
    /// CPU time of both.
    pub(crate) cpu_seconds: f64,
    /// GiB of memory times seconds, of both.
    pub(crate) mem_seconds: f64,
    /// Now.
    pub(crate) as_of: String,
}

/// RFC 3339, in UTC.
pub(crate) fn time(us: i64) -> String {
    Timestamp::from_microsecond(us).unwrap_or_default().to_string()
}

/// `POST .../files/upload`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Written {
    /// As it was named.
    pub(crate) path: String,
    /// How much was sent.
    pub(crate) size_bytes: u64,
}

/// `GET .../files`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Listing {
    /// Names, sorted.
    pub(crate) entries: Vec<String>,
    /// What they are, in the same order.
    pub(crate) details: Vec<FileDetails>,
}

/// A file.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct FileDetails {
    /// Its name.
    pub(crate) name: String,
    /// `file`, `directory`, `symlink` or `other`.
    #[serde(rename = "type")]
    pub(crate) kind: String,
    /// Its length.
    pub(crate) size: u64,
    /// Permissions, in octal.
    pub(crate) mode: String,
    /// Last change.
    pub(crate) mtime: String,
}

/// `POST .../snapshot`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct SnapshotMade {
    /// Its name.
    pub(crate) snapshot_id: String,
    /// Of which sandbox.
    pub(crate) run_id: String,
    /// What it takes of the disk.
    pub(crate) size_bytes: u64,
    /// When.
    pub(crate) created_at: String,
}

impl From<SnapshotRow> for SnapshotMade {
    fn from(row: SnapshotRow) -> Self {
        let created_at = time(row.created_us);
        Self { snapshot_id: row.id, run_id: row.run_id, size_bytes: row.size_bytes, created_at }
    }
}

/// `GET /v1/snapshots`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Snapshots {
    /// Newest first.
    pub(crate) snapshots: Vec<Snapshot>,
}

/// A snapshot.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Snapshot {
    /// Its name.
    pub(crate) id: String,
    /// Of which sandbox.
    pub(crate) run_id: String,
    /// What it takes of the disk.
    pub(crate) size_bytes: u64,
    /// When.
    pub(crate) created_at: String,
}

impl From<SnapshotRow> for Snapshot {
    fn from(row: SnapshotRow) -> Self {
        let created_at = time(row.created_us);
        Self { id: row.id, run_id: row.run_id, size_bytes: row.size_bytes, created_at }
    }
}

/// `DELETE /v1/snapshots/{id}` and of pools.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Deleted {
    /// `deleted`.
    pub(crate) status: String,
    /// What.
    pub(crate) id: String,
}

/// `POST /v1/runs/restore`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct RestoreBody {
    /// Which.
    #[serde(alias = "snapshotId", alias = "id")]
    pub(crate) snapshot_id: Option<String>,
}

/// `POST /v1/runs/{id}/fork`.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ForkBody {
    /// How many; 1 if it is not said.
    pub(crate) count: Option<usize>,
}

/// The children.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Forks {
    /// In no order that means anything.
    pub(crate) forks: Vec<Run>,
}

/// `POST` and `PATCH /v1/pools`.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub(crate) struct PoolBody {
    /// Image.
    pub(crate) image: Option<String>,
    /// Virtual CPUs.
    pub(crate) vcpus: Option<u32>,
    /// Memory.
    pub(crate) mem_mib: Option<u64>,
    /// Workers kept whatever the demand; the same as `min`.
    pub(crate) target: Option<usize>,
    /// Workers kept whatever the demand.
    pub(crate) min: Option<usize>,
    /// Workers that demand may raise it to.
    pub(crate) max: Option<usize>,
    /// Refill in the long run.
    pub(crate) refill_per_s: Option<f64>,
}

/// `GET /v1/pools`.
#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct Pools {
    /// By name.
    pub(crate) pools: Vec<PoolAnswer>,
}

/// A pool.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct PoolAnswer {
    /// Its name.
    pub(crate) id: String,
    /// Image.
    pub(crate) image: String,
    /// Virtual CPUs.
    pub(crate) vcpus: u32,
    /// Memory.
    pub(crate) mem_mib: u64,
    /// Idle workers that demand asks for now.
    pub(crate) target: usize,
    /// Workers kept whatever the demand.
    pub(crate) min: usize,
    /// Workers that demand may raise it to.
    pub(crate) max: usize,
    /// Refill in the long run.
    pub(crate) refill_per_s: f64,
    /// Idle workers.
    pub(crate) ready: usize,
    /// Workers being built.
    pub(crate) making: usize,
    /// Checkouts answered at once.
    pub(crate) hits: u64,
    /// Checkouts that had to wait.
    pub(crate) misses: u64,
    /// Hits of all checkouts, 0 to 1.
    pub(crate) hit_rate: f64,
    /// From asking for a worker to having it.
    pub(crate) checkout_us: Percentiles,
    /// Why there are none.
    pub(crate) error: Option<String>,
}

impl From<PoolView> for PoolAnswer {
    fn from(view: PoolView) -> Self {
        let spec = view.spec;
        let (counts, checkout_us) =
            view.stats.map(|stats| (stats.counts, stats.checkout_us)).unwrap_or_default();
        let all = counts.hits + counts.misses;
        #[allow(clippy::cast_precision_loss)]
        let hit_rate = if all == 0 { 0.0 } else { counts.hits as f64 / all as f64 };
        Self {
            id: view.id,
            image: spec.image,
            vcpus: spec.vcpus,
            mem_mib: spec.mem_mib,
            target: counts.target,
            min: spec.min,
            max: spec.max,
            refill_per_s: spec.refill_per_s,
            ready: counts.ready + counts.parked,
            making: counts.in_flight,
            hits: counts.hits,
            misses: counts.misses,
            hit_rate,
            checkout_us,
            error: view.error.or(counts.broken.map(|cause| cause.to_string())),
        }
    }
}
