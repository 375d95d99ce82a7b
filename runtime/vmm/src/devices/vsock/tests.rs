//! The vsock device, with a guest that sends what it likes and real sockets.
#![allow(clippy::unwrap_used)]

mod hostile;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, channel};

use super::{
    BUF_ALLOC, GUEST_CID, HEADER_BYTES, HOST_CID, Header, MAX_CONNECTIONS, MAX_RESETS, NO_RECEIVE, NO_SEND,
    RX, RX_SIZE, STREAM, TX, TX_SIZE, Vsock, op,
};
use vm_memory::Bytes as _;

use crate::devices::mmio::{Done, F_EVENT_IDX, F_VERSION_1, register};
use crate::devices::testing::{BUFFERS, MEM_BYTES, Rig, readable, writable};
use crate::event_loop::ring::Op;

const PORT: u32 = 1024;
const GUEST_PORT: u32 = 77;
/// Where the guest's TX packets are, one for all: the device has read them when it returns.
const SENT: u64 = BUFFERS;
/// Where RX buffer `i` is.
const RECEIVED: u64 = BUFFERS + 0x10_0000;
const RX_BUFFER_BYTES: usize = 4096;
const NONE: [u16; 0] = [];

/// A guest with a driver, on top of the rig: it sends packets and looks at those it gets.
struct Guest {
    rig: Rig<Vsock>,
    /// RX chain head to buffer address.
    posted: Vec<(u16, u64)>,
    post_more: bool,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self { rig: Rig::live(Vsock::default()), posted: Vec::new(), post_more: true };
        (0..u64::from(RX_SIZE)).for_each(|buffer| guest.post(RECEIVED + buffer * RX_BUFFER_BYTES as u64));
        guest
    }

    fn post(&mut self, addr: u64) {
        let head = self.rig.queues[RX].add(&[writable(addr, RX_BUFFER_BYTES)]);
        self.posted.push((head, addr));
    }

    fn send_raw(&mut self, header: &Header, payload: &[u8]) {
        self.rig.fill(SENT, &header.to_bytes());
        self.rig.fill(SENT + HEADER_BYTES as u64, payload);
        let header_piece = readable(SENT, HEADER_BYTES);
        let payload_piece = readable(SENT + HEADER_BYTES as u64, payload.len());
        let pieces =
            if payload.is_empty() { &[header_piece][..] } else { &[header_piece, payload_piece][..] };
        self.rig.queues[TX].add(pieces);
        self.rig.notify(TX);
    }

    fn header(host_port: u32, op: u16) -> Header {
        Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: GUEST_PORT,
            dst_port: host_port,
            kind: STREAM,
            op,
            buf_alloc: 1 << 20,
            ..Header::default()
        }
    }

    fn send(&mut self, host_port: u32, op: u16) {
        self.send_raw(&Self::header(host_port, op), &[]);
    }

    fn send_data(&mut self, host_port: u32, payload: &[u8]) {
        let header = Header { len: payload.len() as u32, ..Self::header(host_port, op::RW) };
        self.send_raw(&header, payload);
    }

    /// Packets that have arrived; their buffers are posted again.
    fn packets(&mut self) -> Vec<(Header, Vec<u8>)> {
        let mut packets = Vec::new();
        loop {
            let used = self.rig.queues[RX].take_used();
            if used.is_empty() {
                return packets;
            }
            for (head, len) in used {
                let at = self.posted.iter().position(|&(posted, _)| posted == head).unwrap();
                let (_, addr) = self.posted.remove(at);
                if len > 0 {
                    let bytes = self.rig.bytes(addr, len as usize);
                    let header = Header::from_bytes(bytes[..HEADER_BYTES].try_into().unwrap());
                    assert_eq!(header.len as usize, bytes.len() - HEADER_BYTES);
                    assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
                    packets.push((header, bytes[HEADER_BYTES..].to_vec()));
                }
                if self.post_more {
                    self.post(addr);
                }
            }
            self.rig.notify(RX);
        }
    }

    /// The only packet that has arrived.
    fn packet(&mut self) -> Header {
        let packets = self.packets();
        assert_eq!(packets.len(), 1, "{packets:?}");
        packets[0].0
    }

    /// Waits for the host's sockets to have something to say, then takes packets.
    fn packets_after_event(&mut self) -> Vec<(Header, Vec<u8>)> {
        self.rig.complete_some();
        self.packets()
    }

    fn ops(&mut self) -> Vec<u16> {
        self.packets().iter().map(|(header, _)| header.op).collect()
    }

    fn listen(&mut self) -> Receiver<UnixStream> {
        self.rig.mmio.device().listen(PORT).unwrap()
    }

    /// A connection that the guest made; its response is taken.
    fn connected() -> (Self, UnixStream) {
        let mut guest = Self::new();
        let listener = guest.listen();
        guest.send(PORT, op::REQUEST);
        assert_eq!(guest.packet().op, op::RESPONSE);
        let stream = listener.try_recv().unwrap();
        // Later connections would find no listener.
        (guest, stream)
    }
}

