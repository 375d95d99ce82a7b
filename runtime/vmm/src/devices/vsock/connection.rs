//! One vsock connection: credit in both directions, and who has said that they are done.
//!
//! ```text
//!   host asks:  Connecting --RESPONSE--> Open          guest asks:  --REQUEST--> Open
//!                    |RST                  |
//!                 refused                  | guest SHUTDOWN(both) or RST
//!                                          v
//!                                    Draining --(outbox empty)--> gone
//! ```
//!
//! Bytes from the guest go to the socket at once; what it does not take waits in `outbox`, which
//! the credit we advertised bounds to [`BUF_ALLOC`]. Bytes to the guest never wait here: they
//! stay in the socket until the guest has credit and a buffer.

use std::collections::VecDeque;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use super::packet::{Header, NO_RECEIVE, NO_SEND, STREAM};
use crate::devices::mmio::StreamState;
use crate::event_loop::ring::{peek_bytes, send_bytes};

/// Receive buffer we advertise for each connection, and the most we ever hold for it.
pub const BUF_ALLOC: u32 = 256 * 1024;

/// Where the other half of a host-initiated connection is sent.
pub type ConnectReply = Sender<io::Result<UnixStream>>;

/// What stage a connection is in.
#[derive(Debug)]
pub(super) enum Phase {
    /// REQUEST is to be sent or has been; the guest has not answered.
    Connecting(ConnectReply),
    /// Established.
    Open,
    /// The guest is gone; the host has yet to take what it sent.
    Draining,
}

/// Packets that are to be sent as soon as the guest gives a buffer.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Due {
    pub(super) request: bool,
    pub(super) response: bool,
    pub(super) credit: bool,
    pub(super) shutdown: bool,
}

#[derive(Debug)]
pub(super) struct Connection {
    /// Names the connection in tokens; never used twice in a device's life.
    pub(super) id: u32,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    pub(super) phase: Phase,
    pub(super) due: Due,
    /// In the device's queue of connections with something to send.
    pub(super) queued: bool,
    /// The device's end; `None` while connecting.
    pub(super) stream: Option<Arc<UnixStream>>,
    /// The socket may have bytes (or an end) for the guest.
    pub(super) readable: bool,
    /// A POLLOUT is under way.
    pub(super) awaits_space: bool,
    outbox: VecDeque<u8>,
    // Credit towards the guest, §5.10.6.3: free-running counters.
    peer_buf_alloc: u32,
    peer_fwd_cnt: u32,
    sent_bytes: u32,
    // Credit towards us.
    received_bytes: u32,
    forwarded_bytes: u32,
    advertised_bytes: u32,
    /// The host will send no more: its end is closed for writing.
    pub(super) host_ended: bool,
    /// The host takes no more: its end is closed for reading.
    host_deaf: bool,
    shutdown_sent: u32,
    guest_ended: bool,
    guest_deaf: bool,
}

impl Connection {
    pub(super) fn new(id: u32, host_port: u32, guest_port: u32, phase: Phase) -> Self {
        Self {
            id,
            host_port,
            guest_port,
            phase,
            due: Due::default(),
            queued: false,
            stream: None,
            readable: false,
            awaits_space: false,
            outbox: VecDeque::new(),
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            sent_bytes: 0,
            received_bytes: 0,
            forwarded_bytes: 0,
            advertised_bytes: 0,
            host_ended: false,
            host_deaf: false,
            shutdown_sent: 0,
            guest_ended: false,
            guest_deaf: false,
        }
    }

    /// A connection as it was saved, its host's end not made yet.
    pub(super) fn restored(id: u32, saved: &StreamState) -> Self {
        let mut connection = Self::new(id, saved.host_port, saved.guest_port, Phase::Open);
        connection.peer_buf_alloc = saved.peer_buf_alloc;
        connection.peer_fwd_cnt = saved.peer_fwd_cnt;
        connection.sent_bytes = saved.sent_bytes;
        connection.received_bytes = saved.received_bytes;
        connection.forwarded_bytes = saved.forwarded_bytes;
        connection.advertised_bytes = saved.advertised_bytes;
        connection.due.credit = saved.credit_due;
        connection.guest_ended = saved.guest_ended;
        connection.guest_deaf = saved.guest_deaf;
        connection.outbox = saved.to_host.iter().copied().collect();
        connection
    }

