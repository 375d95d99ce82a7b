//! How big a pool has to be: the pool itself, run against a trace of arrivals in simulated time. Same input,
//! same result, on any run of the same build: time is simulated and the random numbers have a seed.

use crate::error::Error;
use crate::policy::{Limits, Policy};
use crate::pool::{Action, Checkout, Pool};
use crate::slot::{SlotId, Ticket};
use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

/// Random numbers for the simulation: SplitMix64 (Steele, Lea, Flood, OOPSLA 2014). Not for secrets.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Above 0, at most 1.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Exponentially distributed with this mean, in seconds.
    fn exponential_s(&mut self, mean_s: f64) -> f64 {
        -self.unit().ln() * mean_s
    }
}

/// Arrivals in bursts: bursts come as a Poisson process, each of a geometrically distributed number of
/// callers at the same instant.
#[derive(Debug, Clone, PartialEq)]
pub struct Arrivals {
    /// Callers a second, all bursts together. Above 0, finite.
    pub rate_per_s: f64,
    /// Callers a burst on average. 1 (plain Poisson) or more, finite.
    pub burst: f64,
    /// How many callers.
    pub count: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

impl Arrivals {
    /// The times of arrival, rising. Errors: a field is out of range.
    pub fn trace(&self) -> Result<Vec<Duration>, Error> {
        let error = |field, problem| Err(Error::Policy { field, problem });
        if !(self.rate_per_s.is_finite() && self.rate_per_s > 0.0) {
            return error("rate_per_s", "must be a finite number above 0");
        }
        if !(self.burst.is_finite() && self.burst >= 1.0) {
            return error("burst", "must be a finite number, 1 or more");
        }
        let mut random = Random(self.seed);
        let mut trace = Vec::with_capacity(self.count);
        let mut at = Duration::ZERO;
        while trace.len() < self.count {
            if trace.is_empty() || random.unit() <= 1.0 / self.burst {
                let gap_s = random.exponential_s(self.burst / self.rate_per_s);
                let gap = Duration::try_from_secs_f64(gap_s).unwrap_or(Duration::MAX);
                at = at.saturating_add(gap);
            }
            trace.push(at);
        }
        Ok(trace)
    }
}

/// How long builds take. The n-th build of a run takes the same time whatever the policy, so policies
/// compare.
#[derive(Debug, Clone, PartialEq)]
pub enum BuildTime {
    /// Always this long.
    Fixed(Duration),
    /// Never below `least`; what comes on top is exponentially distributed with mean `more`.
    Tail {
        /// The shortest.
        least: Duration,
        /// What comes on top, on average.
        more: Duration,
    },
    /// One of these measurements, each as likely; at least one.
    Measured(Vec<Duration>),
}

impl BuildTime {
    fn of(&self, seed: u64, nth: u64) -> Duration {
        let mut random = Random(seed ^ nth.wrapping_mul(0xd6e8_feb8_6659_fd93));
        match self {
            Self::Fixed(time) => *time,
            Self::Tail { least, more } => {
                let more_s = random.exponential_s(more.as_secs_f64());
                least.saturating_add(Duration::try_from_secs_f64(more_s).unwrap_or(Duration::MAX))
            }
            Self::Measured(times) => {
                let at = random.next() % times.len().max(1) as u64;
                times.get(at as usize).copied().unwrap_or_default()
            }
        }
    }
}

/// What to simulate: one template, alone in its pool, which is filled before the first arrival.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// Its policy.
    pub policy: Policy,
    /// The pool's limits.
    pub limits: Limits,
    /// How long a shell takes to build.
    pub build: BuildTime,
    /// How long parking takes.
    pub park: Duration,
    /// How long destroying takes.
    pub destroy: Duration,
    /// Seed of the build times.
    pub seed: u64,
}

/// What came out.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// Part of the callers that found a slot idle, 0 to 1; 1 if there were none.
    pub hit_rate: f64,
    /// Callers refused (queue full).
    pub refused: u64,
    /// Shells built.
    pub builds: u64,
    /// Memory of the pool, summed over the time from the first arrival to the last answer, in byte seconds.
    pub byte_seconds: f64,
    waits: Vec<Duration>,
}

impl Outcome {
    /// The wait that `part` (0 to 1) of the callers who got a slot did not exceed; hits wait for zero.
    /// Nearest rank.
    pub fn wait(&self, part: f64) -> Duration {
        let rank = (part.clamp(0.0, 1.0) * self.waits.len() as f64).ceil() as usize;
        self.waits.get(rank.max(1) - 1).copied().unwrap_or_default()
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Due {
    Built(SlotId),
    Destroyed(SlotId),
}

struct Run<'a> {
    case: &'a Case,
    pool: Pool<()>,
    due: BinaryHeap<Reverse<(Duration, u64, Due)>>,
    waiting: BTreeMap<Ticket, Duration>,
    /// Shell builds ordered, and everything ordered.
    builds: u64,
    pushed: u64,
    byte_seconds: f64,
    clock: Duration,
    waits: Vec<Duration>,
}

impl Run<'_> {
    /// Does what the pool says: everything takes the time the case gives it.
    fn obey(&mut self) {
        while let Some(action) = self.pool.next_action() {
            let (takes, due) = match action {
                Action::Build { slot, to: crate::Depth::Shell, .. } => {
                    self.builds += 1;
                    (self.case.build.of(self.case.seed, self.builds), Due::Built(slot))
                }
                Action::Build { slot, .. } => (self.case.park, Due::Built(slot)),
                Action::Destroy { slot, .. } => (self.case.destroy, Due::Destroyed(slot)),
                Action::Serve { ticket, slot, .. } => {
                    let since = self.waiting.remove(&ticket);
                    self.waits.extend(since.map(|since| self.clock.saturating_sub(since)));
                    // The sandbox's life is not the pool's: handed back at once, so that memory stays small
                    // here.
                    self.hand_back(slot);
                    continue;
                }
                // Nothing fails in a simulation, and it does not shut down.
                Action::Fail { .. } | Action::Rebuild { .. } => continue,
            };
            // What falls due at one time is done in the order in which it was ordered.
            self.pushed += 1;
            self.due.push(Reverse((self.clock.saturating_add(takes), self.pushed, due)));
        }
    }

