//! A program for the guest and, to compare with, the host: do pipes behave as Linux's? It prints what the
//! system calls returned, line by line; the guest's kernel, which copies runs of pages at once, has to print
//! what the host's does. Data that came out other than it went in ends the program. Each `expect` is a check:
//! where one fails the program ends with its words, and the test fails.
//!
//! Built by the tests with rustc alone, as one static file.

use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{Error, Read as _, Seek as _, Write as _};
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::ptr::null_mut;

unsafe extern "C" {
    fn pipe2(fds: *mut c_int, flags: c_int) -> c_int;
    fn read(fd: c_int, buffer: *mut c_void, len: usize) -> isize;
    fn write(fd: c_int, buffer: *const c_void, len: usize) -> isize;
    fn fcntl(fd: c_int, command: c_int, argument: c_int) -> c_int;
    fn ioctl(fd: c_int, request: u64, argument: *mut c_int) -> c_int;
    fn tee(from: c_int, to: c_int, len: usize, flags: u32) -> isize;
    fn splice(from: c_int, at: *mut i64, to: c_int, to_at: *mut i64, len: usize, flags: u32) -> isize;
    fn vmsplice(fd: c_int, vectors: *const [usize; 2], count: usize, flags: u32) -> isize;
    fn mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
}

const O_NONBLOCK: c_int = 0o4000;
const O_DIRECT: c_int = 0o40000;
const F_SETPIPE_SZ: c_int = 1031;
const F_GETPIPE_SZ: c_int = 1032;
const FIONREAD: u64 = 0x541b;
const PAGE: usize = 4096;

/// A pipe of two descriptors that count what went through.
struct Pipe {
    out: File,
    into: File,
    written: u64,
    read: u64,
}

/// The byte at a place of a stream: no page is like another.
fn byte_at(place: u64) -> u8 {
    (place.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8
}

fn bytes_from(start: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| byte_at(start + i)).collect()
}

/// What a call returned, errors as the negative number.
fn result(returned: isize) -> i64 {
    if returned < 0 {
        -i64::from(Error::last_os_error().raw_os_error().unwrap_or(0))
    } else {
        returned as i64
    }
}

impl Pipe {
    fn new(flags: c_int) -> Self {
        let mut fds = [0; 2];
        // SAFETY: room for two descriptors, which are this value's own from here on.
        unsafe {
            assert_eq!(pipe2(fds.as_mut_ptr(), flags), 0);
            Self { out: File::from_raw_fd(fds[0]), into: File::from_raw_fd(fds[1]), written: 0, read: 0 }
        }
    }

    fn write(&mut self, len: usize) -> i64 {
        let bytes = bytes_from(self.written, len);
        // SAFETY: as long as the vector.
        let done = result(unsafe { write(self.into.as_raw_fd(), bytes.as_ptr().cast(), len) });
        self.written += u64::try_from(done).unwrap_or(0);
        done
    }

    fn read(&mut self, len: usize) -> i64 {
        let mut bytes = vec![0xee; len];
        // SAFETY: as long as the vector.
        let done = result(unsafe { read(self.out.as_raw_fd(), bytes.as_mut_ptr().cast(), len) });
        let got = usize::try_from(done).unwrap_or(0);
        assert!(bytes[..got] == bytes_from(self.read, got), "{got} bytes at {} are others", self.read);
        assert!(bytes[got..].iter().all(|b| *b == 0xee), "written past what was returned");
        self.read += got as u64;
        done
    }

    fn pending(&self) -> c_int {
        let mut pending = 0;
        // SAFETY: FIONREAD writes one int.
        unsafe { ioctl(self.out.as_raw_fd(), FIONREAD, &raw mut pending) };
        pending
    }

    fn control(&self, command: c_int, argument: c_int) -> i64 {
        // SAFETY: commands whose argument is a number.
        result(unsafe { fcntl(self.into.as_raw_fd(), command, argument) } as isize)
    }
}

/// xorshift64: the same choices on host and guest.
fn next(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) as usize
}

/// A length that is often about a page, a run of pages, or the whole pipe.
fn length(state: &mut u64) -> usize {
    let around = [1, 100, PAGE, 2 * PAGE, 3 * PAGE, 32 << 10, 60 << 10, 64 << 10, 80 << 10][next(state) % 9];
    match next(state) % 3 {
        0 => around,
        1 => around + next(state) % 200,
        _ => 1 + next(state) % around,
    }
}

fn capacity() {
    let mut pipe = Pipe::new(O_NONBLOCK);
    let fill = [pipe.write(100_000), pipe.write(1), pipe.pending().into(), pipe.read(PAGE), pipe.write(5000)];
    println!("capacity {fill:?} {:?}", [pipe.read(10), pipe.write(1), pipe.read(65_526), pipe.read(1)]);
    for size in [1 << 20, 8192, 65_536, 4096] {
        let now = [pipe.control(F_SETPIPE_SZ, size), pipe.control(F_GETPIPE_SZ, 0)];
        let moved = [pipe.write(3), pipe.write(2 << 20), pipe.write(9), pipe.pending().into()];
        println!("size {now:?} {moved:?} {:?}", [pipe.control(F_SETPIPE_SZ, 4096), pipe.read(2 << 20)]);
        while pipe.read(70_000) > 0 {}
    }
}

