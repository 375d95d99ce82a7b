//! virtio-vsock (virtio 1.2 §5.10): streams between host and guest, without vhost.
//!
//! The host's end of each connection is a Unix stream socket; this device moves bytes between its
//! own end and the guest's buffers, without a copy of its own unless the host is slow.
//!
//! What the guest can make us hold is bounded: [`MAX_CONNECTIONS`] connections with
//! [`BUF_ALLOC`] bytes each, and [`MAX_RESETS`] replies. A packet for a connection that does not
//! exist is answered with RST, a packet that makes no sense is ignored.
//!
//! Interrupts cost the guest dearly, so used TX buffers are given back in batches ([`Held`]), credit is
//! updated as late as possible, and the RX queue is small: Linux fills all of it at boot.

mod connection;
mod packet;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::Receiver;

use vm_memory::{Bytes as _, GuestAddress};

pub use self::connection::{BUF_ALLOC, ConnectReply};
use self::connection::{Connection, Phase};
pub use self::packet::{HEADER_BYTES, HOST_CID, Header, MAX_PAYLOAD_BYTES, NO_RECEIVE, NO_SEND, STREAM, op};
use self::packet::{read_header, write_header};
pub use self::table::{MAX_CONNECTIONS, MAX_RESETS};
use self::table::{Ports, Table};
use crate::devices::mmio::{Device, Done, State};
use crate::devices::virtqueue::{Chain, Fault, Host, Turn};
use crate::event_loop::ring::{GuestBuffers, Op, Pollable};

/// The guest's CID; the same in every microVM, so that snapshots need no rewriting.
pub const GUEST_CID: u64 = 3;

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;
/// Linux allocates a buffer for each RX entry at boot (4 KiB, or 32 KiB with vsock_rx=32), at thousands of instructions a
/// piece.
const RX_SIZE: u16 = 16;
const TX_SIZE: u16 = 128;
/// Linux posts eight event buffers.
const EVENT_SIZE: u16 = 8;
/// Packets handled in one turn.
const BUDGET: u32 = 256;
/// VIRTIO_VSOCK_EVENT_TRANSPORT_RESET, §5.10.6.7.
const EVENT_TRANSPORT_RESET: u32 = 0;

/// A virtio socket device.
pub struct Vsock {
    config: [u8; 8],
    table: Table,
    held: Held,
    /// The guest must be told that its connections are gone (after a restore without them).
    reset_due: bool,
    /// The connections of a snapshot wait to be started.
    start_due: bool,
}

/// The host's end of a connection that a snapshot had.
#[derive(Debug)]
pub struct HostEnd {
    /// The host's port.
    pub host_port: u32,
    /// The guest's port.
    pub guest_port: u32,
    /// The end.
    pub stream: UnixStream,
}

/// TX chains that are done with but not given back yet.
///
/// Linux wants an interrupt for each used TX buffer, and only frees memory in it. So chains are
/// given back when a quarter of the ring or 64 KiB have gathered: enough is left for any packet.
#[derive(Debug, Default)]
struct Held {
    heads: Vec<u16>,
    segments: usize,
    bytes: u64,
}

impl Held {
    fn add(&mut self, chain: &Chain) {
        self.heads.push(chain.head);
        // A broken chain may have none, and must count all the same.
        self.segments += chain.segments().max(1);
        self.bytes += chain.readable.iter().map(|&(_, len)| u64::from(len)).sum::<u64>();
    }

    fn is_full(&self, queue_size: u16) -> bool {
        // On a small ring a driver may need all of it for one packet.
        queue_size < 64 || self.segments >= usize::from(queue_size / 4) || self.bytes >= 64 * 1024
    }
}

/// What became of an RX chain.
enum Filled {
    /// It carries a packet of so many bytes.
    Packet(u32),
    /// There was nothing to put into it.
    Untouched,
    /// It is no use: without room for a payload, or outside guest memory.
    Useless,
}

