//! What the pool decides after every event: rebuilds, builds that callers wait for, refill, parking, expiry,
//! eviction. And the few steps all of them, and all events, are made of.

use crate::error::{Cause, Error};
use crate::pool::{Action, Pool, Template};
use crate::slot::{Depth, Reason, Slot, SlotId, State};
use std::time::Duration;

/// An old slot that demand still asks for is looked at again no sooner than this.
const SOONEST: Duration = Duration::from_millis(1);

/// Who wants memory, and so whose idle slots may go for it. Refill never takes what the loser would build
/// again at once in the same way: that would go on for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Want {
    /// A waiting caller: any idle slot of another template.
    Caller,
    /// Refill below `low`: what is above the others' `low`.
    Low,
    /// Refill above `low`, or parking: what is above the others' target.
    Target,
}

/// Steps.
impl<K: Ord + Clone> Pool<K> {
    /// Takes the time of an event; it never goes back. Whoever calls this calls [`Pool::pump`] too, or what
    /// had fallen due by then would be missed: [`Pool::next_wakeup`] names no time that is past.
    pub(crate) fn advance(&mut self, now: Duration) -> Duration {
        self.now = self.now.max(now);
        self.now
    }

    /// The slot's state and since when, if it is one that the event fits.
    pub(crate) fn state_for(
        &self,
        slot: SlotId,
        event: &'static str,
        fits: &[State],
    ) -> Result<(State, Duration), Error> {
        let entry = self.slots.get(&slot).ok_or(Error::UnknownSlot(slot))?;
        if fits.contains(&entry.state) {
            Ok((entry.state, entry.since))
        } else {
            Err(Error::WrongState { slot, state: entry.state, event })
        }
    }

    pub(crate) fn set_state(&mut self, slot: SlotId, state: State) {
        if let Some(entry) = self.slots.get_mut(&slot) {
            entry.state = state;
            entry.since = self.now;
        }
    }

    /// The slot becomes a caller's; its memory is no longer the pool's.
    pub(crate) fn hand_out(&mut self, slot: SlotId) {
        self.set_state(slot, State::CheckedOut);
        if let Some(entry) = self.slots.get_mut(&slot) {
            self.charged_bytes -= entry.charge_bytes;
            entry.charge_bytes = 0;
        }
    }

    pub(crate) fn destroy(&mut self, slot: SlotId, reason: Reason) {
        self.set_state(slot, State::Destroying(reason));
        self.leaving_bytes += self.slots.get(&slot).map_or(0, |entry| entry.charge_bytes);
        self.actions.push_back(Action::Destroy { slot, reason });
    }

    /// A build or parking ended. Its template, unless that no longer wants it.
    pub(crate) fn leave_flight(&mut self, slot: SlotId) -> Option<&mut Template> {
        self.in_flight -= 1;
        let slot = self.slots.get(&slot).filter(|slot| !slot.doomed)?;
        let entry = self.templates.get_mut(&slot.key)?;
        match slot.state {
            State::Building => entry.building -= 1,
            _ => entry.parking -= 1,
        }
        Some(entry)
    }

    pub(crate) fn fail_build(&mut self, slot: SlotId, cause: Cause, reason: Reason) {
        let now = self.now;
        let Some(failed) = self.slots.get(&slot) else { return };
        let (key, epoch, depth) = (failed.key.clone(), failed.epoch, failed.state.aim());
        let corrupt = matches!(cause, Cause::Template(_));
        let mut stranded = Vec::new();
        let wanted = if let Some(entry) = self.leave_flight(slot) {
            entry.counts.failures += 1;
            entry.breaker.failed(now, epoch, depth, cause.clone(), &entry.policy);
            // In order of arrival, as with slots: the one who came first gets the first outcome.
            let without_build = entry.waiters.len().saturating_sub(entry.building);
            stranded.extend(entry.waiters.drain(..without_build));
            true
        } else {
            false
        };
        let failed = stranded.into_iter().map(|ticket| Action::Fail { ticket, cause: cause.clone() });
        self.actions.extend(failed);
        self.destroy(slot, reason);
        if wanted && corrupt {
            self.discard(&key, &cause);
        }
    }

    /// Everything of a template goes but what callers hold.
    pub(crate) fn discard(&mut self, key: &K, cause: &Cause) {
        let Some(entry) = self.templates.get_mut(key) else { return };
        let failed = entry.waiters.drain(..);
        self.actions.extend(failed.map(|ticket| Action::Fail { ticket, cause: cause.clone() }));
        let idle: Vec<SlotId> = entry.parked.drain(..).chain(entry.ready.drain(..)).collect();
        entry.building = 0;
        entry.parking = 0;
        for slot in self.slots.values_mut().filter(|slot| slot.key == *key) {
            slot.doomed |= matches!(slot.state, State::Building | State::Parking);
        }
        idle.into_iter().for_each(|slot| self.destroy(slot, Reason::Discarded));
    }
}

