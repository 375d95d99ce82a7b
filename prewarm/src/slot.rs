//! One slot: a microVM shell from the order to build it to the end of its destruction.

use std::fmt;
use std::time::Duration;

/// A slot's name. Never used again within one pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub(crate) u64);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

/// A waiting caller's name. Tickets rise in the order of arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ticket(pub(crate) u64);

/// How much of the way to a running microVM a slot has already gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Depth {
    /// Built: process, VM, vCPUs, address space, rings.
    Shell,
    /// The template's state is set as well. Dearer to hold, cheaper to start.
    Parked,
}

/// Why a slot is destroyed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reason {
    /// Its build, or its parking, failed.
    Failed,
    /// Idle for long, and demand does not ask for it.
    Expired,
    /// The memory is wanted more elsewhere.
    Evicted,
    /// Its worker ended by itself.
    Died,
    /// Its caller is done with it. A slot that was handed out is never handed out again.
    Returned,
    /// Its template turned out bad or was removed, or the pool is shutting down.
    Discarded,
}

/// Where a slot is. Every way through, as the exhaustive walk finds it (the test
/// `the_picture_is_what_the_walk_saw` prints it and compares):
///
/// ```text
/// building    --built--> ready
/// building    --died--> destroying
/// building    --failed--> destroying
/// checked out --died--> destroying
/// checked out --returned--> destroying
/// parked      --died--> destroying
/// parked      --discarded--> destroying
/// parked      --evicted--> destroying
/// parked      --handed out--> checked out
/// parking     --built--> parked
/// parking     --died--> destroying
/// parking     --failed--> destroying
/// ready       --died--> destroying
/// ready       --discarded--> destroying
/// ready       --evicted--> destroying
/// ready       --expired--> destroying
/// ready       --handed out--> checked out
/// ready       --park--> parking
/// ```
///
/// So every slot ends with exactly one [`Action::Destroy`](crate::Action::Destroy), and is handed out at most
/// once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum State {
    /// The order to build a shell is out.
    Building,
    /// A built shell, idle.
    Ready,
    /// The order to set the template's state is out.
    Parking,
    /// The template's state is set; idle.
    Parked,
    /// A caller has it.
    CheckedOut,
    /// The order to destroy it is out. Its memory counts until that is done.
    Destroying(Reason),
}

impl State {
    /// How deep a slot in flight is to be.
    pub(crate) fn aim(self) -> Depth {
        if self == Self::Building { Depth::Shell } else { Depth::Parked }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Building => "building",
            Self::Ready => "ready",
            Self::Parking => "parking",
            Self::Parked => "parked",
            Self::CheckedOut => "checked out",
            Self::Destroying(_) => "destroying",
        })
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Slot<K> {
    pub(crate) key: K,
    pub(crate) state: State,
    /// When it came into this state.
    pub(crate) since: Duration,
    /// What it counts against `max_bytes`: nothing once a caller has it.
    pub(crate) charge_bytes: u64,
    /// The breaker's count of openings when the build began: one incident counts once, however many builds it
    /// hit.
    pub(crate) epoch: u64,
    /// Building or parking for a template that is no longer wanted: destroyed as soon as that ends.
    pub(crate) doomed: bool,
}
