//! The MMIO bus: finds the device of an address and acts for the vCPU thread that took the exit.
//!
//! A vCPU thread that rings a doorbell serves the queue itself if nobody else is at the device: its
//! guest is stopped anyway, and a wake-up of the loop is saved. What needs the ring, or comes when
//! the device is busy, is left to the loop by a pending bit.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::bell::{ATTENTION, Bell, bit};
use crate::devices::Counters;
use crate::devices::mmio::{Device, Done, Effect, Line, Mmio, State, WINDOW_BYTES, register};
use crate::devices::virtqueue::Turn;
use crate::event_loop::ring::Op;

/// Longest a vCPU waits in a reset for the disk; after that the driver sees the reset unfinished.
const RESET_PATIENCE: Duration = Duration::from_secs(10);

/// A device on the bus, shared between vCPU threads and the loop.
pub(crate) struct Slot<D> {
    index: usize,
    mmio: Mutex<Mmio<D>>,
    line: Arc<Line>,
    /// Signalled when a reset is complete, and when nothing is in flight.
    drained: Condvar,
    bell: Arc<Bell>,
    counters: Arc<Counters>,
    loop_ended: Arc<AtomicBool>,
}

/// What every slot can do, whatever its device.
pub(crate) trait Port: Send + Sync {
    fn read(&self, offset: u64, data: &mut [u8]);
    fn write(&self, offset: u64, data: &[u8]);
    /// Loop: work on the queues named in the low bits; operations go to `ops`.
    fn service(&self, queues: u64, ops: &mut Vec<Op>);
    /// Loop: an operation is done.
    fn complete(&self, done: Done, ops: &mut Vec<Op>);
    /// Loop: the state to save, once nothing is in flight.
    fn settled_state(&self) -> Option<State>;
    /// Restored: raises the interrupt again that the driver may not have seen.
    fn renew_interrupt(&self);
    /// Loop: it ends, so nobody shall wait for it.
    fn abandon(&self);
}

impl<D: Device> Slot<D> {
    pub(crate) fn new(
        index: usize,
        mmio: Mmio<D>,
        line: Arc<Line>,
        bell: Arc<Bell>,
        counters: Arc<Counters>,
        loop_ended: Arc<AtomicBool>,
    ) -> Self {
        Self { index, mmio: Mutex::new(mmio), line, drained: Condvar::new(), bell, counters, loop_ended }
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Mmio<D>> {
        // Device code does not panic; if it did, its state is still data a reset can clear.
        self.mmio.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A queue was rung for on a vCPU thread.
    fn notified(&self, queue: usize) {
        self.counters.notifications.add(1);
        let mut leave = bit(self.index, queue);
        if let Ok(mut mmio) = self.mmio.try_lock() {
            leave = match mmio.service(queue) {
                Turn::Idle => 0,
                Turn::More => leave,
            };
            if mmio.has_ops() {
                leave |= bit(self.index, ATTENTION);
            }
        }
        if leave == 0 {
            self.counters.served_inline.add(1);
        } else {
            self.bell.ring(leave);
        }
    }

    /// Waits until the operations in flight are done, so that the reset is complete when the
    /// driver's write returns: Linux' virtio_mmio does not read back.
    fn wait_for_reset(&self, mmio: MutexGuard<'_, Mmio<D>>) {
        let waiting = |mmio: &mut Mmio<D>| mmio.is_resetting() && !self.loop_ended.load(Ordering::SeqCst);
        let _unfinished = self.drained.wait_timeout_while(mmio, RESET_PATIENCE, waiting);
    }
}

fn all_queues(index: usize) -> u64 {
    bit(index, 0) | bit(index, 1) | bit(index, 2) | bit(index, ATTENTION)
}

impl<D: Device> Port for Slot<D> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The one register of the fast path needs no lock.
        if offset == register::INTERRUPT_STATUS && data.len() == 4 {
            data.copy_from_slice(&self.line.status().to_le_bytes());
        } else {
            self.lock().read(offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(bytes), register::INTERRUPT_ACK) = (<[u8; 4]>::try_from(data), offset) {
            return self.line.acknowledge(u32::from_le_bytes(bytes));
        }
        if let (Ok(bytes), register::QUEUE_NOTIFY) = (<[u8; 4]>::try_from(data), offset) {
            let queue = usize::try_from(u32::from_le_bytes(bytes)).unwrap_or(usize::MAX);
            if queue < D::QUEUE_SIZES.len() {
                self.notified(queue);
            }
            return;
        }
        let mut mmio = self.lock();
        let effect = mmio.write(offset, data);
        let left_operations = mmio.has_ops();
        match effect {
            Effect::Resetting => self.wait_for_reset(mmio),
            Effect::Live => self.bell.ring(all_queues(self.index)),
            Effect::None | Effect::Notify(_) if left_operations => self.bell.ring(bit(self.index, ATTENTION)),
            Effect::None | Effect::Notify(_) => {}
        }
    }

    fn service(&self, queues: u64, ops: &mut Vec<Op>) {
        let mut mmio = self.lock();
        for queue in 0..D::QUEUE_SIZES.len() {
            if queues & (1 << queue) != 0 && mmio.service(queue) == Turn::More {
                self.bell.ring(bit(self.index, queue));
            }
        }
        ops.append(&mut mmio.take_ops());
    }

    fn complete(&self, done: Done, ops: &mut Vec<Op>) {
        let mut mmio = self.lock();
        if mmio.complete(done) == Turn::More {
            self.bell.ring(all_queues(self.index));
        }
        ops.append(&mut mmio.take_ops());
        if mmio.in_flight() == 0 {
            self.drained.notify_all();
        }
    }

    fn settled_state(&self) -> Option<State> {
        let mmio = self.lock();
        (mmio.in_flight() == 0).then(|| mmio.state())
    }

    fn renew_interrupt(&self) {
        self.line.renew();
    }

    fn abandon(&self) {
        let _locked = self.lock();
        self.drained.notify_all();
    }
}

/// The devices' part of the guest's address space.
pub struct Bus {
    base: u64,
    first_gsi: u32,
    ports: Vec<Arc<dyn Port>>,
}

impl Bus {
    pub(crate) fn new(base: u64, first_gsi: u32, ports: Vec<Arc<dyn Port>>) -> Self {
        Self { base, first_gsi, ports }
    }

    fn find(&self, addr: u64) -> Option<(&dyn Port, u64)> {
        let offset = addr.checked_sub(self.base)?;
        let port = self.ports.get(usize::try_from(offset / WINDOW_BYTES).ok()?)?;
        Some((port.as_ref(), offset % WINDOW_BYTES))
    }

    /// A vCPU reads. `false`: no device is there, and `data` is unchanged.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        self.find(addr).map(|(port, offset)| port.read(offset, data)).is_some()
    }

    /// A vCPU writes. `false`: no device is there.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        self.find(addr).map(|(port, offset)| port.write(offset, data)).is_some()
    }

    /// Kernel parameters that tell Linux of the devices (`virtio_mmio.device=`).
    #[must_use]
    pub fn kernel_cmdline(&self) -> String {
        let parameters = self.ports.iter().zip(self.first_gsi..).enumerate().map(|(index, (_, gsi))| {
            let addr = self.base + index as u64 * WINDOW_BYTES;
            format!("virtio_mmio.device=4K@{addr:#x}:{gsi}")
        });
        parameters.collect::<Vec<_>>().join(" ")
    }
}
