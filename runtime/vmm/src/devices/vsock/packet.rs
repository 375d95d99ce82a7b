//! The vsock packet header (virtio 1.2 §5.10.6), as plain values read from the guest once.
//!
//! The `virtio-vsock` crate's packet type wants the payload in one descriptor; the framing is the
//! driver's choice (§2.7.4) and Linux spreads large packets over pages, so chains are read here.

use vm_memory::{Bytes as _, GuestAddress};

use crate::devices::GuestMemory;

/// Bytes of a header.
pub const HEADER_BYTES: usize = 44;
/// The host's CID, §5.10.4.
pub const HOST_CID: u64 = 2;
/// The largest payload put into one packet, as in Linux.
pub const MAX_PAYLOAD_BYTES: usize = 64 * 1024;
/// VIRTIO_VSOCK_TYPE_STREAM.
pub const STREAM: u16 = 1;

/// Operations, §5.10.6.
pub mod op {
    #![allow(missing_docs)]
    pub const REQUEST: u16 = 1;
    pub const RESPONSE: u16 = 2;
    pub const RST: u16 = 3;
    pub const SHUTDOWN: u16 = 4;
    pub const RW: u16 = 5;
    pub const CREDIT_UPDATE: u16 = 6;
    pub const CREDIT_REQUEST: u16 = 7;
}

/// SHUTDOWN flag: the sender will receive no more.
pub const NO_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender will send no more.
pub const NO_SEND: u32 = 2;

/// A packet header.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    /// Decodes the little-endian wire form.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// Encodes to the little-endian wire form.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The first `N` bytes of `rest`; the callers above take 44 in all from 44.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let mut part = [0; N];
    if let Some((head, tail)) = rest.split_first_chunk::<N>() {
        part = *head;
        *rest = tail;
    }
    part
}

/// Reads a header from the front of `ranges` and cuts it off them.
pub(super) fn read_header(ranges: &mut [(GuestAddress, u32)], mem: &GuestMemory) -> Option<Header> {
    let mut bytes = [0; HEADER_BYTES];
    let mut filled = 0;
    for (addr, len) in ranges {
        let count = usize::try_from(*len).ok()?.min(HEADER_BYTES - filled);
        mem.read_slice(&mut bytes[filled..filled + count], *addr).ok()?;
        filled += count;
        // At most 44.
        *len -= count as u32;
        addr.0 = addr.0.checked_add(count as u64)?;
    }
    (filled == HEADER_BYTES).then(|| Header::from_bytes(&bytes))
}

/// Writes a header to the front of `ranges`. `None`: it does not fit or they lie outside memory.
pub(super) fn write_header(header: &Header, ranges: &[(GuestAddress, u32)], mem: &GuestMemory) -> Option<()> {
    let bytes = header.to_bytes();
    let mut rest = &bytes[..];
    for &(addr, len) in ranges {
        let (part, left) = rest.split_at(rest.len().min(usize::try_from(len).ok()?));
        mem.write_slice(part, addr).ok()?;
        rest = left;
    }
    rest.is_empty().then_some(())
}
