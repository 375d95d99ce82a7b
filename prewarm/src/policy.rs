//! What the operator decides: per template and for the whole pool.

use crate::error::Error;
use std::time::Duration;

/// How one template is kept ready.
#[derive(Debug, Clone, PartialEq)]
pub struct Policy {
    /// Idle slots held whatever the demand. 0 to `high`.
    pub low: usize,
    /// Idle slots that demand may raise the target to. `low` to `max`.
    pub high: usize,
    /// Slots of this template, idle or in building, never exceeded. Builds for waiting callers count; builds
    /// still on their way when the template was discarded do not. At least 1.
    pub max: usize,
    /// How many of the idle slots have the template's state set, as far as memory beyond all shells allows. 0
    /// to `high`.
    pub parked: usize,
    /// Callers that may wait at a time. At least 1.
    pub max_waiters: usize,
    /// What an idle shell costs in bytes. 1 to `parked_bytes`.
    pub shell_bytes: u64,
    /// What a parked slot costs in bytes. `shell_bytes` to the pool's `max_bytes`.
    pub parked_bytes: u64,
    /// Builds a second for refill, in the long run. Builds that a caller waits for are not held back by it,
    /// but they are refills too and use its tokens. 0 or more, finite.
    pub refill_per_s: f64,
    /// Refill builds that may follow each other at once after a quiet time (the token bucket's depth). At
    /// least 1.
    pub refill_burst: u32,
    /// How long a build takes, until builds have been seen. Above 0.
    pub expected_build: Duration,
    /// Time constant of the average arrival rate: what is older counts for less than 1/e. Above 0.
    pub rate_memory: Duration,
    /// For how long a burst is remembered; between one and two of these. Above 0.
    pub peak_window: Duration,
    /// How long a slot may stay idle above the target before it is destroyed. Above 0.
    pub idle_expiry: Duration,
    /// The breaker's first back-off; it doubles with every further failure. Above 0.
    pub backoff_first: Duration,
    /// The breaker's longest back-off. At least `backoff_first`.
    pub backoff_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            low: 2,
            high: 32,
            max: 64,
            parked: 0,
            max_waiters: 1024,
            shell_bytes: 2 << 20,
            parked_bytes: 4 << 20,
            refill_per_s: 200.0,
            refill_burst: 16,
            expected_build: Duration::from_millis(2),
            rate_memory: Duration::from_secs(10),
            peak_window: Duration::from_secs(60),
            idle_expiry: Duration::from_secs(60),
            backoff_first: Duration::from_millis(100),
            backoff_max: Duration::from_secs(30),
        }
    }
}

/// What all templates share.
#[derive(Debug, Clone, PartialEq)]
pub struct Limits {
    /// Memory of all slots that are building, idle or being destroyed, in bytes; never exceeded. Slots in
    /// callers' hands do not count: they are the host's admission's business.
    pub max_bytes: u64,
    /// Builds and parkings in flight at a time, those that a caller waits for included. At least 1.
    pub max_builds: usize,
    /// Refill starts nothing while this many are in flight, so that a miss finds one free. 1 to `max_builds`.
    pub refill_builds: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { max_bytes: 1 << 30, max_builds: 8, refill_builds: 2 }
    }
}

fn need(holds: bool, field: &'static str, problem: &'static str) -> Result<(), Error> {
    if holds { Ok(()) } else { Err(Error::Policy { field, problem }) }
}

impl Policy {
    pub(crate) fn check(&self, limits: &Limits) -> Result<(), Error> {
        need(self.low <= self.high, "low", "is above high: lower it, or raise high")?;
        need(self.high <= self.max, "high", "is above max: lower it, or raise max")?;
        need(self.max >= 1, "max", "is 0: no slot could ever be built; give at least 1")?;
        need(self.parked <= self.high, "parked", "is above high: lower it, or raise high")?;
        need(self.max_waiters >= 1, "max_waiters", "is 0: every miss would be refused; give at least 1")?;
        need(self.shell_bytes >= 1, "shell_bytes", "is 0: the memory budget would bound nothing")?;
        need(self.parked_bytes >= self.shell_bytes, "parked_bytes", "is below shell_bytes")?;
        need(
            self.parked_bytes <= limits.max_bytes,
            "parked_bytes",
            "is above the pool's max_bytes: not one slot would fit",
        )?;
        need(
            self.refill_per_s.is_finite() && self.refill_per_s >= 0.0,
            "refill_per_s",
            "must be a finite number, 0 or more",
        )?;
        need(self.refill_burst >= 1, "refill_burst", "is 0: refill could never start; give at least 1")?;
        need(self.backoff_max >= self.backoff_first, "backoff_max", "is below backoff_first")?;
        for (field, value) in [
            ("expected_build", self.expected_build),
            ("rate_memory", self.rate_memory),
            ("peak_window", self.peak_window),
            ("idle_expiry", self.idle_expiry),
            ("backoff_first", self.backoff_first),
        ] {
            need(!value.is_zero(), field, "must be above 0")?;
        }
        Ok(())
    }
}

impl Limits {
    pub(crate) fn check(&self) -> Result<(), Error> {
        need(self.max_builds >= 1, "max_builds", "is 0: nothing could ever be built; give at least 1")?;
        need(
            self.refill_builds >= 1,
            "refill_builds",
            "is 0: nothing would be built ahead; give at least 1",
        )?;
        need(self.refill_builds <= self.max_builds, "refill_builds", "is above max_builds: lower it")
    }
}
