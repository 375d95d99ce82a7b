//! The virtio-mmio transport, version 2 (virtio 1.2 §4.2), one per device.
//!
//! ```text
//!            ACKNOWLEDGE, DRIVER      FEATURES_OK           DRIVER_OK
//!   Reset ----------------------> Features ------> Queues ------------> Live
//!     ^      (features writable)          (queues writable)  (only notify)
//!     |                                                                  |
//!     +------- in-flight I/O done <------- Resetting <--- status = 0 ----+
//! ```
//!
//! Device status bits only ever go on, except through a reset (§2.1.1); a register written in a
//! state where it has no business is ignored; rings that cannot work set DEVICE_NEEDS_RESET.
//! A reset with I/O in flight reads as the old status until the last of it is done, because the
//! driver may reuse the memory as soon as it reads 0 (§2.1.2).
//!
//! May touch: the registers, the queues, the device behind. Must not: threads, KVM.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use virtio_queue::QueueState;

use crate::devices::virtqueue::{Fault, Host, Turn, Virtqueue};
use crate::devices::{Counters, GuestMemory, Interrupt};
use crate::event_loop::ring::{GuestBuffers, Op};

mod state;
#[cfg(test)]
mod tests;

pub use state::{State, StreamState};

/// Bytes of guest-physical address space a device takes.
pub const WINDOW_BYTES: u64 = 0x1000;

/// VIRTIO_F_VERSION_1 and VIRTIO_F_EVENT_IDX (§6): every device of ours offers both.
/// VIRTIO_F_INDIRECT_DESC is not offered: Linux allocates and frees a table per request for it.
pub const F_VERSION_1: u64 = 1 << 32;
/// See [`F_VERSION_1`].
pub const F_EVENT_IDX: u64 = 1 << 29;

/// Device status bits, §2.1.
pub mod status {
    #![allow(missing_docs)]
    pub const ACKNOWLEDGE: u32 = 1;
    pub const DRIVER: u32 = 2;
    pub const DRIVER_OK: u32 = 4;
    pub const FEATURES_OK: u32 = 8;
    pub const NEEDS_RESET: u32 = 64;
    pub const FAILED: u32 = 128;
}

/// Register offsets, §4.2.2.
pub mod register {
    #![allow(missing_docs)]
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const VENDOR_ID: u64 = 0x00c;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub const QUEUE_SEL: u64 = 0x030;
    pub const QUEUE_SIZE_MAX: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const INTERRUPT_STATUS: u64 = 0x060;
    pub const INTERRUPT_ACK: u64 = 0x064;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC_LOW: u64 = 0x080;
    pub const QUEUE_DESC_HIGH: u64 = 0x084;
    pub const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub const SHM_LEN_LOW: u64 = 0x0b0;
    pub const SHM_LEN_HIGH: u64 = 0x0b4;
    pub const SHM_BASE_LOW: u64 = 0x0b8;
    pub const SHM_BASE_HIGH: u64 = 0x0bc;
    pub const CONFIG_GENERATION: u64 = 0x0fc;
    pub const CONFIG: u64 = 0x100;
}

const MAGIC_VALUE: u32 = 0x7472_6976;
const VENDOR: u32 = 0x4e47_5250;
const INTERRUPT_USED: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What stands behind a transport.
pub trait Device: Send {
    /// Device type, virtio 1.2 §5.
    const TYPE: u32;
    /// Largest size of each queue, powers of two.
    const QUEUE_SIZES: &'static [u16];

