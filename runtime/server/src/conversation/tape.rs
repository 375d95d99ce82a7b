//! What a command wrote, as it came from its agent's connection: a file, so that the next owner of the connection goes on
//! where this one was.
//!
//! ```text
//! 0        8             16         24          25        28        32
//! magic    first_offset  first_seq  stdin_done  reported  json_len  json ...        (4 KiB)
//! record:  kind u8, 0, 0, 0, len u32, position u32, len bytes                       (from first_offset on)
//! ```
//!
//! Little endian. `position` says how far the connection had been read when the record's frame ended, modulo 2^32. A frame
//! is written here before it is taken from the connection: what a killed owner wrote and did not take comes again, and
//! its position tells. Nothing is synced: a host that loses power has no guest to go on with. What nobody can ask
//! for any more is punched out of the front.

use guest_init::{Exited, Outcome};
use rustix::fs::FallocateFlags;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::rc::Rc;

const MAGIC: &[u8; 8] = b"PGTAPE1\n";
const HEADER_BYTES: u64 = 4096;
const FIRST_AT: u64 = 8;
const STDIN_DONE_AT: u64 = 24;
const REPORTED_AT: u64 = 25;
const JSON_AT: usize = 32;
const RECORD_BYTES: usize = 12;
/// Bytes that are given back at a time.
const PUNCH_BYTES: u64 = 256 << 10;

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const EXITED: u8 = 3;
const FAILED: u8 = 4;

/// A record, as it is read again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// Bytes of standard output.
    Stdout(Vec<u8>),
    /// Bytes of standard error.
    Stderr(Vec<u8>),
    /// The command's end.
    Exited(Exited),
    /// It could not be started: a shell's exit code, and why.
    Failed(u8, String),
}

/// A command's tape.
#[derive(Debug)]
pub struct Tape {
    path: PathBuf,
    file: File,
    state: RefCell<State>,
}

#[derive(Debug)]
struct State {
    end: u64,
    /// Where the kept records begin, from `first_seq` on.
    offsets: VecDeque<u64>,
    first_seq: u64,
    /// What lies before this has been given back.
    punched: u64,
    /// Of the last record.
    position: Option<u32>,
    /// It could not be written, and says nothing any more.
    broken: bool,
    over: bool,
}

impl State {
    /// No records yet; the first will be number `first_seq` and begin at `at`.
    fn empty(at: u64, first_seq: u64) -> Self {
        let offsets = VecDeque::new();
        Self { end: at, offsets, first_seq, punched: at, position: None, broken: false, over: false }
    }
}

/// What a tape says when it is found.
#[derive(Debug)]
pub struct Found<H> {
    /// The tape, which goes on.
    pub tape: Rc<Tape>,
    /// What it was begun with.
    pub header: H,
    /// Number of the first record, counted from 1.
    pub first_seq: u64,
    /// All that it has.
    pub records: Vec<Record>,
    /// All of the command's standard input had been sent.
    pub stdin_done: bool,
    /// Its end had been reported.
    pub reported: bool,
}

