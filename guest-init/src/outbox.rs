//! Frames on their way to the host. Pure: it may touch only its own memory.
//!
//! Output is read from a pipe straight behind its header, and everything that one turn of the event loop
//! has made leaves in one send. Output may not use the last bytes: they are kept for the small
//! frames, of which each frame from the host causes at most one.

use guest_init::{FRAME_MAX_BYTES, HEADER_BYTES, Header, Kind, ToHost};

/// Most output in one frame: with its header it fits one vsock packet (64 KiB in Linux).
pub(crate) const CHUNK_BYTES: usize = 60 * 1024;
/// No output is read into less room than this, unless less is all that is wanted.
const CHUNK_MIN_BYTES: usize = 4096;
/// No small frame is larger (ExecFailed and Error with the longest text).
pub(crate) const SMALL_MAX_BYTES: usize = 320;
const RESERVE_BYTES: usize = 4096;
/// Memory that an outbox needs.
pub(crate) const OUTBOX_BYTES: usize = FRAME_MAX_BYTES + RESERVE_BYTES;

/// Bytes that wait to be sent.
pub(crate) struct Outbox<'m> {
    memory: &'m mut [u8; OUTBOX_BYTES],
    start: usize,
    end: usize,
}

impl<'m> Outbox<'m> {
    pub(crate) fn new(memory: &'m mut [u8; OUTBOX_BYTES]) -> Self {
        Outbox { memory, start: 0, end: 0 }
    }

    pub(crate) fn clear(&mut self) {
        self.start = 0;
        self.end = 0;
    }

    pub(crate) fn pending(&self) -> &[u8] {
        &self.memory[self.start..self.end]
    }

    pub(crate) fn sent(&mut self, len: usize) {
        self.start = (self.start + len).min(self.end);
        if self.start == self.end {
            self.clear();
        }
    }

    /// Is there room for any small frame?
    pub(crate) fn takes_small(&self) -> bool {
        OUTBOX_BYTES - (self.end - self.start) >= SMALL_MAX_BYTES
    }

    /// Is there room to read output?
    pub(crate) fn takes_output(&self) -> bool {
        OUTBOX_BYTES - (self.end - self.start) >= HEADER_BYTES + CHUNK_MIN_BYTES + RESERVE_BYTES
    }

    /// Adds a small frame, or says false if there is no room.
    pub(crate) fn put(&mut self, stream: u32, frame: &ToHost<'_>) -> bool {
        if !self.takes_small() {
            return false;
        }
        self.make_room(SMALL_MAX_BYTES);
        match frame.encode(stream, &mut self.memory[self.end..]) {
            Ok(len) => {
                self.end += len;
                true
            }
            Err(_) => false,
        }
    }

    /// Adds a frame of output that `read` puts in place; nothing is added if it fails or reads nothing.
    pub(crate) fn put_output<E>(
        &mut self,
        kind: Kind,
        stream: u32,
        most: usize,
        read: impl FnOnce(&mut [u8]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        let wanted = most.min(CHUNK_BYTES);
        self.make_room(HEADER_BYTES + wanted + RESERVE_BYTES);
        let at = self.end + HEADER_BYTES;
        let room = (OUTBOX_BYTES - RESERVE_BYTES).saturating_sub(at);
        let len = read(&mut self.memory[at..at + wanted.min(room)])?;
        if len > 0 {
            let header = Header { kind, flags: 0, stream, len: len as u32 };
            self.memory[self.end..at].copy_from_slice(&header.to_bytes());
            self.end = at + len;
        }
        Ok(len)
    }

    /// Moves what is left of a partly sent batch to the front, if there is too little room behind.
    fn make_room(&mut self, len: usize) {
        if self.start > 0 && OUTBOX_BYTES - self.end < len {
            self.memory.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn small_frames_fit_after_as_much_output_as_is_taken() {
        let mut memory = Box::new([0; OUTBOX_BYTES]);
        let mut outbox = Outbox::new(&mut memory);
        while outbox.takes_output() {
            outbox.put_output(Kind::Stdout, 1, usize::MAX, |space| Ok::<_, ()>(space.len())).unwrap();
        }
        let text = [b'x'; guest_init::TEXT_MAX_BYTES];
        let code = guest_init::ErrorCode::Refused;
        for _ in 0..RESERVE_BYTES / SMALL_MAX_BYTES {
            assert!(outbox.put(1, &ToHost::Error { code, text: &text }));
        }
        // What was sent makes room again, wherever it was.
        outbox.sent(CHUNK_BYTES);
        assert!(outbox.takes_output());
        assert_eq!(outbox.put_output(Kind::Stdout, 1, 5, |space| Ok::<_, ()>(space.len())), Ok(5));
    }

    #[test]
    fn a_read_of_nothing_leaves_no_frame() {
        let mut memory = Box::new([0; OUTBOX_BYTES]);
        let mut outbox = Outbox::new(&mut memory);
        assert_eq!(outbox.put_output(Kind::Stdout, 1, 10, |_| Ok::<_, ()>(0)), Ok(0));
        assert_eq!(outbox.put_output(Kind::Stdout, 1, 10, |_| Err(())), Err(()));
        assert!(outbox.pending().is_empty());
    }
}
