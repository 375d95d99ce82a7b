//! What of a transport and its device is saved: plain data, no wiring.

use serde::{Deserialize, Serialize};
use virtio_queue::QueueState;

/// All that the guest can see of a transport: plain data, saved whole.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Device status.
    pub status: u32,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// Features the driver has accepted.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// Every queue's registers and positions; empty means as after power-on.
    #[serde(with = "saved_queues")]
    pub queues: Vec<QueueState>,
    /// ConfigGeneration.
    pub config_generation: u32,
    /// InterruptStatus.
    pub interrupt_status: u32,
    /// Open connections of a vsock device.
    pub streams: Vec<StreamState>,
    /// TX chains of a vsock device that it is done with and has not given back.
    pub held: Vec<u16>,
}

/// A vsock connection: what the guest knows of it, and the bytes that are on their way.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
    /// Receive buffer of the guest, as it last said.
    pub peer_buf_alloc: u32,
    /// Bytes the guest has taken, as it last said; counters run freely (virtio 1.2 §5.10.6.3).
    pub peer_fwd_cnt: u32,
    /// Bytes sent to the guest.
    pub sent_bytes: u32,
    /// Bytes received from the guest.
    pub received_bytes: u32,
    /// Of those, bytes the host has taken.
    pub forwarded_bytes: u32,
    /// Of those, bytes the guest has been told of.
    pub advertised_bytes: u32,
    /// The guest waits to be told of credit.
    pub credit_due: bool,
    /// The guest has said that it sends no more.
    pub guest_ended: bool,
    /// The guest has said that it takes no more.
    pub guest_deaf: bool,
    /// Bytes from the guest that its host's end has not been given.
    pub to_host: Vec<u8>,
    /// Bytes the host has written and the guest has no buffer for yet.
    pub to_guest: Vec<u8>,
}

/// virtio-queue's state has no serde of its own.
mod saved_queues {
    use serde::{Deserialize, Deserializer, Serialize, Serializer};
    use virtio_queue::QueueState;

    #[derive(Serialize, Deserialize)]
    #[serde(remote = "QueueState")]
    struct Fields {
        max_size: u16,
        next_avail: u16,
        next_used: u16,
        event_idx_enabled: bool,
        size: u16,
        ready: bool,
        desc_table: u64,
        avail_ring: u64,
        used_ring: u64,
    }

    #[derive(Serialize, Deserialize)]
    struct Saved(#[serde(with = "Fields")] QueueState);

    pub(super) fn serialize<S: Serializer>(queues: &[QueueState], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(queues.iter().copied().map(Saved))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<QueueState>, D::Error> {
        let saved = Vec::<Saved>::deserialize(from)?;
        Ok(saved.into_iter().map(|Saved(queue)| queue).collect())
    }
}
