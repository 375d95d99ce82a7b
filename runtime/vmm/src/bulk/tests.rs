//! Tests of bulk streams on the assist's machine of plain data: real page tables, RAM with a hole; real sockets.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::assist::tests::{
    CR0_WP, CR4_SMAP, DATA, DATA_GPA, DATA_PAGES, HOLE, Machine, PRESENT, USER, WRITABLE, cases,
};
use proptest::prelude::*;
use std::io::{Read as _, Write as _};

/// Eight pages of a program, on the RAM behind [`DATA`].
const PROGRAM: u64 = 0x7000_0000_0000;
const NUMBER: u64 = 0xdead_beef_0000_0001;

/// A guest with a stream, and the stream's other end.
struct Rig {
    machine: Machine,
    streams: Streams,
    host: UnixStream,
}

impl Rig {
    fn new() -> Self {
        let mut machine = Machine::new();
        for page in 0..DATA_PAGES {
            machine.map(PROGRAM + page * 4096, DATA_GPA + page * 4096, PRESENT | WRITABLE | USER);
        }
        let (host, theirs) = UnixStream::pair().unwrap();
        let streams = Streams::default();
        streams.attach(NUMBER, theirs).unwrap();
        Self { machine, streams, host }
    }

    fn read(&mut self, register: u64, at: u64, len: u64) -> u32 {
        self.read_for(NUMBER, register, at, len)
    }

    fn read_for(&mut self, number: u64, register: u64, at: u64, len: u64) -> u32 {
        let Self { machine: Machine { cpu, mem, host, .. }, streams, .. } = self;
        (cpu.regs.rdi, cpu.regs.rsi, cpu.regs.rdx) = (at, len, number);
        let before = cpu.regs;
        let answer = streams.transfer(register, cpu, host, &Arc::new(mem.clone()));
        assert_eq!(cpu.regs, before, "no register changes");
        assert!(cpu.injected.is_empty());
        answer
    }
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn bytes_arrive_across_pages_that_lie_anywhere() {
    let mut rig = Rig::new();
    // Its first two pages change places.
    rig.machine.map(PROGRAM, DATA_GPA + 4096, PRESENT | WRITABLE | USER);
    rig.machine.map(PROGRAM + 4096, DATA_GPA, PRESENT | WRITABLE | USER);
    let bytes = pattern(8000);
    rig.host.write_all(&bytes).unwrap();
    assert_eq!(rig.read(BULK_RECEIVE, PROGRAM + 96, 1 << 30), 8000);
    assert_eq!(rig.machine.bytes(DATA_GPA + 4096 + 96, 4000), bytes[..4000]);
    assert_eq!(rig.machine.bytes(DATA_GPA, 4000), bytes[4000..]);
    assert_eq!(rig.read(BULK_SEND, PROGRAM + 96, 8000), 8000);
    let mut back = vec![0; 8000];
    rig.host.read_exact(&mut back).unwrap();
    assert_eq!(back, bytes);
}

#[test]
fn nothing_to_receive_is_no_end_and_no_room_is_no_loss() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(BULK_RECEIVE, PROGRAM, 4096), BULK_WAIT);
    let mut sent = 0;
    loop {
        match rig.read(BULK_SEND, PROGRAM, 4096 * DATA_PAGES) {
            BULK_WAIT => break,
            count => sent += count as usize,
        }
    }
    rig.host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(rig.read(BULK_RECEIVE, PROGRAM, 4096), 0, "that is the end");
    let mut back = vec![0; sent];
    rig.host.read_exact(&mut back).unwrap();
    assert_ne!(rig.read(BULK_SEND, PROGRAM, 1), BULK_WAIT, "there is room again");
}

#[test]
fn to_send_nothing_is_to_say_that_it_was_all() {
    let mut rig = Rig::new();
    assert_eq!(rig.read(BULK_SEND, PROGRAM, 3), 3);
    assert_eq!(rig.read(BULK_SEND, PROGRAM, 0), 0);
    let mut all = Vec::new();
    assert_eq!(rig.host.read_to_end(&mut all).unwrap(), 3);
    assert_eq!(rig.read(BULK_SEND, PROGRAM, 0), BULK_NONE);
}

