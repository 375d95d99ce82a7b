//! What guest-kernel work costs, measured from inside: `guestbench ITEM [N]` does ITEM N times and prints the
//! nanoseconds of each, one a line. The host counts the emulated instructions beside it.
//!
//! Built by the suite with rustc alone, as one static file; the few C functions it needs are declared here.
//! Beside it, as `PATH-exits`, lies the program of `exits.rs`.

use std::ffi::{CString, c_char, c_int, c_void};
use std::hint::black_box;
use std::io::{Read as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::ptr::null_mut;
use std::time::Instant;

unsafe extern "C" {
    fn getppid() -> c_int;
    fn fork() -> c_int;
    fn vfork() -> c_int;
    fn _exit(code: c_int) -> !;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
    fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
    fn pipe(fds: *mut c_int) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, len: usize) -> isize;
    fn write(fd: c_int, buffer: *const c_void, len: usize) -> isize;
    fn close(fd: c_int) -> c_int;
    fn posix_spawn(
        pid: *mut c_int,
        path: *const c_char,
        actions: *const c_void,
        attributes: *const c_void,
        argv: *const *const c_char,
        envp: *const *const c_char,
    ) -> c_int;
}

const PAGE: usize = 4096;

/// One sample.
fn timed(work: impl FnOnce()) -> u64 {
    let start = Instant::now();
    work();
    start.elapsed().as_nanos() as u64
}

fn wait(pid: c_int) {
    // SAFETY: a null status is allowed.
    unsafe { waitpid(pid, null_mut(), 0) };
}

/// Touches fresh anonymous memory; the sample is nanoseconds a 4 KiB page.
fn touch(bytes: usize, huge: bool) -> u64 {
    const MADV_HUGEPAGE: c_int = 14;
    // Room to align to 2 MiB, as a large allocation is.
    let room = bytes + (2 << 20);
    // SAFETY: a private anonymous mapping of our own, written inside its bounds, unmapped at the end.
    unsafe {
        let base = mmap(null_mut(), room, 3, 0x22, -1, 0);
        assert!(base as isize != -1, "mmap");
        if huge {
            madvise(base, room, MADV_HUGEPAGE);
        }
        let start = (base as usize).next_multiple_of(2 << 20) as *mut u8;
        let ns = timed(|| (0..bytes).step_by(PAGE).for_each(|at| start.add(at).write_volatile(1)));
        munmap(base, room);
        ns / (bytes / PAGE) as u64
    }
}

fn fork_and_exit() {
    // SAFETY: the child leaves at once.
    unsafe {
        match fork() {
            0 => _exit(0),
            pid => wait(pid),
        }
    }
}

fn vfork_and_exit() {
    // SAFETY: the child does nothing but leave.
    unsafe {
        match vfork() {
            0 => _exit(0),
            pid => wait(pid),
        }
    }
}

fn spawn(path: &str, args: &[&str]) {
    let strings: Vec<CString> =
        std::iter::once(path).chain(args.iter().copied()).map(|s| CString::new(s).expect("no NUL")).collect();
    let mut argv: Vec<*const c_char> = strings.iter().map(|s| s.as_ptr()).collect();
    argv.push(std::ptr::null());
    let home = CString::new("HOME=/root").expect("no NUL");
    let path_variable = CString::new("PATH=/usr/bin").expect("no NUL");
    let envp = [home.as_ptr(), path_variable.as_ptr(), std::ptr::null()];
    let mut pid = 0;
    // SAFETY: both arrays are null-terminated and outlive the call.
    let error = unsafe {
        posix_spawn(&raw mut pid, argv[0], std::ptr::null(), std::ptr::null(), argv.as_ptr(), envp.as_ptr())
    };
    assert_eq!(error, 0, "spawn {path}");
    wait(pid);
}

/// 1 MiB through a pipe and back out, 64 KiB at a time, in one process.
fn pipe_copy() {
    let mut fds = [0; 2];
    let mut buffer = vec![7_u8; 64 << 10];
    // SAFETY: the buffer is as long as what is read and written; the pipe holds 64 KiB, so neither blocks.
    unsafe {
        assert_eq!(pipe(fds.as_mut_ptr()), 0);
        for _ in 0..16 {
            let mut left = buffer.len();
            assert_eq!(write(fds[1], buffer.as_ptr().cast(), left), left as isize);
            while left > 0 {
                left -= read(fds[0], buffer.as_mut_ptr().cast(), left) as usize;
            }
        }
        close(fds[0]);
        close(fds[1]);
    }
}

