//! The audit log: who did what to which sandbox, one chain per tenant, so that a change made afterwards shows.
//!
//! It may touch the files of its own directory and nothing else; it knows no sandbox and no HTTP.
//!
//! # The log
//!
//! `log.ndjson` holds one entry a line, in canonical JSON (RFC 8785), so that an entry has one spelling:
//!
//! ```text
//! {"data":{...},"event":"exec.start","hmac":"sha256:...","prev":"sha256:...","sandbox_id":"run...","seq":7,"ts":"..."}
//! ```
//!
//! `hmac` is HMAC-SHA256 over a domain string, the tenant, and the canonical entry without `hmac`, each with its
//! length before it; `prev` is the `hmac` of the entry before, so an entry vouches for all before it.
//!
//! **The key ratchets forward.** Entry n's MAC key comes from chain key n by HMAC, and so does chain key n + 1;
//! neither leads back. The first chain key is random, and left in `initial.key` for the operator to move to
//! where the log is verified; the runner itself needs `state` only, which holds the key of the last checkpoint.
//! Who breaks into the host later can forge what comes, not what was.
//!
//! **Checkpoints.** `checkpoints.ndjson` holds statements signed with Ed25519: so many entries, of so many
//! bytes, with this head and this SHA-256 link digest, at this time. A checkpoint is made when the log is durable so far. Kept
//! elsewhere, it shows truncation and rollback, and it lets somebody who has no MAC key verify the log.
//!
//! # What is durable when
//!
//! [`Log::append`] returns when the entry is in the kernel: it survives the death of this process. A loss of
//! power may take what was appended after the last [`Pending::commit`]; what is lost is whole entries or one
//! torn line at the end, which [`Log::open`] cuts off and records as the event [`RECOVERED`].
#![forbid(unsafe_code)]

mod chain;
mod checkpoint;
mod entry;
mod error;
mod log;
mod verify;

pub use chain::ChainKey;
pub use checkpoint::{Checkpoint, SigningKey, VerifyingKey};
pub use entry::{ENTRY_MAX_BYTES, Entry, GENESIS};
pub use error::AuditError;
pub use log::{Log, Pending, RECOVERED};
pub use verify::{Breakage, Report, Trust, Verdict, verify};
