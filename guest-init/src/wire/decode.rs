//! Bytes in, frames out. Pure: it may touch only the buffer it was made with, whose size the
//! caller chose; nothing that arrives can make it larger.

use super::{Header, Kind, WireError};
use crate::{FRAME_MAX_BYTES, HEADER_BYTES};

/// A frame whose header was understood; its payload was not looked at yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// What it is.
    pub kind: Kind,
    /// Flags, by kind.
    pub flags: u8,
    /// The command it is about.
    pub stream: u32,
    /// The payload.
    pub payload: &'a [u8],
}

/// Cuts a stream of bytes into frames.
///
/// Fill it with [`space`](Self::space) and [`filled`](Self::filled) (no copy), or with
/// [`push`](Self::push); then take frames until there is none. After an error it stays in that
/// error: the stream has lost its frame boundaries and the connection is of no more use.
#[derive(Debug)]
pub struct Decoder<B> {
    buffer: B,
    start: usize,
    end: usize,
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Decoder<B> {
    /// A decoder that keeps its bytes in `buffer`, of at least [`FRAME_MAX_BYTES`].
    pub fn new(buffer: B) -> Result<Self, WireError> {
        match buffer.as_ref().len() {
            room if room < FRAME_MAX_BYTES => Err(WireError::NoRoom { needed: FRAME_MAX_BYTES, room }),
            _ => Ok(Decoder { buffer, start: 0, end: 0 }),
        }
    }

    /// Where to put the bytes that arrive next. Never empty once
    /// [`next_frame`](Self::next_frame) has said that there is no whole frame.
    pub fn space(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.buffer.as_ref().len() - self.start < FRAME_MAX_BYTES {
            // The frame that begins here might not fit behind what was already taken.
            self.buffer.as_mut().copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.buffer.as_mut()[self.end..]
    }

    /// Says that `len` bytes of [`space`](Self::space) were filled.
    pub fn filled(&mut self, len: usize) {
        self.end = self.end.saturating_add(len).min(self.buffer.as_ref().len());
    }

    /// Copies as many of `bytes` in as there is room for, and says how many.
    pub fn push(&mut self, bytes: &[u8]) -> usize {
        let space = self.space();
        let len = bytes.len().min(space.len());
        space[..len].copy_from_slice(&bytes[..len]);
        self.filled(len);
        len
    }

    /// The next whole frame, if there is one.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        let bytes = &self.buffer.as_ref()[self.start..self.end];
        let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let Header { kind, flags, stream, len } = Header::from_bytes(header)?;
        let Some(payload) = rest.get(..len as usize) else {
            return Ok(None);
        };
        self.start += HEADER_BYTES + payload.len();
        Ok(Some(Frame { kind, flags, stream, payload }))
    }

    /// The bytes that were not handed out as frames yet.
    pub fn pending(&self) -> &[u8] {
        &self.buffer.as_ref()[self.start..self.end]
    }

    /// Forgets all bytes, for a new connection.
    pub fn reset(&mut self) {
        self.start = 0;
        self.end = 0;
    }
}
