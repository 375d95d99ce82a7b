//! Workers: one process per microVM, made ahead of need: executed ([`Worker::spawn`]) or forked from a [`Zygote`].
//!
//! ```text
//!            Prepare           Go               Fork
//!   empty ------------> parked -----> running ---------> running + children, parked
//!                                        |
//!       the owner says End, or its end closes: the process ends, and its guest with it; or, where the owner has
//!       left a rendezvous, waits for the next owner, who attaches
//! ```
//!
//! The owner ([`Worker`]) and the process ([`serve`]) speak over a SOCK_SEQPACKET socket. The conversation
//! with the guest's agent is the owner's: the worker passes it the connection. A live fork is fork(2) of this
//! process: the kernel's copy-on-write is the mechanism, no memory is dumped, and the parent's guest stands
//! still for the fork alone.
//!
//! A snapshot of a running guest is such a fork that writes itself out and ends (as Redis' BGSAVE).
//!
//! May touch: its microVM, its control socket. Must not: decide anything; that is the pool's and the
//! service's.

mod client;
mod process;
mod rendezvous;
mod wire;
mod zygote;

pub use client::{Attached, Fork, Forking, Going, MOST_CHILDREN, Parked, Saved, Saving, Worker, WorkerError};
pub use process::{serve, serve_zygote};
pub use rendezvous::Rendezvous;
pub use zygote::Zygote;

use serde::{Deserialize, Serialize};

/// What a worker's guest has cost so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStats {
    /// Guest instructions that were emulated, where KVM counts them.
    pub emulated_instructions: Option<u64>,
    /// VM exits, where KVM counts them.
    pub exits: Option<u64>,
}

/// CLOCK_MONOTONIC, which is the same in every process of a host.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.unsigned_abs() * 1_000_000_000 + now.tv_nsec.unsigned_abs()
}
