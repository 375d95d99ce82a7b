//! A split virtqueue as the devices use it: chains as plain ranges, and notifications suppressed
//! in both directions as far as the specification allows.
//!
//! Everything in guest memory is hostile: a chain is checked while it is walked, at most
//! [`MAX_SEGMENTS`] long, and a ring that makes no sense is a [`Fault`], which the transport turns
//! into DEVICE_NEEDS_RESET.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT as _, QueueState, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::GuestMemory;

/// Most descriptors a chain may have.
pub const MAX_SEGMENTS: usize = 256;

/// VIRTQ_AVAIL_F_NO_INTERRUPT, virtio 1.2 §2.7.6.
const NO_INTERRUPT: u16 = 1;

/// The driver broke a ring: only a reset helps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the driver broke a virtqueue")]
pub struct Fault;

impl From<virtio_queue::Error> for Fault {
    fn from(_: virtio_queue::Error) -> Self {
        Self
    }
}

/// A descriptor chain: where to read and where to write, in order.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Chain {
    /// Goes back to the driver in the used ring.
    pub head: u16,
    /// Device-readable buffers.
    pub readable: Vec<(GuestAddress, u32)>,
    /// Device-writable buffers.
    pub writable: Vec<(GuestAddress, u32)>,
    /// The chain is a loop, too long, points nowhere or mixes the order (§2.7.4.2): use nothing of it.
    pub broken: bool,
}

impl Chain {
    /// Descriptors in the chain.
    #[must_use]
    pub fn segments(&self) -> usize {
        self.readable.len() + self.writable.len()
    }
}

/// A queue that the driver has made ready.
#[derive(Debug)]
pub struct Virtqueue {
    queue: Queue,
    used_since_interrupt: bool,
}

impl Virtqueue {
    /// Takes over a queue whose registers the driver (or a snapshot) has filled in.
    pub fn new(state: QueueState, mem: &GuestMemory) -> Result<Self, Fault> {
        let queue = Queue::try_from(state)?;
        if queue.is_valid(mem) { Ok(Self { queue, used_since_interrupt: false }) } else { Err(Fault) }
    }

    /// The plain data of the queue.
    #[must_use]
    pub fn state(&self) -> QueueState {
        self.queue.state()
    }

    /// Entries of the ring.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Takes the next available chain.
    pub fn pop(&mut self, mem: &GuestMemory) -> Result<Option<Chain>, Fault> {
        let before = self.queue.next_avail();
        let mut available = self.queue.iter(mem)?;
        let Some(descriptors) = available.next() else {
            return Ok(None);
        };
        let mut chain = Chain { head: descriptors.head_index(), ..Chain::default() };
        let mut unfinished = true;
        for descriptor in descriptors {
            unfinished = descriptor.has_next();
            if chain.segments() == MAX_SEGMENTS {
                chain.broken = true;
                break;
            }
            let range = (descriptor.addr(), descriptor.len());
            if descriptor.is_write_only() {
                chain.writable.push(range);
            } else if chain.writable.is_empty() {
                chain.readable.push(range);
            } else {
                chain.broken = true;
            }
        }
        // A walk that stopped at a descriptor with a successor stopped at garbage.
        chain.broken |= unfinished;
        debug_assert_eq!(self.queue.next_avail(), before.wrapping_add(1));
        if chain.head >= self.queue.size() { Err(Fault) } else { Ok(Some(chain)) }
    }

    /// Puts the chain that was popped last back: the next [`Virtqueue::pop`] finds it again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back to the driver with `len` bytes written to it.
    pub fn push_used(&mut self, mem: &GuestMemory, head: u16, len: u32) -> Result<(), Fault> {
        self.queue.add_used(mem, head, len)?;
        self.used_since_interrupt = true;
        Ok(())
    }

    /// Whether the driver wants to be interrupted for what was pushed since the last call (§2.7.7.2).
    pub fn must_interrupt(&mut self, mem: &GuestMemory) -> Result<bool, Fault> {
        if !std::mem::take(&mut self.used_since_interrupt) {
            return Ok(false);
        }
        let wanted = self.queue.needs_notification(mem)?;
        if !wanted || self.queue.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags: u16 =
            mem.load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire).map_err(|_| Fault)?;
        Ok(u16::from_le(flags) & NO_INTERRUPT == 0)
    }

    /// Asks the driver to notify us of the next chain. `true`: one is there already, look again.
    pub fn listen(&mut self, mem: &GuestMemory) -> Result<bool, Fault> {
        Ok(self.queue.enable_notification(mem)?)
    }

    /// Tells the driver that it need not notify us.
    pub fn mute(&mut self, mem: &GuestMemory) -> Result<(), Fault> {
        Ok(self.queue.disable_notification(mem)?)
    }
}

/// What a device may use while it works: the guest's memory, its queues, and a place to leave
/// operations for the event loop.
pub struct Host<'a> {
    /// The guest's memory.
    pub mem: &'a Arc<GuestMemory>,
    /// The device's queues; `None` where the driver has not made one ready.
    pub queues: &'a mut [Option<Virtqueue>],
    /// Operations for the event loop.
    pub ops: &'a mut Vec<crate::event_loop::ring::Op>,
    /// Counters of the microVM.
    pub counters: &'a crate::devices::Counters,
}

impl Host<'_> {
    /// A queue, if the driver has made it ready.
    pub fn queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index)?.as_mut()
    }
}

/// Whether a device is done with a queue for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Turn {
    /// The queue is empty, or waits for a completion or a notification.
    Idle,
    /// The turn's budget is spent and there may be more: come again after the others.
    More,
}
