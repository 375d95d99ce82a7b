//! The connections, listeners and replies of a vsock device.
//!
//! Pure bookkeeping plus the sockets: it knows no queue. Lookups are linear: there are at most
//! [`MAX_CONNECTIONS`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};

use super::connection::{ConnectReply, Connection, Phase};
use super::packet::{HOST_CID, Header, MAX_PAYLOAD_BYTES, STREAM, op};
use super::{GUEST_CID, HostEnd, pollable};
use crate::devices::mmio::StreamState;
use crate::event_loop::ring::{GuestBuffers, Op, is_hung_up, send_bytes};

/// Most connections at a time, in any stage.
pub const MAX_CONNECTIONS: usize = 64;
/// Most RSTs waiting for a guest buffer; a guest that provokes more gets no answer.
pub const MAX_RESETS: usize = 128;
/// Connections waiting to be taken by a listener.
const BACKLOG: usize = 16;
/// Host ports of connections that the host makes start here.
const FIRST_EPHEMERAL_PORT: u32 = 1 << 30;

/// The two ends of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

#[derive(Debug, Default)]
pub(super) struct Table {
    connections: Vec<Connection>,
    listeners: HashMap<u32, SyncSender<UnixStream>>,
    /// Ids of connections that may have a packet for the guest.
    runnable: VecDeque<u32>,
    resets: VecDeque<(Ports, u16)>,
    next_id: u32,
    next_port: u32,
}

/// A poll's token names the connection and what is polled for.
fn read_token(id: u32) -> u32 {
    id << 1
}

fn write_token(id: u32) -> u32 {
    id << 1 | 1
}

impl Table {
    pub(super) fn len(&self) -> usize {
        self.connections.len()
    }

    pub(super) fn held_bytes(&self) -> usize {
        self.connections.iter().map(Connection::held_bytes).sum()
    }

    /// The connections of a snapshot, their host's ends new; bytes for the guest are written into those.
    pub(super) fn restore(&mut self, saved: &[StreamState]) -> io::Result<Vec<HostEnd>> {
        let mut ends = Vec::new();
        for state in saved.iter().take(MAX_CONNECTIONS) {
            let (ours, theirs) = UnixStream::pair()?;
            if !state.to_guest.is_empty() {
                // What one socket held another of the same size takes.
                send_bytes(&theirs, &state.to_guest)?;
            }
            self.next_id += 1;
            let mut connection = Connection::restored(self.next_id, state);
            connection.stream = Some(Arc::new(ours));
            self.connections.push(connection);
            ends.push(HostEnd { host_port: state.host_port, guest_port: state.guest_port, stream: theirs });
        }
        Ok(ends)
    }

    /// Starts what a restored device's connections wait for.
    pub(super) fn start_restored(&mut self, ops: &mut Vec<Op>) {
        for index in 0..self.connections.len() {
            let connection = &mut self.connections[index];
            connection.flush();
            if let Some(stream) = &connection.stream {
                let (token, fd) = (read_token(connection.id), pollable(stream));
                ops.push(Op::Poll { token, fd, events: libc::POLLIN | libc::POLLRDHUP, multi: true });
            }
            self.await_space_at(index, ops);
            let id = self.connections[index].id;
            self.wake_id(id);
        }
    }

    /// What to save of every connection that can go on after a restore.
    pub(super) fn states(&self) -> io::Result<Vec<StreamState>> {
        self.connections.iter().filter_map(|connection| connection.state().transpose()).collect()
    }

    pub(super) fn listen(&mut self, host_port: u32) -> io::Result<Receiver<UnixStream>> {
        let (sender, receiver) = sync_channel(BACKLOG);
        if self.listeners.contains_key(&host_port) {
            return Err(io::ErrorKind::AddrInUse.into());
        }
        self.listeners.insert(host_port, sender);
        Ok(receiver)
    }

    pub(super) fn connect(&mut self, guest_port: u32, reply: ConnectReply, ops: &mut Vec<Op>) {
        if !self.make_room(ops) {
            let full = io::Error::new(io::ErrorKind::QuotaExceeded, "too many vsock connections");
            // The asker may have gone; then nobody is left to tell.
            let _ = reply.send(Err(full));
            return;
        }
        let host_port = self.ephemeral_port();
        let mut connection = self.make(host_port, guest_port, Phase::Connecting(reply));
        connection.due.request = true;
        self.insert(connection);
    }