#[test]
fn a_stream_that_nobody_has_is_none() {
    let mut rig = Rig::new();
    assert_eq!(rig.read_for(NUMBER + 1, BULK_RECEIVE, PROGRAM, 1), BULK_NONE);
    let (host, _) = UnixStream::pair().unwrap();
    drop(std::mem::replace(&mut rig.host, host));
    assert_eq!(rig.read(BULK_SEND, PROGRAM, 1), BULK_NONE, "its other end is closed");
    assert_eq!(rig.read(BULK_RECEIVE, PROGRAM, 1), BULK_NONE, "and it is forgotten");
}

#[test]
fn streams_are_few_and_those_that_nobody_waits_for_make_room() {
    let rig = Rig::new();
    let mut hosts = Vec::new();
    for number in 1..MOST_STREAMS as u64 {
        let (host, theirs) = UnixStream::pair().unwrap();
        rig.streams.attach(number, theirs).unwrap();
        hosts.push(host);
    }
    let attach = || rig.streams.attach(99, UnixStream::pair().unwrap().0);
    assert!(matches!(attach(), Err(VmmError::OutOfRange { value: 17, .. })));
    hosts.pop();
    attach().unwrap();
}

#[test]
fn a_program_reaches_what_it_could_reach_itself() {
    let mut rig = Rig::new();
    rig.host.write_all(&[7; 100]).unwrap();
    // Whatever the bits that are the supervisor's say.
    for (cr0, cr4) in [(0, 0), (CR0_WP, 0), (0, CR4_SMAP), (CR0_WP, CR4_SMAP)] {
        let sregs = &mut rig.machine.cpu.sregs;
        sregs.cr0 = sregs.cr0 & !CR0_WP | cr0;
        sregs.cr4 = sregs.cr4 & !CR4_SMAP | cr4;
        rig.machine.map(PROGRAM, DATA_GPA, PRESENT | USER);
        rig.machine.map(PROGRAM + 4096, HOLE, PRESENT | WRITABLE | USER);
        assert_eq!(rig.read(BULK_RECEIVE, DATA, 10), BULK_FAULT, "a kernel page");
        assert_eq!(rig.read(BULK_SEND, DATA, 10), BULK_FAULT, "a kernel page");
        assert_eq!(rig.read(BULK_RECEIVE, PROGRAM, 10), BULK_FAULT, "a page that it may only read");
        assert_eq!(rig.read(BULK_SEND, PROGRAM, 10), 10);
        assert_eq!(rig.read(BULK_SEND, PROGRAM + 4096, 10), BULK_FAULT, "no RAM");
        assert_eq!(rig.read(BULK_SEND, PROGRAM + DATA_PAGES * 4096, 10), BULK_FAULT, "nothing there");
        assert_eq!(rig.read(BULK_SEND, PROGRAM + (DATA_PAGES - 1) * 4096, 5000), 4096, "as far as it goes");
        assert_eq!(rig.read(BULK_RECEIVE, PROGRAM + 8192, 10), 10);
    }
    assert_eq!(rig.read(BULK_RECEIVE, PROGRAM, 0), BULK_FAULT, "nothing was asked for");
}

proptest! {
    #![proptest_config(cases(2000))]

    /// Whatever the registers hold, the answer comes, and bytes outside the program's pages stay as they were.
    #[test]
    fn no_registers_reach_past_the_page_tables(
        sends in any::<bool>(),
        number in prop_oneof![4 => Just(NUMBER), 1 => any::<u64>()],
        at in prop_oneof![(0..DATA_PAGES * 4096).prop_map(|o| PROGRAM + o), any::<u64>()],
        len in prop_oneof![0_u64..40_000, any::<u64>()],
    ) {
        let mut rig = Rig::new();
        let around = [DATA_GPA - 4096, DATA_GPA + DATA_PAGES * 4096];
        for gpa in around {
            rig.machine.write(gpa, &[0xee; 4096]);
        }
        rig.host.write_all(&[0x11; 50_000]).unwrap();
        let answer = rig.read_for(number, if sends { BULK_SEND } else { BULK_RECEIVE }, at, len);
        let moved = answer < BULK_FAULT;
        prop_assert!(!moved || u64::from(answer) <= len.min(DATA_PAGES * 4096));
        prop_assert!(!moved || number == NUMBER);
        for gpa in around {
            prop_assert_eq!(rig.machine.bytes(gpa, 4096), vec![0xee; 4096]);
        }
    }
}