fn read_all(stream: &UnixStream) -> Vec<u8> {
    stream.set_nonblocking(true).unwrap();
    let mut bytes = Vec::new();
    let mut stream = stream;
    if let Err(error) = stream.read_to_end(&mut bytes) {
        // A reset: the guest went away without taking what the host had written.
        let expected = [std::io::ErrorKind::WouldBlock, std::io::ErrorKind::ConnectionReset];
        assert!(expected.contains(&error.kind()), "{error}");
    }
    bytes
}

fn at_end(stream: &UnixStream) -> bool {
    stream.set_nonblocking(true).unwrap();
    let mut stream = stream;
    matches!(stream.read(&mut [0]), Ok(0))
}

#[test]
fn the_guest_connects_to_a_host_port_and_bytes_go_both_ways() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_data(PORT, b"from the guest");
    assert_eq!(read_all(&stream), b"from the guest");
    stream.write_all(b"from the host").unwrap();
    let packets = guest.packets_after_event();
    assert_eq!(packets.len(), 1);
    let (header, payload) = &packets[0];
    assert_eq!((header.op, header.src_port, header.dst_port), (op::RW, PORT, GUEST_PORT));
    assert_eq!(payload, b"from the host");
    assert_eq!((header.buf_alloc, header.fwd_cnt), (BUF_ALLOC, 14));
}

#[test]
fn the_host_connects_to_a_guest_port() {
    let mut guest = Guest::new();
    let (reply, answer) = channel();
    guest.rig.mmio.with_device(|vsock, host| vsock.connect(GUEST_PORT, reply, host));
    let request = guest.packet();
    assert_eq!((request.op, request.dst_port, request.buf_alloc), (op::REQUEST, GUEST_PORT, BUF_ALLOC));
    assert!(answer.try_recv().is_err());
    guest.send(request.src_port, op::RESPONSE);
    let mut stream = answer.try_recv().unwrap().unwrap();
    stream.write_all(b"hello").unwrap();
    assert_eq!(guest.packets_after_event()[0].1, b"hello");
}

#[test]
fn a_port_nobody_listens_on_refuses_in_both_directions() {
    let mut guest = Guest::new();
    let (reply, answer) = channel();
    guest.rig.mmio.with_device(|vsock, host| vsock.connect(GUEST_PORT, reply, host));
    let request = guest.packet();
    guest.send(request.src_port, op::RST);
    let refused = answer.try_recv().unwrap().unwrap_err();
    assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    assert_eq!(guest.rig.mmio.device().connections(), 0);

    guest.send(PORT, op::REQUEST);
    assert_eq!(guest.packet().op, op::RST);
}

#[test]
fn a_connection_asked_for_before_there_is_a_driver_waits_for_it() {
    let mut guest = Guest { rig: Rig::powered_on(Vsock::default()), posted: Vec::new(), post_more: true };
    let (reply, answer) = channel();
    guest.rig.mmio.with_device(|vsock, host| vsock.connect(GUEST_PORT, reply, host));
    guest.rig.bring_up(F_VERSION_1 | F_EVENT_IDX);
    guest.post(RECEIVED);
    guest.rig.notify(RX);
    let request = guest.packet();
    guest.send(request.src_port, op::RESPONSE);
    assert!(answer.try_recv().unwrap().is_ok());
}

#[test]
fn a_second_listener_on_a_port_is_refused() {
    let mut guest = Guest::new();
    let _first = guest.listen();
    assert_eq!(guest.rig.mmio.device().listen(PORT).unwrap_err().kind(), std::io::ErrorKind::AddrInUse);
}