    /// Feature bits offered besides the transport's own.
    fn features(&self) -> u64;
    /// Device-specific configuration, little endian; whatever lies beyond stays zero.
    fn config(&self) -> &[u8];
    /// The driver rang for `queue`, or there is another reason to look at it.
    fn service(&mut self, queue: usize, host: &mut Host<'_>) -> Result<Turn, Fault>;
    /// An operation left in `host.ops` is done (or, if `more`, has something to say).
    fn complete(&mut self, done: Done, host: &mut Host<'_>) -> Result<Turn, Fault>;
    /// Forgets what the driver asked for. Operations in flight still complete, into nothing.
    fn reset(&mut self, ops: &mut Vec<Op>);
    /// Operations that may still read or write guest memory.
    fn in_flight(&self) -> usize;
    /// Puts into `state` what the device has to save beside its transport.
    fn save(&self, _state: &mut State) {}
}

/// A completion as the device sees it.
#[derive(Debug)]
pub struct Done {
    /// As given in the operation.
    pub token: u32,
    /// A count, an event mask or a negated errno.
    pub result: i32,
    /// The operation goes on.
    pub more: bool,
    /// The operation's buffers.
    pub buffers: Option<GuestBuffers>,
}

/// The interrupt line of a device, with the InterruptStatus register.
pub struct Line {
    status: AtomicU32,
    gsi: u32,
    sink: Arc<dyn Interrupt>,
    counters: Arc<Counters>,
}

impl Line {
    /// A line that pulses `gsi`.
    pub fn new(gsi: u32, sink: Arc<dyn Interrupt>, counters: Arc<Counters>) -> Self {
        Self { status: AtomicU32::new(0), gsi, sink, counters }
    }

    /// InterruptStatus.
    #[must_use]
    pub fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// InterruptACK.
    pub fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Pulses the line if the driver has not acknowledged: after a restore. The pulse before may have come
    /// between the capture of the vCPU and that of the device; one too many only makes the driver look once
    /// for nothing.
    pub(crate) fn renew(&self) {
        if self.status() != 0 {
            self.sink.raise(self.gsi);
        }
    }

    /// Sets a bit and pulses the line.
    ///
    /// If the bit is still set, the driver has been interrupted and has not acknowledged yet. Linux
    /// acknowledges first and looks at the rings after (`vm_interrupt`), so it will see this
    /// event too, and a second pulse would only run its handler once more for nothing.
    fn raise(&self, bit: u32) {
        if self.status.fetch_or(bit, Ordering::SeqCst) & bit == 0 {
            self.counters.interrupts.add(1);
            self.sink.raise(self.gsi);
        } else {
            self.counters.interrupts_saved.add(1);
        }
    }
}

/// What a transport is connected to; rebuilt, never saved.
#[derive(Clone)]
pub struct Wiring {
    /// The guest's memory.
    pub mem: Arc<GuestMemory>,
    /// The interrupt.
    pub line: Arc<Line>,
    /// The microVM's counters.
    pub counters: Arc<Counters>,
}

/// What the caller of [`Mmio::write`] has to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// The driver rang for this queue: [`Mmio::service`] it.
    Notify(usize),
    /// The driver went live: service all queues, it may have filled them before.
    Live,
    /// The reset is complete once the operations in flight are: wait for them.
    Resetting,
}

/// A virtio-mmio transport and its device.
pub struct Mmio<D> {
    device: D,
    registers: State,
    queues: Vec<Option<Virtqueue>>,
    wiring: Wiring,
    resetting: bool,
    ops: Vec<Op>,
}

impl<D: Device> Mmio<D> {
    /// Boots with `State::default()`, restores with a saved state.
    ///
    /// An error says why the state cannot be one of this device; nothing has happened then.
    pub fn new(mut state: State, device: D, wiring: Wiring) -> Result<Self, &'static str> {
        if state.queues.is_empty() {
            state.queues = power_on_queues::<D>();
        }
        let same_sizes = state.queues.iter().map(|queue| queue.max_size).eq(D::QUEUE_SIZES.iter().copied());
        if !same_sizes {
            return Err("it has other queues");
        }
        let offered = device.features() | F_VERSION_1 | F_EVENT_IDX;
        if state.status & status::FEATURES_OK != 0 && state.driver_features & !offered != 0 {
            return Err("the driver uses features this device lacks");
        }
        let mut queues = Vec::with_capacity(state.queues.len());
        for saved in &state.queues {
            let ready = saved.ready.then(|| Virtqueue::new(*saved, &wiring.mem)).transpose();
            queues.push(ready.map_err(|_| "a queue lies outside guest memory")?);
        }
        wiring.line.status.store(state.interrupt_status, Ordering::SeqCst);
        Ok(Self { device, registers: state, queues, wiring, resetting: false, ops: Vec::new() })
    }

    /// The plain data to save. Complete only while no operation is in flight.
    #[must_use]
    pub fn state(&self) -> State {
        let mut state = self.registers.clone();
        for (saved, live) in state.queues.iter_mut().zip(&self.queues) {
            if let Some(queue) = live {
                *saved = queue.state();
            }
        }
        state.interrupt_status = self.wiring.line.status();
        self.device.save(&mut state);
        state
    }

    /// The device behind.
    pub fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Operations the device wants done since the last call.
    pub fn take_ops(&mut self) -> Vec<Op> {
        std::mem::take(&mut self.ops)
    }

    /// Whether operations wait to be taken.
    #[must_use]
    pub fn has_ops(&self) -> bool {
        !self.ops.is_empty()
    }

