//! Reading and writing the fields of a payload. Pure: it may touch only the bytes it is handed.

use core::ffi::CStr;

use super::{Header, Kind, WireError};
use crate::{HEADER_BYTES, PAYLOAD_MAX_BYTES};

/// Takes fields off the front of a payload; every way off the end is an error.
pub(crate) struct Reader<'a> {
    kind: Kind,
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(kind: Kind, payload: &'a [u8]) -> Self {
        Reader { kind, rest: payload }
    }

    pub(crate) fn bytes(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        let (head, rest) = self.rest.split_at_checked(len).ok_or(WireError::Truncated { kind: self.kind })?;
        self.rest = rest;
        Ok(head)
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self.rest.split_first_chunk().ok_or(WireError::Truncated { kind: self.kind })?;
        self.rest = rest;
        Ok(*head)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    pub(crate) fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A length, that many bytes, and a NUL: the receiver can hand the bytes to execve as they are.
    pub(crate) fn string(&mut self) -> Result<&'a CStr, WireError> {
        let len = self.u32()? as usize;
        let bytes = self.bytes(len.saturating_add(1))?;
        CStr::from_bytes_with_nul(bytes).map_err(|_| WireError::BadString { kind: self.kind })
    }

    pub(crate) fn strings(&mut self, count: u32) -> Result<Strings<'a>, WireError> {
        let whole = self.rest;
        for _ in 0..count {
            self.string()?;
        }
        let used = whole.len() - self.rest.len();
        Ok(Strings { count, raw: &whole[..used] })
    }

    /// Everything that is left.
    pub(crate) fn remainder(&mut self) -> &'a [u8] {
        core::mem::take(&mut self.rest)
    }

    pub(crate) fn finish(self) -> Result<(), WireError> {
        match self.rest.len() {
            0 => Ok(()),
            bytes => Err(WireError::Trailing { kind: self.kind, bytes }),
        }
    }
}

/// A list of NUL-terminated strings inside a frame, already checked: iterating copies nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Strings<'a> {
    count: u32,
    raw: &'a [u8],
}

impl<'a> Strings<'a> {
    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count as usize
    }

    pub(crate) fn raw(&self) -> &'a [u8] {
        self.raw
    }

    /// The strings, in order.
    pub fn iter(&self) -> impl Iterator<Item = &'a CStr> + use<'a> {
        // The kind only names the frame in an error, and there is none: the bytes were checked.
        let mut reader = Reader::new(Kind::Exec, self.raw);
        (0..self.count).map_while(move |_| reader.string().ok())
    }
}

/// Puts a frame together in the caller's buffer; the header goes in last, when the length is known.
pub(crate) struct Writer<'b> {
    out: &'b mut [u8],
    at: usize,
}

impl<'b> Writer<'b> {
    pub(crate) fn new(out: &'b mut [u8]) -> Self {
        Writer { out, at: HEADER_BYTES }
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) -> Result<(), WireError> {
        let end = self.at.saturating_add(bytes.len());
        let room = self.out.len();
        if end > HEADER_BYTES + PAYLOAD_MAX_BYTES {
            return Err(WireError::TooLong { len: end - HEADER_BYTES, limit: PAYLOAD_MAX_BYTES });
        }
        let Some(place) = self.out.get_mut(self.at..end) else {
            return Err(WireError::NoRoom { needed: end, room });
        };
        place.copy_from_slice(bytes);
        self.at = end;
        Ok(())
    }

    pub(crate) fn u8(&mut self, value: u8) -> Result<(), WireError> {
        self.bytes(&[value])
    }

    pub(crate) fn u16(&mut self, value: u16) -> Result<(), WireError> {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u32(&mut self, value: u32) -> Result<(), WireError> {
        self.bytes(&value.to_le_bytes())
    }

    pub(crate) fn u64(&mut self, value: u64) -> Result<(), WireError> {
        self.bytes(&value.to_le_bytes())
    }

    /// Counterpart of [`Reader::string`]; `bytes` without a NUL.
    pub(crate) fn string(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), WireError> {
        if bytes.contains(&0) {
            return Err(WireError::BadString { kind });
        }
        self.u32(length(bytes)?)?;
        self.bytes(bytes)?;
        self.u8(0)
    }

    /// Writes the header and says how long the frame is.
    pub(crate) fn finish(self, kind: Kind, flags: u8, stream: u32) -> Result<usize, WireError> {
        let room = self.out.len();
        let Some(place) = self.out.first_chunk_mut::<HEADER_BYTES>() else {
            return Err(WireError::NoRoom { needed: HEADER_BYTES, room });
        };
        let len = (self.at - HEADER_BYTES) as u32;
        *place = Header { kind, flags, stream, len }.to_bytes();
        Ok(self.at)
    }
}

/// A length that fits the wire.
pub(crate) fn length(bytes: &[u8]) -> Result<u32, WireError> {
    at_most(bytes, PAYLOAD_MAX_BYTES).map(|bytes| bytes.len() as u32)
}

/// The bytes, if they are no more than `limit`.
pub(crate) fn at_most(bytes: &[u8], limit: usize) -> Result<&[u8], WireError> {
    if bytes.len() > limit { Err(WireError::TooLong { len: bytes.len(), limit }) } else { Ok(bytes) }
}
