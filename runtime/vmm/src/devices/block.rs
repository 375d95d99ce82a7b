//! virtio-blk (virtio 1.2 §5.2) over a file.
//!
//! What the page cache has is read at once, on the thread that looks at the queue (usually the
//! vCPU thread that rang): the guest then finds its interrupt pending before it goes to sleep,
//! which saves it two context switches. Everything else goes through the event loop's io_uring,
//! straight between file and guest memory. At most one request per ring entry is in flight.
//!
//! May touch: the disk's file, buffers inside guest memory. Must not: read a field of the guest's twice.

mod request;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{Seek as _, SeekFrom};
use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};

use self::request::{Action, Geometry, SECTOR_BYTES, parse};
use crate::devices::mmio::{Device, Done};
use crate::devices::virtqueue::{Chain, Fault, Host, Turn};
use crate::devices::{DeviceError, Disk};
use crate::event_loop::ring::{GuestBuffers, Op};

/// Feature bits, §5.2.3. Left out on purpose: SIZE_MAX (a segment may be as long as a folio),
/// TOPOLOGY and BLK_SIZE (more configuration reads), MQ, CONFIG_WCE.
const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
/// Only for writable disks; without it Linux never sends a flush.
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

/// Linux makes half as many requests at boot, and clears the memory of each.
const QUEUE_SIZE: u16 = 128;
/// Without indirect descriptors a request takes ring entries: all but header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// One gibibyte: a discard is one call whatever its length.
const MAX_DISCARD_SECTORS: u32 = 1 << 21;
const ID_BYTES: usize = 20;
/// Configuration layout, §5.2.4.
const CONFIG_BYTES: usize = 60;
/// Times the kernel may say "try again" before the guest is told of an error.
const MAX_RETRIES: u8 = 16;

mod answer {
    pub(super) const OK: u8 = 0;
    pub(super) const IO_ERROR: u8 = 1;
    pub(super) const UNSUPPORTED: u8 = 2;
}

/// A virtio block device.
pub struct Block {
    disk: Arc<File>,
    geometry: Geometry,
    id: [u8; ID_BYTES],
    config: [u8; CONFIG_BYTES],
    /// Requests the ring works on; their place is their token. Never longer than the queue.
    slots: Vec<Option<InFlight>>,
    in_flight: usize,
    /// Chains wait in the ring because too many requests are in flight.
    stalled: bool,
    read_cached: bool,
}

/// A request that the ring works on.
struct InFlight {
    reply: Reply,
    work: Work,
    offset: u64,
    retries: u8,
    /// The driver has reset the device since: complete into nothing.
    abandoned: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Read,
    Write,
    Other,
}

/// How to tell the driver.
#[derive(Clone, Copy)]
struct Reply {
    head: u16,
    status: GuestAddress,
    /// Data bytes that a successful request moves.
    data_bytes: u64,
}

impl Block {
    /// A device over `disk`.
    pub fn new(disk: Disk) -> Result<Self, DeviceError> {
        let Disk { mut file, read_only, id: name } = disk;
        let length = file.seek(SeekFrom::End(0));
        let length = length.map_err(|source| DeviceError::DiskLength { id: name.clone(), source })?;
        let sectors = length / SECTOR_BYTES;
        let mut id = [0; ID_BYTES];
        let count = name.len().min(ID_BYTES);
        id[..count].copy_from_slice(&name.as_bytes()[..count]);
        Ok(Self {
            disk: Arc::new(file),
            geometry: Geometry { size_bytes: sectors * SECTOR_BYTES, read_only },
            id,
            config: config(sectors, read_only),
            slots: Vec::new(),
            in_flight: 0,
            stalled: false,
            read_cached: true,
        })
    }

    /// Whether reads may be answered from the page cache without the ring (they may, by default).
    pub fn set_read_cached(&mut self, allowed: bool) {
        self.read_cached = allowed;
    }

