//! The block device behind its transport, with real files and a real ring.
#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;

use proptest::prelude::*;
use vmm_sys_util::tempfile::TempFile;

use super::{Block, QUEUE_SIZE, answer};
use crate::devices::Disk;
use crate::devices::mmio::{Effect, F_EVENT_IDX, F_VERSION_1, register, status};
use crate::devices::testing::{BUFFERS, HIGH_MEM, MEM_BYTES, Piece, Rig, readable, writable};
use crate::event_loop::ring::Op;

const HEADER: u64 = BUFFERS;
const STATUS: u64 = BUFFERS + 0x800;
const DATA: u64 = BUFFERS + 0x1000;
const SECTORS: u64 = 2048;
/// A status byte no device writes.
const UNTOUCHED: u8 = 0xee;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

fn content() -> Vec<u8> {
    (0..SECTORS * 512).map(|at| (at / 512) as u8 ^ at as u8).collect()
}

struct Guest {
    rig: Rig<Block>,
    file: File,
}

impl Guest {
    fn new(read_only: bool, read_cached: bool) -> Self {
        let mut file = TempFile::new().unwrap().into_file();
        file.write_all(&content()).unwrap();
        let disk = Disk { file: file.try_clone().unwrap(), read_only, id: "serial-0001".into() };
        let mut block = Block::new(disk).unwrap();
        block.set_read_cached(read_cached);
        let mut rig = Rig::powered_on(block);
        let by_access = if read_only { super::F_RO } else { super::F_FLUSH | super::F_DISCARD };
        rig.bring_up(F_VERSION_1 | F_EVENT_IDX | super::F_SEG_MAX | by_access);
        Self { rig, file }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.rig.fill(HEADER, &kind.to_le_bytes());
        self.rig.fill(HEADER + 8, &sector.to_le_bytes());
        self.rig.fill(STATUS, &[UNTOUCHED]);
    }

    /// Makes a request in the usual framing and waits for it; gives status and used length.
    fn request(&mut self, kind: u32, sector: u64, data: &[Piece]) -> (u8, u32) {
        self.header(kind, sector);
        let mut pieces = vec![readable(HEADER, 16)];
        pieces.extend_from_slice(data);
        pieces.push(writable(STATUS, 1));
        self.raw(&pieces)
    }

    fn raw(&mut self, pieces: &[Piece]) -> (u8, u32) {
        let head = self.rig.queues[0].add(pieces);
        self.rig.notify(0);
        self.rig.run_operations();
        let used = self.rig.queues[0].take_used();
        assert_eq!(used.len(), 1, "exactly one answer");
        assert_eq!(used[0].0, head);
        (self.rig.bytes(STATUS, 1)[0], used[0].1)
    }

    fn on_disk(&self, sector: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, sector * 512).unwrap();
        bytes
    }
}

#[test]
fn reads_give_the_files_bytes_from_the_page_cache_and_through_the_ring() {
    for read_cached in [true, false] {
        let mut guest = Guest::new(true, read_cached);
        let data = [writable(DATA, 512), writable(HIGH_MEM, 1024), writable(DATA + 0x4000, 512)];
        assert_eq!(guest.request(IN, 7, &data), (answer::OK, 2049));
        let expected = &content()[7 * 512..11 * 512];
        assert_eq!(guest.rig.bytes(DATA, 512), expected[..512]);
        assert_eq!(guest.rig.bytes(HIGH_MEM, 1024), expected[512..1536]);
        assert_eq!(guest.rig.bytes(DATA + 0x4000, 512), expected[1536..]);
        let stats = guest.rig.counters.snapshot();
        assert_eq!((stats.block_requests, stats.block_read_bytes), (1, 2048));
        assert_eq!(stats.block_cached, u64::from(read_cached));
    }
}