    /// A connection that the guest asks for; `None` if it cannot have it.
    pub(super) fn accept(&mut self, ports: Ports, header: &Header, ops: &mut Vec<Op>) -> Option<()> {
        if self.find(ports).is_some() || !self.listeners.contains_key(&ports.host) || !self.make_room(ops) {
            return None;
        }
        let (ours, theirs) = UnixStream::pair().ok()?;
        match self.listeners.get(&ports.host)?.try_send(theirs) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => return None,
            Err(TrySendError::Disconnected(_)) => {
                self.listeners.remove(&ports.host);
                return None;
            }
        }
        let mut connection = self.make(ports.host, ports.guest, Phase::Open);
        connection.learn_credit(header);
        connection.due.response = true;
        open(&mut connection, ours, ops);
        self.insert(connection);
        Some(())
    }

    /// The guest has answered our request.
    pub(super) fn establish(&mut self, ports: Ports, ops: &mut Vec<Op>) -> Option<()> {
        let connection = self.find(ports)?;
        let (ours, theirs) = UnixStream::pair().ok()?;
        let Phase::Connecting(reply) = std::mem::replace(&mut connection.phase, Phase::Open) else {
            return None;
        };
        open(connection, ours, ops);
        // If the asker has gone, `theirs` is dropped and the guest will see the end.
        let _ = reply.send(Ok(theirs));
        Some(())
    }

    fn make(&mut self, host_port: u32, guest_port: u32, phase: Phase) -> Connection {
        self.next_id = self.next_id.wrapping_add(1) & (u32::MAX >> 1);
        Connection::new(self.next_id, host_port, guest_port, phase)
    }

    fn insert(&mut self, connection: Connection) {
        let id = connection.id;
        self.connections.push(connection);
        self.wake_id(id);
    }

    fn ephemeral_port(&mut self) -> u32 {
        loop {
            let port = FIRST_EPHEMERAL_PORT + (self.next_port & (FIRST_EPHEMERAL_PORT - 1));
            self.next_port = self.next_port.wrapping_add(1);
            let taken = self.connections.iter().any(|connection| connection.host_port == port);
            if !taken && !self.listeners.contains_key(&port) {
                return port;
            }
        }
    }

    /// Makes room by dropping a connection that only waits for the guest's last word.
    fn make_room(&mut self, ops: &mut Vec<Op>) -> bool {
        if self.connections.len() < MAX_CONNECTIONS {
            return true;
        }
        let Some(index) = self.connections.iter().position(Connection::lingers) else {
            return false;
        };
        let ports = self.remove(index, ops);
        self.owe_reset(ports, STREAM);
        true
    }

    pub(super) fn find(&mut self, ports: Ports) -> Option<&mut Connection> {
        self.connections.iter_mut().find(|connection| connection.has_ports(ports.host, ports.guest))
    }

    fn index(&self, id: u32) -> Option<usize> {
        self.connections.iter().position(|connection| connection.id == id)
    }

    /// Notes that a connection may have something for the guest.
    pub(super) fn wake(&mut self, ports: Ports) {
        if let Some(id) = self.find(ports).map(|connection| connection.id) {
            self.wake_id(id);
        }
    }

    fn wake_id(&mut self, id: u32) {
        let Some(index) = self.index(id) else { return };
        let connection = &mut self.connections[index];
        if !connection.queued && connection.wants_to_send() {
            connection.queued = true;
            self.runnable.push_back(id);
        }
    }

    pub(super) fn has_work(&self) -> bool {
        !self.resets.is_empty() || !self.runnable.is_empty()
    }

    pub(super) fn owe_reset(&mut self, ports: Ports, kind: u16) {
        if self.resets.len() < MAX_RESETS {
            self.resets.push_back((ports, kind));
        }
    }

    /// The next packet for the guest, its payload already in `buffers`; `None` if there is none.
    pub(super) fn next_packet(&mut self, mut buffers: GuestBuffers) -> Option<Header> {
        if let Some((ports, kind)) = self.resets.pop_front() {
            return Some(reset_header(ports, kind));
        }
        for _ in 0..self.runnable.len() {
            let id = self.runnable.pop_front()?;
            let Some(index) = self.index(id) else {
                continue;
            };
            let connection = &mut self.connections[index];
            connection.queued = false;
            let packet = next_of(connection, &mut buffers);
            // Behind the others, so that each gets its turn.
            self.wake_id(id);
            if packet.is_some() {
                return packet;
            }
        }
        None
    }

    /// A poll has something to say.
    pub(super) fn poll_fired(&mut self, token: u32, more: bool, ops: &mut Vec<Op>) {
        let id = token >> 1;
        let Some(index) = self.index(id) else { return };
        let connection = &mut self.connections[index];
        if token == write_token(id) {
            connection.awaits_space = false;
            connection.flush();
            if matches!(connection.phase, Phase::Draining) && !connection.has_backlog() {
                self.remove(index, ops);
                return;
            }
            self.await_space_at(index, ops);
        } else {
            connection.readable = true;
            if !more && let Some(stream) = &connection.stream {
                let (token, fd) = (read_token(id), pollable(stream));
                ops.push(Op::Poll { token, fd, events: libc::POLLIN | libc::POLLRDHUP, multi: true });
            }
        }
        self.wake_id(id);
    }

    /// Polls for space if bytes wait for the host.
    pub(super) fn await_space(&mut self, ports: Ports, ops: &mut Vec<Op>) {
        if let Some(index) = self.find(ports).map(|connection| connection.id).and_then(|id| self.index(id)) {
            self.await_space_at(index, ops);
        }
    }

    fn await_space_at(&mut self, index: usize, ops: &mut Vec<Op>) {
        let connection = &mut self.connections[index];
        if connection.has_backlog()
            && !connection.awaits_space
            && let Some(stream) = &connection.stream
        {
            connection.awaits_space = true;
            let (token, fd) = (write_token(connection.id), pollable(stream));
            ops.push(Op::Poll { token, fd, events: libc::POLLOUT, multi: false });
        }
    }

    /// The guest is done with a connection: what it sent is still delivered.
    pub(super) fn guest_is_gone(&mut self, ports: Ports, ops: &mut Vec<Op>) {
        let Some(id) = self.find(ports).map(|connection| connection.id) else {
            return;
        };
        let Some(index) = self.index(id) else { return };
        let connection = &mut self.connections[index];
        connection.flush();
        if connection.has_backlog() {
            connection.drain();
            self.await_space_at(index, ops);
        } else {
            self.remove(index, ops);
        }
    }

    /// Drops a connection whose guest side broke the protocol.
    pub(super) fn abort(&mut self, ports: Ports, ops: &mut Vec<Op>) {
        if let Some(id) = self.find(ports).map(|connection| connection.id)
            && let Some(index) = self.index(id)
        {
            self.remove(index, ops);
        }
    }

    /// The driver has reset the device: its connections are gone, requests to it are made again.
    pub(super) fn reset(&mut self, ops: &mut Vec<Op>) {
        self.resets.clear();
        self.runnable.clear();
        for index in (0..self.connections.len()).rev() {
            let connection = &mut self.connections[index];
            connection.queued = false;
            if matches!(connection.phase, Phase::Connecting(_)) {
                connection.due.request = true;
                let id = connection.id;
                self.wake_id(id);
            } else {
                connection.flush();
                self.remove(index, ops);
            }
        }
    }

    fn remove(&mut self, index: usize, ops: &mut Vec<Op>) -> Ports {
        let connection = self.connections.swap_remove(index);
        if let Some(stream) = &connection.stream {
            // The polls keep the file open for a while, so the host must be told explicitly.
            // It fails only when the host has gone.
            let _ = stream.shutdown(std::net::Shutdown::Both);
            ops.push(Op::Unpoll { token: read_token(connection.id) });
            if connection.awaits_space {
                ops.push(Op::Unpoll { token: write_token(connection.id) });
            }
        }
        if let Phase::Connecting(reply) = &connection.phase {
            // The asker may have gone; then nobody is left to tell.
            let _ = reply.send(Err(io::ErrorKind::ConnectionRefused.into()));
        }
        Ports { host: connection.host_port, guest: connection.guest_port }
    }
}

