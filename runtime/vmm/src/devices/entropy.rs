//! virtio-rng (virtio 1.2 §5.4): the host's random bytes for the guest.
//!
//! A request gets at most [`MAX_REQUEST_BYTES`], whatever it asks for: Linux asks for 64, and the
//! bytes are made while the guest's vCPU may wait.

use vm_memory::Bytes as _;

use crate::devices::mmio::{Device, Done};
use crate::devices::virtqueue::{Chain, Fault, Host, Turn};
use crate::event_loop::ring::{Op, fill_random};

/// Most bytes one request gets.
pub const MAX_REQUEST_BYTES: usize = 4096;

/// Linux has one request under way at a time.
const QUEUE_SIZE: u16 = 4;

/// The device has no state of its own: randomness is never saved.
#[derive(Debug, Default)]
pub struct Entropy;

impl Entropy {
    /// Fills the chain's buffers and says how many bytes were written.
    fn fill(chain: &Chain, host: &Host<'_>) -> u32 {
        let mut written = 0;
        if chain.broken {
            return 0;
        }
        let mut bytes = [0u8; MAX_REQUEST_BYTES];
        for &(addr, len) in &chain.writable {
            let count = usize::try_from(len).unwrap_or(usize::MAX).min(MAX_REQUEST_BYTES - written);
            let part = &mut bytes[..count];
            if fill_random(part).is_err() || host.mem.write_slice(part, addr).is_err() {
                break;
            }
            written += count;
        }
        // At most MAX_REQUEST_BYTES.
        written as u32
    }
}

impl Device for Entropy {
    const TYPE: u32 = 4;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn service(&mut self, index: usize, host: &mut Host<'_>) -> Result<Turn, Fault> {
        let mem = host.mem;
        let mut budget = QUEUE_SIZE;
        while let Some(queue) = host.queue(index) {
            queue.mute(mem)?;
            while let Some(chain) = host.queue(index).map(|queue| queue.pop(mem)).transpose()?.flatten() {
                let written = Self::fill(&chain, host);
                host.counters.entropy_bytes.add(written.into());
                if let Some(queue) = host.queue(index) {
                    queue.push_used(mem, chain.head, written)?;
                }
                budget -= 1;
                if budget == 0 {
                    return Ok(Turn::More);
                }
            }
            if !host.queue(index).map(|queue| queue.listen(mem)).transpose()?.unwrap_or(false) {
                break;
            }
        }
        Ok(Turn::Idle)
    }

    fn complete(&mut self, _done: Done, _host: &mut Host<'_>) -> Result<Turn, Fault> {
        Ok(Turn::Idle)
    }

    fn reset(&mut self, _ops: &mut Vec<Op>) {}

    fn in_flight(&self) -> usize {
        0
    }
}