    fn hand_back(&mut self, slot: SlotId) {
        // Both fit: the slot was handed out, and then given back.
        let done = self.pool.returned(self.clock, slot);
        debug_assert!(done.is_ok());
    }

    fn pass_to(&mut self, at: Duration) {
        let passed = at.saturating_sub(self.clock);
        self.byte_seconds += self.pool.charged_bytes() as f64 * passed.as_secs_f64();
        self.clock = self.clock.max(at);
    }

    /// Lets everything happen that happens before `until`, or until nobody waits.
    fn run(&mut self, until: Option<Duration>) {
        loop {
            self.obey();
            if until.is_none() && self.waiting.is_empty() {
                return;
            }
            let work = self.due.peek().map(|Reverse((at, ..))| *at);
            let Some(at) = [work, self.pool.next_wakeup()].into_iter().flatten().min() else { break };
            if until.is_some_and(|until| at > until) {
                break;
            }
            self.pass_to(at);
            if work != Some(at) {
                self.pool.tick(at);
                continue;
            }
            let done = match self.due.pop() {
                Some(Reverse((_, _, Due::Built(slot)))) => self.pool.built(at, slot),
                Some(Reverse((_, _, Due::Destroyed(slot)))) => self.pool.destroyed(at, slot),
                None => Ok(()),
            };
            debug_assert!(done.is_ok());
        }
        if let Some(until) = until {
            self.pass_to(until);
        }
    }
}

/// Runs the pool against a trace of arrivals (rising times). Errors: policy or limits are out of range, or
/// [`BuildTime::Measured`] is empty.
pub fn simulate(case: &Case, trace: &[Duration]) -> Result<Outcome, Error> {
    if matches!(&case.build, BuildTime::Measured(times) if times.is_empty()) {
        return Err(Error::Policy { field: "build", problem: "has no measurement: give at least one" });
    }
    let mut run = Run {
        case,
        pool: Pool::new(case.limits.clone())?,
        due: BinaryHeap::new(),
        waiting: BTreeMap::new(),
        builds: 0,
        pushed: 0,
        byte_seconds: 0.0,
        clock: Duration::ZERO,
        waits: Vec::with_capacity(trace.len()),
    };
    run.pool.add(Duration::ZERO, (), case.policy.clone())?;
    // Fill it before the first arrival; no more than a day, in case its refill rate never gets there.
    let lead = Duration::from_secs(86_400);
    while run.pool.stats(&()).is_some_and(|s| s.ready + s.parked < case.policy.low) && run.clock < lead {
        run.obey();
        let next = run.due.peek().map(|Reverse((at, ..))| *at);
        let Some(at) = [next, run.pool.next_wakeup()].into_iter().flatten().min() else { break };
        run.run(Some(at));
    }
    let start = run.clock;
    run.byte_seconds = 0.0;
    for &at in trace {
        run.run(Some(start.saturating_add(at)));
        match run.pool.checkout(run.clock, &()) {
            Ok(Checkout::Hit { slot, .. }) => {
                run.waits.push(Duration::ZERO);
                run.hand_back(slot);
            }
            Ok(Checkout::Wait(ticket)) => {
                run.waiting.insert(ticket, run.clock);
            }
            // Counted by the pool.
            Err(_) => {}
        }
    }
    run.run(None);
    run.waits.sort_unstable();
    let stats = run.pool.stats(&()).unwrap_or_default();
    let callers = stats.hits + stats.misses;
    Ok(Outcome {
        hit_rate: if callers == 0 { 1.0 } else { stats.hits as f64 / callers as f64 },
        refused: stats.refused,
        builds: stats.builds,
        byte_seconds: run.byte_seconds,
        waits: run.waits,
    })
}

/// The smallest number of idle slots, 0 to the policy's `max`, that gives the wanted hit rate (0 to 1) when
/// held throughout (`low` and `high` both that number), and what then comes out. `None`: `max` does not give
/// it either.
///
/// Every number from 0 up is tried: with refill bounded, more is not always better, and so no step may be
/// skipped.
pub fn plan(
    case: &Case,
    trace: &[Duration],
    wanted_hit_rate: f64,
) -> Result<Option<(usize, Outcome)>, Error> {
    for size in 0..=case.policy.max {
        let parked = case.policy.parked.min(size);
        let policy = Policy { low: size, high: size, parked, ..case.policy.clone() };
        let outcome = simulate(&Case { policy, ..case.clone() }, trace)?;
        if outcome.hit_rate >= wanted_hit_rate {
            return Ok(Some((size, outcome)));
        }
    }
    Ok(None)
}
