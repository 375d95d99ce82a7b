//! The console: what the guest kernel prints, kept in a ring of fixed size so that a chatty or hostile guest
//! costs no more memory than a quiet one.

use std::collections::VecDeque;

/// Bytes of guest console output that are kept; older ones make room.
pub const RING_BYTES: usize = 64 << 10;

/// First port of the 16550 UART whose transmit side the early console drives.
pub const PORT: u16 = 0x3f8;
const PORTS: u16 = 8;
const LINE_STATUS: u16 = 5;
/// Transmitter holding register and transmitter empty: always ready, so the guest never waits.
const READY: u8 = 0x60;

/// The ring and, when asked for, a copy to standard error.
#[derive(Debug, Default)]
pub struct Console {
    ring: VecDeque<u8>,
    echo: bool,
}

impl Console {
    /// An empty console; with `echo` the guest's output also goes to standard error as it comes.
    #[must_use]
    pub fn new(echo: bool) -> Self {
        Self { ring: VecDeque::new(), echo }
    }

    /// Does this console answer `port`?
    #[must_use]
    pub fn owns(port: u16) -> bool {
        (PORT..PORT + PORTS).contains(&port)
    }

    /// A port write of the guest. Only the transmit register keeps anything.
    pub fn write(&mut self, port: u16, data: &[u8]) {
        if port != PORT {
            return;
        }
        for &byte in data {
            if self.ring.len() == RING_BYTES {
                self.ring.pop_front();
            }
            self.ring.push_back(byte);
        }
        if self.echo {
            use std::io::Write as _;
            // A closed standard error must not hurt the guest.
            let _ = std::io::stderr().write_all(data);
        }
    }

    /// A port read of the guest.
    pub fn read(&self, port: u16, data: &mut [u8]) {
        data.fill(if port == PORT + LINE_STATUS { READY } else { 0 });
    }

    /// The text kept, oldest first.
    #[must_use]
    pub fn text(&self) -> String {
        let bytes: Vec<u8> = self.ring.iter().copied().filter(|b| *b != b'\r').collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The reason of the last kernel panic in the ring, if there is one.
    #[must_use]
    pub fn panic_reason(&self) -> Option<String> {
        const MARK: &str = "Kernel panic - not syncing: ";
        let text = self.text();
        let at = text.rfind(MARK)? + MARK.len();
        Some(text[at..].lines().next().unwrap_or_default().trim().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_newest_bytes_and_no_more() {
        let mut console = Console::new(false);
        for i in 0..RING_BYTES + 10 {
            console.write(PORT, &[b'a' + (i % 26) as u8]);
        }
        assert_eq!(console.text().len(), RING_BYTES);
        assert_eq!(console.text().as_bytes()[0], b'a' + 10);
    }

    #[test]
    fn a_panic_is_found_with_its_reason() {
        let mut console = Console::new(false);
        console.write(PORT, b"[ 1.0] Kernel panic - not syncing: Attempted to kill init!\r\nmore\r\n");
        assert_eq!(console.panic_reason().as_deref(), Some("Attempted to kill init!"));
        assert_eq!(Console::new(false).panic_reason(), None);
    }

    #[test]
    fn the_transmitter_is_always_ready() {
        let mut data = [0];
        Console::new(false).read(PORT + LINE_STATUS, &mut data);
        assert_eq!(data, [READY]);
    }
}
