//! The breaker of one template (M. Nygard, Release It!, "Circuit Breaker"): after a failed build no second
//! one is tried at once, callers are told the cause, and the next attempts are single and ever further apart.
//!
//! ```text
//! closed --host failure--> open --back-off over--> one trial --built--> closed
//!                                                     `--failed--> open, twice as long
//! closed --bad template--> rebuild asked --rebuilt--> one trial (as above)
//!                                `--rebuild failed--> asked again after the back-off
//! ```
//!
//! What failed must be built as deep as it was when it failed: a shell says nothing about a template's state.

use crate::error::Cause;
use crate::policy::Policy;
use crate::slot::Depth;
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// One build may be tried from this time on.
    Trial(Duration),
    /// The template is to be rebuilt from this time on.
    RebuildDue(Duration),
    /// The order to rebuild is out.
    Rebuilding,
}

#[derive(Debug, Clone)]
struct Open {
    cause: Cause,
    /// How deep the build was to be that failed.
    depth: Depth,
    next: Next,
}

#[derive(Debug, Clone, Default)]
pub(crate) struct Breaker {
    open: Option<Open>,
    /// Failures since the last build that succeeded.
    streak: u32,
    /// How often it opened: builds begun before an opening do not count a second time.
    pub(crate) epoch: u64,
}

impl Breaker {
    fn backoff(&self, policy: &Policy) -> Duration {
        let doublings = self.streak.saturating_sub(1).min(31);
        policy.backoff_first.saturating_mul(1 << doublings).min(policy.backoff_max)
    }

    /// A build to this depth, begun in `epoch`, failed.
    pub(crate) fn failed(&mut self, now: Duration, epoch: u64, depth: Depth, cause: Cause, policy: &Policy) {
        let corrupt = matches!(cause, Cause::Template(_));
        let rebuilding = self.open.as_ref().is_some_and(|o| !matches!(o.next, Next::Trial(_)));
        // Of one incident only the first failure counts, unless a later one says that the template is bad.
        if rebuilding || (epoch != self.epoch && !corrupt) {
            return;
        }
        self.epoch += 1;
        self.streak = self.streak.saturating_add(1);
        let later = now.saturating_add(self.backoff(policy));
        let next = match (corrupt, self.streak) {
            (true, 1) => Next::RebuildDue(now),
            (true, _) => Next::RebuildDue(later),
            (false, _) => Next::Trial(later),
        };
        self.open = Some(Open { cause, depth, next });
    }

    pub(crate) fn built(&mut self, depth: Depth) {
        if self.open.as_ref().is_none_or(|open| depth >= open.depth) {
            self.streak = 0;
            self.open = None;
        }
    }

    /// The rebuild that was asked for ended. False: none was asked for.
    pub(crate) fn rebuilt(&mut self, now: Duration, outcome: Result<(), Cause>, policy: &Policy) -> bool {
        if self.open.as_ref().is_none_or(|o| o.next != Next::Rebuilding) {
            return false;
        }
        if outcome.is_err() {
            self.streak = self.streak.saturating_add(1);
        }
        let later = now.saturating_add(self.backoff(policy));
        if let Some(open) = &mut self.open {
            match outcome {
                Ok(()) => open.next = Next::Trial(now),
                Err(cause) => *open = Open { cause, next: Next::RebuildDue(later), ..*open },
            }
        }
        true
    }

    /// The cause, once, when the order to rebuild is due.
    pub(crate) fn take_rebuild(&mut self, now: Duration) -> Option<Cause> {
        let open = self.open.as_mut()?;
        match open.next {
            Next::RebuildDue(at) if at <= now => {
                open.next = Next::Rebuilding;
                Some(open.cause.clone())
            }
            _ => None,
        }
    }

    /// How many builds may be in flight now.
    pub(crate) fn allowance(&self, now: Duration) -> usize {
        match self.open.as_ref().map(|o| o.next) {
            None => usize::MAX,
            Some(Next::Trial(at)) if at <= now => 1,
            Some(_) => 0,
        }
    }

    /// The same for parkings: while shells fail there are none, and where they failed themselves one is the trial.
    pub(crate) fn parking_allowance(&self, now: Duration) -> usize {
        match &self.open {
            Some(open) if open.depth == Depth::Shell => 0,
            _ => self.allowance(now),
        }
    }

    /// The cause and how long until a trial, while open.
    pub(crate) fn why(&self, now: Duration) -> Option<(Cause, Option<Duration>)> {
        self.open.as_ref().map(|open| {
            let retry = match open.next {
                Next::Trial(at) => Some(at.saturating_sub(now)),
                _ => None,
            };
            (open.cause.clone(), retry)
        })
    }

    /// When time alone will change something.
    pub(crate) fn wakeup(&self, now: Duration) -> Option<Duration> {
        match self.open.as_ref()?.next {
            Next::Trial(at) | Next::RebuildDue(at) if at > now => Some(at),
            _ => None,
        }
    }
}