#[test]
fn a_write_and_a_flush_reach_the_file() {
    let mut guest = Guest::new(false, true);
    guest.rig.fill(DATA, &[0x5a; 1024]);
    assert_eq!(guest.request(OUT, 2, &[readable(DATA, 1024)]), (answer::OK, 1));
    assert_eq!(guest.request(FLUSH, 0, &[]), (answer::OK, 1));
    assert_eq!(guest.on_disk(2, 1024), [0x5a; 1024]);
    assert_eq!(guest.on_disk(1, 512), content()[512..1024]);
    assert_eq!(guest.on_disk(4, 512), content()[2048..2560]);
    assert_eq!(guest.rig.counters.snapshot().block_written_bytes, 1024);
}

#[test]
fn a_read_only_disk_refuses_writes_and_offers_none_of_their_features() {
    let mut guest = Guest::new(true, true);
    assert_eq!(guest.request(OUT, 0, &[readable(DATA, 512)]).0, answer::IO_ERROR);
    assert_eq!(guest.request(DISCARD, 0, &[readable(DATA, 16)]).0, answer::UNSUPPORTED);
    assert_eq!(guest.on_disk(0, 512), content()[..512]);
    guest.rig.write(register::DEVICE_FEATURES_SEL, 0);
    let offered = u64::from(guest.rig.read(register::DEVICE_FEATURES));
    assert_eq!(offered & (super::F_RO | super::F_FLUSH | super::F_DISCARD), super::F_RO);
}

#[test]
fn requests_outside_the_disk_or_not_of_whole_sectors_fail() {
    for kind in [IN, OUT] {
        let mut guest = Guest::new(false, true);
        let piece = |len| [Piece(DATA, len, kind == IN)];
        for (sector, len) in
            [(SECTORS, 512), (SECTORS - 1, 1024), (u64::MAX, 512), (u64::MAX / 512, 512), (0, 511)]
        {
            assert_eq!(guest.request(kind, sector, &piece(len)).0, answer::IO_ERROR, "{sector} {len}");
        }
        assert_eq!(guest.request(kind, SECTORS - 1, &piece(512)).0, answer::OK);
        assert_eq!(guest.request(kind, SECTORS, &[]).0, answer::OK, "nothing is wrong with nothing");
    }
}

#[test]
fn buffers_outside_guest_memory_fail_without_touching_the_disk() {
    let mut guest = Guest::new(false, true);
    for addr in [MEM_BYTES - 256, MEM_BYTES, HIGH_MEM - 4, u64::MAX - 100] {
        assert_eq!(guest.request(OUT, 0, &[readable(addr, 512)]).0, answer::IO_ERROR);
        assert_eq!(guest.request(IN, 0, &[writable(addr, 512)]).0, answer::IO_ERROR);
    }
    assert_eq!(guest.on_disk(0, 512), content()[..512]);
}

#[test]
fn the_framing_is_the_drivers_choice() {
    let mut guest = Guest::new(false, true);
    // Header in two pieces; data and status in one.
    guest.header(IN, 3);
    guest.rig.fill(DATA, &[UNTOUCHED; 513]);
    let pieces = [readable(HEADER, 7), readable(HEADER + 7, 9), writable(DATA, 513)];
    assert_eq!(guest.raw(&pieces).1, 513);
    assert_eq!(guest.rig.bytes(DATA, 512), content()[3 * 512..4 * 512]);
    assert_eq!(guest.rig.bytes(DATA + 512, 1), [answer::OK]);
    // Header and data in one.
    guest.header(OUT, 3);
    guest.rig.fill(HEADER + 16, &[1; 512]);
    assert_eq!(guest.raw(&[readable(HEADER, 528), writable(STATUS, 1)]), (answer::OK, 1));
    assert_eq!(guest.on_disk(3, 512), [1; 512]);
}

#[test]
fn chains_without_a_status_or_a_header_get_no_data() {
    let mut guest = Guest::new(false, true);
    guest.header(IN, 0);
    assert_eq!(guest.raw(&[readable(HEADER, 16)]), (UNTOUCHED, 0));
    assert_eq!(guest.raw(&[readable(HEADER, 15), writable(STATUS, 1)]).0, answer::IO_ERROR);
    assert_eq!(guest.raw(&[writable(DATA, 512), readable(HEADER, 16)]).1, 0, "wrong order");
    assert_eq!(guest.raw(&[readable(HEADER, 16), writable(u64::MAX - 3, 512)]).1, 0);
    assert_eq!(guest.rig.bytes(DATA, 512), [0; 512]);
    assert!(guest.rig.mmio.is_live());
}

