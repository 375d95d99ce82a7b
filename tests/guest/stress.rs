//! A program for the guest and, to compare with, the host: work that is hard on a kernel, with a digest of
//! what came of it. `stress SCALE DIR PART...` prints a line `PART DIGEST` for each part; the digest depends
//! on SCALE and part alone, so that guest and host must agree. What a kernel gets wrong in between ends the
//! program with words: each `expect` is a check whose failure fails the test.
//!
//! Built by the tests with rustc alone, as one static file; the few C functions it needs are declared here.

use std::arch::is_x86_feature_detected;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

unsafe extern "C" {
    fn fork() -> c_int;
    fn _exit(code: c_int) -> !;
    fn waitpid(pid: c_int, status: *mut c_int, options: c_int) -> c_int;
    fn mmap(at: *mut c_void, len: usize, prot: c_int, flags: c_int, fd: c_int, offset: i64) -> *mut c_void;
    fn munmap(at: *mut c_void, len: usize) -> c_int;
    fn mprotect(at: *mut c_void, len: usize, prot: c_int) -> c_int;
    fn mremap(at: *mut c_void, old: usize, new: usize, flags: c_int, ...) -> *mut c_void;
    fn madvise(at: *mut c_void, len: usize, advice: c_int) -> c_int;
    fn signal(number: c_int, handler: usize) -> usize;
    fn fallocate(fd: c_int, mode: c_int, offset: i64, len: i64) -> c_int;
    fn kill(pid: c_int, number: c_int) -> c_int;
    fn getpid() -> c_int;
    fn getppid() -> c_int;
    fn setitimer(which: c_int, new: *const [i64; 4], old: *mut [i64; 4]) -> c_int;
}

const PAGE: usize = 4096;
const READ: c_int = 1;
const WRITE: c_int = 2;
const SHARED: c_int = 1;
const PRIVATE: c_int = 2;
const ANONYMOUS: c_int = 0x20;
const DONTNEED: c_int = 4;
/// FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE.
const PUNCH_HOLE: c_int = 3;
const SIGKILL: c_int = 9;
const SIGUSR1: c_int = 10;
const SIGALRM: c_int = 14;
const SIGCHLD: c_int = 17;

/// xorshift64*: the same numbers everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }
}