    /// What to save, if it is a connection that can go on. What the host's end has been given is the host's
    /// to save.
    pub(super) fn state(&self) -> io::Result<Option<StreamState>> {
        let Some(stream) = self.stream.as_ref().filter(|_| {
            matches!(self.phase, Phase::Open) && !self.host_deaf && !self.host_ended && !self.due.response
        }) else {
            return Ok(None);
        };
        Ok(Some(StreamState {
            host_port: self.host_port,
            guest_port: self.guest_port,
            peer_buf_alloc: self.peer_buf_alloc,
            peer_fwd_cnt: self.peer_fwd_cnt,
            sent_bytes: self.sent_bytes,
            received_bytes: self.received_bytes,
            forwarded_bytes: self.forwarded_bytes,
            advertised_bytes: self.advertised_bytes,
            credit_due: self.due.credit,
            guest_ended: self.guest_ended,
            guest_deaf: self.guest_deaf,
            to_host: self.outbox.iter().copied().collect(),
            to_guest: peek_bytes(&**stream)?,
        }))
    }

    /// Whether this is the live connection of these ports.
    pub(super) fn has_ports(&self, host_port: u32, guest_port: u32) -> bool {
        !matches!(self.phase, Phase::Draining) && self.host_port == host_port && self.guest_port == guest_port
    }

    /// Both ends have been told that the host is gone; only the guest's RST is missing.
    pub(super) fn lingers(&self) -> bool {
        self.shutdown_sent == NO_RECEIVE | NO_SEND && self.outbox.is_empty()
    }

    /// Bytes held for the host.
    pub(super) fn held_bytes(&self) -> usize {
        self.outbox.len()
    }

    /// Every packet from the guest carries its buffer space (§5.10.6.3).
    pub(super) fn learn_credit(&mut self, header: &Header) {
        self.peer_buf_alloc = header.buf_alloc;
        self.peer_fwd_cnt = header.fwd_cnt;
    }

    /// Bytes we may send. A guest that claims nonsense gets nothing.
    pub(super) fn credit(&self) -> usize {
        let in_flight = self.sent_bytes.wrapping_sub(self.peer_fwd_cnt);
        usize::try_from(self.peer_buf_alloc.saturating_sub(in_flight)).unwrap_or(0)
    }

    pub(super) fn note_sent(&mut self, count: u32) {
        self.sent_bytes = self.sent_bytes.wrapping_add(count);
    }

    /// Books a payload from the guest; `false` if it is more than we ever allowed.
    #[must_use]
    pub(super) fn note_received(&mut self, count: u32) -> bool {
        let held = self.received_bytes.wrapping_sub(self.forwarded_bytes);
        let fits = held.checked_add(count).is_some_and(|held| held <= BUF_ALLOC);
        if fits {
            self.received_bytes = self.received_bytes.wrapping_add(count);
        }
        fits
    }

    /// Books bytes that the host has taken, and decides whether the guest must be told now.
    ///
    /// An update costs the guest an interrupt, so it is sent only when the guest is about to run
    /// out: it believes that a quarter is left, and we can give at least a quarter. When all
    /// is forwarded that is always so, so a waiting guest is always woken.
    pub(super) fn note_forwarded(&mut self, count: usize) {
        // Never more than was received, which fits.
        self.forwarded_bytes = self.forwarded_bytes.wrapping_add(count as u32);
        let believed_used = self.received_bytes.wrapping_sub(self.advertised_bytes);
        let gain = self.forwarded_bytes.wrapping_sub(self.advertised_bytes);
        if believed_used >= BUF_ALLOC / 4 * 3 && gain >= BUF_ALLOC / 4 {
            self.due.credit = true;
        }
    }