/// Ping-pong of a byte with a child over two pipes: two switches and four calls a round.
fn switches(rounds: usize) -> Vec<u64> {
    let (mut there, mut back) = ([0; 2], [0; 2]);
    let mut byte = [0_u8];
    // SAFETY: one-byte buffers; parent and child use their own ends and the child leaves at end of file.
    unsafe {
        assert_eq!(pipe(there.as_mut_ptr()) + pipe(back.as_mut_ptr()), 0);
        let pid = fork();
        if pid == 0 {
            close(there[1]);
            while read(there[0], byte.as_mut_ptr().cast(), 1) == 1 {
                write(back[1], byte.as_ptr().cast(), 1);
            }
            _exit(0);
        }
        let samples = (0..rounds)
            .map(|_| {
                timed(|| {
                    write(there[1], byte.as_ptr().cast(), 1);
                    read(back[0], byte.as_mut_ptr().cast(), 1);
                })
            })
            .collect();
        close(there[1]);
        wait(pid);
        samples
    }
}

fn read_file(path: &str) {
    let mut buffer = vec![0; 64 << 10];
    let mut file = std::fs::File::open(path).expect("open");
    while file.read(&mut buffer).expect("read") > 0 {}
}

fn repeat(n: usize, mut work: impl FnMut()) -> Vec<u64> {
    (0..n).map(|_| timed(&mut work)).collect()
}

fn measure(item: &str, n: usize) -> Option<Vec<u64>> {
    let own = std::env::current_exe().ok()?.to_str()?.to_owned();
    Some(match item {
        "nothing" => Vec::new(),
        // 64 calls a sample, so that reading the clock does not count.
        "null-call" => (0..n)
            // SAFETY: getppid has no preconditions.
            .map(|_| timed(|| (0..64).for_each(|_| _ = black_box(unsafe { getppid() }))) / 64)
            .collect(),
        "fault-1mib" => (0..n).map(|_| touch(1 << 20, false)).collect(),
        "fault-64mib" => (0..n).map(|_| touch(64 << 20, false)).collect(),
        "huge-64mib" => (0..n).map(|_| touch(64 << 20, true)).collect(),
        "fork" => repeat(n, fork_and_exit),
        "vfork" => repeat(n, vfork_and_exit),
        "spawn-static" => repeat(n, || spawn(&format!("{own}-exits"), &[])),
        "spawn-std" => repeat(n, || spawn(&own, &["nothing"])),
        "spawn-dynamic" => repeat(n, || spawn("/usr/bin/true", &[])),
        "pipe-1mib" => repeat(n, pipe_copy),
        "switch" => switches(n),
        "read-cold" => repeat(1, || read_file("/usr/bin/python3")),
        "read-warm" => {
            read_file("/usr/bin/bash");
            repeat(n, || read_file("/usr/bin/bash"))
        }
        "python-pass" => repeat(n, || spawn("/usr/bin/python3", &["-c", "pass"])),
        "python-50mb" => repeat(n, || {
            spawn("/usr/bin/python3", &["-c", "b = b'x' * 50_000_000; assert len(b) == 50_000_000"]);
        }),
        _ => return None,
    })
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let item = args.get(1).map_or("", String::as_str);
    if item == "exec" {
        // Replaces this process: what an exec alone costs.
        let error = Command::new("/usr/bin/true").stdin(Stdio::null()).exec();
        panic!("{error}");
    }
    let n = args.get(2).and_then(|n| n.parse().ok()).unwrap_or(5);
    match measure(item, n) {
        Some(samples) => {
            let text: String = samples.iter().map(|ns| format!("{ns}\n")).collect();
            std::io::stdout().write_all(text.as_bytes()).expect("stdout");
        }
        None => {
            eprintln!("usage: guestbench ITEM [N]");
            std::process::exit(2);
        }
    }
}