/// FNV-1a over 8 bytes at a time.
fn mix(digest: u64, value: u64) -> u64 {
    (digest ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(29)
}

fn digest(bytes: &[u8]) -> u64 {
    let words = bytes.chunks(8).map(|c| c.iter().fold(0, |word, b| word << 8 | u64::from(*b)));
    words.fold(0xcbf2_9ce4_8422_2325, mix)
}

/// A mapping of whole pages that ends with its value.
struct Map {
    at: *mut u8,
    len: usize,
}

impl Map {
    fn new(len: usize, flags: c_int, file: Option<&File>) -> Self {
        use std::os::fd::AsRawFd as _;
        let fd = file.map_or(-1, |f| f.as_raw_fd());
        // SAFETY: a new mapping at an address of the kernel's choice.
        let at = unsafe { mmap(null_mut(), len, READ | WRITE, flags, fd, 0) };
        assert!(at as isize != -1, "mmap of {len}: {}", std::io::Error::last_os_error());
        Self { at: at.cast(), len }
    }

    fn anonymous(len: usize) -> Self {
        Self::new(len, PRIVATE | ANONYMOUS, None)
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is `len` bytes, ours alone as long as `self` is borrowed, and both readable and
        // writable whenever this is called. Processes that share it write to parts of their own.
        unsafe { std::slice::from_raw_parts_mut(self.at, self.len) }
    }

    fn page(&mut self, page: usize) -> &mut [u8] {
        &mut self.bytes()[page * PAGE..(page + 1) * PAGE]
    }

    fn call(&self, page: usize, pages: usize, what: unsafe extern "C" fn(*mut c_void, usize, c_int) -> c_int, arg: c_int) {
        // SAFETY: pages of this mapping; `bytes` is called only when they are accessible again.
        let done = unsafe { what(self.at.add(page * PAGE).cast(), pages * PAGE, arg) };
        assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping any more.
        unsafe { munmap(self.at.cast(), self.len) };
    }
}

/// Runs `work` in a child; its pid.
fn child(work: impl FnOnce() -> c_int) -> c_int {
    // SAFETY: one thread runs here whenever a part forks, so the child may do all that this process may.
    unsafe {
        match fork() {
            0 => _exit(work()),
            pid => {
                assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
                pid
            }
        }
    }
}

/// Waits for a child; (exit code, signal).
fn wait(pid: c_int) -> (c_int, c_int) {
    let mut status = 0;
    loop {
        // SAFETY: `status` is ours.
        let found = unsafe { waitpid(pid, &raw mut status, 0) };
        if found == pid {
            return (status >> 8 & 0xff, status & 0x7f);
        }
        let error = std::io::Error::last_os_error();
        assert!(error.kind() == std::io::ErrorKind::Interrupted, "waitpid: {error}");
    }
}

fn fill(bytes: &mut [u8], seed: u64) {
    let mut random = Random(seed | 1);
    bytes.chunks_mut(8).for_each(|c| c.copy_from_slice(&random.next().to_le_bytes()[..c.len()]));
}

/// Children and children's children on one copy-on-write arena and one shared page each.
fn forks(scale: usize) -> u64 {
    let mut arena = Map::anonymous(1 << 20);
    let mut shared = Map::new(PAGE, SHARED | ANONYMOUS, None);
    fill(arena.bytes(), 7);
    let mut total = digest(arena.bytes());
    for round in 0..2 * scale {
        let children: Vec<c_int> = (0..4)
            .map(|n| {
                child(|| {
                    let mut random = Random((round * 8 + n + 1) as u64);
                    for _ in 0..24 {
                        let at = random.below(256);
                        let page = arena.page(at);
                        page[n * 8..n * 8 + 8].copy_from_slice(&random.next().to_le_bytes());
                    }
                    if n == 0 {
                        let grandchild = child(|| {
                            arena.page(3).fill(9);
                            (digest(arena.page(3)) & 0x3f) as c_int
                        });
                        arena.page(4).fill(wait(grandchild).0 as u8);
                    }
                    let mine = digest(arena.bytes()).to_le_bytes();
                    shared.bytes()[n * 8..n * 8 + 8].copy_from_slice(&mine);
                    n as c_int
                })
            })
            .collect();
        for (n, pid) in children.into_iter().enumerate() {
            assert_eq!(wait(pid), (n as c_int, 0), "child {n} of round {round}");
        }
        total = mix(total, digest(&shared.bytes()[..32]));
        arena.page(round % 256).fill(round as u8);
        total = mix(total, digest(arena.bytes()));
    }
    total
}

/// Pages that come, go, move and change their rights, beside a model of what they must hold.
fn maps(scale: usize) -> u64 {
    const PAGES: usize = 640;
    let mut random = Random(11);
    let mut map = Map::anonymous(PAGES * PAGE);
    let mut model = vec![0_u8; PAGES * PAGE];
    let (mut source, mut pipe) = std::io::pipe().expect("pipe");
    for _ in 0..50 * scale {
        let page = random.below(PAGES);
        let pages = 1 + random.below((PAGES - page).min(40));
        let (start, end) = (page * PAGE, (page + pages) * PAGE);
        match random.below(8) {
            0 => {
                map.call(page, pages, madvise, DONTNEED);
                model[start..end].fill(0);
            }
            1 => {
                // The kernel may not write to a page that its owner may not, whoever copies for it.
                map.call(page, pages, mprotect, READ);
                pipe.write_all(&[1; 64]).expect("write");
                // SAFETY: the kernel refuses to write there.
                let slice = unsafe { std::slice::from_raw_parts_mut(map.at.add(start + 100), 64) };
                let refused = source.read(slice).expect_err("a read into read-only memory");
                assert_eq!(refused.raw_os_error(), Some(14), "EFAULT");
                map.call(page, pages, mprotect, READ | WRITE);
                source.read_exact(&mut map.bytes()[start + 100..start + 164]).expect("read");
                model[start + 100..start + 164].fill(1);
            }
            2 => {
                map.call(page, pages, mprotect, 0);
                map.call(page, pages, mprotect, READ | WRITE);
            }
            3 => {
                // SAFETY: unmaps pages of this mapping and maps fresh ones in their place.
                unsafe {
                    let at = map.at.add(start).cast::<c_void>();
                    assert_eq!(munmap(at, end - start), 0);
                    let again = mmap(at, end - start, READ | WRITE, PRIVATE | ANONYMOUS | 0x10, -1, 0);
                    assert_eq!(again, at, "MAP_FIXED");
                }
                model[start..end].fill(0);
            }
            4 => {
                let mut other = Map::anonymous((pages + 2) * PAGE);
                fill(other.bytes(), random.next());
                // SAFETY: moves pages of `other` over pages of this mapping; they are not touched there
                // again.
                let moved = unsafe {
                    let to = map.at.add(start).cast::<c_void>();
                    mremap(other.at.add(PAGE).cast(), pages * PAGE, pages * PAGE, 3, to)
                };
                assert!(moved as isize != -1, "mremap: {}", std::io::Error::last_os_error());
                model[start..end].copy_from_slice(&map.bytes()[start..end]);
            }
            _ => {
                let seed = random.next();
                fill(&mut map.bytes()[start + 3..end - 5], seed);
                fill(&mut model[start + 3..end - 5], seed);
            }
        }
        assert!(map.bytes()[start..end] == model[start..end], "pages {page} to {} differ", page + pages);
    }
    assert!(*map.bytes() == *model, "the whole differs");
    digest(&model)
}

static CAUGHT: AtomicU64 = AtomicU64::new(0);

extern "C" fn on_signal(_: c_int) {
    // Clobbers vector registers, as a handler may.
    let mut data = [1.5_f32; 64];
    vectorised(&mut data, 2);
    CAUGHT.fetch_add(1 + u64::from(data[0] == 0.1), Ordering::SeqCst);
}

fn vectorised(data: &mut [f32], rounds: u32) {
    #[target_feature(enable = "avx2,fma")]
    fn wide(data: &mut [f32], rounds: u32) {
        for round in 1..=rounds {
            let factor = 1.0 + 1.0 / round as f32;
            for (i, x) in data.iter_mut().enumerate() {
                *x = x.mul_add(factor, (i as f32).sqrt()) * 0.5;
            }
        }
    }
    assert!(is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"), "a CPU with AVX2");
    // SAFETY: checked above.
    unsafe { wide(data, rounds) };
}

fn vector_digest(seed: u32, rounds: u32) -> u64 {
    let mut data: Vec<f32> = (0..4000).map(|i| ((i + seed) % 977) as f32 * 0.25).collect();
    vectorised(&mut data, rounds);
    data.iter().fold(seed.into(), |all, x| mix(all, x.to_bits().into()))
}

/// Signals from oneself, from a child, and from a timer in the middle of vector arithmetic.
fn signals(scale: usize) -> u64 {
    let handler = on_signal as extern "C" fn(c_int) as usize;
    let times = 40 * scale as u64;
    // SAFETY: the handler touches an atomic and its own stack.
    unsafe {
        signal(SIGUSR1, handler);
        signal(SIGALRM, handler);
        (0..times).for_each(|_| assert_eq!(kill(getpid(), SIGUSR1), 0));
    }
    assert_eq!(CAUGHT.load(Ordering::SeqCst), times, "signals to oneself");
    for n in 0..4 * scale as u64 {
        // SAFETY: to this process, whose handler is set.
        let pid = child(|| unsafe { kill(getppid(), SIGUSR1) });
        assert_eq!(wait(pid), (0, 0));
        assert_eq!(CAUGHT.load(Ordering::SeqCst), times + n + 1, "a signal from a child");
    }
    let before = CAUGHT.load(Ordering::SeqCst);
    // SAFETY: both values are plain data; every 10 ms until it is switched off.
    unsafe { setitimer(0, &[0, 10_000, 0, 10_000], null_mut()) };
    let mut total = 0;
    for n in 0.. {
        total = if n < 400 * scale as u32 { mix(total, vector_digest(n, 40)) } else { total };
        let caught = CAUGHT.load(Ordering::SeqCst) - before;
        if n >= 400 * scale as u32 && caught >= 5 {
            break;
        }
    }
    // SAFETY: switches the timer off.
    unsafe { setitimer(0, &[0; 4], null_mut()) };
    mix(total, times)
}

/// Bytes through a pipe from a child, in pieces of any length from and to any address.
fn pipes(scale: usize) -> u64 {
    let total_bytes = scale << 20;
    let (mut out, mut into) = std::io::pipe().expect("pipe");
    let pid = child(|| {
        let mut random = Random(21);
        let mut data = vec![0; 80_000];
        let mut sent = 0;
        while sent < total_bytes {
            let start = random.below(4096);
            let len = (1 + random.below(70_000)).min(total_bytes - sent);
            fill(&mut data[start..start + len], sent as u64 + 1);
            into.write_all(&data[start..start + len]).expect("write");
            sent += len;
        }
        0
    });
    let mut random = Random(22);
    let mut buffer = vec![0; 80_000];
    let (mut all, mut received) = (Vec::with_capacity(total_bytes), 0);
    while received < total_bytes {
        let start = random.below(4096);
        let len = (1 + random.below(60_000)).min(total_bytes - received);
        out.read_exact(&mut buffer[start..start + len]).expect("read");
        all.extend_from_slice(&buffer[start..start + len]);
        received += len;
    }
    assert_eq!(wait(pid), (0, 0));
    digest(&all)
}

/// Writes, reads, holes, truncation, renames and mappings of files in `dir`, beside a model.
fn files(scale: usize, dir: &str) -> u64 {
    let path = |n: usize| format!("{dir}/stress-{n}");
    let mut random = Random(31);
    let mut total = 0;
    for n in 0..scale {
        let file = File::options().read(true).write(true).create(true).truncate(true).open(path(n)).expect("open");
        let mut model: Vec<u8> = Vec::new();
        for _ in 0..40 {
            let (at, mut len) = (random.below(200_000), 1 + random.below(20_000));
            let what = random.below(7);
            if what == 6 {
                // Large writes, which take large folios, up to 2 MiB at once.
                len <<= random.below(7);
            }
            match what {
                0 => {
                    file.set_len(at as u64).expect("truncate");
                    model.resize(at, 0);
                }
                1 if model.len() > PAGE => {
                    let mut map = Map::new(model.len(), SHARED, Some(&file));
                    let start = at % (model.len() - 64);
                    map.bytes()[start..start + 64].fill(n as u8 + 1);
                    model[start..start + 64].fill(n as u8 + 1);
                    assert!(*map.bytes() == *model, "the shared mapping differs");
                }
                2 if model.len() > PAGE => {
                    let mut map = Map::new(model.len(), PRIVATE, Some(&file));
                    let start = at % (model.len() - 64);
                    map.bytes()[start..start + 64].fill(0xee);
                    assert!(map.bytes()[..start] == model[..start], "the private mapping differs");
                    assert!(map.bytes()[start + 64..] == model[start + 64..], "the private mapping differs");
                }
                3 if model.len() > PAGE => {
                    let end = model.len().min(at + 4 * len);
                    // SAFETY: a plain call on an open file.
                    let punched = unsafe { fallocate(file.as_raw_fd(), PUNCH_HOLE, at as i64, 4 * len as i64) };
                    assert_eq!(punched, 0, "{}", std::io::Error::last_os_error());
                    model[at.min(end)..end].fill(0);
                }
                4 if model.len() > PAGE => {
                    let start = at % model.len();
                    let mut data = vec![1; (8 * len).min(model.len() - start)];
                    file.read_exact_at(&mut data, start as u64).expect("read");
                    assert!(data == model[start..start + data.len()], "what is read differs");
                }
                _ => {
                    let mut data = vec![0; len];
                    fill(&mut data, random.next());
                    file.write_all_at(&data, at as u64).expect("write");
                    model.resize(model.len().max(at + len), 0);
                    model[at..at + len].copy_from_slice(&data);
                }
            }
        }
        std::fs::rename(path(n), path(n + 1000)).expect("rename");
        assert!(std::fs::read(path(n + 1000)).expect("read") == model, "file {n} differs");
        std::fs::remove_file(path(n + 1000)).expect("unlink");
        total = mix(total, digest(&model));
    }
    total
}

/// Threads with live vector registers that share a lock, a heap and, with one vCPU, a CPU.
fn threads(scale: usize) -> u64 {
    let sum = std::sync::Mutex::new(0_u64);
    std::thread::scope(|scope| {
        for t in 0..4_u32 {
            let sum = &sum;
            scope.spawn(move || {
                for n in 0..20 * scale as u32 {
                    let part = vector_digest(t * 1000 + n, 60);
                    let mut copy = vec![0_u8; 30_000 + (n as usize % 7) * 10_000];
                    fill(&mut copy, part);
                    let part = mix(part, digest(&copy));
                    let mut sum = sum.lock().expect("lock");
                    *sum = sum.wrapping_add(part);
                    drop(sum);
                    std::thread::yield_now();
                }
            });
        }
    });
    sum.into_inner().expect("lock")
}

/// Large files of the root image read, mapped and privately written while anonymous memory takes most of the
/// RAM, so that the kernel reclaims. The files differ from host to host, so the digest is of whether all was
/// right.
fn pressure(scale: usize) -> u64 {
    let names = ["/usr/bin/python3", "/usr/bin/bash", "/lib/x86_64-linux-gnu/libc.so.6", "/usr/bin/sort"];
    let files: Vec<File> = names.iter().filter_map(|name| File::open(name).ok()).collect();
    assert!(files.len() >= 2, "files to read");
    let length = |file: &File| file.metadata().expect("metadata").len() as usize;
    let expected: Vec<u64> = files
        .iter()
        .map(|file| {
            let mut bytes = vec![0; length(file)];
            file.read_exact_at(&mut bytes, 0).expect("read");
            digest(&bytes)
        })
        .collect();
    let mut held = Map::anonymous(hold_bytes());
    fill(held.bytes(), 41);
    let whole = digest(held.bytes());
    let mut random = Random(42);
    for round in 0..scale {
        for (file, expected) in files.iter().zip(&expected) {
            let len = length(file);
            let mut map = Map::new(len, PRIVATE, Some(file));
            assert_eq!(digest(map.bytes()), *expected, "a mapped file, round {round}");
            let places: Vec<usize> = (0..12).map(|_| random.below(len)).collect();
            let mut model = vec![0; len];
            file.read_exact_at(&mut model, 0).expect("read");
            for &at in &places {
                map.bytes()[at] ^= 0xff;
                model[at] = map.bytes()[at];
            }
            assert!(*map.bytes() == *model, "private pages of a file, round {round}");
            let pid = child(|| {
                map.bytes()[places[0]] = 0;
                c_int::from(map.bytes()[1..places[0].max(1)] != model[1..places[0].max(1)])
            });
            assert_eq!(wait(pid), (0, 0), "a child's view");
            assert!(*map.bytes() == *model, "private pages after a child wrote, round {round}");
        }
        assert_eq!(digest(held.bytes()), whole, "anonymous memory, round {round}");
    }
    mix(5, scale as u64)
}

/// So much that page cache has to go: what is free, less 10 MiB, at most 64 MiB.
fn hold_bytes() -> usize {
    let text = std::fs::read_to_string("/proc/meminfo").expect("meminfo");
    let line = text.lines().find(|l| l.starts_with("MemAvailable")).expect("MemAvailable");
    let kib: usize = line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number");
    (kib.saturating_sub(16 << 10) << 10).clamp(4 << 20, 64 << 20) & !(PAGE - 1)
}

/// For a guest only: a child takes all memory there is and must be killed; nothing else may be.
fn out_of_memory(scale: usize) -> u64 {
    let mut mine = Map::anonymous(1 << 20);
    fill(mine.bytes(), 51);
    let before = digest(mine.bytes());
    for _ in 0..scale {
        let pid = child(|| {
            std::fs::write("/proc/self/oom_score_adj", "1000").expect("oom_score_adj");
            let mut all = Vec::new();
            loop {
                let mut map = Map::anonymous(4 << 20);
                map.bytes().fill(all.len() as u8 | 1);
                all.push(map);
            }
        });
        assert_eq!(wait(pid), (0, SIGKILL), "the child is killed");
        assert_eq!(digest(mine.bytes()), before, "this process's memory");
    }
    mix(before, scale as u64)
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let scale = args.get(1).and_then(|n| n.parse().ok()).unwrap_or(1);
    let dir = args.get(2).map_or("/tmp", String::as_str);
    // SAFETY: the default; a parent may have had it ignored, and then there would be nobody to wait for.
    unsafe { signal(SIGCHLD, 0) };
    for part in args.iter().skip(3) {
        let digest = match part.as_str() {
            "forks" => forks(scale),
            "maps" => maps(scale),
            "signals" => signals(scale),
            "pipes" => pipes(scale),
            "files" => files(scale, dir),
            "threads" => threads(scale),
            "pressure" => pressure(scale),
            "out-of-memory" => out_of_memory(scale),
            other => panic!("no part {other}"),
        };
        println!("{part} {digest:016x}");
    }
}
