//! The simulation against results known without it.

use super::ms;
use crate::plan::{Arrivals, BuildTime, Case, plan, simulate};
use crate::{Limits, Policy};
use std::time::Duration;

fn case(size: usize, build: BuildTime) -> Case {
    Case {
        policy: Policy {
            low: size,
            high: size,
            max: 64,
            refill_per_s: 1e6,
            refill_burst: 64,
            ..Policy::default()
        },
        limits: Limits { max_builds: 64, refill_builds: 64, ..Limits::default() },
        build,
        park: ms(1),
        destroy: ms(1),
        seed: 7,
    }
}

#[test]
fn with_no_slot_held_every_caller_waits_for_one_build() {
    let outcome = simulate(&case(0, BuildTime::Fixed(ms(10))), &[ms(0), ms(0), ms(100)]).unwrap();
    assert_eq!(
        (outcome.hit_rate, outcome.builds, outcome.wait(0.0), outcome.wait(1.0)),
        (0.0, 3, ms(10), ms(10))
    );
}

#[test]
fn a_held_slot_costs_its_bytes_for_as_long_as_it_is_held() {
    let mut held = case(1, BuildTime::Fixed(ms(10)));
    (held.policy.shell_bytes, held.policy.parked_bytes) = (1000, 1000);
    held.destroy = ms(0);
    let outcome = simulate(&held, &[ms(0), ms(500)]).unwrap();
    assert_eq!((outcome.hit_rate, outcome.builds), (1.0, 3));
    assert!((outcome.byte_seconds - 500.0).abs() < 1e-6, "{}", outcome.byte_seconds);
}

/// Slots are replaced one for one, and a build on its way is taken over: callers find none idle when at least
/// `n` replacements are on their way. As every arrival starts one build, that number is M/G/infinity's:
/// Poisson with mean rate x build time, whatever the distribution of build times.
#[test]
fn the_hit_rate_is_that_of_queueing_theory() {
    let arrivals = Arrivals { rate_per_s: 400.0, burst: 1.0, count: 20_000, seed: 3 };
    let trace = arrivals.trace().unwrap();
    let load = 400.0 * 0.01;
    let mut poisson_term = f64::exp(-load);
    let mut below = 0.0;
    for size in 0..9 {
        let miss = 1.0 - below;
        let tail = BuildTime::Tail { least: ms(5), more: ms(5) };
        let got = 1.0 - simulate(&case(size, tail), &trace).unwrap().hit_rate;
        assert!((got - miss).abs() < 0.02, "size {size}: missed {got}, theory {miss}");
        below += poisson_term;
        poisson_term *= load / (size as f64 + 1.0);
    }
}

#[test]
fn the_plan_is_the_smallest_size_that_does() {
    let trace = Arrivals { rate_per_s: 200.0, burst: 3.0, count: 4_000, seed: 11 }.trace().unwrap();
    let times = BuildTime::Measured(vec![ms(4), ms(5), ms(30)]);
    let (size, outcome) = plan(&case(0, times.clone()), &trace, 0.99).unwrap().unwrap();
    assert!(outcome.hit_rate >= 0.99);
    assert!(simulate(&case(size - 1, times.clone()), &trace).unwrap().hit_rate < 0.99);
    assert_eq!(plan(&case(0, times.clone()), &trace, 0.99).unwrap(), Some((size, outcome)), "deterministic");
    let mut small = case(0, times);
    small.policy.max = 1;
    assert_eq!(plan(&small, &trace, 0.99).unwrap(), None);
}

#[test]
fn a_target_that_follows_demand_holds_less_memory_than_a_fixed_one_of_its_hit_rate() {
    // A busy minute, then a quiet hour.
    let mut trace = Arrivals { rate_per_s: 300.0, burst: 2.0, count: 18_000, seed: 5 }.trace().unwrap();
    trace.extend((1..60).map(|minute| Duration::from_secs(60 + 60 * minute)));
    let mut follows = case(0, BuildTime::Fixed(ms(10)));
    (follows.policy.low, follows.policy.high) = (1, 64);
    let followed = simulate(&follows, &trace).unwrap();
    let (size, fixed) = plan(&follows, &trace, followed.hit_rate).unwrap().unwrap();
    assert!(followed.hit_rate > 0.95, "{}", followed.hit_rate);
    assert!(followed.byte_seconds < fixed.byte_seconds / 2.0, "fixed at {size}: {fixed:?} {followed:?}");
}