fn random_lengths() {
    let mut state = 0x1234_5678_9abc_def1;
    for round in 0..6 {
        let mut pipe = Pipe::new(O_NONBLOCK);
        let mut sum = 0_i64;
        for _ in 0..40 {
            let len = length(&mut state);
            let done = if next(&mut state) % 2 == 0 { pipe.write(len) } else { pipe.read(len) };
            sum = sum.wrapping_mul(31).wrapping_add(done);
        }
        println!("random {round} {sum} pending {}", pipe.pending());
    }
}

fn packets() {
    let mut pipe = Pipe::new(O_NONBLOCK | O_DIRECT);
    let wrote = [pipe.write(10_000), pipe.write(5)];
    println!(
        "packets {wrote:?} {:?}",
        [pipe.read(70_000), pipe.read(70_000), pipe.read(70_000), pipe.read(9)]
    );
}

/// Pages that somebody else has must not be written again.
fn shared_pages() {
    let (mut one, mut two) = (Pipe::new(O_NONBLOCK), Pipe::new(O_NONBLOCK));
    for (round, moves) in [(0, false), (1, true), (2, false), (3, true)] {
        let wrote = one.write(64 << 10);
        let (from, to) = (one.out.as_raw_fd(), two.into.as_raw_fd());
        two.written = one.read;
        two.read = one.read;
        // SAFETY: no offsets.
        let went = result(unsafe {
            if moves {
                splice(from, null_mut(), to, null_mut(), 50_000, 0)
            } else {
                tee(from, to, 64 << 10, 0)
            }
        });
        if moves {
            one.read += went as u64;
        }
        let rest = [one.read(64 << 10), one.write(64 << 10), one.read(30_000), one.write(20_000)];
        println!("shared {round} {wrote} {went} {rest:?} {:?}", [two.read(64 << 10), one.read(64 << 10)]);
    }
    let mut file =
        File::options().read(true).write(true).create(true).truncate(true).open("/tmp/pipes.spliced");
    let file = file.as_mut().expect("a file in /tmp");
    let mut expected = Vec::new();
    for _ in 0..3 {
        expected.extend(bytes_from(one.written, 64 << 10));
        one.write(64 << 10);
        while one.pending() > 0 {
            // SAFETY: no offsets; the flag is SPLICE_F_MOVE.
            let went =
                unsafe { splice(one.out.as_raw_fd(), null_mut(), file.as_raw_fd(), null_mut(), 1 << 20, 1) };
            assert!(went > 0, "splice to a file: {}", Error::last_os_error());
            one.read += went as u64;
        }
    }
    let mut found = Vec::new();
    file.rewind().and_then(|()| file.read_to_end(&mut found)).expect("reading back");
    assert!(found == expected, "the file has other bytes than went into the pipe");
    let mine = bytes_from(one.written, 40_000);
    // SAFETY: one vector, which lives until the pipe is read.
    let gave = result(unsafe { vmsplice(one.into.as_raw_fd(), &[mine.as_ptr() as usize, mine.len()], 1, 0) });
    one.written += gave as u64;
    println!("vmsplice {gave} {:?}", [one.write(20_000), one.read(70_000)]);
}

/// Buffers that end where nothing is mapped.
fn bad_addresses() {
    let mut pipe = Pipe::new(O_NONBLOCK);
    // SAFETY: 16 pages of our own, the last 8 unmapped again; the kernel is to meet that, not we.
    unsafe {
        let base = mmap(null_mut(), 16 * PAGE, 3, 0x22, -1, 0);
        munmap(base.byte_add(8 * PAGE), 8 * PAGE);
        for start in [0, 100, 7 * PAGE, 8 * PAGE - 1, 8 * PAGE] {
            let at = base.byte_add(start);
            let wrote = result(write(pipe.into.as_raw_fd(), at, 16 * PAGE - start));
            let pending = pipe.pending();
            let back = result(read(pipe.out.as_raw_fd(), base.cast(), 16 * PAGE));
            println!("bad source {start}: {wrote} {pending} {back} {}", pipe.pending());
            let again = pipe.write(64 << 10);
            let got = result(read(pipe.out.as_raw_fd(), at, 16 * PAGE - start));
            let good = usize::try_from(got).unwrap_or(0);
            let bytes = std::slice::from_raw_parts(at.cast::<u8>(), good);
            assert!(bytes == bytes_from(pipe.read, good), "bytes before the bad address");
            pipe.read += good as u64;
            println!("bad target {start}: {again} {got} {} {}", pipe.pending(), pipe.read(64 << 10));
        }
    }
}

fn two_threads() {
    let mut pipe = Pipe::new(0);
    let (mut into, mut state, total) = (pipe.into.try_clone().expect("dup"), 77_u64, 6 << 20);
    let writer = std::thread::spawn(move || {
        let mut at = 0;
        while at < total {
            let len = length(&mut state).min(total - at);
            into.write_all(&bytes_from(at as u64, len)).expect("write");
            at += len;
        }
    });
    let mut state = 99;
    while pipe.read < total as u64 {
        assert!(pipe.read(length(&mut state)) > 0);
    }
    writer.join().expect("the writer");
    println!("threads {}", pipe.read);
}

fn main() {
    capacity();
    random_lengths();
    packets();
    shared_pages();
    bad_addresses();
    two_threads();
}
