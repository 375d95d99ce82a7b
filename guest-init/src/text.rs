//! Short texts for people, in fixed memory. Pure.

use core::fmt::{self, Write};

use guest_init::TEXT_MAX_BYTES;

/// A text that is cut where its memory ends.
pub(crate) struct Text {
    bytes: [u8; TEXT_MAX_BYTES],
    len: usize,
}

impl Text {
    pub(crate) const fn new() -> Text {
        Text { bytes: [0; TEXT_MAX_BYTES], len: 0 }
    }

    pub(crate) fn add(&mut self, what: fmt::Arguments<'_>) {
        // Never an error: what does not fit is left out.
        let _ = self.write_fmt(what);
    }

    pub(crate) fn add_bytes(&mut self, bytes: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let len = bytes.len().min(room.len());
        room[..len].copy_from_slice(&bytes[..len]);
        self.len += len;
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Text {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.add_bytes(text.as_bytes());
        Ok(())
    }
}
