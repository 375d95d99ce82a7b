//! Every order of events up to a depth, from a small pool where everything can go wrong at once.

use super::{Event, Place, World, ms};
use crate::{Action, Depth, Limits, Policy};
use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeSet, HashSet};
use std::hash::{Hash, Hasher};

const EVENTS: [Event; 15] = [
    Event::Checkout(0),
    Event::Checkout(1),
    Event::Cancel(0),
    Event::Built(0),
    Event::Built(1),
    Event::FailHost(0),
    Event::FailTemplate(0),
    Event::Die(0),
    Event::Die(1),
    Event::Return(0),
    Event::Destroyed(0),
    Event::Rebuilt(true),
    Event::Tick(100),
    Event::Remove(1),
    Event::Drain,
];

/// Template 0 is kept ready and parked, template 1 is built on demand only; three shells are all that fits.
fn world() -> World {
    let quick =
        Policy { idle_expiry: ms(100), peak_window: ms(50), rate_memory: ms(50), ..Policy::default() };
    let kept =
        Policy { low: 1, high: 2, max: 2, parked: 1, shell_bytes: 2, parked_bytes: 3, ..quick.clone() };
    let asked = Policy { low: 0, high: 0, max: 2, shell_bytes: 2, parked_bytes: 2, ..quick };
    World::new(Limits { max_bytes: 6, max_builds: 2, refill_builds: 1 }, &[kept, asked])
}

/// Walks all orders, states seen before (at the same depth left, or more) not again. The lines of the
/// picture.
fn walk(depth: usize) -> (usize, BTreeSet<String>) {
    let mut frontier = vec![world()];
    let mut seen = HashSet::new();
    let mut edges = BTreeSet::new();
    for level in 0..depth {
        let mut next = Vec::new();
        for before in &frontier {
            for event in EVENTS {
                let mut after = before.clone();
                match after.step(event) {
                    Ok(true) => {}
                    Ok(false) => continue,
                    Err(what) => panic!("{what}\nafter {event:?} in {before:#?}"),
                }
                edges.append(&mut after.witness.edges);
                if after.pool.templates.contains_key(&1) {
                    let (builds, misses) = (after.witness.builds.get(&1), after.witness.misses.get(&1));
                    assert!(builds <= misses, "{builds:?} builds for {misses:?} misses");
                }
                let mut hasher = DefaultHasher::new();
                format!("{:?}", after.pool).hash(&mut hasher);
                if seen.insert(hasher.finish()) {
                    if level + 1 == depth {
                        let mut end =
                            after.settle().unwrap_or_else(|e| panic!("{e} after {event:?}, {before:#?}"));
                        edges.append(&mut end.witness.edges);
                    } else {
                        next.push(after);
                    }
                }
            }
        }
        frontier = next;
    }
    (seen.len(), edges)
}

#[test]
fn the_picture_is_what_the_walk_saw() {
    let (states, edges) = walk(6);
    let source = include_str!("../slot.rs");
    let picture: BTreeSet<String> = source
        .lines()
        .filter_map(|l| l.strip_prefix("/// "))
        .filter(|l| l.contains(" --"))
        .map(String::from)
        .collect();
    println!("{states} states\n{}", edges.iter().cloned().collect::<Vec<_>>().join("\n"));
    assert_eq!(picture, edges, "the picture at slot::State is not what the pool does");
}

#[test]
fn the_witness_objects_to_a_slot_served_twice_and_to_a_queue_out_of_order() {
    let mut world = world();
    // The kept template's build first, then one for each of two callers of the other.
    let events =
        [Event::Built(0), Event::Checkout(1), Event::Built(0), Event::Checkout(1), Event::Checkout(1)];
    events.into_iter().for_each(|event| assert!(world.step(event).unwrap(), "{event:?}"));
    let mut witness = world.witness;
    let waiting: Vec<_> = witness.waiting[&1].iter().copied().collect();
    let (&slot, _) = witness.slots.iter().find(|(_, (key, _))| *key == 1).unwrap();
    witness.slots.insert(slot, (1, Place::Idle(Depth::Shell)));
    let serve = |ticket| Action::Serve { ticket, slot, depth: Depth::Shell };
    assert!(witness.clone().sees(&serve(waiting[1])).unwrap_err().contains("before its turn"));
    witness.sees(&serve(waiting[0])).unwrap();
    assert!(witness.sees(&serve(waiting[1])).unwrap_err().contains("Out"));
}
