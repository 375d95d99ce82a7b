//! The prewarm pool: which microVM shells to build, keep, hand out and destroy, and when. Pure policy: no
//! KVM, no I/O, no clock, no threads, no unsafe code.
//!
//! [`Pool`] is a state machine without I/O (the pattern of sans-io.readthedocs.io, and of quinn-proto in
//! Rust). The host process that owns the workers tells it what happened ([`Pool::checkout`], [`Pool::built`],
//! …) and does what [`Pool::next_action`] says. Time is a parameter of every event: a [`std::time::Duration`]
//! since an epoch the caller chooses. A time earlier than one already seen counts as the latest seen.
//!
//! One task owns a pool, or one mutex guards it: no call blocks, so there is nothing to interleave below the
//! level of whole events. Those interleavings are walked exhaustively (`tests/walk.rs`) and sampled
//! (`tests/invariants.rs`).
//!
//! ```
//! use prewarm::{Action, Checkout, Limits, Policy, Pool};
//! use std::time::Duration;
//!
//! let mut pool = Pool::new(Limits::default())?;
//! pool.add(Duration::ZERO, "python", Policy { low: 1, ..Policy::default() })?;
//! let Some(Action::Build { slot, .. }) = pool.next_action() else { panic!("low is 1") };
//! // … the caller builds the shell, and says so:
//! pool.built(Duration::from_micros(900), slot)?;
//! assert!(matches!(pool.checkout(Duration::from_millis(5), &"python")?, Checkout::Hit { .. }));
//! # Ok::<(), prewarm::Error>(())
//! ```
#![forbid(unsafe_code)]

mod breaker;
mod demand;
mod error;
pub mod plan;
mod policy;
mod pool;
mod schedule;
mod slot;

#[cfg(test)]
mod tests;

pub use error::{Cause, Error};
pub use policy::{Limits, Policy};
pub use pool::{Action, Checkout, Pool, Stats, Stock};
pub use slot::{Depth, Reason, SlotId, State, Ticket};