    /// Operations that may still touch guest memory.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.device.in_flight()
    }

    /// Whether the driver waits for a reset to complete.
    #[must_use]
    pub fn is_resetting(&self) -> bool {
        self.resetting
    }

    /// Whether queues may be worked on.
    #[must_use]
    pub fn is_live(&self) -> bool {
        let bits = self.registers.status;
        bits & status::DRIVER_OK != 0 && bits & (status::NEEDS_RESET | status::FAILED) == 0 && !self.resetting
    }

    /// The guest reads `data.len()` bytes at `offset` of the window.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= register::CONFIG {
            let config = self.device.config();
            let start = usize::try_from(offset - register::CONFIG).unwrap_or(usize::MAX);
            if let Some(rest) = config.get(start..) {
                let count = rest.len().min(data.len());
                data[..count].copy_from_slice(&rest[..count]);
            }
        } else if data.len() == 4 && offset.is_multiple_of(4) {
            // §4.2.2.2: all registers but the configuration are read with 32-bit accesses.
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.selected();
        match offset {
            register::MAGIC => MAGIC_VALUE,
            register::VERSION => 2,
            register::DEVICE_ID => D::TYPE,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(self.offered(), self.registers.device_features_sel),
            register::QUEUE_SIZE_MAX => queue.map_or(0, |queue| queue.max_size.into()),
            register::QUEUE_READY => queue.is_some_and(|queue| queue.ready).into(),
            register::INTERRUPT_STATUS => self.wiring.line.status(),
            register::STATUS => self.registers.status,
            // §4.2.2: a shared memory region that does not exist has length and base -1.
            register::SHM_LEN_LOW | register::SHM_LEN_HIGH => u32::MAX,
            register::SHM_BASE_LOW | register::SHM_BASE_HIGH => u32::MAX,
            register::CONFIG_GENERATION => self.registers.config_generation,
            _ => 0,
        }
    }

    /// The guest writes `data` at `offset` of the window.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> Effect {
        let Ok(bytes) = <[u8; 4]>::try_from(data) else {
            return Effect::None;
        };
        // No device of ours has writable configuration.
        if !offset.is_multiple_of(4) || offset >= register::CONFIG {
            return Effect::None;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            register::STATUS => return self.write_status(value),
            register::QUEUE_NOTIFY => {
                // Without VIRTIO_F_NOTIFICATION_DATA the value is the queue's index.
                let index = usize::try_from(value).unwrap_or(usize::MAX);
                if index < D::QUEUE_SIZES.len() {
                    return Effect::Notify(index);
                }
            }
            register::INTERRUPT_ACK => self.wiring.line.acknowledge(value),
            register::DEVICE_FEATURES_SEL => self.registers.device_features_sel = value,
            register::DRIVER_FEATURES_SEL => self.registers.driver_features_sel = value,
            register::QUEUE_SEL => self.registers.queue_sel = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            _ => self.write_queue_register(offset, value),
        }
        Effect::None
    }

    fn offered(&self) -> u64 {
        self.device.features() | F_VERSION_1 | F_EVENT_IDX
    }

    fn selected(&self) -> Option<&QueueState> {
        self.registers.queues.get(usize::try_from(self.registers.queue_sel).ok()?)
    }

    fn write_driver_features(&mut self, value: u32) {
        let bits = self.registers.status;
        if bits & status::DRIVER == 0 || bits & status::FEATURES_OK != 0 || self.resetting {
            return;
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_sel {
            0 => *features = (*features & !0xffff_ffff) | u64::from(value),
            1 => *features = (*features & 0xffff_ffff) | u64::from(value) << 32,
            _ => {}
        }
    }

    /// Queue registers are writable between FEATURES_OK and DRIVER_OK (§3.1.1), and all but
    /// QueueReady only while the queue is not ready (§4.2.2.2).
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let phase = self.registers.status & (status::FEATURES_OK | status::DRIVER_OK);
        if phase != status::FEATURES_OK || self.resetting {
            return;
        }
        let Ok(index) = usize::try_from(self.registers.queue_sel) else {
            return;
        };
        let Some(queue) = self.registers.queues.get_mut(index) else {
            return;
        };
        if offset == register::QUEUE_READY {
            return self.write_queue_ready(index, value);
        }
        if queue.ready {
            return;
        }
        match offset {
            // Checked as a whole when the queue is made ready; out of range is no size at all.
            register::QUEUE_SIZE => queue.size = u16::try_from(value).unwrap_or(0),
            register::QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.avail_ring, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail_ring, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            register::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    fn write_queue_ready(&mut self, index: usize, value: u32) {
        let event_idx_enabled = self.registers.driver_features & F_EVENT_IDX != 0;
        let (Some(queue), Some(live)) = (self.registers.queues.get_mut(index), self.queues.get_mut(index))
        else {
            return;
        };
        match (value, queue.ready) {
            (1, false) => {
                let wanted = QueueState { ready: true, event_idx_enabled, ..*queue };
                match Virtqueue::new(wanted, &self.wiring.mem) {
                    Ok(checked) => {
                        *queue = wanted;
                        *live = Some(checked);
                    }
                    Err(fault) => self.fail(fault),
                }
            }
            (0, true) => {
                queue.ready = false;
                *live = None;
            }
            _ => {}
        }
    }

    fn write_status(&mut self, value: u32) -> Effect {
        if value == 0 {
            return self.start_reset();
        }
        let old = self.registers.status;
        let known =
            status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;
        // §2.1.1: the driver must not clear a bit; DEVICE_NEEDS_RESET is the device's own.
        if self.resetting || value & old & known != old & known {
            return Effect::None;
        }
        let mut new = old | (value & known);
        let added = new & !old;
        if added & status::FEATURES_OK != 0 && !self.features_acceptable(new) {
            // §3.1.1 step 5: the bit stays off, and the driver sees that when it reads back.
            new &= !(status::FEATURES_OK | status::DRIVER_OK);
        }
        if new & status::FEATURES_OK == 0 {
            new &= !status::DRIVER_OK;
        }
        self.registers.status = new;
        if new & !old & status::DRIVER_OK != 0 { Effect::Live } else { Effect::None }
    }

    fn features_acceptable(&self, bits: u32) -> bool {
        let features = self.registers.driver_features;
        let greeted = status::ACKNOWLEDGE | status::DRIVER;
        bits & greeted == greeted && features & !self.offered() == 0 && features & F_VERSION_1 != 0
    }

    fn start_reset(&mut self) -> Effect {
        if !self.resetting {
            self.resetting = true;
            self.device.reset(&mut self.ops);
            self.queues.iter_mut().for_each(|queue| *queue = None);
        }
        self.finish_reset_when_drained();
        if self.resetting { Effect::Resetting } else { Effect::None }
    }

    fn finish_reset_when_drained(&mut self) {
        if self.resetting && self.device.in_flight() == 0 {
            self.registers = State {
                config_generation: self.registers.config_generation,
                queues: power_on_queues::<D>(),
                ..State::default()
            };
            self.wiring.line.acknowledge(u32::MAX);
            self.resetting = false;
        }
    }

    /// The device cannot go on (§2.1.2): says so, and with a configuration interrupt if it was live.
    fn fail(&mut self, _: Fault) {
        self.wiring.counters.faults.add(1);
        let live = self.registers.status & status::DRIVER_OK != 0;
        self.registers.status |= status::NEEDS_RESET;
        if live {
            self.wiring.line.raise(INTERRUPT_CONFIG);
        }
    }

    /// Lets the device work on `queue`.
    pub fn service(&mut self, queue: usize) -> Turn {
        if !self.is_live() {
            return Turn::Idle;
        }
        self.with_device(|device, host| device.service(queue, host)).unwrap_or(Turn::Idle)
    }

    /// Tells the device that an operation is done. [`Turn::More`]: service its queues again.
    pub fn complete(&mut self, done: Done) -> Turn {
        // Also while resetting: what is in flight must come back before the reset is complete.
        let turn = self.with_device(|device, host| device.complete(done, host));
        self.finish_reset_when_drained();
        turn.unwrap_or(Turn::Idle)
    }

    /// Runs device code, then raises the interrupt if the driver wants one.
    pub fn with_device<T>(
        &mut self,
        work: impl FnOnce(&mut D, &mut Host<'_>) -> Result<T, Fault>,
    ) -> Option<T> {
        let live = self.is_live();
        let Self { device, queues, wiring, ops, .. } = self;
        let mut none = [];
        let queues = if live { queues.as_mut_slice() } else { &mut none };
        let mut host = Host { mem: &wiring.mem, queues, ops, counters: &wiring.counters };
        let outcome = work(device, &mut host).and_then(|outcome| {
            let mut interrupt = false;
            for queue in host.queues.iter_mut().flatten() {
                interrupt |= queue.must_interrupt(host.mem)?;
            }
            if interrupt {
                wiring.line.raise(INTERRUPT_USED);
            }
            Ok(outcome)
        });
        match outcome {
            Ok(outcome) => Some(outcome),
            Err(fault) => {
                self.fail(fault);
                None
            }
        }
    }
}

fn power_on_queues<D: Device>() -> Vec<QueueState> {
    D::QUEUE_SIZES
        .iter()
        .map(|&max_size| QueueState { max_size, size: max_size, ..QueueState::default() })
        .collect()
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        // Truncation is the point: the register is one half of the bits.
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = (*address & !0xffff_ffff) | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = (*address & 0xffff_ffff) | u64::from(value) << 32;
}
