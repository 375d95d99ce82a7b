//! The pool: what callers and workers tell it, and what it says to do. What it decides by itself is
//! `schedule.rs`.

use crate::breaker::Breaker;
use crate::demand::{Bucket, Demand};
use crate::error::{Cause, Error};
use crate::policy::{Limits, Policy};
use crate::slot::{Depth, Reason, Slot, SlotId, State, Ticket};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// What the caller is to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Action<K> {
    /// Build a shell under this slot's name (`to` is [`Depth::Shell`]) or set the template's state in a built
    /// one ([`Depth::Parked`]). Ends with [`Pool::built`], [`Pool::build_failed`] or [`Pool::died`].
    Build {
        /// The slot.
        slot: SlotId,
        /// Its template.
        template: K,
        /// How far to bring it.
        to: Depth,
    },
    /// End the slot's worker and free what it held, also what a failed build left. Ends with
    /// [`Pool::destroyed`].
    Destroy {
        /// The slot.
        slot: SlotId,
        /// Why.
        reason: Reason,
    },
    /// Give the slot to the caller who waits with this ticket.
    Serve {
        /// Who.
        ticket: Ticket,
        /// What.
        slot: SlotId,
        /// How far it has come.
        depth: Depth,
    },
    /// Tell the caller who waits with this ticket that there is nothing for it.
    Fail {
        /// Who.
        ticket: Ticket,
        /// Why.
        cause: Cause,
    },
    /// The template is bad: rebuild it. Ends with [`Pool::rebuilt`].
    Rebuild {
        /// Which.
        template: K,
        /// What the failed build said.
        cause: Cause,
    },
}

/// What a checkout gets at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkout {
    /// A slot, now the caller's; it ends with [`Pool::returned`] or [`Pool::died`].
    Hit {
        /// The slot.
        slot: SlotId,
        /// How far it has come.
        depth: Depth,
    },
    /// A place in the queue. An [`Action::Serve`] or [`Action::Fail`] with this ticket will come.
    Wait(Ticket),
}

/// Counts since the template was added, and what is there now.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats {
    /// Checkouts answered at once.
    pub hits: u64,
    /// Checkouts that were not: `waits + refused`.
    pub misses: u64,
    /// Misses that were given a ticket.
    pub waits: u64,
    /// Waits that took over a build already in flight instead of starting one.
    pub adopted: u64,
    /// Misses refused at once: breaker open, or queue full.
    pub refused: u64,
    /// Shell builds ordered.
    pub builds: u64,
    /// Parkings ordered.
    pub parkings: u64,
    /// Builds and parkings that failed.
    pub failures: u64,
    /// Idle slots destroyed because nobody asked for them.
    pub expired: u64,
    /// Idle slots destroyed because the memory was wanted more elsewhere.
    pub evicted: u64,
    /// Idle slots whose worker ended by itself.
    pub died_idle: u64,
    /// Idle shells now.
    pub ready: usize,
    /// Idle parked slots now.
    pub parked: usize,
    /// Builds and parkings in flight now.
    pub in_flight: usize,
    /// Callers waiting now.
    pub waiting: usize,
    /// Idle slots that demand asks for now.
    pub target: usize,
    /// Average arrivals a second as of the last event that concerned this template.
    pub rate_per_s: f64,
    /// Smoothed time from the order to build to `built`.
    pub build_time: Duration,
    /// Why the breaker is open, if it is.
    pub broken: Option<Cause>,
}

/// What a template has idle; cheaper than [`Stats`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stock {
    /// Idle slots now, shells and parked ones.
    pub idle: usize,
    /// [`Policy::low`].
    pub low: usize,
}

