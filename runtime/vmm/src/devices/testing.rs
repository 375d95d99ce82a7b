//! The driver's side of a device, for tests: guest memory, rings written by hand, and the
//! registers as Linux' virtio_mmio writes them.
#![allow(clippy::unwrap_used)]

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::mmio::{Device, Done, Effect, F_EVENT_IDX, F_VERSION_1, Line, Mmio, State, Wiring};
use crate::devices::mmio::{register, status};
use crate::devices::virtqueue::Turn;
use crate::devices::{Counters, GuestMemory, Interrupt};
use crate::event_loop::ring::{Op, Ring};

/// Two regions with a hole between them, as a PC has.
pub(crate) const MEM_BYTES: u64 = 8 << 20;
pub(crate) const HIGH_MEM: u64 = 64 << 20;
/// Where the rings of queue `i` are: 64 KiB apart from here.
const RINGS: u64 = 0x10_0000;
/// Where buffers may be.
pub(crate) const BUFFERS: u64 = 0x40_0000;

pub(crate) fn memory() -> Arc<GuestMemory> {
    let ranges = [(GuestAddress(0), MEM_BYTES as usize), (GuestAddress(HIGH_MEM), 1 << 20)];
    Arc::new(GuestMemory::from_ranges(&ranges).unwrap())
}

/// Counts pulses.
#[derive(Default)]
pub(crate) struct Pulses {
    pub(crate) count: AtomicU32,
    pub(crate) gsis: Mutex<Vec<u32>>,
}

impl Pulses {
    pub(crate) fn count(&self) -> u32 {
        self.count.load(Ordering::SeqCst)
    }
}

impl Interrupt for Pulses {
    fn raise(&self, gsi: u32) {
        self.count.fetch_add(1, Ordering::SeqCst);
        self.gsis.lock().unwrap().push(gsi);
    }
}

/// One descriptor: address, length, device-writable.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece(pub(crate) u64, pub(crate) u32, pub(crate) bool);

pub(crate) fn readable(addr: u64, len: usize) -> Piece {
    Piece(addr, len as u32, false)
}

pub(crate) fn writable(addr: u64, len: usize) -> Piece {
    Piece(addr, len as u32, true)
}

/// The driver's view of one split queue.
pub(crate) struct DriverQueue {
    mem: Arc<GuestMemory>,
    pub(crate) base: u64,
    pub(crate) size: u16,
    next_descriptor: u16,
    pub(crate) available: u16,
    pub(crate) used_seen: u16,
}

impl DriverQueue {
    pub(crate) fn new(mem: &Arc<GuestMemory>, index: usize, size: u16) -> Self {
        let base = RINGS + index as u64 * 0x1_0000;
        Self { mem: Arc::clone(mem), base, size, next_descriptor: 0, available: 0, used_seen: 0 }
    }

    pub(crate) fn avail(&self) -> u64 {
        self.base + 0x4000
    }

    pub(crate) fn used(&self) -> u64 {
        self.base + 0x8000
    }

