//! Floods, garbage and everything in any order: memory stays bounded and the device lives.

use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::channel;

use proptest::prelude::*;

use super::*;

#[test]
fn packets_for_unknown_connections_are_reset_but_resets_are_not() {
    let mut guest = Guest::new();
    for op in [op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 0, 99] {
        guest.send(PORT, op);
        let reset = guest.packet();
        assert_eq!((reset.op, reset.src_port, reset.dst_port), (op::RST, PORT, GUEST_PORT));
    }
    guest.send(PORT, op::RST);
    assert_eq!(guest.ops(), NONE);
}

#[test]
fn other_socket_types_are_reset_and_other_addresses_are_ignored() {
    let (mut guest, _stream) = Guest::connected();
    let good = Guest::header(PORT, op::RW);
    for bad in
        [Header { src_cid: 4, ..good }, Header { dst_cid: 1, ..good }, Header { dst_cid: u64::MAX, ..good }]
    {
        guest.send_raw(&bad, &[]);
        assert_eq!(guest.ops(), NONE);
    }
    assert_eq!(guest.rig.mmio.device().connections(), 1);
    guest.send_raw(&Header { kind: 2, ..good }, &[]);
    let reset = guest.packet();
    assert_eq!((reset.op, reset.kind), (op::RST, 2));
}

#[test]
fn a_length_beyond_the_payload_is_reset() {
    let (mut guest, stream) = Guest::connected();
    guest.send_raw(&Header { len: 100, ..Guest::header(PORT, op::RW) }, b"only this");
    assert_eq!(guest.ops(), [op::RST]);
    assert!(at_end(&stream));
}

#[test]
fn a_payload_in_many_pieces_arrives_whole() {
    let (mut guest, stream) = Guest::connected();
    let header = Header { len: 6, ..Guest::header(PORT, op::RW) }.to_bytes();
    guest.rig.fill(SENT, &header[..10]);
    guest.rig.fill(SENT + 0x1000, &header[10..]);
    guest.rig.fill(SENT + 0x2000, b"ab");
    guest.rig.fill(SENT + 0x3000, b"cdefgh");
    guest.rig.queues[TX].add(&[
        readable(SENT, 10),
        readable(SENT + 0x1000, 34),
        readable(SENT + 0x2000, 2),
        readable(SENT + 0x3000, 6),
    ]);
    guest.rig.notify(TX);
    assert_eq!(read_all(&stream), b"abcdef");
}

#[test]
fn a_flood_of_connections_is_capped() {
    let mut guest = Guest::new();
    let listener = guest.listen();
    let mut streams = Vec::new();
    let mut accepted = 0;
    for port in 0..500 {
        guest.send_raw(&Header { src_port: port, ..Guest::header(PORT, op::REQUEST) }, &[]);
        streams.extend(listener.try_iter());
        accepted += guest.ops().iter().filter(|&&op| op == op::RESPONSE).count();
        assert!(guest.rig.mmio.device().connections() <= MAX_CONNECTIONS);
    }
    assert_eq!((accepted, streams.len()), (MAX_CONNECTIONS, MAX_CONNECTIONS));
    // Connections that only wait for the guest's last word make room for the host.
    drop(streams);
    while guest.rig.mmio.device().connections() == MAX_CONNECTIONS {
        guest.packets_after_event();
        let (reply, _answer) = channel();
        guest.rig.mmio.with_device(|vsock, host| vsock.connect(GUEST_PORT, reply, host));
        if guest.ops().contains(&op::REQUEST) {
            return;
        }
    }
}

#[test]
fn connections_nobody_takes_are_refused_beyond_the_backlog() {
    let mut guest = Guest::new();
    let _listener = guest.listen();
    for port in 0..30 {
        guest.send_raw(&Header { src_port: port, ..Guest::header(PORT, op::REQUEST) }, &[]);
    }
    let ops = guest.ops();
    assert_eq!(ops.iter().filter(|&&op| op == op::RESPONSE).count(), 16);
    assert_eq!(ops.iter().filter(|&&op| op == op::RST).count(), 14);
}

#[test]
fn replies_to_a_guest_without_buffers_are_capped() {
    let mut guest = Guest::new();
    guest.post_more = false;
    for port in 0..1000 {
        guest.send_raw(&Header { src_port: port, ..Guest::header(PORT, op::RW) }, &[]);
    }
    assert_eq!(guest.packets().len(), usize::from(RX_SIZE));
    guest.post_more = true;
    (0..u64::from(RX_SIZE)).for_each(|buffer| guest.post(RECEIVED + buffer * RX_BUFFER_BYTES as u64));
    guest.rig.notify(RX);
    assert_eq!(guest.packets().len(), MAX_RESETS);
}

