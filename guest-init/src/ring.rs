//! Stdin that a command has not taken yet. Pure: it may touch only its own memory.

use guest_init::INITIAL_WINDOW_BYTES;

const ROOM_BYTES: usize = INITIAL_WINDOW_BYTES as usize;

/// As many bytes as a stream's stdin window lets the host send. All-zero is the empty ring.
pub(crate) struct Ring {
    start: usize,
    len: usize,
    bytes: [u8; ROOM_BYTES],
}

/// More stdin than the host had credit for.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Overflow;

impl Ring {
    pub(crate) const ZERO: Ring = Ring { start: 0, len: 0, bytes: [0; ROOM_BYTES] };

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn room(&self) -> usize {
        ROOM_BYTES - self.len
    }

    pub(crate) fn len_u32(&self) -> u32 {
        self.len as u32
    }

    pub(crate) fn clear(&mut self) {
        self.start = 0;
        self.len = 0;
    }

    /// Takes all of `bytes`, or none.
    pub(crate) fn put(&mut self, bytes: &[u8]) -> Result<(), Overflow> {
        if bytes.len() > self.room() {
            return Err(Overflow);
        }
        let at = (self.start + self.len) % ROOM_BYTES;
        let first = bytes.len().min(ROOM_BYTES - at);
        self.bytes[at..at + first].copy_from_slice(&bytes[..first]);
        self.bytes[..bytes.len() - first].copy_from_slice(&bytes[first..]);
        self.len += bytes.len();
        Ok(())
    }

    /// The oldest bytes that lie in one piece.
    pub(crate) fn front(&self) -> &[u8] {
        &self.bytes[self.start..(self.start + self.len).min(ROOM_BYTES)]
    }

    /// Forgets the oldest `len` bytes. An empty ring begins anew, to touch the same memory again.
    pub(crate) fn consume(&mut self, len: usize) {
        let len = len.min(self.len);
        self.len -= len;
        self.start = if self.len == 0 { 0 } else { (self.start + len) % ROOM_BYTES };
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn bytes_leave_in_the_order_they_came_also_around_the_end() {
        let mut ring = Box::new(Ring::ZERO);
        let mut sent = 0u32;
        let mut seen = 0u32;
        for round in 1..200usize {
            let chunk: Vec<u8> = (0..round * 1500 % 100_000).map(|_| (sent, sent += 1).0 as u8).collect();
            while ring.put(&chunk).is_err() {
                let len = ring.front().len().min(70_001);
                for &byte in &ring.front()[..len] {
                    assert_eq!(byte, (seen, seen += 1).0 as u8);
                }
                ring.consume(len);
            }
        }
        assert_eq!(ring.room(), ROOM_BYTES - (sent - seen) as usize);
    }

    #[test]
    fn more_than_the_room_is_refused_whole() {
        let mut ring = Box::new(Ring::ZERO);
        assert_eq!(ring.put(&vec![7; ROOM_BYTES - 1]), Ok(()));
        assert_eq!(ring.put(&[1, 2]), Err(Overflow));
        assert_eq!(ring.put(&[1]), Ok(()));
        assert_eq!(ring.room(), 0);
    }
}