    fn start(&mut self, chain: Chain, host: &mut Host<'_>) -> Result<(), Fault> {
        let head = chain.head;
        let Some((status, action)) = parse(chain, host.mem, self.geometry) else {
            // Nowhere to put a status: all the driver gets is its buffer.
            return push(host, head, 0);
        };
        let mut reply = Reply { head, status, data_bytes: 0 };
        match action {
            Action::Read { offset, buffers } => self.read(reply, offset, buffers, host)?,
            Action::Write { offset, buffers } => {
                reply.data_bytes = buffers.len() as u64;
                if buffers.is_empty() {
                    return self.finish(reply, Work::Write, answer::OK, host);
                }
                let token = self.track(reply, Work::Write, offset);
                host.ops.push(Op::Write { token, file: Arc::clone(&self.disk), buffers, offset });
            }
            Action::Flush if self.geometry.read_only => self.finish(reply, Work::Other, answer::OK, host)?,
            Action::Flush => {
                let token = self.track(reply, Work::Other, 0);
                host.ops.push(Op::Sync { token, file: Arc::clone(&self.disk) });
            }
            Action::Allocate { mode, offset, len } => {
                let token = self.track(reply, Work::Other, offset);
                host.ops.push(Op::Allocate { token, file: Arc::clone(&self.disk), mode, offset, len });
            }
            Action::Identify { into } => self.identify(reply, &into, host)?,
            Action::Unsupported => self.finish(reply, Work::Other, answer::UNSUPPORTED, host)?,
            Action::Refuse => self.finish(reply, Work::Other, answer::IO_ERROR, host)?,
        }
        Ok(())
    }

    fn read(
        &mut self,
        mut reply: Reply,
        mut offset: u64,
        mut buffers: GuestBuffers,
        host: &mut Host<'_>,
    ) -> Result<(), Fault> {
        reply.data_bytes = buffers.len() as u64;
        if self.read_cached && !buffers.is_empty() {
            // An error here is no error yet: EAGAIN (not cached), EOPNOTSUPP (file system).
            let count = buffers.read_cached(&self.disk, offset).unwrap_or(0);
            buffers.advance(count);
            offset += count as u64;
        }
        if buffers.is_empty() {
            host.counters.block_cached.add(1);
            return self.finish(reply, Work::Read, answer::OK, host);
        }
        let token = self.track(reply, Work::Read, offset);
        host.ops.push(Op::Read { token, file: Arc::clone(&self.disk), buffers, offset });
        Ok(())
    }

    fn identify(
        &self,
        mut reply: Reply,
        into: &[(GuestAddress, u32)],
        host: &mut Host<'_>,
    ) -> Result<(), Fault> {
        let mut rest = &self.id[..];
        let mut fits = true;
        for &(addr, len) in into {
            let (part, left) = rest.split_at(rest.len().min(usize::try_from(len).unwrap_or(usize::MAX)));
            fits &= host.mem.write_slice(part, addr).is_ok();
            rest = left;
        }
        reply.data_bytes = (ID_BYTES - rest.len()) as u64;
        let status = if fits { answer::OK } else { answer::IO_ERROR };
        self.finish(reply, Work::Read, status, host)
    }

    fn track(&mut self, reply: Reply, work: Work, offset: u64) -> u32 {
        let request = InFlight { reply, work, offset, retries: 0, abandoned: false };
        self.in_flight += 1;
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(request);
        // At most a queue's length.
        slot as u32
    }

    /// Writes the status and gives the chain back.
    fn finish(&self, reply: Reply, work: Work, status: u8, host: &mut Host<'_>) -> Result<(), Fault> {
        host.counters.block_requests.add(1);
        let mut written = 1;
        match work {
            Work::Read if status == answer::OK => {
                host.counters.block_read_bytes.add(reply.data_bytes);
                // used.len is 32 bits wide and advisory to Linux.
                written = u32::try_from(reply.data_bytes).map_or(u32::MAX, |data| data.saturating_add(1));
            }
            Work::Write if status == answer::OK => host.counters.block_written_bytes.add(reply.data_bytes),
            _ => {}
        }
        if host.mem.write_obj(status, reply.status).is_err() {
            written = 0;
        }
        push(host, reply.head, written)
    }