#[test]
fn useless_rx_buffers_are_given_back_and_skipped() {
    let mut guest = Guest { rig: Rig::live(Vsock::default()), posted: Vec::new(), post_more: true };
    let bad = [
        guest.rig.queues[RX].add(&[writable(RECEIVED, HEADER_BYTES)]),
        guest.rig.queues[RX].add(&[writable(MEM_BYTES - 8, 4096)]),
        guest.rig.queues[RX].add(&[readable(RECEIVED, 4096)]),
    ];
    guest.send(PORT, op::RW);
    assert_eq!(guest.rig.queues[RX].take_used(), bad.map(|head| (head, 0)));
    guest.post(RECEIVED);
    guest.rig.notify(RX);
    assert_eq!(guest.packet().op, op::RST);
}

/// What a hostile or unlucky pair of guest and host may do.
#[derive(Debug, Clone)]
enum Act {
    Packet {
        op: u16,
        host_port: u32,
        guest_port: u32,
        len: u32,
        payload: usize,
        flags: u32,
        buf_alloc: u32,
        fwd_cnt: u32,
        odd: u8,
    },
    HostWrites(usize),
    HostReads,
    HostCloses,
    HostConnects,
    PostsBuffer(u32),
}

fn act() -> impl Strategy<Value = Act> {
    let packet = (
        0u16..9,
        prop_oneof![3 => Just(PORT), 1 => Just(PORT + 1), 2 => (1u32 << 30)..(1 << 30) + 3],
        0u32..3,
        prop_oneof![Just(0u32), 0u32..5000, any::<u32>()],
        0usize..5000,
        0u32..5,
        prop_oneof![Just(1u32 << 18), 0u32..1000, any::<u32>()],
        prop_oneof![Just(0u32), 0u32..10_000, any::<u32>()],
        0u8..20,
    );
    let packet =
        packet.prop_map(|(op, host_port, guest_port, len, payload, flags, buf_alloc, fwd_cnt, odd)| {
            // Mostly consistent lengths, so that data gets through.
            let len = if len % 3 == 0 { payload as u32 } else { len };
            Act::Packet { op, host_port, guest_port, len, payload, flags, buf_alloc, fwd_cnt, odd }
        });
    prop_oneof![
        8 => packet,
        2 => (1usize..9000).prop_map(Act::HostWrites),
        1 => Just(Act::HostReads),
        1 => Just(Act::HostCloses),
        1 => Just(Act::HostConnects),
        2 => (0u32..5000).prop_map(Act::PostsBuffer),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_sequence_of_packets_and_host_actions_breaks_the_device(acts in proptest::collection::vec(act(), 0..120)) {
        let mut guest = Guest { rig: Rig::live(Vsock::default()), posted: Vec::new(), post_more: true };
        let listener = guest.listen();
        let mut streams: Vec<UnixStream> = Vec::new();
        let mut answers = Vec::new();
        let block = vec![1; 9000];
        for act in acts {
            match act {
                Act::Packet { op, host_port, guest_port, len, payload, flags, buf_alloc, fwd_cnt, odd } => {
                    let mut header = Header {
                        len, flags, buf_alloc, fwd_cnt, src_port: guest_port, ..Guest::header(host_port, op)
                    };
                    match odd {
                        0 => header.kind = 2,
                        1 => header.dst_cid = 9,
                        2 => header.src_cid = 9,
                        _ => {}
                    }
                    guest.send_raw(&header, &block[..payload]);
                }
                Act::HostWrites(count) => if let Some(stream) = streams.last_mut() {
                    stream.set_nonblocking(true).unwrap();
                    let _ = stream.write(&block[..count]);
                },
                Act::HostReads => streams.iter().for_each(|stream| drop(read_all(stream))),
                Act::HostCloses => drop(streams.pop()),
                Act::HostConnects => {
                    let (reply, answer) = channel();
                    guest.rig.mmio.with_device(|vsock, host| vsock.connect(1, reply, host));
                    answers.push(answer);
                }
                Act::PostsBuffer(len) => {
                    guest.rig.queues[RX].add(&[writable(RECEIVED, len as usize)]);
                    guest.rig.notify(RX);
                }
            }
            streams.extend(listener.try_iter());
            streams.extend(answers.iter().filter_map(|answer| answer.try_recv().ok()?.ok()));
            // Events of the sockets, as many as there are.
            guest.rig.push_operations();
            let mut completions = Vec::new();
            guest.rig.ring.drain(&mut completions);
            for done in completions {
                let token = done.owner as u32;
                guest.rig.mmio.complete(crate::devices::mmio::Done { token, result: done.result, more: done.more, buffers: None });
            }
            let device = guest.rig.mmio.device();
            prop_assert!(device.connections() <= MAX_CONNECTIONS);
            prop_assert!(device.held_bytes() <= device.connections() * BUF_ALLOC as usize);
            prop_assert!(guest.rig.mmio.is_live());
        }
        prop_assert!(guest.rig.queues[TX].take_used().len() + usize::from(TX_SIZE) / 4 >= usize::from(guest.rig.queues[TX].available) % usize::from(TX_SIZE));
    }
}