impl Tape {
    /// A new tape at `path`.
    ///
    /// # Errors
    /// If the file cannot be written, or the header is longer than 4 KiB.
    pub fn create(path: &Path, header: &impl Serialize) -> io::Result<Self> {
        let json = serde_json::to_vec(header)?;
        let mut block = MAGIC.to_vec();
        block.extend(HEADER_BYTES.to_le_bytes());
        block.extend(1_u64.to_le_bytes());
        block.extend([0; 4]);
        block.extend((json.len() as u32).to_le_bytes());
        block.extend(&json);
        if block.len() as u64 > HEADER_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the header is too long"));
        }
        let file = File::options().read(true).write(true).create_new(true).open(path)?;
        file.write_all_at(&block, 0)?;
        let state = State::empty(HEADER_BYTES, 1);
        Ok(Self { path: path.to_owned(), file, state: RefCell::new(state) })
    }

    /// The tape at `path`, as far as it was written whole.
    ///
    /// # Errors
    /// If it cannot be read, or is none.
    pub fn open<H: DeserializeOwned>(path: &Path) -> io::Result<Found<H>> {
        let file = File::options().read(true).write(true).open(path)?;
        let bad = |what| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut block = vec![0; HEADER_BYTES as usize];
        let len = read_at(&file, &mut block, 0)?;
        let (head, rest) = block[..len].split_at_checked(JSON_AT).ok_or_else(|| bad("it is cut short"))?;
        if !head.starts_with(MAGIC) {
            return Err(bad("it is no tape"));
        }
        let long = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
        let (first_offset, first_seq) = (long(8), long(16));
        let json_len = head[28..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes)) as usize;
        let json = rest.get(..json_len).ok_or_else(|| bad("its header is cut short"))?;
        let header = serde_json::from_slice(json)?;
        let (stdin_done, reported) = (head[24] != 0, head[25] != 0);
        if first_offset < HEADER_BYTES || first_seq == 0 {
            return Err(bad("its header is damaged"));
        }
        let mut state = State::empty(first_offset, first_seq);
        let mut bytes = vec![0; file.metadata()?.len().saturating_sub(first_offset) as usize];
        let len = read_at(&file, &mut bytes, first_offset)?;
        let mut rest = &bytes[..len];
        let mut records = Vec::new();
        while let Some((record, position, taken)) = parse(rest)? {
            state.over = matches!(record, Record::Exited(_) | Record::Failed(..));
            records.push(record);
            state.position = Some(position);
            state.offsets.push_back(state.end);
            state.end += taken as u64;
            rest = &rest[taken..];
        }
        // What was being written when its owner was killed.
        file.set_len(state.end)?;
        let tape = Self { path: path.to_owned(), file, state: RefCell::new(state) };
        Ok(Found { tape: Rc::new(tape), header, first_seq, records, stdin_done, reported })
    }

    /// Whether it has the frame that ends at `position` already.
    #[must_use]
    pub fn has(&self, position: u32) -> bool {
        // The connection may have carried more than 4 GiB, never that much between two records to compare.
        self.state.borrow().position.is_some_and(|last| (last.wrapping_sub(position)).cast_signed() >= 0)
    }

    /// Whether the command has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state.borrow().over
    }

    pub(super) fn stdout(&self, bytes: &[u8], position: u32) {
        self.record(STDOUT, bytes, position);
    }

    pub(super) fn stderr(&self, bytes: &[u8], position: u32) {
        self.record(STDERR, bytes, position);
    }

    pub(super) fn exited(&self, exited: &Exited, position: u32) {
        let (kind, value) = match exited.outcome {
            Outcome::Code(code) => (0, code),
            Outcome::Signal(signo) => (1, signo),
        };
        let mut bytes = vec![kind, value];
        bytes.extend(exited.user_us.to_le_bytes());
        bytes.extend(exited.sys_us.to_le_bytes());
        bytes.extend(exited.max_rss_kib.to_le_bytes());
        self.record(EXITED, &bytes, position);
    }

    pub(super) fn failed(&self, code: u8, text: &str, position: u32) {
        let bytes = [&[code], text.as_bytes()].concat();
        self.record(FAILED, &bytes, position);
    }

    fn record(&self, kind: u8, bytes: &[u8], position: u32) {
        let mut state = self.state.borrow_mut();
        if state.broken {
            return;
        }
        let mut record = Vec::with_capacity(RECORD_BYTES + bytes.len());
        record.extend([kind, 0, 0, 0]);
        record.extend((bytes.len() as u32).to_le_bytes());
        record.extend(position.to_le_bytes());
        record.extend(bytes);
        if let Err(error) = self.file.write_all_at(&record, state.end) {
            self.give_up(&mut state, &error);
            return;
        }
        let at = state.end;
        state.offsets.push_back(at);
        state.end += record.len() as u64;
        state.position = Some(position);
        state.over = matches!(kind, EXITED | FAILED);
    }

    /// The command goes on; it only ends with this daemon if that is killed.
    fn give_up(&self, state: &mut State, error: &io::Error) {
        tracing::warn!(path = %self.path.display(), %error, "a command's output cannot be kept for the next daemon");
        state.broken = true;
        let _ = std::fs::remove_file(&self.path);
    }

    /// All of the command's standard input was sent.
    pub(super) fn stdin_done(&self) {
        self.mark(STDIN_DONE_AT);
    }

    /// The command's end was reported.
    pub fn reported(&self) {
        self.mark(REPORTED_AT);
    }

    fn mark(&self, at: u64) {
        let mut state = self.state.borrow_mut();
        if !state.broken
            && let Err(error) = self.file.write_all_at(&[1], at)
        {
            self.give_up(&mut state, &error);
        }
    }

    /// Nobody will ask for records before number `seq`.
    pub fn forget_before(&self, seq: u64) {
        let mut state = self.state.borrow_mut();
        while state.first_seq < seq && state.offsets.len() > 1 {
            state.offsets.pop_front();
            state.first_seq += 1;
        }
        let first = state.offsets.front().copied().unwrap_or(state.end);
        if state.broken || first - state.punched < PUNCH_BYTES {
            return;
        }
        let mut begin = first.to_le_bytes().to_vec();
        begin.extend(state.first_seq.to_le_bytes());
        if let Err(error) = self.file.write_all_at(&begin, FIRST_AT) {
            return self.give_up(&mut state, &error);
        }
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where files have no holes, it grows until the command's end.
        let _ = rustix::fs::fallocate(&self.file, hole, state.punched, first - state.punched);
        state.punched = first;
    }

    /// Nobody will ask for anything any more.
    pub fn remove(&self) {
        let state = self.state.borrow();
        if !state.broken {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// As much as there is, up to the buffer's length.
fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read_at(&mut buffer[len..], offset + len as u64) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(len)
}

/// The first record, its position, and its length; `None` where there is no whole one.
fn parse(bytes: &[u8]) -> io::Result<Option<(Record, u32, usize)>> {
    let Some((head, rest)) = bytes.split_first_chunk::<RECORD_BYTES>() else { return Ok(None) };
    let word = |at: usize| head[at..].first_chunk().map_or(0, |bytes| u32::from_le_bytes(*bytes));
    let Some(body) = rest.get(..word(4) as usize) else { return Ok(None) };
    let bad = || io::Error::new(io::ErrorKind::InvalidData, "it has a record of no kind");
    let record = match (head[0], body) {
        (STDOUT, bytes) => Record::Stdout(bytes.to_vec()),
        (STDERR, bytes) => Record::Stderr(bytes.to_vec()),
        (EXITED, [kind, value, times @ ..]) => {
            let long =
                |at: usize| times.get(at..).and_then(<[u8]>::first_chunk).map(|b| u64::from_le_bytes(*b));
            let outcome = if *kind == 0 { Outcome::Code(*value) } else { Outcome::Signal(*value) };
            Record::Exited(Exited {
                outcome,
                user_us: long(0).ok_or_else(bad)?,
                sys_us: long(8).ok_or_else(bad)?,
                max_rss_kib: long(16).ok_or_else(bad)?,
            })
        }
        (FAILED, [code, text @ ..]) => Record::Failed(*code, String::from_utf8_lossy(text).into_owned()),
        _ => return Err(bad()),
    };
    Ok(Some((record, word(8), RECORD_BYTES + body.len())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_was_recorded_is_there_again_and_goes_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tape");
        let tape = Tape::create(&path, &"who").unwrap();
        // The count of bytes begins again in between.
        tape.stdout(b"one", u32::MAX - 1);
        tape.stderr(b"two", 10);
        assert!(tape.has(u32::MAX - 1) && tape.has(9) && tape.has(10) && !tape.has(11));
        drop(tape);
        let found = Tape::open::<String>(&path).unwrap();
        assert_eq!((found.header.as_str(), found.first_seq, found.stdin_done), ("who", 1, false));
        assert_eq!(found.records, [Record::Stdout(b"one".to_vec()), Record::Stderr(b"two".to_vec())]);
        found.tape.stdin_done();
        let exited = Exited { outcome: Outcome::Signal(9), user_us: 1, sys_us: 2, max_rss_kib: 3 };
        found.tape.exited(&exited, 5);
        let found = Tape::open::<String>(&path).unwrap();
        assert_eq!(found.records.last(), Some(&Record::Exited(exited)));
        assert!(found.tape.is_over() && found.stdin_done && !found.reported);
        found.tape.remove();
        assert!(!path.exists());
    }

    #[test]
    fn the_front_is_given_back_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tape");
        let tape = Tape::create(&path, &()).unwrap();
        for n in 1..=100_u32 {
            tape.stdout(&[n as u8; 60 << 10], n);
            tape.forget_before(u64::from(n).saturating_sub(3));
        }
        let found = Tape::open::<()>(&path).unwrap();
        let last = found.first_seq + found.records.len() as u64 - 1;
        assert_eq!(last, 100);
        assert!(found.records.len() < 12, "{}", found.records.len());
        assert_eq!(found.records.last(), Some(&Record::Stdout(vec![100; 60 << 10])));
    }

    proptest! {
        #[test]
        fn a_tape_cut_anywhere_gives_whole_records_or_says_why_not(
            lens in proptest::collection::vec(0_usize..300, 0..20), cut in 0_u64..8000, flip in 0_u64..6000,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("tape");
            let tape = Tape::create(&path, &"x").unwrap();
            for (n, len) in lens.iter().enumerate() {
                tape.stdout(&vec![n as u8; *len], n as u32);
            }
            drop(tape);
            let file = File::options().read(true).write(true).open(&path).unwrap();
            let len = file.metadata().unwrap().len();
            file.set_len(cut.min(len)).unwrap();
            if let Ok(found) = Tape::open::<String>(&path) {
                let whole = |(n, record): (usize, &Record)| *record == Record::Stdout(vec![n as u8; lens[n]]);
                prop_assert!(found.records.iter().enumerate().all(whole));
            }
            // Whatever is in it: an answer.
            let mut byte = [0];
            if file.read_at(&mut byte, flip).unwrap() == 1 {
                file.write_all_at(&[!byte[0]], flip).unwrap();
                let _ = Tape::open::<String>(&path);
            }
        }
    }
}