    /// Handles the outcome of a ring operation; `None` if the request goes on.
    fn outcome(&mut self, request: &mut InFlight, done: Done, ops: &mut Vec<Op>) -> Option<u8> {
        let Done { token, result, buffers, .. } = done;
        let Ok(count) = usize::try_from(result) else {
            return match (-result, buffers) {
                (libc::EAGAIN | libc::EINTR, Some(buffers)) if request.retries < MAX_RETRIES => {
                    request.retries += 1;
                    ops.push(self.again(token, request, buffers));
                    None
                }
                (libc::EOPNOTSUPP, None) => Some(answer::UNSUPPORTED),
                _ => Some(answer::IO_ERROR),
            };
        };
        let Some(mut buffers) = buffers else {
            return Some(answer::OK);
        };
        buffers.advance(count);
        if buffers.is_empty() {
            Some(answer::OK)
        } else if count == 0 {
            // The file has become shorter than the disk.
            Some(answer::IO_ERROR)
        } else {
            request.offset += count as u64;
            ops.push(self.again(token, request, buffers));
            None
        }
    }

    fn again(&self, token: u32, request: &InFlight, buffers: GuestBuffers) -> Op {
        let (file, offset) = (Arc::clone(&self.disk), request.offset);
        match request.work {
            Work::Write => Op::Write { token, file, buffers, offset },
            Work::Read | Work::Other => Op::Read { token, file, buffers, offset },
        }
    }
}

impl Device for Block {
    const TYPE: u32 = 2;
    const QUEUE_SIZES: &'static [u16] = &[QUEUE_SIZE];

    fn features(&self) -> u64 {
        let by_access = if self.geometry.read_only { F_RO } else { F_FLUSH | F_DISCARD | F_WRITE_ZEROES };
        F_SEG_MAX | by_access
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn service(&mut self, index: usize, host: &mut Host<'_>) -> Result<Turn, Fault> {
        let mem = host.mem;
        self.stalled = false;
        let mut budget = QUEUE_SIZE;
        loop {
            let Some(queue) = host.queue(index) else {
                return Ok(Turn::Idle);
            };
            let most = usize::from(queue.size());
            queue.mute(mem)?;
            loop {
                if self.in_flight >= most {
                    self.stalled = true;
                    return Ok(Turn::Idle);
                }
                if budget == 0 {
                    return Ok(Turn::More);
                }
                budget -= 1;
                let Some(chain) = host.queue(index).map(|queue| queue.pop(mem)).transpose()?.flatten() else {
                    break;
                };
                self.start(chain, host)?;
            }
            if !host.queue(index).map(|queue| queue.listen(mem)).transpose()?.unwrap_or(false) {
                return Ok(Turn::Idle);
            }
        }
    }

    fn complete(&mut self, done: Done, host: &mut Host<'_>) -> Result<Turn, Fault> {
        let slot = usize::try_from(done.token).unwrap_or(usize::MAX);
        let Some(mut request) = self.slots.get_mut(slot).and_then(Option::take) else {
            return Ok(Turn::Idle);
        };
        let outcome =
            if request.abandoned { Some(answer::OK) } else { self.outcome(&mut request, done, host.ops) };
        let Some(status) = outcome else {
            self.slots[slot] = Some(request);
            return Ok(Turn::Idle);
        };
        self.in_flight -= 1;
        if !request.abandoned && host.queue(0).is_some() {
            self.finish(request.reply, request.work, status, host)?;
        }
        Ok(if self.stalled { Turn::More } else { Turn::Idle })
    }

    fn reset(&mut self, _ops: &mut Vec<Op>) {
        self.stalled = false;
        self.slots.iter_mut().flatten().for_each(|request| request.abandoned = true);
    }

    fn in_flight(&self) -> usize {
        self.in_flight
    }
}

fn push(host: &mut Host<'_>, head: u16, written: u32) -> Result<(), Fault> {
    let mem = host.mem;
    host.queue(0).map_or(Ok(()), |queue| queue.push_used(mem, head, written))
}

fn config(sectors: u64, read_only: bool) -> [u8; CONFIG_BYTES] {
    let mut bytes = [0; CONFIG_BYTES];
    bytes[0..8].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    bytes[34..36].copy_from_slice(&1u16.to_le_bytes());
    if !read_only {
        let [most, one, align] = [MAX_DISCARD_SECTORS, 1, 8].map(u32::to_le_bytes);
        bytes[36..40].copy_from_slice(&most);
        bytes[40..44].copy_from_slice(&one);
        bytes[44..48].copy_from_slice(&align);
        bytes[48..52].copy_from_slice(&most);
        bytes[52..56].copy_from_slice(&one);
        bytes[56] = 1;
    }
    bytes
}
