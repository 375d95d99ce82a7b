//! When a refill begins. Making a worker is milliseconds of the host's kernel, which a create in its way waits for: so it
//! waits for a pause between checkouts, as long as there is enough in stock.
//!
//! May touch: the clock. Must not: know the pool.

use std::cell::Cell;
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
    hurry: Notify,
}

impl Quiet {
    pub(super) fn new() -> Self {
        Self { last: Cell::new(Instant::now()), hurry: Notify::new() }
    }

    /// A worker was handed out; `left` are there still, `low` should be.
    pub(super) fn checkout(&self, left: usize, low: usize) {
        self.last.set(Instant::now());
        if is_short(left, low) {
            self.hurry.notify_waiters();
        }
    }

    /// Somebody waits for a worker.
    pub(super) fn hurry(&self) {
        self.hurry.notify_waiters();
    }

    /// Returns when a refill may begin that was ordered with so many `left`.
    pub(super) async fn wait(&self, left: usize, low: usize) {
        let begun = Instant::now();
        while let Some(at) = look_again(begun, self.last.get(), Instant::now(), is_short(left, low)) {
            tokio::select! {
                () = tokio::time::sleep_until(at) => {}
                () = self.hurry.notified() => return,
            }
        }
    }
}

fn is_short(left: usize, low: usize) -> bool {
    left * 2 < low
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
        assert!(is_short(4, 10) && !is_short(5, 10) && !is_short(0, 0));
    }
}
