//! The pool under a witness: it sees only events and actions, keeps its own books, and objects.

mod cases;
mod invariants;
mod planning;
mod walk;

use crate::{Action, Cause, Checkout, Depth, Error, Limits, Policy, Pool, SlotId, State, Ticket};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Idle(Depth),
    Building(Depth),
    Out,
    /// Failed, died or returned, seen from where: its Destroy has to follow at once.
    Over(&'static str),
    Destroying,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Self::Building(Depth::Shell) => "building",
            Self::Building(Depth::Parked) => "parking",
            Self::Idle(Depth::Shell) => "ready",
            Self::Idle(Depth::Parked) => "parked",
            Self::Out => "checked out",
            Self::Over(from) => from,
            Self::Destroying => "destroying",
        }
    }
}

#[derive(Debug, Clone, Default)]
struct Witness {
    slots: BTreeMap<SlotId, (u8, Place)>,
    waiting: BTreeMap<u8, VecDeque<Ticket>>,
    high: BTreeMap<u8, usize>,
    rebuilds: Vec<u8>,
    /// Builds of a template that was discarded meanwhile: they serve nobody.
    doomed: BTreeSet<SlotId>,
    builds: BTreeMap<u8, usize>,
    misses: BTreeMap<u8, usize>,
    edges: BTreeSet<String>,
}

impl Witness {
    fn go(
        &mut self,
        slot: SlotId,
        from: impl Fn(Place) -> bool,
        label: &str,
        to: Place,
    ) -> Result<u8, String> {
        let Some((key, place)) = self.slots.get_mut(&slot).filter(|(_, place)| from(*place)) else {
            return Err(format!("{slot} {:?}: {label} to {to:?}", self.slots.get(&slot)));
        };
        if !matches!(to, Place::Over(_)) {
            self.edges.insert(format!("{:<11} --{label}--> {}", place.name(), to.name()));
        }
        *place = to;
        Ok(*key)
    }

    fn idle(place: Place) -> bool {
        matches!(place, Place::Idle(_))
    }

