//! What a block request chain asks for (virtio 1.2 §5.2.6), bounds-checked.
//!
//! The framing is the driver's choice (§2.7.4): header, data and status may share descriptors or be spread
//! over many. Everything read from guest memory is read once.

use std::sync::Arc;

use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::GuestMemory;
use crate::devices::virtqueue::Chain;
use crate::event_loop::ring::GuestBuffers;

pub(super) const SECTOR_BYTES: u64 = 512;
const HEADER_BYTES: usize = 16;
/// One segment of a discard or write-zeroes request.
const SEGMENT_BYTES: usize = 16;

mod kind {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
    pub(super) const DISCARD: u32 = 11;
    pub(super) const WRITE_ZEROES: u32 = 13;
}

type Ranges = Vec<(GuestAddress, u32)>;

/// What to do for the driver.
#[derive(Debug)]
pub(super) enum Action {
    Read {
        offset: u64,
        buffers: GuestBuffers,
    },
    Write {
        offset: u64,
        buffers: GuestBuffers,
    },
    Flush,
    Identify {
        into: Ranges,
    },
    Allocate {
        mode: i32,
        offset: u64,
        len: u64,
    },
    /// Answer UNSUPP.
    Unsupported,
    /// Answer IOERR.
    Refuse,
}

/// The disk as far as a request can be wrong about it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Geometry {
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
}

/// Where the status byte goes and what to do; `None` if the chain has no room for a status.
pub(super) fn parse(
    mut chain: Chain,
    mem: &Arc<GuestMemory>,
    disk: Geometry,
) -> Option<(GuestAddress, Action)> {
    if chain.broken {
        return None;
    }
    let status = take_status(&mut chain.writable)?;
    let action = match read_front::<HEADER_BYTES>(&mut chain.readable, mem) {
        Some(header) => action(header, chain, mem, disk),
        None => Action::Refuse,
    };
    Some((status, action))
}

fn action(header: [u8; HEADER_BYTES], mut chain: Chain, mem: &Arc<GuestMemory>, disk: Geometry) -> Action {
    let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
    let sector = u64::from_le_bytes(sector);
    match u32::from_le_bytes([k0, k1, k2, k3]) {
        kind::IN => match transfer(&chain.writable, sector, mem, disk) {
            Some((offset, buffers)) => Action::Read { offset, buffers },
            None => Action::Refuse,
        },
        kind::OUT if disk.read_only => Action::Refuse,
        kind::OUT => match transfer(&chain.readable, sector, mem, disk) {
            Some((offset, buffers)) => Action::Write { offset, buffers },
            None => Action::Refuse,
        },
        kind::FLUSH => Action::Flush,
        kind::GET_ID => Action::Identify { into: chain.writable },
        kind::DISCARD | kind::WRITE_ZEROES if disk.read_only => Action::Unsupported,
        kind @ (kind::DISCARD | kind::WRITE_ZEROES) => {
            let segment = read_front::<SEGMENT_BYTES>(&mut chain.readable, mem);
            // max_discard_seg and max_write_zeroes_seg are 1.
            match segment.filter(|_| chain.readable.iter().all(|&(_, len)| len == 0)) {
                Some(segment) => allocate(kind, segment, disk),
                None => Action::Refuse,
            }
        }
        _ => Action::Unsupported,
    }
}

/// §5.2.6: a whole number of sectors, all inside the disk.
fn transfer(
    ranges: &[(GuestAddress, u32)],
    sector: u64,
    mem: &Arc<GuestMemory>,
    disk: Geometry,
) -> Option<(u64, GuestBuffers)> {
    let buffers = GuestBuffers::new(mem, ranges).ok()?;
    let len = u64::try_from(buffers.len()).ok()?;
    let offset = inside(sector, len, disk)?;
    len.is_multiple_of(SECTOR_BYTES).then_some((offset, buffers))
}

fn inside(sector: u64, len: u64, disk: Geometry) -> Option<u64> {
    let offset = sector.checked_mul(SECTOR_BYTES)?;
    (offset.checked_add(len)? <= disk.size_bytes).then_some(offset)
}

fn allocate(kind: u32, segment: [u8; SEGMENT_BYTES], disk: Geometry) -> Action {
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let len = u64::from(u32::from_le_bytes([n0, n1, n2, n3])) * SECTOR_BYTES;
    // Bit 0 is "unmap", reserved for discards; other bits are unknown (§5.2.6.2: UNSUPP).
    let unmap = match (kind, u32::from_le_bytes(flags)) {
        (kind::DISCARD, 0) | (kind::WRITE_ZEROES, 1) => true,
        (kind::WRITE_ZEROES, 0) => false,
        _ => return Action::Unsupported,
    };
    let Some(offset) = inside(sector, len, disk).filter(|_| len > 0) else {
        return Action::Refuse;
    };
    let how = if unmap { libc::FALLOC_FL_PUNCH_HOLE } else { libc::FALLOC_FL_ZERO_RANGE };
    Action::Allocate { mode: how | libc::FALLOC_FL_KEEP_SIZE, offset, len }
}

/// Cuts the status byte off: the last device-writable byte (§5.2.6).
fn take_status(writable: &mut Ranges) -> Option<GuestAddress> {
    while writable.last().is_some_and(|&(_, len)| len == 0) {
        writable.pop();
    }
    let (addr, len) = writable.last_mut()?;
    *len -= 1;
    addr.0.checked_add(u64::from(*len)).map(GuestAddress)
}

/// Cuts the first `N` bytes off and reads them.
fn read_front<const N: usize>(ranges: &mut Ranges, mem: &GuestMemory) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    let mut filled = 0;
    for (addr, len) in ranges.iter_mut() {
        let count = usize::try_from(*len).ok()?.min(N - filled);
        mem.read_slice(&mut bytes[filled..filled + count], *addr).ok()?;
        filled += count;
        // `count` came from a u32.
        *len -= count as u32;
        addr.0 = addr.0.checked_add(count as u64)?;
    }
    (filled == N).then_some(bytes)
}