impl Stock {
    /// Less than half of what is to be there whatever the demand.
    #[must_use]
    pub fn is_short(self) -> bool {
        self.idle * 2 < self.low
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Template {
    pub(crate) policy: Policy,
    /// Idle slots, oldest first. The newest is handed out: its memory is the warmest, and the surplus gets
    /// old.
    pub(crate) ready: VecDeque<SlotId>,
    pub(crate) parked: VecDeque<SlotId>,
    /// Shell builds and parkings in flight, the doomed not among them.
    pub(crate) building: usize,
    pub(crate) parking: usize,
    /// Waiting callers in order of arrival. The first `building` of them have a build in flight.
    pub(crate) waiters: VecDeque<Ticket>,
    pub(crate) demand: Demand,
    pub(crate) bucket: Bucket,
    pub(crate) breaker: Breaker,
    pub(crate) counts: Stats,
}

impl Template {
    pub(crate) fn idle(&self) -> usize {
        self.ready.len() + self.parked.len()
    }

    pub(crate) fn pooled(&self) -> usize {
        self.idle() + self.building + self.parking
    }

    pub(crate) fn target(&self) -> usize {
        self.demand.target(&self.policy)
    }
}

/// The pool. See the crate's page for how it is driven, [`State`] for what a slot goes through.
///
/// What it keeps, after every event:
/// - A slot is in one state and is handed out at most once.
/// - A template's idle slots and builds are at most `max`; the memory of all is at most `max_bytes`; builds
///   and parkings in flight are at most `max_builds`.
/// - A caller waits only if no slot is idle, takes the oldest build that nobody waits for, or starts one; so
///   he never waits longer than for a build of his own, unless `max`, `max_builds` or `max_bytes` holds that
///   one up. Then he comes before any refill. Slots go to waiting callers in order of arrival.
/// - Every waiting caller is served, or told the cause, as long as builds end and time goes on.
#[derive(Debug, Clone)]
pub struct Pool<K> {
    pub(crate) limits: Limits,
    pub(crate) templates: BTreeMap<K, Template>,
    pub(crate) slots: BTreeMap<SlotId, Slot<K>>,
    pub(crate) actions: VecDeque<Action<K>>,
    pub(crate) now: Duration,
    pub(crate) next_id: u64,
    /// Bytes of all slots but those in callers' hands; and, of them, those being destroyed.
    pub(crate) charged_bytes: u64,
    pub(crate) leaving_bytes: u64,
    /// Builds and parkings in flight, the doomed among them.
    pub(crate) in_flight: usize,
    pub(crate) draining: bool,
}

impl<K: Ord + Clone> Pool<K> {
    /// An empty pool. Errors: a limit is out of range.
    pub fn new(limits: Limits) -> Result<Self, Error> {
        limits.check()?;
        Ok(Self {
            limits,
            templates: BTreeMap::new(),
            slots: BTreeMap::new(),
            actions: VecDeque::new(),
            now: Duration::ZERO,
            next_id: 0,
            charged_bytes: 0,
            leaving_bytes: 0,
            in_flight: 0,
            draining: false,
        })
    }

    /// Starts to keep a template ready.
    pub fn add(&mut self, now: Duration, template: K, policy: Policy) -> Result<(), Error> {
        policy.check(&self.limits)?;
        if self.draining {
            return Err(Error::Draining);
        }
        if self.templates.contains_key(&template) {
            return Err(Error::Duplicate);
        }
        let now = self.advance(now);
        let entry = Template {
            demand: Demand::new(now, &policy),
            bucket: Bucket::new(now, &policy),
            policy,
            ready: VecDeque::new(),
            parked: VecDeque::new(),
            building: 0,
            parking: 0,
            waiters: VecDeque::new(),
            breaker: Breaker::default(),
            counts: Stats::default(),
        };
        self.templates.insert(template, entry);
        self.pump();
        Ok(())
    }

    /// Gives a template up: its waiting callers fail, its idle slots go, its builds go when they end. Slots
    /// in callers' hands stay with them.
    pub fn remove(&mut self, now: Duration, template: &K) -> Result<(), Error> {
        if !self.templates.contains_key(template) {
            return Err(Error::UnknownTemplate);
        }
        self.advance(now);
        self.discard(template, &Cause::Removed);
        self.templates.remove(template);
        self.pump();
        Ok(())
    }

    /// A caller wants a slot. Errors: no such template, shutting down, breaker open, queue full.
    pub fn checkout(&mut self, now: Duration, template: &K) -> Result<Checkout, Error> {
        if self.draining {
            return Err(Error::Draining);
        }
        let now = self.now.max(now);
        let entry = self.templates.get_mut(template).ok_or(Error::UnknownTemplate)?;
        self.now = now;
        entry.demand.arrival(now, &entry.policy);
        let parked = entry.parked.pop_back();
        if let Some(slot) = parked.or_else(|| entry.ready.pop_back()) {
            entry.counts.hits += 1;
            self.hand_out(slot);
            self.pump();
            let depth = if parked.is_some() { Depth::Parked } else { Depth::Shell };
            return Ok(Checkout::Hit { slot, depth });
        }
        entry.counts.misses += 1;
        let waiting = entry.waiters.len();
        let broken = entry.breaker.why(now).filter(|_| waiting >= entry.breaker.allowance(now));
        let refusal = match broken {
            Some((cause, retry_after)) => Some(Error::Broken { cause, retry_after }),
            None if waiting >= entry.policy.max_waiters => Some(Error::QueueFull { waiting }),
            None => None,
        };
        if let Some(refusal) = refusal {
            entry.counts.refused += 1;
            self.pump();
            return Err(refusal);
        }
        entry.counts.waits += 1;
        entry.counts.adopted += u64::from(entry.building > waiting);
        let ticket = Ticket(self.next_id);
        self.next_id += 1;
        entry.waiters.push_back(ticket);
        self.pump();
        Ok(Checkout::Wait(ticket))
    }

    /// A waiting caller gave up; the build in flight becomes a refill. False: too late, its answer is already
    /// out, and a slot it was served has to be returned.
    pub fn cancel(&mut self, now: Duration, ticket: Ticket) -> bool {
        self.advance(now);
        let found = self.templates.values_mut().any(|entry| {
            let place = entry.waiters.iter().position(|&t| t == ticket);
            place.is_some_and(|at| entry.waiters.remove(at).is_some())
        });
        self.pump();
        found
    }

    /// The build or parking of this slot is done.
    pub fn built(&mut self, now: Duration, slot: SlotId) -> Result<(), Error> {
        let (state, since) = self.state_for(slot, "built", &[State::Building, State::Parking])?;
        let now = self.advance(now);
        if let Some(entry) = self.leave_flight(slot) {
            let depth = state.aim();
            entry.breaker.built(depth);
            if depth == Depth::Shell {
                entry.demand.build_took(now.saturating_sub(since));
            }
            match entry.waiters.pop_front() {
                Some(ticket) => {
                    self.hand_out(slot);
                    self.actions.push_back(Action::Serve { ticket, slot, depth });
                }
                None if depth == Depth::Shell => {
                    entry.ready.push_back(slot);
                    self.set_state(slot, State::Ready);
                }
                None => {
                    entry.parked.push_back(slot);
                    self.set_state(slot, State::Parked);
                }
            }
        } else {
            self.destroy(slot, Reason::Discarded);
        }
        self.pump();
        Ok(())
    }

    /// The build or parking of this slot failed. The breaker opens; of the callers who wait, those keep
    /// waiting who still have a build in flight, the others are told the cause.
    pub fn build_failed(&mut self, now: Duration, slot: SlotId, cause: Cause) -> Result<(), Error> {
        self.state_for(slot, "build_failed", &[State::Building, State::Parking])?;
        self.advance(now);
        self.fail_build(slot, cause, Reason::Failed);
        self.pump();
        Ok(())
    }

    /// The slot's worker ended by itself, in whatever state. A build it was at has failed.
    pub fn died(&mut self, now: Duration, slot: SlotId, words: &str) -> Result<(), Error> {
        let now = self.now.max(now);
        let entry = self.slots.get(&slot).ok_or(Error::UnknownSlot(slot))?;
        self.now = now;
        match entry.state {
            State::Building | State::Parking => {
                self.fail_build(slot, Cause::Host(words.to_owned()), Reason::Died);
            }
            State::Ready | State::Parked => {
                if let Some(entry) = self.templates.get_mut(&entry.key) {
                    entry.ready.retain(|&s| s != slot);
                    entry.parked.retain(|&s| s != slot);
                    entry.counts.died_idle += 1;
                }
                self.destroy(slot, Reason::Died);
            }
            State::CheckedOut => self.destroy(slot, Reason::Died),
            State::Destroying(_) => {}
        }
        self.pump();
        Ok(())
    }

    /// The caller is done with the slot it was given.
    pub fn returned(&mut self, now: Duration, slot: SlotId) -> Result<(), Error> {
        self.state_for(slot, "returned", &[State::CheckedOut])?;
        self.advance(now);
        self.destroy(slot, Reason::Returned);
        self.pump();
        Ok(())
    }

    /// An [`Action::Destroy`] is done: worker reaped, memory free. The slot's name is forgotten.
    pub fn destroyed(&mut self, now: Duration, slot: SlotId) -> Result<(), Error> {
        let entry = self.slots.get(&slot).ok_or(Error::UnknownSlot(slot))?;
        let (state, bytes) = (entry.state, entry.charge_bytes);
        if !matches!(state, State::Destroying(_)) {
            return Err(Error::WrongState { slot, state, event: "destroyed" });
        }
        self.advance(now);
        self.slots.remove(&slot);
        self.charged_bytes -= bytes;
        self.leaving_bytes -= bytes;
        self.pump();
        Ok(())
    }

    /// An [`Action::Rebuild`] is done, or failed. False: none was asked for (it may have been removed since).
    pub fn rebuilt(&mut self, now: Duration, template: &K, outcome: Result<(), Cause>) -> bool {
        let now = self.advance(now);
        let asked = match self.templates.get_mut(template) {
            Some(entry) => entry.breaker.rebuilt(now, outcome, &entry.policy),
            None => false,
        };
        self.pump();
        asked
    }

    /// Time went on. To be called at [`Pool::next_wakeup`]; harmless at any other time.
    pub fn tick(&mut self, now: Duration) {
        self.advance(now);
        self.pump();
    }

    /// Shuts the pool down: waiting callers fail, idle slots go, builds in flight go when they end, and no
    /// work is taken. Done when [`Pool::is_drained`].
    pub fn drain(&mut self, now: Duration) {
        self.advance(now);
        self.draining = true;
        let keys: Vec<K> = self.templates.keys().cloned().collect();
        keys.iter().for_each(|key| self.discard(key, &Cause::Drained));
    }

    /// No slot is left but those in callers' hands ([`Pool::checked_out`]), which are for them to return.
    pub fn is_drained(&self) -> bool {
        self.draining && self.slots.values().all(|slot| slot.state == State::CheckedOut)
    }

    /// Slots in callers' hands, with their templates.
    pub fn checked_out(&self) -> impl Iterator<Item = (SlotId, &K)> {
        let out = self.slots.iter().filter(|(_, slot)| slot.state == State::CheckedOut);
        out.map(|(&id, slot)| (id, &slot.key))
    }

    /// The next thing to do, in order; to be called after every event until there is none.
    pub fn next_action(&mut self) -> Option<Action<K>> {
        self.actions.pop_front()
    }

    /// A slot's state; `None` once destroyed.
    pub fn state(&self, slot: SlotId) -> Option<State> {
        self.slots.get(&slot).map(|s| s.state)
    }

    /// Memory of all slots but those in callers' hands, in bytes.
    pub fn charged_bytes(&self) -> u64 {
        self.charged_bytes
    }

    /// What a template has idle; `None` if there is no such template.
    pub fn stock(&self, template: &K) -> Option<Stock> {
        let entry = self.templates.get(template)?;
        Some(Stock { idle: entry.ready.len() + entry.parked.len(), low: entry.policy.low })
    }

    /// Counts and gauges of a template; `None` if there is no such template.
    pub fn stats(&self, template: &K) -> Option<Stats> {
        let entry = self.templates.get(template)?;
        Some(Stats {
            ready: entry.ready.len(),
            parked: entry.parked.len(),
            in_flight: entry.building + entry.parking,
            waiting: entry.waiters.len(),
            target: entry.target(),
            rate_per_s: entry.demand.rate_per_s(),
            build_time: entry.demand.build(),
            broken: entry.breaker.why(self.now).map(|(cause, _)| cause),
            ..entry.counts.clone()
        })
    }
}
