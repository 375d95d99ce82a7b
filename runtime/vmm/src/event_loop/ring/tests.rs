//! Buffers in guest memory against a plain model, and the ring's promise to wait.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::Bytes as _;

use super::*;
use crate::devices::testing::{BUFFERS, HIGH_MEM, MEM_BYTES, memory};

fn ranges(pieces: &[(u64, u32)]) -> Vec<(GuestAddress, u32)> {
    pieces.iter().map(|&(addr, len)| (GuestAddress(addr), len)).collect()
}

#[test]
fn buffers_outside_guest_memory_cannot_be_made() {
    let mem = memory();
    for piece in
        [(MEM_BYTES, 1), (MEM_BYTES - 1, 2), (HIGH_MEM - 1, 1), (u64::MAX, 1), (u64::MAX - 1, u32::MAX)]
    {
        assert_eq!(GuestBuffers::new(&mem, &ranges(&[(0, 8), piece])).err(), Some(BadBuffers), "{piece:x?}");
    }
    assert_eq!(GuestBuffers::new(&mem, &ranges(&[(0, 8), (HIGH_MEM, 8)])).unwrap().len(), 16);
    assert!(GuestBuffers::new(&mem, &ranges(&[(u64::MAX, 0)])).unwrap().is_empty());
}

#[test]
fn more_pieces_than_one_call_takes_are_refused() {
    let mem = memory();
    assert!(GuestBuffers::new(&mem, &ranges(&[(0, 1); 1024])).is_ok());
    assert!(GuestBuffers::new(&mem, &ranges(&[(0, 1); 1025])).is_err());
}

#[test]
fn a_dropped_ring_has_waited_for_what_writes_to_guest_memory() {
    let mem = memory();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let file = Arc::new(File::from(std::os::fd::OwnedFd::from(ours)));
    let buffers = GuestBuffers::new(&mem, &ranges(&[(BUFFERS, 4)])).unwrap();
    std::thread::scope(|scope| {
        let (begun, begins) = std::sync::mpsc::channel();
        let (file, memory) = (&file, &mem);
        scope.spawn(move || {
            let mut ring = Ring::new(8).unwrap();
            ring.push(0, Op::Read { token: 0, file: Arc::clone(file), buffers, offset: 0 });
            ring.submit().unwrap();
            assert_eq!(ring.moving(), 1);
            begun.send(()).unwrap();
            drop(ring);
            let mut bytes = [0; 4];
            memory.read_slice(&mut bytes, GuestAddress(BUFFERS)).unwrap();
            assert_eq!(&bytes, b"late");
        });
        begins.recv().unwrap();
        // Gives a ring that does not wait the time to show it.
        std::thread::sleep(Duration::from_millis(50));
        theirs.write_all(b"late").unwrap();
    });
}

#[test]
fn more_operations_than_entries_all_complete() {
    let mem = memory();
    let file = Arc::new(vmm_sys_util::tempfile::TempFile::new().unwrap().into_file());
    let mut ring = Ring::new(4).unwrap();
    for number in 0..100u64 {
        let addr = BUFFERS + number;
        mem.write_slice(&[number as u8], GuestAddress(addr)).unwrap();
        let buffers = GuestBuffers::new(&mem, &ranges(&[(addr, 1)])).unwrap();
        ring.push(number, Op::Write { token: 0, file: Arc::clone(&file), buffers, offset: number });
    }
    let mut done = Vec::new();
    while ring.moving() > 0 {
        ring.wait().unwrap();
        ring.drain(&mut done);
    }
    let mut owners: Vec<u64> = done.iter().map(|completion| completion.owner).collect();
    owners.sort_unstable();
    assert_eq!(owners, (0..100).collect::<Vec<_>>());
    assert!(done.iter().all(|completion| completion.result == 1 && completion.buffers.is_some()));
    let mut bytes = [0; 100];
    std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 0).unwrap();
    assert!(bytes.iter().enumerate().all(|(at, &byte)| at == usize::from(byte)));
}

#[test]
fn a_cancelled_poll_says_nothing_more() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let fd: Pollable = Arc::new(ours);
    let mut ring = Ring::new(8).unwrap();
    ring.push(7, Op::Poll { token: 7, fd, events: libc::POLLIN, multi: true });
    let mut done = Vec::new();
    for round in 1..=3 {
        theirs.write_all(b"x").unwrap();
        while done.len() < round {
            ring.wait().unwrap();
            ring.drain(&mut done);
        }
        assert!(done[round - 1].more, "a multishot poll stays armed");
    }
    ring.push(7, Op::Unpoll { token: 7 });
    while done.last().is_some_and(|completion| completion.more) {
        ring.wait().unwrap();
        ring.drain(&mut done);
    }
    assert_eq!(done.len(), 4);
    assert_eq!(done[3].result, -libc::ECANCELED);
}

proptest! {
    #[test]
    fn advance_and_truncate_leave_exactly_the_bytes_between(
        pieces in proptest::collection::vec((BUFFERS..MEM_BYTES - 64, 0u32..64), 0..10),
        steps in proptest::collection::vec((any::<bool>(), 0usize..200), 0..5),
    ) {
        let mem = memory();
        let noise: Vec<u8> = (0..MEM_BYTES - BUFFERS).map(|at| (at * 31 % 251) as u8).collect();
        mem.write_slice(&noise, GuestAddress(BUFFERS)).unwrap();
        let mut model: Vec<u8> = Vec::new();
        for &(addr, len) in &pieces {
            let from = (addr - BUFFERS) as usize;
            model.extend_from_slice(&noise[from..from + len as usize]);
        }
        let mut buffers = GuestBuffers::new(&mem, &ranges(&pieces)).unwrap();
        for (front, count) in steps {
            if front {
                buffers.advance(count);
                model.drain(..count.min(model.len()));
            } else {
                buffers.truncate(count);
                model.truncate(count);
            }
            prop_assert_eq!(buffers.len(), model.len());
        }
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        prop_assert_eq!(buffers.send(&ours).unwrap(), model.len());
        drop(ours);
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).unwrap();
        prop_assert_eq!(got, model);
    }
}