impl Default for Vsock {
    fn default() -> Self {
        Self {
            config: GUEST_CID.to_le_bytes(),
            table: Table::default(),
            held: Held::default(),
            reset_due: false,
            start_due: false,
        }
    }
}

impl Vsock {
    /// A device whose driver comes from a snapshot. Saved connections go on, and their hosts' ends are
    /// returned; if none was saved, the guest will be told that those it may have are gone.
    ///
    /// # Errors
    /// If a socket cannot be made.
    pub fn restored(saved: &State) -> io::Result<(Self, Vec<HostEnd>)> {
        let streams = &saved.streams;
        // What the chains hold counts no more; that there are some does.
        let held = Held { heads: saved.held.clone(), segments: saved.held.len(), bytes: 0 };
        let (reset_due, start_due) = (streams.is_empty(), !streams.is_empty());
        let mut vsock = Self { held, reset_due, start_due, ..Self::default() };
        let ends = vsock.table.restore(streams)?;
        Ok((vsock, ends))
    }

    /// Hands connections that the guest makes to `host_port` to the receiver, at most 16 waiting.
    pub fn listen(&mut self, host_port: u32) -> io::Result<Receiver<UnixStream>> {
        self.table.listen(host_port)
    }

    /// Asks the guest for a connection to its `guest_port`; the answer goes to `reply`.
    ///
    /// If the guest has no driver yet, the request waits for it.
    pub fn connect(
        &mut self,
        guest_port: u32,
        reply: ConnectReply,
        host: &mut Host<'_>,
    ) -> Result<Turn, Fault> {
        self.table.connect(guest_port, reply, host.ops);
        self.deliver(host)
    }