#[test]
fn no_more_is_sent_than_the_guest_has_credit_for() {
    let mut guest = Guest::new();
    let listener = guest.listen();
    let request = Header { buf_alloc: 10_000, ..Guest::header(PORT, op::REQUEST) };
    guest.send_raw(&request, &[]);
    assert_eq!(guest.packet().op, op::RESPONSE);
    let mut stream = listener.try_recv().unwrap();
    stream.write_all(&[7; 30_000]).unwrap();
    let count =
        |packets: &[(Header, Vec<u8>)]| packets.iter().map(|(_, payload)| payload.len()).sum::<usize>();
    assert_eq!(count(&guest.packets_after_event()), 10_000);
    let update = Header { buf_alloc: 10_000, fwd_cnt: 4_000, ..Guest::header(PORT, op::CREDIT_UPDATE) };
    guest.send_raw(&update, &[]);
    assert_eq!(count(&guest.packets()), 4_000);
    // A guest that claims to have taken more than was ever sent gets nothing.
    guest.send_raw(&Header { fwd_cnt: 60_000, ..update }, &[]);
    assert_eq!(count(&guest.packets()), 0);
    guest.send_raw(&Header { fwd_cnt: 14_000, ..update }, &[]);
    assert_eq!(count(&guest.packets()), 10_000);
}

#[test]
fn without_rx_buffers_bytes_stay_in_the_socket_and_one_notification_brings_them() {
    let (mut guest, mut stream) = Guest::connected();
    guest.post_more = false;
    let payload: Vec<u8> = (0..200_000u32).map(|at| at as u8).collect();
    stream.set_nonblocking(true).unwrap();
    let written = stream.write(&payload).unwrap();
    assert!(written > 100_000);
    let mut got: Vec<u8> = guest.packets_after_event().into_iter().flat_map(|(_, payload)| payload).collect();
    assert_eq!(got.len(), usize::from(RX_SIZE) * (RX_BUFFER_BYTES - HEADER_BYTES));
    // Starving, the device wants to hear of the next buffer.
    assert_eq!(guest.rig.queues[RX].avail_event(), guest.rig.queues[RX].available);
    assert_eq!(guest.rig.mmio.device().held_bytes(), 0);
    guest.post_more = true;
    (0..u64::from(RX_SIZE)).for_each(|buffer| guest.post(RECEIVED + buffer * RX_BUFFER_BYTES as u64));
    guest.rig.notify(RX);
    got.extend(guest.packets().into_iter().flat_map(|(_, payload)| payload));
    assert_eq!(got, payload[..written]);
}

#[test]
fn events_without_bytes_use_up_no_rx_buffer() {
    let mut guest = Guest::new();
    let listener = guest.listen();
    guest.send(PORT, op::REQUEST);
    guest.packets();
    let token = match guest.rig.operations()[..] {
        [Op::Poll { token, .. }] => token,
        ref other => panic!("{other:?}"),
    };
    for _ in 0..100 {
        guest.rig.mmio.complete(Done { token, result: 1, more: true, buffers: None });
    }
    assert_eq!(guest.ops(), NONE);
    guest.post_more = false;
    let mut stream = listener.try_recv().unwrap();
    stream.write_all(&[1; 100_000]).unwrap();
    guest.rig.mmio.complete(Done { token, result: 1, more: true, buffers: None });
    assert_eq!(guest.ops().len(), usize::from(RX_SIZE));
}

#[test]
fn a_slow_host_holds_at_most_the_advertised_buffer_and_overdraft_is_reset() {
    let (mut guest, stream) = Guest::connected();
    let block = vec![9; 64 * 1024];
    // The socket takes some of it, so more than BUF_ALLOC gets through in all.
    let mut sent = 0usize;
    let mut refused = false;
    for _ in 0..64 {
        guest.send_data(PORT, &block);
        assert!(guest.rig.mmio.device().held_bytes() <= BUF_ALLOC as usize);
        refused = guest.ops().contains(&op::RST);
        if refused {
            break;
        }
        sent += block.len();
    }
    assert!(refused, "a guest that ignores its credit is cut off");
    assert!(sent >= BUF_ALLOC as usize);
    assert_eq!(guest.rig.mmio.device().connections(), 0);
    drop(stream);
}

