//! The doorbell between vCPU threads and the loop: pending bits, and an eventfd that is written
//! only when the loop sleeps.
//!
//! No KVM ioeventfd is used: registering and closing one costs milliseconds on some hosts. A vCPU
//! thread that took the exit sets a bit instead, which is free while the loop is awake.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::devices::Counters;

/// Pending bits per device: three queues and "look at your operations".
pub(crate) const BITS_PER_DEVICE: usize = 4;
/// The bit, among a device's four, that says it has operations for the ring.
pub(crate) const ATTENTION: usize = 3;
/// Devices that fit beside the two bits below.
pub(crate) const MAX_DEVICES: usize = 15;
/// A command waits in the channel.
pub(crate) const COMMAND: u64 = 1 << 63;
/// The loop shall end.
pub(crate) const STOP: u64 = 1 << 62;

/// The pending bit of `queue` (or [`ATTENTION`]) of `device`.
pub(crate) fn bit(device: usize, queue: usize) -> u64 {
    1 << (device * BITS_PER_DEVICE + queue.min(ATTENTION))
}

/// Pending work, and a way to wake whoever does it.
pub(crate) struct Bell {
    pending: AtomicU64,
    asleep: AtomicBool,
    wake: Arc<EventFd>,
    counters: Arc<Counters>,
}

impl Bell {
    pub(crate) fn new(counters: Arc<Counters>) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
        Ok(Self { pending: AtomicU64::new(0), asleep: AtomicBool::new(false), wake, counters })
    }

    /// Marks work and wakes the loop if it sleeps. Called by any thread.
    pub(crate) fn ring(&self, bits: u64) {
        self.pending.fetch_or(bits, Ordering::SeqCst);
        // Only one caller sees `true`, so a sleep is ended by one write.
        if self.asleep.swap(false, Ordering::SeqCst) {
            self.counters.wakeups.add(1);
            // Fails only when the counter is at its maximum, and then the loop is woken already.
            let _ = self.wake.write(1);
        }
    }

    /// Takes all pending bits. Loop thread only.
    pub(crate) fn take(&self) -> u64 {
        self.asleep.store(false, Ordering::SeqCst);
        self.pending.swap(0, Ordering::SeqCst)
    }

    /// Whether the loop may sleep now. Loop thread only.
    ///
    /// The store and this load, and `ring`'s two, are sequentially consistent: either the ringer
    /// sees `asleep`, or we see its bit.
    pub(crate) fn may_sleep(&self) -> bool {
        self.asleep.store(true, Ordering::SeqCst);
        self.pending.load(Ordering::SeqCst) == 0
    }

    /// What the loop polls.
    pub(crate) fn pollable(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }
}
