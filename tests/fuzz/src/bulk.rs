//! Bulk streams with any registers over any page tables, and a real socket.
//!
//! Promises: nothing but the guest's RAM is touched (guard pages), of that nothing that the page tables do not
//! let a program in ring 3 access, and with the right bytes (an [`crate::oracle`] says which); no register
//! changes; one call moves at most its share; it stops early only where an access would fault, or where the
//! socket had no more or no room; a number that is no stream's moves nothing.

use crate::cpu::FakeCpu;
use crate::oracle::{Ram, Who, walk};
use crate::tables::{
    Machine, PAGE, address, compare, fill_tables, read, set_control, with_machine, write_tables,
};
use arbitrary::{Result, Unstructured};
use guest_init::{BULK_FAULT, BULK_MAX_BYTES, BULK_NONE, BULK_RECEIVE, BULK_SEND, BULK_WAIT};
use peregrine_vmm::bulk::Streams;
use peregrine_vmm::event_loop::ring::send_bytes;
use std::io::{ErrorKind, Read as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

const NUMBER: u64 = 0xdead_beef_0000_0001;
const ACCESSED: u64 = 0x20;
const DIRTY: u64 = 0x40;
/// Most bytes that the host writes before a call: a little more than all of RAM.
const MOST_WRITTEN: usize = 0x2_1000;

/// One execution.
pub fn target(data: &[u8]) {
    with_machine(data, execute);
}

fn execute(machine: &mut Machine, u: &mut Unstructured<'_>) -> Result<()> {
    let mut ram = machine.ram();
    let pkru = set_control(&mut machine.cpu, u)?;
    write_tables(&mut ram.ranges[0].1, Who::User, u)?;
    if u.ratio(1, 8)? {
        fill_tables(&mut ram.ranges[0].1, Who::User, u)?;
    }
    machine.load(&ram);
    let mut stream = Stream::new(u)?;
    // The bytes of one call may be the tables of the next.
    for _ in 0..u.int_in_range(0..=2)? {
        stream.call(machine, pkru, ram, u)?;
        ram = machine.snapshot();
    }
    stream.call(machine, pkru, ram, u)?;
    stream.check_end();
    Ok(())
}

fn length(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=63)? {
        0 => u.arbitrary()?,
        1 => 0,
        2..=5 => BULK_MAX_BYTES as u64 + u.int_in_range(0..=9)? - 5,
        6..=20 => u.int_in_range(1..=256)?,
        _ => u.int_in_range(0..=MOST_WRITTEN as u64)?,
    })
}

/// A page, or less, of what a call may access.
struct Piece {
    gpa: u64,
    len: usize,
    /// Where the page-table entry is that maps it.
    entry: u64,
}

/// A stream, and what its two ends have to expect.
struct Stream {
    streams: Streams,
    /// The guest's end once more, to see whether it has room.
    guest: UnixStream,
    /// The other end, unless it is closed.
    host: Option<UnixStream>,
    /// The host will write no more.
    ended: bool,
    /// There is such a stream still.
    attached: bool,
    /// What the host has written and the guest has not received.
    queued: Vec<u8>,
    /// What the guest has sent.
    sent: Vec<u8>,
}

impl Stream {
    fn new(u: &mut Unstructured<'_>) -> Result<Self> {
        let (host, theirs) = UnixStream::pair().unwrap_or_else(|e| panic!("{e}"));
        let guest = theirs.try_clone().unwrap_or_else(|e| panic!("{e}"));
        let streams = Streams::default();
        streams.attach(NUMBER, theirs).unwrap_or_else(|e| panic!("{e}"));
        let (queued, sent) = (Vec::new(), Vec::new());
        let mut stream =
            Self { streams, guest, host: Some(host), ended: false, attached: true, queued, sent };
        match u.int_in_range(0..=15)? {
            0 => {
                stream.host_writes(u)?;
                (stream.host, stream.ended) = (None, true);
            }
            1 => {
                stream.host_writes(u)?;
                let ended = stream.host.as_ref().map(|host| host.shutdown(Shutdown::Write));
                assert!(matches!(ended, Some(Ok(()))));
                stream.ended = true;
            }
            _ => {}
        }
        Ok(stream)
    }

