//! When a refill begins, and the end of a worker. Both are milliseconds of the host's kernel, which a create in their way waits
//! for: so they wait for a pause between checkouts, refills as long as there is enough in stock.
//!
//! May touch: the clock. Must not: know the pool.

use std::cell::Cell;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A pause: so long without a checkout. That of the create that has just taken the last worker is over by then.
const PAUSE: Duration = Duration::from_millis(5);
/// Checkouts that never pause put a refill off for so long and no longer.
const MOST: Duration = Duration::from_millis(250);

/// The checkouts that refills look at.
#[derive(Debug)]
pub(super) struct Quiet {
    last: Cell<Instant>,
    /// How often refills were told not to wait any longer.
    hurries: Cell<u64>,
    hurry: Notify,
}

impl Quiet {
    pub(super) fn new() -> Self {
        Self { last: Cell::new(Instant::now()), hurries: Cell::new(0), hurry: Notify::new() }
    }

    /// A worker was handed out; `short`: too few are left.
    pub(super) fn checkout(&self, short: bool) {
        self.last.set(Instant::now());
        if short {
            self.hurry();
        }
    }

    /// Refills that wait are wanted now.
    pub(super) fn hurry(&self) {
        self.hurries.set(self.hurries.get() + 1);
        self.hurry.notify_waiters();
    }

    /// Ends when a refill may begin that is ordered now; `short`: too few are there. A hurry between this call and the first
    /// poll counts too.
    pub(super) fn pause(self: &Rc<Self>, short: bool) -> impl Future<Output = ()> + use<> {
        let (quiet, begun, hurries) = (Rc::clone(self), Instant::now(), self.hurries.get());
        async move {
            while hurries == quiet.hurries.get()
                && let Some(at) = look_again(begun, quiet.last.get(), Instant::now(), short)
            {
                tokio::select! {
                    () = tokio::time::sleep_until(at) => {}
                    () = quiet.hurry.notified() => {}
                }
            }
        }
    }
}

/// When to look again whether a refill may begin; none: it may now. A pool that runs short has it wait for one pause's
/// time only.
fn look_again(begun: Instant, last_checkout: Instant, now: Instant, short: bool) -> Option<Instant> {
    let latest = begun + if short { PAUSE } else { MOST };
    let at = (last_checkout + PAUSE).min(latest);
    (now < at).then_some(at)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::{Context, Waker};

    /// How long a refill waits while checkouts come a millisecond apart, so many of them, the first of them its own.
    fn waits(checkouts: u32, short: bool) -> Duration {
        let begun = Instant::now();
        let mut now = begun;
        let ms = Duration::from_millis(1);
        let last = |now: Instant| begun + ms * (checkouts - 1).min((now - begun).as_millis() as u32);
        while let Some(at) = look_again(begun, last(now), now, short) {
            assert!(at > now);
            now = at;
        }
        now - begun
    }

    #[test]
    fn a_refill_waits_for_a_pause_between_checkouts() {
        assert_eq!(waits(1, false), PAUSE);
        assert_eq!(waits(41, false), Duration::from_millis(45));
    }

    #[test]
    fn a_refill_is_not_put_off_for_ever() {
        assert_eq!(waits(1000, false), MOST);
    }

    #[test]
    fn a_refill_of_a_pool_that_runs_short_does_not_wait_for_a_pause() {
        assert_eq!(waits(41, true), PAUSE);
    }

    #[test]
    fn a_hurry_before_a_refill_first_looks_is_not_lost() {
        let quiet = Rc::new(Quiet::new());
        let pause = std::pin::pin!(quiet.pause(false));
        quiet.hurry();
        // No timer is there to wait with.
        assert!(pause.poll(&mut Context::from_waker(Waker::noop())).is_ready());
    }
}