fn open(connection: &mut Connection, stream: UnixStream, ops: &mut Vec<Op>) {
    let stream = Arc::new(stream);
    let (token, fd) = (read_token(connection.id), pollable(&stream));
    connection.stream = Some(stream);
    ops.push(Op::Poll { token, fd, events: libc::POLLIN | libc::POLLRDHUP, multi: true });
}

fn reset_header(ports: Ports, kind: u16) -> Header {
    Header {
        src_cid: HOST_CID,
        dst_cid: GUEST_CID,
        src_port: ports.host,
        dst_port: ports.guest,
        kind,
        op: op::RST,
        ..Header::default()
    }
}

/// The next packet of one connection, in the order REQUEST or RESPONSE, data, SHUTDOWN, credit.
fn next_of(connection: &mut Connection, buffers: &mut GuestBuffers) -> Option<Header> {
    let due = connection.due;
    if due.request {
        connection.due.request = false;
        return Some(connection.header(HOST_CID, GUEST_CID, op::REQUEST));
    }
    if due.response {
        connection.due.response = false;
        return Some(connection.header(HOST_CID, GUEST_CID, op::RESPONSE));
    }
    if connection.can_send()
        && let Some(len) = receive(connection, buffers)
    {
        connection.note_sent(len);
        return Some(Header { len, ..connection.header(HOST_CID, GUEST_CID, op::RW) });
    }
    if connection.due.shutdown {
        let flags = connection.shutdown_flags();
        connection.note_shutdown_sent(flags);
        return Some(Header { flags, ..connection.header(HOST_CID, GUEST_CID, op::SHUTDOWN) });
    }
    connection.due.credit.then(|| connection.header(HOST_CID, GUEST_CID, op::CREDIT_UPDATE))
}

/// Receives from the host's socket straight into the guest's buffers; `None` if there is nothing.
fn receive(connection: &mut Connection, buffers: &mut GuestBuffers) -> Option<u32> {
    let stream = connection.stream.clone()?;
    buffers.truncate(connection.credit().min(MAX_PAYLOAD_BYTES));
    if buffers.is_empty() {
        return None;
    }
    match buffers.receive(&*stream) {
        Ok(0) => connection.note_ended(is_hung_up(&*stream)),
        // At most MAX_PAYLOAD_BYTES.
        Ok(count) => return Some(count as u32),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => connection.readable = false,
        Err(_) => connection.note_ended(true),
    }
    None
}