#[test]
fn the_serial_number_can_be_asked_for() {
    let mut guest = Guest::new(true, true);
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 20)]), (answer::OK, 21));
    assert_eq!(guest.rig.bytes(DATA, 20), *b"serial-0001\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.request(GET_ID, 0, &[writable(DATA, 6)]), (answer::OK, 7));
}

#[test]
fn unknown_requests_are_unsupported() {
    let mut guest = Guest::new(false, true);
    for kind in [2, 3, 5, 14, u32::MAX] {
        assert_eq!(guest.request(kind, 0, &[]).0, answer::UNSUPPORTED);
    }
}

#[test]
fn discarded_and_zeroed_sectors_read_as_zeroes() {
    for (kind, flags) in [(DISCARD, 0u32), (WRITE_ZEROES, 0), (WRITE_ZEROES, 1)] {
        let mut guest = Guest::new(false, true);
        let segment = |sector: u64, count: u32, flags: u32| {
            [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
        };
        guest.rig.fill(DATA, &segment(8, 16, flags));
        let (answer, _) = guest.request(kind, 0, &[readable(DATA, 16)]);
        // ZERO_RANGE is not on every file system.
        assert!(answer == answer::OK || answer == answer::UNSUPPORTED && flags == 0, "{kind} {flags}");
        if answer == answer::OK {
            assert_eq!(guest.on_disk(8, 16 * 512), [0; 16 * 512]);
        }
        assert_eq!(guest.on_disk(24, 512), content()[24 * 512..25 * 512]);
        for (sector, count, flags, wanted) in [
            (SECTORS - 1, 2, 0, answer::IO_ERROR),
            (u64::MAX, 1, 0, answer::IO_ERROR),
            (0, 0, 0, answer::IO_ERROR),
            (0, 1, 6, answer::UNSUPPORTED),
        ] {
            guest.rig.fill(DATA, &segment(sector, count, flags));
            assert_eq!(guest.request(kind, 0, &[readable(DATA, 16)]).0, wanted);
        }
        assert_eq!(guest.request(kind, 0, &[readable(DATA, 32)]).0, answer::IO_ERROR, "two segments");
    }
}

#[test]
fn a_file_that_became_shorter_is_an_error_not_a_hang() {
    let mut guest = Guest::new(false, false);
    guest.file.set_len(3 * 512).unwrap();
    assert_eq!(guest.request(IN, 2, &[writable(DATA, 1024)]).0, answer::IO_ERROR);
    assert_eq!(guest.request(IN, 2, &[writable(DATA, 512)]).0, answer::OK);
}

#[test]
fn a_reset_with_io_in_flight_completes_when_the_io_has() {
    let mut guest = Guest::new(false, false);
    guest.header(IN, 0);
    guest.rig.queues[0].add(&[readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)]);
    guest.rig.notify(0);
    assert_eq!(guest.rig.mmio.in_flight(), 1);
    let before = guest.rig.read(register::STATUS);
    assert_eq!(guest.rig.write(register::STATUS, 0), Effect::Resetting);
    assert_eq!(guest.rig.read(register::STATUS), before, "not reset yet");
    guest.rig.write(register::STATUS, status::ACKNOWLEDGE);
    assert_eq!(guest.rig.read(register::STATUS), before, "and nothing else works meanwhile");
    guest.rig.run_operations();
    assert_eq!(guest.rig.read(register::STATUS), 0);
    assert_eq!(guest.rig.queues[0].take_used(), [], "the old queue is not touched");
    assert_eq!(guest.rig.bytes(STATUS, 1), [UNTOUCHED]);
    assert_eq!(guest.rig.pulses.count(), 0);
}