    fn sees(&mut self, action: &Action<u8>) -> Result<(), String> {
        match action {
            Action::Build { slot, template, to: Depth::Shell } => {
                let known = self.slots.insert(*slot, (*template, Place::Building(Depth::Shell)));
                let count = |f: fn(Place) -> bool| {
                    let of_key = |slot: &SlotId, key| key == template && !self.doomed.contains(slot);
                    self.slots.iter().filter(|(slot, (key, place))| of_key(slot, key) && f(*place)).count()
                };
                let building = count(|p| p == Place::Building(Depth::Shell));
                let free = self.high.get(template).unwrap_or(&0).saturating_sub(count(Self::idle));
                let waiting = self.waiting.get(template).map_or(0, VecDeque::len);
                *self.builds.entry(*template).or_default() += 1;
                if known.is_some() || building > waiting + free {
                    return Err(format!("{building} builds for {waiting} waiting and {free} free places"));
                }
            }
            Action::Build { slot, to, .. } => {
                self.go(*slot, |p| p == Place::Idle(Depth::Shell), "park", Place::Building(*to))?;
            }
            Action::Destroy { slot, reason } => {
                let may = |p| matches!(p, Place::Idle(_) | Place::Over(_));
                self.go(*slot, may, &format!("{reason:?}").to_lowercase(), Place::Destroying)?;
            }
            Action::Serve { ticket, slot, depth } => {
                let key = self.go(*slot, |p| p == Place::Idle(*depth), "handed out", Place::Out)?;
                if self.waiting.entry(key).or_default().pop_front() != Some(*ticket) {
                    return Err(format!("{ticket:?} was served before its turn"));
                }
            }
            Action::Fail { ticket, .. } => {
                if !self.waiting.values_mut().any(|w| w.pop_front_if(|t| t == ticket).is_some()) {
                    return Err(format!("{ticket:?} failed before its turn"));
                }
            }
            Action::Rebuild { template, .. } => self.rebuilds.push(*template),
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
enum Event {
    Checkout(u8),
    /// The rest name their slot or ticket by its place among those that the event fits.
    Cancel(usize),
    Built(usize),
    FailHost(usize),
    FailTemplate(usize),
    Die(usize),
    Return(usize),
    Destroyed(usize),
    Rebuilt(bool),
    Tick(u64),
    Remove(u8),
    Add(u8),
    /// Time goes on, and an event comes that fits no slot.
    Misfit(u64),
    Drain,
}

#[derive(Debug, Clone)]
struct World {
    pool: Pool<u8>,
    witness: Witness,
    now: Duration,
}

impl World {
    fn new(limits: Limits, policies: &[Policy]) -> Self {
        let mut world = Self { pool: Pool::new(limits).unwrap(), witness: Witness::default(), now: ms(0) };
        for (key, policy) in (0..).zip(policies) {
            world.witness.high.insert(key, policy.high);
            world.pool.add(world.now, key, policy.clone()).unwrap();
        }
        world.watch().unwrap();
        world
    }

    fn nth(&self, n: usize, fits: impl Fn(Place) -> bool) -> Option<SlotId> {
        let fit: Vec<_> = self.witness.slots.iter().filter(|(_, (_, place))| fits(*place)).collect();
        fit.get(n % fit.len().max(1)).map(|(slot, _)| **slot)
    }

    /// Does the event; false if nothing is there that it fits.
    fn step(&mut self, event: Event) -> Result<bool, String> {
        let now = self.now;
        let flying = |p| matches!(p, Place::Building(_));
        let slot = match event {
            Event::Built(n) | Event::FailHost(n) | Event::FailTemplate(n) => self.nth(n, flying),
            Event::Die(n) => self.nth(n, |p| p != Place::Destroying),
            Event::Return(n) => self.nth(n, |p| p == Place::Out),
            Event::Destroyed(n) => self.nth(n, |p| p == Place::Destroying),
            _ => None,
        };
        let refused = match (event, slot) {
            (Event::Checkout(key), _) => return self.checkout(key),
            (Event::Cancel(n), _) => return self.cancel(n),
            (Event::Built(_), Some(slot)) => {
                let Place::Building(depth) = self.witness.slots[&slot].1 else { unreachable!() };
                self.witness.go(slot, flying, "built", Place::Idle(depth))?;
                self.pool.built(now, slot)
            }
            (Event::FailHost(_) | Event::FailTemplate(_) | Event::Die(_) | Event::Return(_), Some(slot)) => {
                let from = self.witness.slots[&slot].1.name();
                self.witness.go(slot, |_| true, "over", Place::Over(from))?;
                match event {
                    Event::FailHost(_) => self.pool.build_failed(now, slot, Cause::Host("h".into())),
                    Event::FailTemplate(_) => self.pool.build_failed(now, slot, Cause::Template("t".into())),
                    Event::Die(_) => self.pool.died(now, slot, "killed"),
                    _ => self.pool.returned(now, slot),
                }
            }
            (Event::Destroyed(_), Some(slot)) => {
                self.witness.slots.remove(&slot);
                self.pool.destroyed(now, slot)
            }
            (Event::Rebuilt(well), _) => {
                let Some(key) = self.witness.rebuilds.pop() else { return Ok(false) };
                self.pool.rebuilt(now, &key, if well { Ok(()) } else { Err(Cause::Template("r".into())) });
                Ok(())
            }
            (Event::Tick(by_ms), _) => {
                self.now += ms(by_ms);
                self.pool.tick(self.now);
                Ok(())
            }
            (Event::Misfit(by_ms), _) => {
                self.now += ms(by_ms);
                self.pool
                    .built(self.now, SlotId(u64::MAX))
                    .is_err()
                    .then_some(())
                    .ok_or("a misfit was taken")?;
                Ok(())
            }
            (Event::Drain, _) => {
                self.pool.drain(now);
                Ok(())
            }
            (Event::Remove(key), _) => self.pool.remove(now, &key).or(Ok(())),
            (Event::Add(key), _) => {
                let policy = Policy { low: 1, high: 1, max: 2, ..Policy::default() };
                if self.pool.add(now, key, policy).is_ok() {
                    self.witness.high.insert(key, 1);
                }
                Ok(())
            }
            (_, None) => return Ok(false),
        };
        refused.map_err(|e: Error| e.to_string())?;
        self.watch().map(|()| true)
    }

    fn checkout(&mut self, key: u8) -> Result<bool, String> {
        let nobody = self.witness.waiting.get(&key).is_none_or(VecDeque::is_empty);
        match self.pool.checkout(self.now, &key) {
            Ok(Checkout::Hit { slot, depth }) => {
                self.witness.go(slot, |p| p == Place::Idle(depth), "handed out", Place::Out)?;
                if !nobody {
                    return Err(format!("{slot} went past those who waited"));
                }
            }
            Ok(Checkout::Wait(ticket)) => {
                self.witness.waiting.entry(key).or_default().push_back(ticket);
                *self.witness.misses.entry(key).or_default() += 1;
            }
            Err(_) => {}
        }
        self.watch().map(|()| true)
    }

    fn cancel(&mut self, n: usize) -> Result<bool, String> {
        let all: Vec<Ticket> = self.witness.waiting.values().flatten().copied().collect();
        let Some(&ticket) = all.get(n % all.len().max(1)) else { return Ok(false) };
        if !self.pool.cancel(self.now, ticket) {
            return Err(format!("{ticket:?} waits, but the pool does not know it"));
        }
        self.witness.waiting.values_mut().for_each(|w| w.retain(|&t| t != ticket));
        self.watch().map(|()| true)
    }

    /// Lets the witness see the actions, then compares its books with the pool's.
    fn watch(&mut self) -> Result<(), String> {
        let doomed = self.pool.slots.iter().filter(|(_, slot)| slot.doomed);
        self.witness.doomed = doomed.map(|(&id, _)| id).collect();
        while let Some(action) = self.pool.next_action() {
            self.witness.sees(&action)?;
        }
        let mut later = self.pool.clone();
        later.tick(self.pool.now);
        if let Some(action) = later.next_action() {
            return Err(format!("left undone: {action:?}"));
        }
        if self.pool.next_wakeup().is_some_and(|at| at <= self.pool.now) {
            return Err("a wake-up in the past: the caller would spin".to_owned());
        }
        let pool = &self.pool;
        for (slot, (_, place)) in &self.witness.slots {
            let state = match pool.state(*slot).ok_or("the pool forgot a slot")? {
                State::Building => Place::Building(Depth::Shell),
                State::Parking => Place::Building(Depth::Parked),
                State::Ready => Place::Idle(Depth::Shell),
                State::Parked => Place::Idle(Depth::Parked),
                State::CheckedOut => Place::Out,
                State::Destroying(_) => Place::Destroying,
            };
            if state != *place {
                return Err(format!("{slot} is {state:?} in the pool, {place:?} by its actions"));
            }
        }
        let charged: u64 = pool.slots.values().map(|s| s.charge_bytes).sum();
        let flying = self.witness.slots.values().filter(|(_, p)| matches!(p, Place::Building(_))).count();
        let right = [
            (pool.slots.len() == self.witness.slots.len(), "a slot is known to one side only"),
            (charged == pool.charged_bytes && charged <= pool.limits.max_bytes, "the memory budget"),
            (flying == pool.in_flight && flying <= pool.limits.max_builds, "the builds in flight"),
        ];
        right.iter().try_for_each(|(holds, what)| if *holds { Ok(()) } else { Err((*what).to_owned()) })?;
        self.watch_templates()
    }

    fn watch_templates(&self) -> Result<(), String> {
        let pool = &self.pool;
        let lacks = |t: &crate::pool::Template| {
            t.building < t.waiters.len().min(t.breaker.allowance(pool.now)) && t.pooled() < t.policy.max
        };
        let no_memory = pool
            .templates
            .values()
            .any(|t| lacks(t) && t.policy.shell_bytes > pool.limits.max_bytes - pool.charged_bytes);
        let held = pool.draining || no_memory || pool.in_flight == pool.limits.max_builds;
        for (key, t) in &pool.templates {
            let is = |place| {
                let of_key = |(slot, (k, p)): (&SlotId, &(u8, Place))| {
                    k == key && *p == place && !pool.slots[slot].doomed
                };
                self.witness.slots.iter().filter(|&s| of_key(s)).count()
            };
            let waiting: Vec<_> = self.witness.waiting.get(key).into_iter().flatten().collect();
            let right = [
                (t.ready.len() == is(Place::Idle(Depth::Shell)), "ready"),
                (t.parked.len() == is(Place::Idle(Depth::Parked)), "parked"),
                (t.building == is(Place::Building(Depth::Shell)), "building"),
                (t.parking == is(Place::Building(Depth::Parked)), "parking"),
                (t.waiters.iter().eq(waiting.iter().copied()), "the queue"),
                (t.pooled() <= t.policy.max, "max"),
                (t.idle() == 0 || waiting.is_empty(), "a caller waits and a slot is idle"),
                (held || !lacks(t), "a caller waits without a build, and nothing holds it up"),
            ];
            for (holds, what) in right {
                holds.then_some(()).ok_or_else(|| format!("template {key}: {what}"))?;
            }
        }
        Ok(())
    }

    /// Builds end well and time goes on: everyone is answered; then a shutdown leaves nothing.
    fn settle(mut self) -> Result<Self, String> {
        for _ in 0..1_000 {
            if self.witness.waiting.values().all(VecDeque::is_empty) {
                break;
            }
            let done = self.step(Event::Built(0))? | self.step(Event::Destroyed(0))?;
            if !done && !self.step(Event::Rebuilt(true))? {
                let at = self.pool.next_wakeup().ok_or("a caller waits, and nothing will happen")?;
                self.now = self.now.max(at);
                self.step(Event::Tick(0))?;
            }
        }
        if self.witness.waiting.values().any(|w| !w.is_empty()) {
            return Err(format!("callers wait for ever: {:?}", self.witness.waiting));
        }
        self.step(Event::Drain)?;
        while self.step(Event::Built(0))? | self.step(Event::Destroyed(0))? {}
        if !self.pool.is_drained() {
            return Err("not drained".to_owned());
        }
        while self.step(Event::Return(0))? | self.step(Event::Destroyed(0))? {}
        if self.pool.slots.is_empty() { Ok(self) } else { Err("slots leaked".to_owned()) }
    }
}
