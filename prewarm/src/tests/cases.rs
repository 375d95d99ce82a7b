//! What the pool is for, one sentence at a time.

use super::ms;
use crate::{Action, Cause, Checkout, Depth, Error, Limits, Policy, Pool, Reason, SlotId, Ticket};
use std::time::Duration;

type Actions = Vec<Action<&'static str>>;

fn pool(policies: &[(&'static str, Policy)]) -> Pool<&'static str> {
    let mut pool = Pool::new(Limits { max_bytes: 4 << 20, ..Limits::default() }).unwrap();
    policies.iter().for_each(|(key, policy)| pool.add(ms(0), *key, policy.clone()).unwrap());
    pool
}

fn keep(low: usize, high: usize) -> Policy {
    Policy { low, high, max: 8, shell_bytes: 1 << 20, parked_bytes: 1 << 20, ..Policy::default() }
}

fn actions(pool: &mut Pool<&'static str>) -> Actions {
    std::iter::from_fn(|| pool.next_action()).collect()
}

/// Ends every build that is out, until there is none.
fn fill(pool: &mut Pool<&'static str>, now: Duration) {
    while let Some(action) = pool.next_action() {
        if let Action::Build { slot, .. } = action {
            pool.built(now, slot).unwrap();
        }
    }
}

fn wait(pool: &mut Pool<&'static str>, now: Duration, key: &'static str) -> Ticket {
    let Ok(Checkout::Wait(ticket)) = pool.checkout(now, &key) else { panic!("a slot was idle") };
    ticket
}

fn one_build(pool: &mut Pool<&'static str>) -> SlotId {
    let [Action::Build { slot, .. }] = actions(pool)[..] else { panic!("not one build") };
    slot
}

#[test]
fn a_miss_takes_over_the_refill_in_flight_or_starts_its_own_build_and_slots_go_in_order_of_arrival() {
    let mut pool = pool(&[("a", keep(1, 1))]);
    let refill = one_build(&mut pool);
    let first = wait(&mut pool, ms(1), "a");
    // The refill is now the caller's, and the place it was for is refilled in its turn.
    let next = one_build(&mut pool);
    let second = wait(&mut pool, ms(1), "a");
    assert_eq!(actions(&mut pool), [], "taken over too; two in flight are all that refill may have");
    let third = wait(&mut pool, ms(1), "a");
    let own = one_build(&mut pool);
    // The quickest build goes to the caller who came first, whoever it was begun for.
    [own, next, refill].into_iter().for_each(|slot| pool.built(ms(2), slot).unwrap());
    let serve = |ticket, slot| Action::Serve { ticket, slot, depth: Depth::Shell };
    let mut seen = actions(&mut pool);
    seen.retain(|action| matches!(action, Action::Serve { .. }));
    assert_eq!(seen, [serve(first, own), serve(second, next), serve(third, refill)]);
    assert_eq!(pool.stats(&"a").map(|s| (s.waits, s.adopted)), Some((3, 2)));
}

#[test]
fn a_corrupt_template_gets_one_attempt_then_a_breaker_with_the_cause_then_a_rebuild() {
    let mut pool = pool(&[("a", keep(0, 0))]);
    let ticket = wait(&mut pool, ms(0), "a");
    let slot = one_build(&mut pool);
    let cause = Cause::Template("section 3: checksum".to_owned());
    pool.build_failed(ms(1), slot, cause.clone()).unwrap();
    let expected: Actions = vec![
        Action::Fail { ticket, cause: cause.clone() },
        Action::Destroy { slot, reason: Reason::Failed },
        Action::Rebuild { template: "a", cause: cause.clone() },
    ];
    assert_eq!(actions(&mut pool), expected);
    let refused = pool.checkout(ms(60_000), &"a");
    assert_eq!(refused, Err(Error::Broken { cause: cause.clone(), retry_after: None }));
    assert!(pool.rebuilt(ms(61_000), &"a", Ok(())));
    wait(&mut pool, ms(61_000), "a");
    let trial = one_build(&mut pool);
    assert!(matches!(pool.checkout(ms(61_000), &"a"), Err(Error::Broken { .. })), "one trial, no more");
    pool.built(ms(61_001), trial).unwrap();
    assert_eq!(pool.stats(&"a").unwrap().broken, None);
    wait(&mut pool, ms(61_002), "a");
}

#[test]
fn a_shell_does_not_speak_for_a_template_whose_state_cannot_be_set() {
    let mut pool = pool(&[("a", Policy { parked: 1, ..keep(1, 1) })]);
    let refused = || Cause::Template("section 3: checksum".to_owned());
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let shell = one_build(&mut pool);
        let now = pool.now;
        pool.built(now, shell).unwrap();
        assert_eq!(one_build(&mut pool), shell, "it is to be parked");
        pool.build_failed(now, shell, refused()).unwrap();
        pool.destroyed(now, shell).unwrap();
        let asked = |seen: Actions| seen.iter().any(|action| matches!(action, Action::Rebuild { .. }));
        // The first time at once, then ever later: what is built meanwhile is no success.
        let mut waited = ms(0);
        if !asked(actions(&mut pool)) {
            let at = pool.next_wakeup().unwrap();
            waited = at - now;
            pool.tick(at);
            assert!(asked(actions(&mut pool)));
        }
        pauses.push(waited);
        let now = pool.now;
        assert!(pool.rebuilt(now, &"a", Ok(())));
    }
    assert_eq!(pauses, [ms(0), ms(200), ms(400), ms(800)]);
    // One that can be parked closes the breaker.
    let (shell, now) = (one_build(&mut pool), pool.now);
    pool.built(now, shell).unwrap();
    assert!(pool.stats(&"a").unwrap().broken.is_some());
    one_build(&mut pool);
    pool.built(now, shell).unwrap();
    assert_eq!(pool.stats(&"a").unwrap().broken, None);
}

#[test]
fn failures_of_the_host_back_off_twice_as_long_each_time_up_to_the_longest() {
    let mut pool = pool(&[("a", Policy { backoff_max: ms(300), ..keep(1, 1) })]);
    let mut pauses = Vec::new();
    for _ in 0..4 {
        let slot = one_build(&mut pool);
        let failed_at = pool.now;
        pool.build_failed(failed_at, slot, Cause::Host("EMFILE".to_owned())).unwrap();
        pool.destroyed(failed_at, slot).unwrap();
        assert_eq!(actions(&mut pool).len(), 1, "the Destroy, and no new build");
        let at = pool.next_wakeup().unwrap();
        pauses.push(at - failed_at);
        pool.tick(at);
    }
    assert_eq!(pauses, [ms(100), ms(200), ms(300), ms(300)]);
}

#[test]
fn refill_keeps_to_its_rate_and_a_waiting_caller_does_not() {
    let mut pool = pool(&[("a", Policy { refill_per_s: 10.0, refill_burst: 1, ..keep(2, 2) })]);
    let first = one_build(&mut pool);
    pool.built(ms(0), first).unwrap();
    assert_eq!(actions(&mut pool), [], "no token for the second");
    assert_eq!(pool.next_wakeup().map(|at| at.as_millis()), Some(100));
    assert!(matches!(pool.checkout(ms(1), &"a"), Ok(Checkout::Hit { .. })));
    wait(&mut pool, ms(2), "a");
    one_build(&mut pool);
    pool.tick(pool.next_wakeup().unwrap());
    one_build(&mut pool);
}

#[test]
fn the_target_follows_a_burst_and_the_surplus_expires_when_it_is_forgotten() {
    let window = Policy { peak_window: ms(1_000), idle_expiry: ms(500), refill_per_s: 1e6, ..keep(1, 3) };
    let mut pool = pool(&[("a", window)]);
    fill(&mut pool, ms(0));
    (0..3).for_each(|_| drop(pool.checkout(ms(1), &"a")));
    fill(&mut pool, ms(2));
    assert_eq!(pool.stats(&"a").map(|s| (s.target, s.ready)), Some((3, 3)));
    let mut destroyed = 0;
    while let Some(at) = pool.next_wakeup().filter(|at| *at < ms(60_000)) {
        pool.tick(at);
        destroyed += actions(&mut pool).len();
    }
    assert_eq!((destroyed, pool.stats(&"a").map(|s| (s.target, s.ready))), (2, Some((1, 1))));
}

#[test]
fn memory_for_a_caller_comes_from_the_template_that_is_wanted_least() {
    // 4 MiB in all: two templates hold two shells of one each.
    let mut pool = pool(&[("busy", keep(2, 2)), ("quiet", keep(2, 2)), ("new", keep(0, 0))]);
    fill(&mut pool, ms(0));
    assert!(matches!(pool.checkout(ms(1), &"busy"), Ok(Checkout::Hit { .. })));
    fill(&mut pool, ms(1));
    assert_eq!(pool.charged_bytes(), 4 << 20);
    wait(&mut pool, ms(2), "new");
    let [Action::Destroy { slot, reason: Reason::Evicted }] = actions(&mut pool)[..] else {
        panic!("one eviction")
    };
    assert_eq!(pool.stats(&"quiet").map(|s| (s.ready, s.evicted)), Some((1, 1)));
    pool.destroyed(ms(3), slot).unwrap();
    let [Action::Build { template: "new", .. }] = actions(&mut pool)[..] else {
        panic!("its build, nothing else")
    };
}

#[test]
fn an_event_that_does_not_fit_is_refused_and_changes_nothing() {
    let mut pool = pool(&[("a", keep(1, 1))]);
    let slot = one_build(&mut pool);
    pool.built(ms(1), slot).unwrap();
    let refused = pool.built(ms(1), slot).unwrap_err();
    assert_eq!(refused.to_string(), "slot 0 is ready, which `built` does not fit");
    assert!(pool.returned(ms(1), slot).is_err() && pool.destroyed(ms(1), slot).is_err());
    assert!(matches!(pool.checkout(ms(1), &"a"), Ok(Checkout::Hit { .. })));
}

#[test]
fn policies_out_of_range_are_refused_with_the_field_and_what_to_do() {
    let mut pool = pool(&[]);
    let bad = [
        Policy { low: 9, ..keep(0, 8) },
        Policy { max: 0, ..keep(0, 0) },
        Policy { refill_per_s: f64::NAN, ..keep(0, 0) },
        Policy { parked_bytes: 5 << 20, ..keep(0, 0) },
        Policy { idle_expiry: ms(0), ..keep(0, 0) },
    ];
    let fields = bad.map(|policy| match pool.add(ms(0), "a", policy) {
        Err(Error::Policy { field, .. }) => field,
        other => panic!("{other:?}"),
    });
    assert_eq!(fields, ["low", "max", "refill_per_s", "parked_bytes", "idle_expiry"]);
}

#[test]
fn a_stock_is_short_with_less_than_half_of_what_is_to_be_there() {
    let mut pool = pool(&[("python", keep(3, 4)), ("never", keep(0, 1))]);
    fill(&mut pool, ms(1));
    let short = |pool: &Pool<&'static str>, key| pool.stock(&key).map(|stock| (stock.idle, stock.is_short()));
    assert_eq!(short(&pool, "python"), Some((3, false)));
    pool.checkout(ms(2), &"python").unwrap();
    assert_eq!(short(&pool, "python"), Some((2, false)));
    pool.checkout(ms(2), &"python").unwrap();
    assert_eq!(short(&pool, "python"), Some((1, true)));
    assert_eq!(short(&pool, "never"), Some((0, false)));
    assert_eq!(short(&pool, "unknown"), None);
}