    /// Connections there are, in any stage.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.table.len()
    }

    /// Bytes held for host sockets that do not take them.
    #[must_use]
    pub fn held_bytes(&self) -> usize {
        self.table.held_bytes()
    }

    fn receive_from_guest(&mut self, host: &mut Host<'_>) -> Result<Turn, Fault> {
        let mem = host.mem;
        let mut budget = BUDGET;
        loop {
            let Some(queue) = host.queue(TX) else {
                return Ok(Turn::Idle);
            };
            let size = queue.size();
            queue.mute(mem)?;
            while let Some(chain) = host.queue(TX).map(|queue| queue.pop(mem)).transpose()?.flatten() {
                self.held.add(&chain);
                self.take_packet(chain, host);
                if self.held.is_full(size) {
                    self.give_back(host)?;
                }
                budget -= 1;
                if budget == 0 {
                    return Ok(Turn::More);
                }
            }
            if !host.queue(TX).map(|queue| queue.listen(mem)).transpose()?.unwrap_or(false) {
                return Ok(Turn::Idle);
            }
        }
    }

    fn give_back(&mut self, host: &mut Host<'_>) -> Result<(), Fault> {
        let mem = host.mem;
        let held = std::mem::take(&mut self.held);
        if let Some(queue) = host.queue(TX) {
            for head in held.heads {
                queue.push_used(mem, head, 0)?;
            }
        }
        Ok(())
    }

    /// One packet from the guest. Nothing it contains can make this fail.
    fn take_packet(&mut self, mut chain: Chain, host: &mut Host<'_>) {
        host.counters.vsock_packets_from_guest.add(1);
        let header = if chain.broken { None } else { read_header(&mut chain.readable, host.mem) };
        // §5.10.4.2: packets that are not from this guest to the host are dropped.
        let Some(header) = header.filter(|header| header.src_cid == GUEST_CID && header.dst_cid == HOST_CID)
        else {
            host.counters.vsock_refused.add(1);
            return;
        };
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let known = if header.kind == STREAM { self.act(ports, &header, &chain, host) } else { None };
        if known.is_none() {
            host.counters.vsock_refused.add(1);
            self.table.abort(ports, host.ops);
            if header.op != op::RST {
                self.table.owe_reset(ports, header.kind);
            }
        }
    }

    /// Does what the packet says; `None` if the answer is RST.
    fn act(&mut self, ports: Ports, header: &Header, chain: &Chain, host: &mut Host<'_>) -> Option<()> {
        if header.op == op::REQUEST {
            return self.table.accept(ports, header, host.ops);
        }
        let connection = self.table.find(ports)?;
        connection.learn_credit(header);
        match (header.op, &connection.phase) {
            (op::RESPONSE, Phase::Connecting(_)) => self.table.establish(ports, host.ops),
            (op::RST, _) => {
                self.table.guest_is_gone(ports, host.ops);
                Some(())
            }
            (op::RW, Phase::Open) => self.take_payload(ports, header.len, chain, host),
            (op::SHUTDOWN, Phase::Open) => {
                let done = connection.guest_shuts_down(header.flags);
                connection.flush();
                if done {
                    // §5.10.6.5: the clean end of a connection is a RST from the other side.
                    self.table.guest_is_gone(ports, host.ops);
                    self.table.owe_reset(ports, STREAM);
                }
                Some(())
            }
            (op::CREDIT_UPDATE, Phase::Open) => Some(()),
            (op::CREDIT_REQUEST, Phase::Open) => {
                connection.due.credit = true;
                Some(())
            }
            _ => None,
        }?;
        self.table.wake(ports);
        Some(())
    }

    /// Moves the payload to the host's socket, or keeps what the socket does not take.
    fn take_payload(&mut self, ports: Ports, len: u32, chain: &Chain, host: &mut Host<'_>) -> Option<()> {
        let mut buffers = GuestBuffers::new(host.mem, &chain.readable).ok()?;
        let wanted = usize::try_from(len).ok().filter(|&wanted| wanted <= buffers.len())?;
        let connection = self.table.find(ports)?;
        if connection.guest_has_ended() || !connection.note_received(len) {
            return None;
        }
        buffers.truncate(wanted);
        host.counters.vsock_bytes_from_guest.add(len.into());
        let mut moved = 0;
        if !connection.has_backlog() && !connection.host_is_deaf() && wanted > 0 {
            let stream = connection.stream.clone()?;
            match buffers.send(&*stream) {
                Ok(count) => moved = count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => connection.note_deaf(),
            }
        }
        if connection.host_is_deaf() {
            moved = wanted;
        }
        connection.note_forwarded(moved);
        keep_rest(connection, chain, moved, wanted, host)?;
        self.table.await_space(ports, host.ops);
        Some(())
    }

    /// Sends what is due to the guest, as long as it has buffers.
    fn deliver(&mut self, host: &mut Host<'_>) -> Result<Turn, Fault> {
        let mem = host.mem;
        let mut budget = BUDGET;
        while self.table.has_work() {
            let Some(queue) = host.queue(RX) else {
                return Ok(Turn::Idle);
            };
            let Some(chain) = queue.pop(mem)? else {
                // Only now is a notification about new RX buffers worth the guest's exit.
                if queue.listen(mem)? {
                    continue;
                }
                return Ok(Turn::Idle);
            };
            match self.fill(&chain, host) {
                Filled::Untouched => host.queue(RX).map(|queue| queue.unpop()).unwrap_or_default(),
                Filled::Packet(bytes) => push(host, RX, chain.head, bytes)?,
                Filled::Useless => push(host, RX, chain.head, 0)?,
            }
            budget -= 1;
            if budget == 0 {
                return Ok(Turn::More);
            }
        }
        if let Some(queue) = host.queue(RX) {
            queue.mute(mem)?;
        }
        Ok(Turn::Idle)
    }

    /// Puts the next packet into an RX chain.
    fn fill(&mut self, chain: &Chain, host: &mut Host<'_>) -> Filled {
        let capacity =
            GuestBuffers::new(host.mem, &chain.writable).ok().filter(|all| all.len() > HEADER_BYTES);
        let Some(mut buffers) = capacity.filter(|_| !chain.broken && chain.readable.is_empty()) else {
            return Filled::Useless;
        };
        buffers.advance(HEADER_BYTES);
        let Some(header) = self.table.next_packet(buffers) else {
            return Filled::Untouched;
        };
        host.counters.vsock_packets_to_guest.add(1);
        host.counters.vsock_bytes_to_guest.add(header.len.into());
        // The chain has been checked above, so this cannot fail.
        match write_header(&header, &chain.writable, host.mem) {
            Some(()) => Filled::Packet(HEADER_BYTES as u32 + header.len),
            None => Filled::Useless,
        }
    }

    fn announce_reset(&mut self, host: &mut Host<'_>) -> Result<(), Fault> {
        let mem = host.mem;
        let Some(queue) = host.queue(EVENT).filter(|_| self.reset_due) else {
            return Ok(());
        };
        let Some(chain) = queue.pop(mem)? else {
            return Ok(());
        };
        self.reset_due = false;
        let room = chain.writable.first().filter(|&&(_, len)| len >= 4 && !chain.broken);
        let written = room
            .is_some_and(|&(addr, _)| mem.write_slice(&EVENT_TRANSPORT_RESET.to_le_bytes(), addr).is_ok());
        push(host, EVENT, chain.head, if written { 4 } else { 0 })
    }
}

