//! Long random histories, and random policies.

use super::{Event, World, ms};
use crate::{Limits, Policy};
use proptest::prelude::*;

fn event() -> impl Strategy<Value = Event> {
    let n = 0..8usize;
    prop_oneof![
        8 => (0..3u8).prop_map(Event::Checkout),
        1 => n.clone().prop_map(Event::Cancel),
        8 => n.clone().prop_map(Event::Built),
        1 => n.clone().prop_map(Event::FailHost),
        1 => n.clone().prop_map(Event::FailTemplate),
        1 => n.clone().prop_map(Event::Die),
        4 => n.clone().prop_map(Event::Return),
        8 => n.prop_map(Event::Destroyed),
        2 => any::<bool>().prop_map(Event::Rebuilt),
        4 => (0..400u64).prop_map(Event::Tick),
        1 => (0..400u64).prop_map(Event::Misfit),
        1 => (0..3u8).prop_map(Event::Remove),
        1 => (0..3u8).prop_map(Event::Add),
    ]
}

prop_compose! {
    fn policy()(
        low in 0..3usize, up in 0..4usize, more in 1..3usize, parked in 0..3usize,
        shell_bytes in 1..8u64, extra in 0..8u64, refill_per_s in prop_oneof![Just(0.0), 1.0..200.0f64],
        refill_burst in 1..4u32, max_waiters in 1..12usize,
    ) -> Policy {
        let high = low + up;
        Policy {
            low, high, max: high + more, parked: parked.min(high), max_waiters,
            shell_bytes, parked_bytes: shell_bytes + extra, refill_per_s, refill_burst,
            expected_build: ms(20), rate_memory: ms(500), peak_window: ms(300), idle_expiry: ms(200),
            backoff_first: ms(50), backoff_max: ms(1_000),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_history_breaks_a_promise_and_every_caller_is_answered(
        policies in prop::collection::vec(policy(), 3),
        max_bytes in 0..40u64, max_builds in 1..5usize, refill in 1..5usize,
        events in prop::collection::vec(event(), 1..150),
    ) {
        let fits = policies.iter().map(|p| p.parked_bytes).max().unwrap_or(1);
        // `Add` brings a policy of ordinary size; a few of it have to fit where it can occur.
        let max_bytes = if max_bytes > 30 { 12 << 20 } else { fits + max_bytes };
        let limits = Limits { max_bytes, max_builds, refill_builds: refill.min(max_builds) };
        let mut world = World::new(limits, &policies);
        for event in events {
            if let Err(what) = world.step(event) {
                return Err(TestCaseError::fail(format!("{what} after {event:?}")));
            }
        }
        world.settle().map_err(TestCaseError::fail)?;
    }
}
