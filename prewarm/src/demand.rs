//! What demand asks for, and how fast refill may answer: the arrival rate, the build time, the peak, the
//! token bucket.

use crate::policy::Policy;
use std::collections::VecDeque;
use std::time::Duration;

/// A rounding error of the floating-point sums, far below one slot.
const SLACK: f64 = 1e-6;

/// Arrivals and build times of one template, and the number of slots that follows from them.
///
/// Little's law: `rate x build time` slots are used up, on average, while one is rebuilt. The burst allowance
/// is what the peak was above that: the most arrivals seen within one build time. So the target is the larger
/// of the two.
#[derive(Debug, Clone)]
pub(crate) struct Demand {
    /// Arrivals a second at `at`: each adds `1 / rate_memory`, and the sum decays with that time constant.
    rate_per_s: f64,
    at: Duration,
    /// Smoothed like a round-trip time: 7/8 old, 1/8 new (RFC 6298, section 2).
    build: Duration,
    build_seen: bool,
    /// Arrivals within the last build time, at most `max` of them: more could not be answered anyway.
    recent: VecDeque<Duration>,
    /// The most that `recent` held in this window and in the one before.
    peaks: [usize; 2],
    window_start: Duration,
}

impl Demand {
    pub(crate) fn new(now: Duration, policy: &Policy) -> Self {
        Self {
            rate_per_s: 0.0,
            at: now,
            build: policy.expected_build,
            build_seen: false,
            recent: VecDeque::new(),
            peaks: [0, 0],
            window_start: now,
        }
    }

    /// Brings the average and the windows to `now`.
    pub(crate) fn advance(&mut self, now: Duration, policy: &Policy) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.rate_per_s *= (-passed / policy.rate_memory.as_secs_f64()).exp();
        self.at = now;
        let since = now.saturating_sub(self.window_start);
        if since >= policy.peak_window {
            let kept = if since / 2 < policy.peak_window { self.peaks[0] } else { 0 };
            self.peaks = [0, kept];
            self.window_start = now;
        }
    }

    pub(crate) fn arrival(&mut self, now: Duration, policy: &Policy) {
        self.advance(now, policy);
        self.rate_per_s += 1.0 / policy.rate_memory.as_secs_f64();
        self.recent.push_back(now);
        let old = now.saturating_sub(self.build);
        while self.recent.len() > policy.max || self.recent.front().is_some_and(|&at| at < old) {
            self.recent.pop_front();
        }
        self.peaks[0] = self.peaks[0].max(self.recent.len());
    }

    pub(crate) fn build_took(&mut self, took: Duration) {
        self.build = if self.build_seen { self.build - self.build / 8 + took / 8 } else { took };
        self.build_seen = true;
    }

    /// Idle slots wanted, between `low` and `high`.
    pub(crate) fn target(&self, policy: &Policy) -> usize {
        let average = (self.rate_per_s * self.build.as_secs_f64() - SLACK).ceil().max(0.0) as usize;
        average.max(self.peaks[0]).max(self.peaks[1]).clamp(policy.low, policy.high)
    }

    pub(crate) fn rate_per_s(&self) -> f64 {
        self.rate_per_s
    }

    pub(crate) fn build(&self) -> Duration {
        self.build
    }
}

/// A token bucket (as in RFC 2697's committed rate): one token a build.
#[derive(Debug, Clone)]
pub(crate) struct Bucket {
    tokens: f64,
    at: Duration,
}

impl Bucket {
    pub(crate) fn new(now: Duration, policy: &Policy) -> Self {
        Self { tokens: f64::from(policy.refill_burst), at: now }
    }

    pub(crate) fn advance(&mut self, now: Duration, policy: &Policy) {
        let earned = now.saturating_sub(self.at).as_secs_f64() * policy.refill_per_s;
        self.tokens = (self.tokens + earned).min(f64::from(policy.refill_burst));
        self.at = now;
    }

    pub(crate) fn has_token(&self) -> bool {
        self.tokens >= 1.0 - SLACK
    }

    /// Takes a token if there is one: a build that a caller waits for goes ahead without.
    pub(crate) fn spend(&mut self) {
        self.tokens = (self.tokens - 1.0).max(0.0);
    }

    /// When the next token is there; `None` if there is one, or never will be.
    pub(crate) fn next_token(&self, policy: &Policy) -> Option<Duration> {
        let wait_s = (1.0 - self.tokens) / policy.refill_per_s;
        // A rate so small that the time does not fit a Duration is a rate of nothing. The microsecond makes
        // sure that the wake-up comes after the token and not a rounding error before it.
        let wait = Duration::try_from_secs_f64(wait_s).ok().filter(|_| !self.has_token())?;
        self.at.checked_add(wait)?.checked_add(Duration::from_micros(1))
    }
}