    pub(crate) fn write_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        let at = GuestAddress(self.base + u64::from(index) * 16);
        self.mem.write_obj(addr, at).unwrap();
        self.mem.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        self.mem.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        self.mem.write_obj(next, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Puts a chain head into the available ring without touching descriptors.
    pub(crate) fn offer(&mut self, head: u16) {
        let at = self.avail() + 4 + u64::from(self.available % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(at)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    pub(crate) fn set_available(&mut self, index: u16) {
        self.available = index;
        self.mem.store(index, GuestAddress(self.avail() + 2), Ordering::SeqCst).unwrap();
    }

    /// Writes a chain and makes it available; gives its head.
    pub(crate) fn add(&mut self, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (at, &Piece(addr, len, write)) in pieces.iter().enumerate() {
            let index = self.next_descriptor;
            self.next_descriptor = (index + 1) % self.size;
            let more = at + 1 < pieces.len();
            let flags = u16::from(more) | u16::from(write) << 1;
            self.write_descriptor(index, addr, len, flags, self.next_descriptor);
        }
        self.offer(head);
        head
    }

    /// Used entries since the last call: head and written length.
    pub(crate) fn take_used(&mut self) -> Vec<(u16, u32)> {
        let index: u16 = self.mem.load(GuestAddress(self.used() + 2), Ordering::SeqCst).unwrap();
        let mut entries = Vec::new();
        while self.used_seen != index {
            let at = self.used() + 4 + u64::from(self.used_seen % self.size) * 8;
            let head: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
            let len: u32 = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
            entries.push((head as u16, len));
            self.used_seen = self.used_seen.wrapping_add(1);
        }
        entries
    }

    /// Asks for an interrupt when the used index passes `index` (VIRTIO_F_EVENT_IDX).
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.avail() + 4 + u64::from(self.size) * 2;
        self.mem.store(index, GuestAddress(at), Ordering::SeqCst).unwrap();
    }

    /// When the device wants to be notified.
    pub(crate) fn avail_event(&self) -> u16 {
        let at = self.used() + 4 + u64::from(self.size) * 8;
        self.mem.load(GuestAddress(at), Ordering::SeqCst).unwrap()
    }
}

/// A transport with its driver.
pub(crate) struct Rig<D> {
    pub(crate) mem: Arc<GuestMemory>,
    pub(crate) mmio: Mmio<D>,
    pub(crate) pulses: Arc<Pulses>,
    pub(crate) counters: Arc<Counters>,
    pub(crate) queues: Vec<DriverQueue>,
    pub(crate) ring: Ring,
}

impl<D: Device> Rig<D> {
    /// A device after power-on.
    pub(crate) fn powered_on(device: D) -> Self {
        Self::with_state(State::default(), device, memory()).unwrap()
    }

    pub(crate) fn with_state(state: State, device: D, mem: Arc<GuestMemory>) -> Result<Self, &'static str> {
        let (pulses, counters) = (Arc::new(Pulses::default()), Arc::new(Counters::default()));
        let line = Arc::new(Line::new(5, Arc::clone(&pulses) as Arc<dyn Interrupt>, Arc::clone(&counters)));
        let wiring = Wiring { mem: Arc::clone(&mem), line, counters: Arc::clone(&counters) };
        let mmio = Mmio::new(state, device, wiring)?;
        let queues = D::QUEUE_SIZES.iter().enumerate();
        let queues = queues.map(|(index, &size)| DriverQueue::new(&mem, index, size)).collect();
        Ok(Self { mem, mmio, pulses, counters, queues, ring: Ring::new(64).unwrap() })
    }

    /// A device whose driver has done all that Linux does at probe.
    pub(crate) fn live(device: D) -> Self {
        let mut rig = Self::powered_on(device);
        rig.bring_up(F_VERSION_1 | F_EVENT_IDX);
        rig
    }

    pub(crate) fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.mmio.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write(&mut self, offset: u64, value: u32) -> Effect {
        self.mmio.write(offset, &value.to_le_bytes())
    }

    pub(crate) fn negotiate(&mut self, features: u64) {
        self.write(register::STATUS, 0);
        self.write(register::STATUS, status::ACKNOWLEDGE);
        self.write(register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
        self.write(register::DRIVER_FEATURES_SEL, 1);
        self.write(register::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(register::DRIVER_FEATURES_SEL, 0);
        self.write(register::DRIVER_FEATURES, features as u32);
        let bits = self.read(register::STATUS);
        self.write(register::STATUS, bits | status::FEATURES_OK);
    }

    pub(crate) fn set_up_queue(&mut self, index: usize) {
        let queue = &self.queues[index];
        let (size, desc, avail, used) = (queue.size, queue.base, queue.avail(), queue.used());
        self.write(register::QUEUE_SEL, index as u32);
        self.write(register::QUEUE_SIZE, size.into());
        for (low, addr) in [
            (register::QUEUE_DESC_LOW, desc),
            (register::QUEUE_DRIVER_LOW, avail),
            (register::QUEUE_DEVICE_LOW, used),
        ] {
            self.write(low, addr as u32);
            self.write(low + 4, (addr >> 32) as u32);
        }
        self.write(register::QUEUE_READY, 1);
    }

    pub(crate) fn go_live(&mut self) -> Effect {
        let bits = self.read(register::STATUS);
        self.write(register::STATUS, bits | status::DRIVER_OK)
    }

    pub(crate) fn bring_up(&mut self, features: u64) {
        self.negotiate(features);
        for index in 0..self.queues.len() {
            self.set_up_queue(index);
        }
        self.go_live();
        assert!(self.mmio.is_live());
    }

    /// Rings for a queue, and does all that follows from it; panics if it never ends.
    pub(crate) fn notify(&mut self, queue: usize) {
        assert_eq!(self.write(register::QUEUE_NOTIFY, queue as u32), Effect::Notify(queue));
        self.service(queue);
    }

    pub(crate) fn service(&mut self, queue: usize) {
        for _ in 0..10_000 {
            if self.mmio.service(queue) == Turn::Idle {
                return;
            }
        }
        panic!("the device never comes to an end");
    }

    /// Lets the kernel do what the device asked for, until nothing moves data any more.
    pub(crate) fn run_operations(&mut self) {
        loop {
            self.push_operations();
            if self.ring.moving() == 0 {
                return;
            }
            self.complete_some();
        }
    }

    /// Waits for one more event (of a poll), and lets the device have it.
    pub(crate) fn complete_some(&mut self) {
        self.push_operations();
        self.ring.wait().unwrap();
        let mut completions = Vec::new();
        self.ring.drain(&mut completions);
        for done in completions {
            let token = done.owner as u32;
            let done = Done { token, result: done.result, more: done.more, buffers: done.buffers };
            if self.mmio.complete(done) == Turn::More {
                (0..self.queues.len()).for_each(|queue| self.service(queue));
            }
        }
    }

    pub(crate) fn push_operations(&mut self) {
        for op in self.mmio.take_ops() {
            self.ring.push(op.token().into(), op);
        }
        self.ring.submit().unwrap();
    }

    /// Operations the device wants done, not done.
    pub(crate) fn operations(&mut self) -> Vec<Op> {
        self.mmio.take_ops()
    }

    pub(crate) fn fill(&self, addr: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
    }

    pub(crate) fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}