    /// A header for the next packet; it carries our credit, so no separate update is due.
    pub(super) fn header(&mut self, host_cid: u64, guest_cid: u64, op: u16) -> Header {
        self.advertised_bytes = self.forwarded_bytes;
        self.due.credit = false;
        Header {
            src_cid: host_cid,
            dst_cid: guest_cid,
            src_port: self.host_port,
            dst_port: self.guest_port,
            kind: STREAM,
            op,
            buf_alloc: BUF_ALLOC,
            fwd_cnt: self.forwarded_bytes,
            ..Header::default()
        }
    }

    /// Keeps bytes the socket did not take.
    pub(super) fn keep(&mut self, bytes: &[u8]) {
        self.outbox.extend(bytes);
    }

    /// Whether new bytes must queue behind older ones.
    pub(super) fn has_backlog(&self) -> bool {
        !self.outbox.is_empty()
    }

    /// Whether bytes for the host are of no use any more.
    pub(super) fn host_is_deaf(&self) -> bool {
        self.host_deaf
    }

    /// Whether bytes for the guest can be sent if there are any.
    pub(super) fn can_send(&self) -> bool {
        matches!(self.phase, Phase::Open)
            && self.readable
            && !self.host_ended
            && !self.guest_deaf
            && self.credit() > 0
    }

    /// Whether there is a packet to send, as far as can be known without reading the socket.
    pub(super) fn wants_to_send(&self) -> bool {
        let Due { request, response, credit, shutdown } = self.due;
        request || response || credit || shutdown || self.can_send()
    }

    /// Gives the socket what waits for it.
    pub(super) fn flush(&mut self) {
        while let (Some(stream), false) = (&self.stream, self.outbox.is_empty()) {
            let (front, _) = self.outbox.as_slices();
            match send_bytes(stream, front) {
                Ok(count) => {
                    self.outbox.drain(..count);
                    self.note_forwarded(count);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.note_deaf(),
            }
        }
        if self.guest_ended
            && let Some(stream) = &self.stream
        {
            // Fails only when the host is gone, which we notice otherwise.
            let _ = stream.shutdown(std::net::Shutdown::Write);
        }
    }

    /// The host's end takes no more bytes: what it has not taken is lost.
    pub(super) fn note_deaf(&mut self) {
        self.host_deaf = true;
        let lost = self.outbox.len();
        self.outbox = VecDeque::new();
        self.note_forwarded(lost);
        self.owe_shutdown();
    }

    /// The host's end sends no more bytes; `closed` if it is closed altogether.
    pub(super) fn note_ended(&mut self, closed: bool) {
        self.host_ended = true;
        self.host_deaf |= closed;
        self.owe_shutdown();
    }

    fn owe_shutdown(&mut self) {
        self.due.shutdown = matches!(self.phase, Phase::Open) && self.shutdown_flags() != self.shutdown_sent;
    }

    /// Flags of the SHUTDOWN that is due.
    pub(super) fn shutdown_flags(&self) -> u32 {
        let mut flags = 0;
        if self.host_deaf {
            flags |= NO_RECEIVE;
        }
        if self.host_ended {
            flags |= NO_SEND;
        }
        flags
    }

    pub(super) fn note_shutdown_sent(&mut self, flags: u32) {
        self.shutdown_sent = flags;
        self.due.shutdown = false;
    }

    /// SHUTDOWN from the guest. `true`: it is done with the connection in both directions.
    pub(super) fn guest_shuts_down(&mut self, flags: u32) -> bool {
        self.guest_ended |= flags & NO_SEND != 0;
        if flags & NO_RECEIVE != 0 && !self.guest_deaf {
            self.guest_deaf = true;
            if let Some(stream) = &self.stream {
                // The host's writes fail from now on; if it is gone there is nothing to tell.
                let _ = stream.shutdown(std::net::Shutdown::Read);
            }
        }
        self.guest_ended && self.guest_deaf
    }

    /// Whether the guest has said that it sends no more.
    pub(super) fn guest_has_ended(&self) -> bool {
        self.guest_ended
    }

    /// The guest is gone: only the outbox is left to do.
    pub(super) fn drain(&mut self) {
        self.phase = Phase::Draining;
        self.due = Due::default();
        self.guest_ended = true;
    }
}