/// Decisions.
impl<K: Ord + Clone> Pool<K> {
    pub(crate) fn pump(&mut self) {
        if self.draining {
            return;
        }
        let now = self.now;
        for (key, entry) in &mut self.templates {
            entry.demand.advance(now, &entry.policy);
            entry.bucket.advance(now, &entry.policy);
            if let Some(cause) = entry.breaker.take_rebuild(now) {
                self.actions.push_back(Action::Rebuild { template: key.clone(), cause });
            }
        }
        self.expire();
        // Refill waits until every caller's build has its memory.
        if self.build_for_callers() {
            self.refill();
            self.park();
        }
    }

    /// When [`Pool::tick`] is next needed, if nothing else happens first.
    pub fn next_wakeup(&self) -> Option<Duration> {
        if self.draining {
            return None;
        }
        let of_template = |entry: &Template| {
            let short = entry.idle() + entry.building + entry.parking < entry.target() + entry.waiters.len();
            let token = if short { entry.bucket.next_token(&entry.policy) } else { None };
            // A slot that is old but wanted is looked at again as the target falls.
            let expiry = self.oldest(entry).filter(|_| entry.idle() > entry.policy.low).map(|(_, since)| {
                let again = self.now.saturating_add((entry.policy.idle_expiry / 4).max(SOONEST));
                let at = since.saturating_add(entry.policy.idle_expiry);
                if at > self.now { at } else { again }
            });
            [token, expiry, entry.breaker.wakeup(self.now)].into_iter().flatten().min()
        };
        self.templates.values().filter_map(of_template).min()
    }

    /// Starts the builds that waiting callers lack, fewest builds first, then the longest wait: no template
    /// starves another. False: one lacks memory, which has to come first.
    fn build_for_callers(&mut self) -> bool {
        while self.in_flight < self.limits.max_builds {
            let now = self.now;
            let lacking = self.templates.iter().filter(|(_, t)| {
                let may = t.breaker.allowance(now).min(t.waiters.len());
                t.building < may && t.pooled() < t.policy.max
            });
            let Some((key, bytes)) = lacking
                .min_by_key(|(_, t)| (t.building, t.waiters.get(t.building).copied()))
                .map(|(key, t)| (key.clone(), t.policy.shell_bytes))
            else {
                return true;
            };
            if !self.make_room(&key, bytes, Want::Caller) {
                return false;
            }
            self.start_build(&key);
        }
        true
    }

    fn refill(&mut self) {
        let mut passed: Vec<K> = Vec::new();
        while self.in_flight < self.limits.refill_builds {
            let now = self.now;
            let short = self.templates.iter().filter(|(key, t)| {
                // A caller without a build waits for `max`, `max_builds` or the breaker; so does refill.
                t.waiters.len() <= t.building
                    && t.pooled() - t.waiters.len() < t.target()
                    && t.pooled() < t.policy.max
                    && t.building < t.breaker.allowance(now)
                    && t.bucket.has_token()
                    && !passed.contains(key)
            });
            // Furthest from its watermark first, in parts of it: below `low` before above.
            let lack = |t: &Template| {
                let has = (t.pooled() - t.waiters.len()) as f64;
                let wants = if has < t.policy.low as f64 { t.policy.low } else { t.target() } as f64;
                let want = if has < t.policy.low as f64 { Want::Low } else { Want::Target };
                (want, (wants - has) / wants)
            };
            let order = |t: &Template| {
                let (want, part) = lack(t);
                part + f64::from(u8::from(want == Want::Low))
            };
            let Some((key, want, bytes)) = short
                .max_by(|(_, a), (_, b)| order(a).total_cmp(&order(b)))
                .map(|(key, t)| (key.clone(), lack(t).0, t.policy.shell_bytes))
            else {
                return;
            };
            if self.make_room(&key, bytes, want) {
                self.start_build(&key);
            } else {
                passed.push(key);
            }
        }
    }

    fn start_build(&mut self, key: &K) {
        let slot = SlotId(self.next_id);
        let Some(entry) = self.templates.get_mut(key) else { return };
        self.next_id += 1;
        self.in_flight += 1;
        self.charged_bytes += entry.policy.shell_bytes;
        entry.building += 1;
        entry.counts.builds += 1;
        entry.bucket.spend();
        let built = Slot {
            key: key.clone(),
            state: State::Building,
            since: self.now,
            charge_bytes: entry.policy.shell_bytes,
            epoch: entry.breaker.epoch,
            doomed: false,
        };
        self.slots.insert(slot, built);
        self.actions.push_back(Action::Build { slot, template: key.clone(), to: Depth::Shell });
    }