impl Device for Vsock {
    const TYPE: u32 = 19;
    const QUEUE_SIZES: &'static [u16] = &[RX_SIZE, TX_SIZE, EVENT_SIZE];

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn service(&mut self, queue: usize, host: &mut Host<'_>) -> Result<Turn, Fault> {
        self.announce_reset(host)?;
        if std::mem::take(&mut self.start_due) {
            self.table.start_restored(host.ops);
        }
        let received = if queue == TX { self.receive_from_guest(host)? } else { Turn::Idle };
        let delivered = self.deliver(host)?;
        Ok(if received == Turn::Idle { delivered } else { Turn::More })
    }

    fn complete(&mut self, done: Done, host: &mut Host<'_>) -> Result<Turn, Fault> {
        self.table.poll_fired(done.token, done.more, host.ops);
        self.deliver(host)
    }

    fn reset(&mut self, ops: &mut Vec<Op>) {
        self.held = Held::default();
        self.reset_due = false;
        self.start_due = false;
        self.table.reset(ops);
    }

    fn in_flight(&self) -> usize {
        // Polls do not touch guest memory.
        0
    }

    fn save(&self, state: &mut State) {
        // A connection that cannot be saved is closed in the restored guest.
        state.streams = self.table.states().unwrap_or_default();
        // Giving them back would interrupt the guest, and each of its clones.
        state.held.clone_from(&self.held.heads);
    }
}

fn push(host: &mut Host<'_>, index: usize, head: u16, written: u32) -> Result<(), Fault> {
    let mem = host.mem;
    host.queue(index).map_or(Ok(()), |queue| queue.push_used(mem, head, written))
}

/// Copies bytes `moved..wanted` of the chain's payload to the outbox.
fn keep_rest(
    connection: &mut Connection,
    chain: &Chain,
    moved: usize,
    wanted: usize,
    host: &Host<'_>,
) -> Option<()> {
    let mut skip = moved;
    let mut left = wanted - moved;
    for &(addr, len) in &chain.readable {
        let len = usize::try_from(len).ok()?;
        if skip >= len {
            skip -= len;
            continue;
        }
        let mut part = vec![0; (len - skip).min(left)];
        host.mem.read_slice(&mut part, GuestAddress(addr.0.checked_add(skip as u64)?)).ok()?;
        connection.keep(&part);
        left -= part.len();
        skip = 0;
    }
    Some(())
}

fn pollable(stream: &Arc<UnixStream>) -> Pollable {
    Arc::clone(stream) as Pollable
}
