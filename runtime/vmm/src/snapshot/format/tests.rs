//! The state file under damage, and its bytes pinned.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::snapshot::{AgentState, MemoryDigest, Run};
use proptest::prelude::*;
use std::path::Path;

/// A snapshot that is the same on every host.
fn small(streams: Vec<u32>, unread: Vec<u8>) -> Snapshot {
    let compat = Compat {
        version: 2,
        kvm: "software".to_owned(),
        cpu: "00ff".to_owned(),
        cpu_name: "a CPU".to_owned(),
        tsc_khz: 2_600_000,
        vcpus: 0,
        mem_mib: 256,
        disks_bytes: vec![4096, 1 << 20],
        memory: MemoryDigest { xxh3: 0x0123_4567_89ab_cdef, pages: 42 },
        pages: MemoryDigest { xxh3: 0xfedc_ba98_7654_3210, pages: 3 },
    };
    let machine = MachineState {
        vcpus: Vec::new(),
        irqchips: Vec::new(),
        clock: Default::default(),
        devices: Vec::new(),
        agent: AgentState { next_stream: 7, streams, unread },
        at_gate: true,
        runs: vec![Run { first: 5, pages: 2 }, Run { first: 300, pages: 1 }],
    };
    Snapshot { compat, machine }
}

fn golden_snapshot() -> Snapshot {
    small(vec![3, 5], b"half a frame".to_vec())
}

#[test]
fn the_bytes_of_a_state_file_are_those_of_the_golden_one() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/state-v2");
    let bytes = encode(&golden_snapshot()).unwrap();
    let golden = std::fs::read(path).unwrap();
    assert_eq!(bytes, golden, "the format changed: give it another version, and a golden file of its own");
    assert_eq!(&golden[..8], b"PGSNAP01");
    let record: serde_json::Value = {
        let len = u32::from_le_bytes(golden[8..12].try_into().unwrap()) as usize;
        serde_json::from_slice(&golden[48..48 + len]).unwrap()
    };
    assert_eq!((&record["version"], &record["memory"]["pages"]), (&2.into(), &42.into()));
}

#[test]
fn every_flipped_bit_of_a_state_file_is_refused() {
    let bytes = encode(&golden_snapshot()).unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut bytes = bytes.clone();
            bytes[at] ^= 1 << bit;
            assert!(parse(&bytes).is_err(), "byte {at}, bit {bit}");
        }
    }
}

#[test]
fn every_truncation_of_a_state_file_is_refused() {
    let bytes = encode(&golden_snapshot()).unwrap();
    for len in 0..bytes.len() {
        assert!(matches!(parse(&bytes[..len]), Err(FormatError::Length { .. })), "{len} bytes");
    }
}

/// A file with a right header and checksum around these parts.
fn sealed(compat: &[u8], machine: &[u8]) -> Vec<u8> {
    let mut header = MAGIC.to_vec();
    header.extend((compat.len() as u32).to_le_bytes());
    header.extend((machine.len() as u32).to_le_bytes());
    let body = [compat, machine].concat();
    [header.as_slice(), &checksum(&header, &body), &body].concat()
}

#[test]
fn bytes_behind_the_state_are_refused_though_the_checksum_covers_them() {
    let machine = [postcard::to_stdvec(&golden_snapshot().machine).unwrap(), vec![0]].concat();
    let bytes = sealed(b"{}", &machine);
    let parts = parse(&bytes).unwrap();
    assert!(parts.compat().unwrap_err().to_string().contains("compatibility record"));
    assert!(parts.machine().unwrap_err().to_string().contains("1 bytes too many"));
}

#[test]
fn a_header_that_claims_gigabytes_is_refused_unread() {
    let mut bytes = encode(&golden_snapshot()).unwrap();
    bytes[8..16].fill(0xff);
    assert!(matches!(parse(&bytes), Err(FormatError::Length { .. })));
}

proptest! {
    #[test]
    fn what_is_written_is_read_back(
        streams in prop::collection::vec(any::<u32>(), 0..20),
        unread in prop::collection::vec(any::<u8>(), 0..2000),
    ) {
        let snapshot = small(streams, unread);
        let bytes = encode(&snapshot).unwrap();
        let parts = parse(&bytes).unwrap();
        prop_assert_eq!(parts.compat().unwrap(), snapshot.compat);
        let machine = parts.machine().unwrap();
        prop_assert_eq!(machine.agent, snapshot.machine.agent);
    }

    #[test]
    fn changed_and_appended_bytes_are_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), 1..=u8::MAX), 1..4),
        appended in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let good = encode(&golden_snapshot()).unwrap();
        let mut bytes = good.clone();
        for (at, change) in edits {
            let at = at.index(bytes.len());
            bytes[at] ^= change;
        }
        bytes.extend(appended);
        // Two edits may undo each other.
        prop_assume!(bytes != good);
        prop_assert!(parse(&bytes).is_err());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..4096)) {
        prop_assert!(parse(&bytes).is_err());
    }

    /// What a checksum cannot keep out: a file that somebody made on purpose.
    #[test]
    fn arbitrary_parts_under_a_right_checksum_never_panic(
        compat in prop::collection::vec(any::<u8>(), 0..256),
        machine in prop::collection::vec(any::<u8>(), 0..4096),
    ) {
        let bytes = sealed(&compat, &machine);
        let parts = parse(&bytes).unwrap();
        let _ = (parts.compat(), parts.machine());
    }
}