    /// Sets the template's state in ready shells, the oldest first, until `parked` of them have it.
    fn park(&mut self) {
        let keys: Vec<K> = self.templates.keys().cloned().collect();
        for key in keys {
            while self.in_flight < self.limits.refill_builds {
                let Some(t) = self.templates.get(&key) else { break };
                let lacking = t.parked.len() + t.parking < t.policy.parked
                    && t.parking < t.breaker.parking_allowance(self.now);
                let Some(&slot) = t.ready.front().filter(|_| lacking) else { break };
                let (bytes, epoch) = (t.policy.parked_bytes, t.breaker.epoch);
                let more = bytes - t.policy.shell_bytes;
                if !self.make_room(&key, more, Want::Target) {
                    break;
                }
                if let Some(t) = self.templates.get_mut(&key) {
                    t.ready.pop_front();
                    t.parking += 1;
                    t.counts.parkings += 1;
                }
                self.in_flight += 1;
                self.charged_bytes += more;
                self.set_state(slot, State::Parking);
                if let Some(entry) = self.slots.get_mut(&slot) {
                    entry.charge_bytes = bytes;
                    entry.epoch = epoch;
                }
                self.actions.push_back(Action::Build { slot, template: key.clone(), to: Depth::Parked });
            }
        }
    }

    /// The idle slot to lose first: the oldest shell, and a parked one, which is dearer, only when there is
    /// no shell.
    fn oldest(&self, entry: &Template) -> Option<(SlotId, Duration)> {
        let &slot = entry.ready.front().or(entry.parked.front())?;
        self.slots.get(&slot).map(|s| (slot, s.since))
    }

    fn lose(&mut self, key: &K, slot: SlotId, reason: Reason) {
        if let Some(entry) = self.templates.get_mut(key) {
            entry.ready.retain(|&s| s != slot);
            entry.parked.retain(|&s| s != slot);
            match reason {
                Reason::Evicted => entry.counts.evicted += 1,
                _ => entry.counts.expired += 1,
            }
        }
        self.destroy(slot, reason);
    }

    fn expire(&mut self) {
        let now = self.now;
        while let Some((key, slot)) = self.templates.iter().find_map(|(key, t)| {
            let (slot, since) = self.oldest(t).filter(|_| t.idle() > t.target())?;
            (since.saturating_add(t.policy.idle_expiry) <= now).then(|| (key.clone(), slot))
        }) {
            self.lose(&key, slot, Reason::Expired);
        }
    }

    /// Whether `bytes` more fit the budget now. If not, and other templates hold enough that may go for it,
    /// starts to destroy that: the room is there once the last is gone.
    fn make_room(&mut self, key: &K, bytes: u64, want: Want) -> bool {
        if bytes <= self.limits.max_bytes - self.charged_bytes {
            return true;
        }
        let missing = (self.charged_bytes - self.leaving_bytes)
            .saturating_add(bytes)
            .saturating_sub(self.limits.max_bytes);
        let floor = |t: &Template| match want {
            Want::Caller => 0,
            Want::Low => t.policy.low,
            Want::Target => t.target(),
        };
        let spare = |t: &Template| {
            let order = t.ready.iter().chain(&t.parked).take(t.idle().saturating_sub(floor(t)));
            order.filter_map(|slot| self.slots.get(slot)).map(|slot| slot.charge_bytes).sum::<u64>()
        };
        let others = || self.templates.iter().filter(|(other, _)| *other != key);
        if others().map(|(_, t)| spare(t)).sum::<u64>() < missing {
            return false;
        }
        let goal = self.leaving_bytes + missing;
        while self.leaving_bytes < goal {
            // The least wanted: surplus before what demand asks for, that before `low`; then by arrivals a
            // slot.
            let rank = |t: &Template| match t.idle() {
                idle if idle > t.target() => 0,
                idle if idle > t.policy.low => 1,
                _ => 2,
            };
            let worth = |t: &Template| t.demand.rate_per_s() / t.idle() as f64;
            let others = self.templates.iter().filter(|(other, t)| *other != key && t.idle() > floor(t));
            let least = others
                .min_by(|(_, a), (_, b)| rank(a).cmp(&rank(b)).then(worth(a).total_cmp(&worth(b))))
                .and_then(|(other, t)| self.oldest(t).map(|(slot, _)| (other.clone(), slot)));
            let Some((other, slot)) = least else { break };
            self.lose(&other, slot, Reason::Evicted);
        }
        false
    }
}
