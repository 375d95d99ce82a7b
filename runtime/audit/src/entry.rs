//! One entry and its canonical form. Pure.

use crate::chain::{self, ChainKey};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Most bytes of one line of the log. An entry says what was done, never what it printed.
pub const ENTRY_MAX_BYTES: usize = 64 * 1024;

/// What the first entry names as the one before it.
pub const GENESIS: &str = "sha256:0000000000000000000000000000000000000000000000000000000000000000";

/// One line of the log.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its number in the chain, from 0.
    pub seq: u64,
    /// When, in UTC (RFC 3339, microseconds). Clocks step; order is `seq`.
    pub ts: String,
    /// The sandbox it is about; empty where it is about none.
    pub sandbox_id: String,
    /// What happened: `exec.start`, `sandbox.created` and so on.
    pub event: String,
    /// The event's own fields. Never output, never a secret.
    pub data: Map<String, Value>,
    /// The `hmac` of the entry before, or [`GENESIS`].
    pub prev: String,
    /// The MAC over all of the above.
    pub hmac: String,
}

/// What the MAC covers: everything but the MAC.
#[derive(Serialize)]
struct Covered<'a> {
    seq: u64,
    ts: &'a str,
    sandbox_id: &'a str,
    event: &'a str,
    data: &'a Map<String, Value>,
    prev: &'a str,
}

impl Entry {
    /// The MAC that this entry should carry under `key`.
    pub(crate) fn mac(&self, tenant: &str, key: &ChainKey) -> Result<String, serde_json::Error> {
        let covered = Covered {
            seq: self.seq,
            ts: &self.ts,
            sandbox_id: &self.sandbox_id,
            event: &self.event,
            data: &self.data,
            prev: &self.prev,
        };
        Ok(chain::text(&key.mac(tenant, &serde_jcs::to_vec(&covered)?)))
    }

    /// The line without its line feed.
    pub(crate) fn line(&self) -> Result<Vec<u8>, serde_json::Error> {
        serde_jcs::to_vec(self)
    }

    /// Reads a line; `None` unless it is spelled as [`Entry::line`] spells it.
    pub(crate) fn parse(line: &[u8]) -> Option<Self> {
        let entry: Self = serde_json::from_slice(line).ok()?;
        (entry.line().ok()? == line).then_some(entry)
    }
}