    /// Some bytes nearly always, for a call that finds none waits.
    fn host_writes(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some(host) = self.host.as_ref().filter(|_| !self.ended) else { return Ok(()) };
        let len = match u.int_in_range(0..=127)? {
            0 => 0,
            1..=40 => u.int_in_range(1..=300)?,
            _ => u.int_in_range(1..=MOST_WRITTEN)?,
        };
        let seed: u64 = u.arbitrary()?;
        let mut bytes = vec![0; len];
        if seed & 3 == 0 {
            // Entries of page tables, should it be there that they arrive.
            let entry = (seed >> 8 & 15) << 12 | 7;
            bytes.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&entry.to_le_bytes()));
        } else {
            fastrand::Rng::with_seed(seed).fill(&mut bytes);
        }
        if len > 0 {
            // What is queued already may leave room for less, or none.
            let written = send_bytes(host, &bytes).unwrap_or(0);
            self.queued.extend_from_slice(&bytes[..written]);
        }
        Ok(())
    }

    fn call(&mut self, machine: &mut Machine, pkru: u32, ram: Ram, u: &mut Unstructured<'_>) -> Result<()> {
        let sends: bool = u.arbitrary()?;
        if !sends {
            self.host_writes(u)?;
        }
        let number = if u.ratio(1, 16)? { u.arbitrary()? } else { NUMBER };
        let regs = &mut machine.cpu.regs;
        (regs.rdi, regs.rsi, regs.rdx) = (address(u)?, length(u)?, number);
        let before = *regs;

        let register = if sends { BULK_SEND } else { BULK_RECEIVE };
        let answer = self.streams.transfer(register, &mut machine.cpu, &machine.host, &machine.mem);

        assert_eq!(machine.cpu.regs, before, "no register changes");
        assert!(machine.cpu.injected.is_empty());
        self.check(machine, pkru, ram, sends, answer);
        Ok(())
    }

    /// `ram` is memory before the call.
    fn check(&mut self, machine: &Machine, pkru: u32, mut ram: Ram, sends: bool, answer: u32) {
        let regs = &machine.cpu.regs;
        if regs.rdx != NUMBER || !self.attached {
            assert_eq!(answer, BULK_NONE, "there is no such stream");
            return compare(&ram, &machine.mem);
        }
        if sends && regs.rsi == 0 {
            assert_eq!(answer, 0, "it was all");
            self.attached = false;
            return compare(&ram, &machine.mem);
        }
        let mut pieces = pieces(&machine.cpu, pkru, &mut ram, !sends);
        let no_ram = pieces.iter().position(|piece| ram.page(piece.gpa).is_none());
        if answer == BULK_FAULT {
            assert!(pieces.is_empty() || no_ram.is_some(), "no access would fault");
            return compare(&ram, &machine.mem);
        }
        pieces.truncate(no_ram.unwrap_or(pieces.len()));
        let most = pieces.iter().map(|piece| piece.len).sum();
        assert!(most > 0, "the first byte is out of reach, and the answer is {answer:#x}");
        if sends {
            self.check_sent(machine, &mut ram, &pieces, most, answer);
        } else {
            self.check_received(&mut ram, &pieces, most, answer);
        }
        compare(&ram, &machine.mem);
    }

    fn check_received(&mut self, ram: &mut Ram, pieces: &[Piece], most: usize, answer: u32) {
        let count = most.min(self.queued.len());
        let right = if count == 0 && !self.ended { BULK_WAIT } else { count as u32 };
        assert_eq!(answer, right, "{most} bytes in reach, {} to receive", self.queued.len());
        let moved = first(pieces, count);
        for piece in &moved {
            ram.mark(piece.entry, ACCESSED | DIRTY);
        }
        // The tables were walked before any byte came, so marks that bytes have come over are gone.
        ram.walked.retain(|at| !moved.iter().any(|p| (p.gpa..p.gpa + p.len as u64).contains(at)));
        let mut done = 0;
        for piece in &moved {
            let page = ram.page(piece.gpa).unwrap_or_else(|| panic!("{:#x} is no RAM", piece.gpa));
            let bytes = &self.queued[done..done + piece.len];
            page[(piece.gpa % PAGE) as usize..][..piece.len].copy_from_slice(bytes);
            done += piece.len;
        }
        self.queued.drain(..count);
    }

    fn check_sent(&mut self, machine: &Machine, ram: &mut Ram, pieces: &[Piece], most: usize, answer: u32) {
        if self.host.is_none() {
            assert_eq!(answer, BULK_NONE, "nobody is there to send to");
            self.attached = false;
            return;
        }
        let count = if answer == BULK_WAIT { 0 } else { answer as usize };
        assert!(answer != 0 && count <= most, "{answer:#x} bytes sent, {most} in reach");
        if count < most {
            let room = send_bytes(&self.guest, &[0]);
            let full = room.as_ref().is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
            assert!(full, "{answer:#x} bytes of {most} sent, and there was room: {room:?}");
        }
        for piece in first(pieces, count) {
            ram.mark(piece.entry, ACCESSED);
            // As memory is now: of tables that were sent, the marks were sent.
            self.sent.extend(read(&machine.mem, piece.gpa, piece.len));
        }
    }

    /// The host finds what was sent, and the end behind it if that was said.
    fn check_end(self) {
        let Self { streams, guest, host, attached, queued, sent, .. } = self;
        drop(guest);
        let Some(mut host) = host else { return };
        host.set_nonblocking(true).unwrap_or_else(|e| panic!("{e}"));
        let mut found = Vec::new();
        let end = host.read_to_end(&mut found);
        assert!(found == sent, "{} bytes were sent, not these {}", sent.len(), found.len());
        let right = match end.map_err(|error| error.kind()) {
            Ok(_) => !attached && queued.is_empty(),
            // To a socket that is closed with bytes in it, Linux' end of a stream is a reset.
            Err(ErrorKind::ConnectionReset) => !attached && !queued.is_empty(),
            Err(kind) => attached && kind == ErrorKind::WouldBlock,
        };
        assert!(right, "attached: {attached}, queued: {}", queued.len());
        drop(streams);
    }
}

/// What RSI bytes at RDI are, as far as a program may access them. Some of it may be no RAM.
fn pieces(cpu: &FakeCpu, pkru: u32, ram: &mut Ram, write: bool) -> Vec<Piece> {
    let (start, len) = (cpu.regs.rdi, cpu.regs.rsi.min(BULK_MAX_BYTES as u64));
    let mut pieces = Vec::new();
    let mut done = 0;
    while done < len {
        let linear = start.wrapping_add(done);
        let Some(reached) = walk(ram, cpu, pkru, Who::User, linear, write) else { break };
        let bytes = (PAGE - linear % PAGE).min(len - done);
        pieces.push(Piece { gpa: reached.gpa, len: bytes as usize, entry: reached.entry });
        done += bytes;
    }
    pieces
}

/// The first `count` bytes of them.
fn first(pieces: &[Piece], count: usize) -> Vec<Piece> {
    let mut left = count;
    let cut = pieces.iter().map_while(|piece| {
        let len = piece.len.min(left);
        left -= len;
        (len > 0).then_some(Piece { len, ..*piece })
    });
    cut.collect()
}