#[test]
fn bytes_a_slow_host_did_not_take_come_whole_and_in_order_and_credit_returns() {
    let (mut guest, stream) = Guest::connected();
    stream.set_nonblocking(true).unwrap();
    let (mut expected, mut got) = (Vec::new(), Vec::new());
    let (mut credit, mut updates) = (BUF_ALLOC, 0);
    for round in 0..60u32 {
        let block: Vec<u8> = (0..50_000u32).map(|at| (at ^ round) as u8).collect();
        if expected.len() as u32 + 50_000 <= credit {
            guest.send_data(PORT, &block);
            expected.extend_from_slice(&block);
        } else {
            got.extend(read_all(&stream));
            guest.rig.push_operations();
            while expected.len() > got.len() {
                guest.rig.complete_some();
                got.extend(read_all(&stream));
            }
        }
        for (header, _) in guest.packets() {
            assert_eq!(header.op, op::CREDIT_UPDATE);
            credit = header.fwd_cnt + BUF_ALLOC;
            updates += 1;
        }
    }
    while expected.len() > got.len() {
        guest.rig.complete_some();
        got.extend(read_all(&stream));
    }
    assert_eq!(got, expected);
    assert!(expected.len() > 1_000_000, "credit came back: {}", expected.len());
    assert!(updates <= expected.len() / 100_000, "{updates} updates");
}

#[test]
fn small_messages_cost_the_guest_no_credit_updates_and_no_tx_interrupts() {
    let (mut guest, stream) = Guest::connected();
    guest.rig.write(register::INTERRUPT_ACK, 1);
    let before = guest.rig.pulses.count();
    for _ in 0..15 {
        guest.send_data(PORT, b"a line of output\n");
    }
    assert_eq!(guest.ops(), NONE);
    assert_eq!(guest.rig.pulses.count(), before);
    assert_eq!(read_all(&stream).len(), 15 * 17);
    assert_eq!(guest.rig.queues[TX].take_used(), [], "given back later");
    // A quarter of the ring is the most that is held.
    for _ in 0..15 {
        guest.send_data(PORT, b"a line of output\n");
    }
    assert!(guest.rig.queues[TX].take_used().len() >= 16);
    // And a snapshot knows what is held.
    let state = guest.rig.mmio.state();
    let taken = state.queues[TX].next_avail.wrapping_sub(state.queues[TX].next_used);
    assert_eq!(state.held.len(), usize::from(taken));
}

#[test]
fn a_connection_goes_on_after_a_restore_with_the_bytes_that_were_on_their_way() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_data(PORT, b"before");
    // Not delivered: the guest has posted no buffer for it.
    stream.write_all(b"to the guest").unwrap();
    let saved = guest.rig.mmio.state();
    assert_eq!(saved.streams.len(), 1);
    assert_eq!(saved.streams[0].to_guest, b"to the guest");
    let (vsock, mut ends) = Vsock::restored(&saved).unwrap();
    let mem = std::sync::Arc::clone(&guest.rig.mem);
    let mut restored = Rig::with_state(saved.clone(), vsock, mem).unwrap();
    std::mem::swap(&mut restored.queues, &mut guest.rig.queues);
    guest.rig = restored;
    let end = ends.pop().unwrap();
    guest.send_data(PORT, b"after");
    assert_eq!(read_all(&end.stream), b"after");
    assert_eq!(guest.rig.mmio.state().streams[0].received_bytes, saved.streams[0].received_bytes + 5);
}

#[test]
fn a_credit_request_is_answered() {
    let (mut guest, _stream) = Guest::connected();
    guest.send(PORT, op::CREDIT_REQUEST);
    assert_eq!(guest.packet().op, op::CREDIT_UPDATE);
}

#[test]
fn the_host_may_end_its_direction_and_still_receive() {
    let (mut guest, mut stream) = Guest::connected();
    stream.write_all(b"last words").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let packets = guest.packets_after_event();
    assert_eq!(packets[0].1, b"last words");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, NO_SEND));
    assert_eq!(packets.len(), 2);
    guest.send_data(PORT, b"an answer");
    assert_eq!(read_all(&stream), b"an answer");
    guest.send_raw(&Header { flags: NO_SEND | NO_RECEIVE, ..Guest::header(PORT, op::SHUTDOWN) }, &[]);
    assert_eq!(guest.ops(), [op::RST]);
    assert!(at_end(&stream));
    assert_eq!(guest.rig.mmio.device().connections(), 0);
}

#[test]
fn the_guest_may_end_its_direction_and_still_receive() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_data(PORT, b"question");
    guest.send_raw(&Header { flags: NO_SEND, ..Guest::header(PORT, op::SHUTDOWN) }, &[]);
    assert_eq!(guest.ops(), NONE);
    assert_eq!(read_all(&stream), b"question");
    assert!(at_end(&stream));
    stream.write_all(b"answer").unwrap();
    assert_eq!(guest.packets_after_event()[0].1, b"answer");
    guest.send_data(PORT, b"after the end");
    assert_eq!(guest.ops(), [op::RST], "it said that it would not");
}

