//! The rows, as they are kept: JSON, so that a field may be added.

use crate::images::Image;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A sandbox.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunRow {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// `running`, `hibernated`, `destroyed` or `lost`.
    pub status: String,
    /// Why it was lost.
    #[serde(default)]
    pub reason: Option<String>,
    /// The image as it was named.
    pub image: String,
    /// What that meant then.
    pub root: Image,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub mem_mib: u64,
    /// Disk it may use.
    pub disk_mib: u64,
    /// From the request to the answer.
    pub create_ms: f64,
    /// Seconds of idleness; `None` never ends it.
    pub timeout_s: Option<u64>,
    /// Idle for its timeout, it hibernates and does not end.
    #[serde(default)]
    pub sleeps_when_idle: bool,
    /// Environment of its commands, `NAME=VALUE`.
    #[serde(default)]
    pub env: Vec<String>,
    /// Microseconds since 1970.
    pub created_us: i64,
    /// Microseconds since 1970.
    pub ended_us: Option<i64>,
    /// How long it has run, hibernation left out.
    pub ran_ms: u64,
    /// CPU time of its microVM's process.
    pub cpu_ms: u64,
    /// Most memory that process had resident.
    pub mem_peak_bytes: u64,
    /// What it has cost.
    pub cost_cents: f64,
    /// Where it sleeps, if it does.
    #[serde(default)]
    pub sleeps_in: Option<PathBuf>,
    /// Where the next daemon finds its worker, if it runs.
    #[serde(default)]
    pub found_at: Option<String>,
    /// What a worker that still runs has to be counted from.
    #[serde(default)]
    pub running: Option<RunningRow>,
    /// The request that made it, if it had a key.
    #[serde(default)]
    pub made_with: Option<MadeWith>,
}

/// The request that made a sandbox, for a client that sends it again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MadeWith {
    /// Its `Idempotency-Key`.
    pub key: String,
    /// SHA-256 of path and body, in hexadecimal.
    pub request: String,
}

/// The meter of a sandbox that runs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RunningRow {
    /// When its present worker began, on CLOCK_MONOTONIC.
    pub since_ns: u64,
    /// How long it had run before.
    pub ran_ms: u64,
    /// CPU time before.
    pub cpu_ms: u64,
    /// Peak of memory before.
    pub mem_peak_bytes: u64,
}

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SnapshotRow {
    /// Its id.
    pub id: String,
    /// Whose it is.
    pub tenant: String,
    /// The sandbox it was made of.
    pub run_id: String,
    /// What it takes of the disk.
    pub size_bytes: u64,
    /// Microseconds since 1970.
    pub created_us: i64,
    /// Where it lies.
    pub dir: PathBuf,
    /// What a sandbox made from it gets.
    pub image: String,
    /// What the image's name meant then.
    pub root: Image,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub mem_mib: u64,
    /// Disk it may use.
    pub disk_mib: u64,
    /// Seconds of idleness.
    pub timeout_s: Option<u64>,
    /// Environment of its commands.
    #[serde(default)]
    pub env: Vec<String>,
}

/// Sums over sandboxes that have ended.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Totals {
    /// How many.
    pub sandboxes: u64,
    /// What they have cost.
    pub cost_cents: f64,
    /// Their CPU time.
    pub cpu_ms: f64,
    /// Memory by time.
    pub gib_ms: f64,
}
