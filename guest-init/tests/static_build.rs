//! The program that goes into the guest: built as the runtime builds it, looked at, and run.
#![allow(missing_docs, clippy::unwrap_used)]

mod host;

use std::path::{Path, PathBuf};
use std::process::Command;

use guest_init::{EXEC_STDIN, ExecRequest};
use host::{Agent, Ran};

/// One test at a time builds, the others wait for it.
fn static_program() -> PathBuf {
    static PROGRAM: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let build = || {
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("static");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("static.sh");
        assert!(Command::new("sh").arg(script).arg(&target).status().unwrap().success());
        target.join("x86_64-unknown-linux-gnu/release/guest-init")
    };
    PROGRAM.get_or_init(build).clone()
}

/// A program header of a 64-bit little endian ELF file.
struct Segment {
    kind: u32,
    flags: u32,
    file_bytes: u64,
    memory_bytes: u64,
}

fn segments(elf: &[u8]) -> Vec<Segment> {
    assert_eq!(&elf[..6], b"\x7fELF\x02\x01");
    let u16_at = |at: usize| u16::from_le_bytes(elf[at..at + 2].try_into().unwrap());
    let u32_at = |at: usize| u32::from_le_bytes(elf[at..at + 4].try_into().unwrap());
    let u64_at = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().unwrap());
    assert_eq!(u16_at(16), 2, "a fixed address (ET_EXEC): nothing to relocate");
    let (start, size, count) = (u64_at(32) as usize, u16_at(54) as usize, u16_at(56) as usize);
    (0..count)
        .map(|number| start + number * size)
        .map(|at| Segment {
            kind: u32_at(at),
            flags: u32_at(at + 4),
            file_bytes: u64_at(at + 32),
            memory_bytes: u64_at(at + 40),
        })
        .collect()
}

#[test]
fn the_guests_program_needs_no_interpreter_and_carries_no_empty_memory() {
    const PT_LOAD: u32 = 1;
    const PT_DYNAMIC: u32 = 2;
    const PT_INTERP: u32 = 3;
    const PF_W: u32 = 2;
    const PF_X: u32 = 1;
    let elf = std::fs::read(static_program()).unwrap();
    let segments = segments(&elf);
    assert!(segments.iter().all(|segment| ![PT_INTERP, PT_DYNAMIC].contains(&segment.kind)));
    assert!(segments.iter().all(|segment| segment.flags & (PF_W | PF_X) != PF_W | PF_X));
    let writable: Vec<_> =
        segments.iter().filter(|segment| segment.kind == PT_LOAD && segment.flags & PF_W != 0).collect();
    // The agent's memory is all-zero, so none of it is in the file, and it is all there beforehand.
    assert!(writable.iter().map(|segment| segment.file_bytes).sum::<u64>() < 4096);
    assert!(writable.iter().map(|segment| segment.memory_bytes).sum::<u64>() > 16 << 20);
    assert!(elf.len() < 64 * 1024, "{} bytes", elf.len());
}

#[test]
fn the_guests_program_serves_as_the_tested_one_does() {
    let mut agent = Agent::start_program(&static_program());
    let input: Vec<u8> =
        (0..3_000_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut ran = Ran::default();
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    agent.line.feed(1, &input, &mut ran);
    assert!(ran.stdout == input && ran.code() == 0);
    assert_eq!(agent.line.run(2, &["no-such-program"]).failed.unwrap().0, 2);
    let request = ExecRequest {
        flags: guest_init::EXEC_PTY,
        rows: 7,
        cols: 9,
        argv: &["stty", "size"],
        ..ExecRequest::default()
    };
    assert_eq!(agent.line.run_request(3, &request).text(), "7 9\r\n");
}