#[test]
fn a_guest_that_receives_no_more_makes_the_hosts_writes_fail() {
    let (mut guest, mut stream) = Guest::connected();
    guest.send_raw(&Header { flags: NO_RECEIVE, ..Guest::header(PORT, op::SHUTDOWN) }, &[]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.send_data(PORT, b"still here");
    assert_eq!(read_all(&stream), b"still here");
}

#[test]
fn a_host_that_closes_is_seen_by_the_guest_at_once() {
    let (mut guest, mut stream) = Guest::connected();
    stream.write_all(b"bye").unwrap();
    drop(stream);
    let packets = guest.packets_after_event();
    assert_eq!(packets[0].1, b"bye");
    assert_eq!((packets[1].0.op, packets[1].0.flags), (op::SHUTDOWN, NO_SEND | NO_RECEIVE));
    guest.send(PORT, op::RST);
    assert_eq!(guest.rig.mmio.device().connections(), 0);
}

#[test]
fn data_for_a_host_that_has_closed_is_dropped_and_the_guest_is_told() {
    let (mut guest, stream) = Guest::connected();
    drop(stream);
    guest.send_data(PORT, b"anyone?");
    let packet = guest.packet();
    assert_eq!(packet.op, op::SHUTDOWN);
    assert_ne!(packet.flags & NO_RECEIVE, 0);
}

#[test]
fn what_the_guest_sent_before_it_went_is_still_delivered() {
    let (mut guest, stream) = Guest::connected();
    let block = vec![3; 60_000];
    let mut sent = 0;
    while guest.rig.mmio.device().held_bytes() < 100_000 {
        guest.send_data(PORT, &block);
        sent += block.len();
    }
    guest.send_raw(&Header { flags: NO_SEND | NO_RECEIVE, ..Guest::header(PORT, op::SHUTDOWN) }, &[]);
    assert_eq!(guest.ops().last(), Some(&op::RST), "the guest need not wait for the host");
    let mut got = 0;
    while got < sent {
        got += read_all(&stream).len();
        if got < sent {
            guest.rig.complete_some();
        }
    }
    assert!(at_end(&stream));
    assert_eq!(guest.rig.mmio.device().connections(), 0);
    assert_eq!(got, sent);
}

#[test]
fn a_reset_ends_connections_and_keeps_requests_of_the_host() {
    let (mut guest, stream) = Guest::connected();
    let (reply, answer) = channel();
    guest.rig.mmio.with_device(|vsock, host| vsock.connect(GUEST_PORT, reply, host));
    assert_eq!(guest.packet().op, op::REQUEST);
    guest.rig.write(register::STATUS, 0);
    assert!(at_end(&stream));
    assert_eq!(guest.rig.mmio.device().connections(), 1);
    for queue in &mut guest.rig.queues {
        queue.set_available(0);
        queue.used_seen = 0;
        let index = queue.used() + 2;
        guest.rig.mem.write_obj(0u16, vm_memory::GuestAddress(index)).unwrap();
    }
    guest.posted.clear();
    guest.rig.bring_up(F_VERSION_1 | F_EVENT_IDX);
    guest.post(RECEIVED);
    guest.rig.notify(RX);
    let request = guest.packet();
    assert_eq!(request.op, op::REQUEST);
    guest.send(request.src_port, op::RESPONSE);
    assert!(answer.try_recv().unwrap().is_ok());
}

#[test]
fn a_restored_guest_is_told_that_its_connections_are_gone() {
    let (mut guest, _stream) = Guest::connected();
    let head = guest.rig.queues[2].add(&[writable(SENT, 4)]);
    guest.rig.notify(2);
    assert_eq!(guest.rig.queues[2].take_used(), []);
    let mut saved = guest.rig.mmio.state();
    saved.streams.clear();
    let mem = std::sync::Arc::clone(&guest.rig.mem);
    let (vsock, _) = Vsock::restored(&saved).unwrap();
    let mut restored = Rig::with_state(saved, vsock, mem).unwrap();
    restored.queues = guest.rig.queues;
    restored.fill(SENT, &[0xff; 4]);
    restored.service(0);
    assert_eq!(restored.queues[2].take_used(), [(head, 4)]);
    assert_eq!(restored.bytes(SENT, 4), [0; 4]);
    restored.service(2);
    assert_eq!(restored.queues[2].take_used(), [], "once");
}

#[test]
fn the_configuration_holds_the_guests_address() {
    let guest = Guest::new();
    let mut cid = [0; 8];
    guest.rig.mmio.read(register::CONFIG, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), GUEST_CID);
}
