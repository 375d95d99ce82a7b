//! The microVM's devices: virtio-mmio transports with block, vsock and entropy behind them.
//!
//! Device logic is synchronous and owns no thread: it is called with the guest's queues and answers with used
//! buffers and with [`Op`](crate::event_loop::ring::Op)s for the event loop. So tests and fuzz targets drive
//! it directly. It may touch guest memory through `vm-memory` and the bounds-checked buffers of the ring; it
//! must not touch KVM: interrupts leave through [`Interrupt`].
//!
//! Guest kernel instructions are the currency (on software KVM each costs half a microsecond to one, an
//! interrupt a millisecond), so every device is shaped to need few of them: small queues,
//! no indirect descriptors, event indices, and interrupts only when the driver waits for one.

pub mod block;
pub mod entropy;
pub mod mmio;
pub mod virtqueue;
pub mod vsock;

#[cfg(test)]
pub(crate) mod testing;

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

/// The guest's memory as all of the VMM sees it.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

/// Raises interrupts in the guest.
///
/// `raise` is an edge: it must not block, and it must not call back into the devices.
pub trait Interrupt: Send + Sync {
    /// Pulses the global system interrupt `gsi`.
    fn raise(&self, gsi: u32);
}

/// A disk for the guest.
#[derive(Debug)]
pub struct Disk {
    /// A regular file or block device; its length, rounded down to 512 bytes, is the disk's.
    pub file: File,
    /// Refuse the guest's writes.
    pub read_only: bool,
    /// Serial number the guest can read; only the first 20 bytes are used.
    pub id: String,
}

/// What devices a microVM gets, and where. They stand in this order: disks, vsock, entropy.
#[derive(Debug)]
pub struct DevicesConfig {
    /// vda, vdb, ...
    pub disks: Vec<Disk>,
    /// Guest-physical address of the first device; the others follow 4 KiB apart.
    pub mmio_base: u64,
    /// Interrupt of the first device; the others follow.
    pub first_gsi: u32,
    /// Saved states, one per device, to restore; empty to boot.
    pub states: Vec<mmio::State>,
}

impl Default for DevicesConfig {
    fn default() -> Self {
        Self { disks: Vec::new(), mmio_base: 0xd000_0000, first_gsi: 5, states: Vec::new() }
    }
}

/// Why the devices could not be set up or used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// Too many disks for the interrupt lines and pending bits there are.
    #[error("{count} disks asked for, at most {most} are possible: attach fewer")]
    TooManyDisks {
        /// How many were asked for.
        count: usize,
        /// How many there can be.
        most: usize,
    },
    /// The disk's length cannot be found out.
    #[error("disk {id}: cannot find its length: {source}")]
    DiskLength {
        /// The disk's id.
        id: String,
        /// Why.
        source: io::Error,
    },
    /// A saved state does not describe this device.
    #[error("saved state of device {device} does not fit it: {why}; take a new snapshot")]
    BadState {
        /// Position of the device.
        device: usize,
        /// What is wrong.
        why: &'static str,
    },
    /// There must be a saved state for every device, or none.
    #[error("{states} saved states for {devices} devices: the snapshot is of another machine")]
    StateCount {
        /// Saved states given.
        states: usize,
        /// Devices configured.
        devices: usize,
    },
    /// io_uring or an eventfd could not be made.
    #[error("cannot set up the event loop: {0}; is io_uring disabled (/proc/sys/kernel/io_uring_disabled)?")]
    EventLoop(io::Error),
    /// The event loop has ended; the microVM is being torn down.
    #[error("the event loop has ended")]
    Stopped,
}

/// A number that several threads add to and nobody orders by.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub(crate) fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Live counters, shared by all threads of a microVM.
        #[derive(Debug, Default)]
        pub struct Counters { $($(#[$doc])* pub(crate) $name: Counter,)* }

        /// What the devices have done so far.
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Counters {
            /// The numbers of this moment.
            #[must_use]
            pub fn snapshot(&self) -> Stats {
                Stats { $($name: self.$name.get(),)* }
            }
        }
    };
}

counters! {
    /// QueueNotify writes by the guest.
    notifications,
    /// Of those, served on the vCPU thread without waking the loop.
    served_inline,
    /// Times the loop was woken by its eventfd.
    wakeups,
    /// Interrupts raised.
    interrupts,
    /// Interrupts saved because the guest had not looked at the last one yet.
    interrupts_saved,
    /// Devices that needed a reset because of what the driver did.
    faults,
    /// Block requests finished.
    block_requests,
    /// Of those, reads answered from the page cache without the ring.
    block_cached,
    /// Bytes read by the guest.
    block_read_bytes,
    /// Bytes written by the guest.
    block_written_bytes,
    /// Bytes of randomness given.
    entropy_bytes,
    /// Packets from the guest.
    vsock_packets_from_guest,
    /// Packets to the guest.
    vsock_packets_to_guest,
    /// Payload from the guest.
    vsock_bytes_from_guest,
    /// Payload to the guest.
    vsock_bytes_to_guest,
    /// Packets from the guest that were ignored or answered with a reset.
    vsock_refused,
}