#[test]
fn a_guest_that_offers_one_chain_over_and_over_cannot_have_more_than_a_queue_in_flight() {
    let mut guest = Guest::new(false, false);
    guest.header(IN, 0);
    let pieces = [readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)];
    let head = guest.rig.queues[0].add(&pieces);
    for _ in 0..20 {
        for _ in 0..100 {
            guest.rig.queues[0].offer(head);
        }
        guest.rig.notify(0);
        assert!(guest.rig.mmio.in_flight() <= usize::from(QUEUE_SIZE));
        if !guest.rig.mmio.is_live() {
            break;
        }
    }
    assert_eq!(guest.rig.mmio.in_flight(), usize::from(QUEUE_SIZE));
    guest.rig.run_operations();
    assert_eq!(guest.rig.mmio.in_flight(), 0);
}

#[test]
fn requests_behind_a_full_device_are_served_when_it_has_room() {
    let mut guest = Guest::new(false, false);
    guest.header(IN, 0);
    let pieces = [readable(HEADER, 16), writable(DATA, 512), writable(STATUS, 1)];
    let head = guest.rig.queues[0].add(&pieces);
    (1..QUEUE_SIZE).for_each(|_| guest.rig.queues[0].offer(head));
    guest.rig.notify(0);
    guest.rig.queues[0].offer(head);
    guest.rig.notify(0);
    assert_eq!(guest.rig.mmio.in_flight(), usize::from(QUEUE_SIZE));
    guest.rig.run_operations();
    assert_eq!(guest.rig.queues[0].take_used().len(), usize::from(QUEUE_SIZE) + 1);
}

#[test]
fn many_requests_cost_one_interrupt() {
    let mut guest = Guest::new(true, true);
    for request in 0..20u64 {
        let header = HEADER + request * 16;
        guest.rig.fill(header, &IN.to_le_bytes());
        let status = STATUS + request;
        guest.rig.queues[0].add(&[
            readable(header, 16),
            writable(DATA + request * 512, 512),
            writable(status, 1),
        ]);
    }
    guest.rig.notify(0);
    assert_eq!(guest.rig.queues[0].take_used().len(), 20);
    assert_eq!(guest.rig.pulses.count(), 1);
}

#[test]
fn an_errno_of_the_kernel_becomes_an_io_error() {
    let mut guest = Guest::new(false, true);
    guest.header(FLUSH, 0);
    let head = guest.rig.queues[0].add(&[readable(HEADER, 16), writable(STATUS, 1)]);
    guest.rig.notify(0);
    let ops = guest.rig.operations();
    let [Op::Sync { token, .. }] = ops[..] else { panic!("{ops:?}") };
    let done = crate::devices::mmio::Done { token, result: -libc::EIO, more: false, buffers: None };
    guest.rig.mmio.complete(done);
    assert_eq!(guest.rig.queues[0].take_used(), [(head, 1)]);
    assert_eq!(guest.rig.bytes(STATUS, 1), [answer::IO_ERROR]);
}

/// Addresses in and around memory, but not in the rings.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => BUFFERS..MEM_BYTES,
        1 => MEM_BYTES - 0x2000..MEM_BYTES + 0x1000,
        1 => HIGH_MEM..HIGH_MEM + (1 << 20),
        1 => u64::MAX - 0x1000..=u64::MAX,
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn any_chain_gets_exactly_one_answer_and_the_device_lives(
        kind in prop_oneof![Just(IN), Just(OUT), Just(FLUSH), Just(GET_ID), Just(DISCARD), Just(WRITE_ZEROES), any::<u32>()],
        sector in prop_oneof![0..SECTORS + 2, any::<u64>()],
        pieces in proptest::collection::vec((address(), prop_oneof![0u32..5000, Just(512), Just(16), Just(1)], any::<bool>()), 1..12),
        usual in any::<bool>(),
        read_cached in any::<bool>(),
    ) {
        let mut guest = Guest::new(false, read_cached);
        guest.header(kind, sector);
        let mut chain: Vec<Piece> = pieces.iter().map(|&(addr, len, write)| Piece(addr, len, write)).collect();
        if usual {
            chain.retain(|piece| piece.2 == (kind != OUT));
            chain.insert(0, readable(HEADER, 16));
            chain.push(writable(STATUS, 1));
        }
        guest.raw(&chain);
        prop_assert!(guest.rig.mmio.is_live());
        prop_assert_eq!(guest.rig.mmio.in_flight(), 0);
    }
}
