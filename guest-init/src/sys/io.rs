//! Files, pipes and epoll.

use libc::{c_int, epoll_event};

use super::raw::syscall;
use super::{Errno, Fd};

/// There are bytes.
pub(crate) const READABLE: u32 = libc::EPOLLIN as u32;
/// There is room.
pub(crate) const WRITABLE: u32 = libc::EPOLLOUT as u32;
const HUNG_UP: u32 = (libc::EPOLLHUP | libc::EPOLLERR | libc::EPOLLRDHUP) as u32;
const EVENTS_PER_WAIT: usize = 32;

impl Fd {
    /// Opens a path for reading and writing, without waiting and without making it the terminal.
    pub(super) fn open(path: &core::ffi::CStr, flags: c_int) -> Result<Fd, Errno> {
        let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
        // SAFETY: `path` is a NUL-terminated string that lives through the call.
        unsafe { syscall(libc::SYS_open, [path.as_ptr() as usize, flags as usize, 0, 0, 0, 0]) }.map(Fd::own)
    }

    /// Makes a new file for writing.
    pub(crate) fn create(path: &core::ffi::CStr, mode: u32) -> Result<Fd, Errno> {
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC;
        let path = path.as_ptr() as usize;
        // SAFETY: `path` is a NUL-terminated string that lives through the call.
        unsafe { syscall(libc::SYS_open, [path, flags as usize, mode as usize, 0, 0, 0]) }.map(Fd::own)
    }

    /// `/dev/null`, with the promise that descriptors 0, 1 and 2 are taken: a pipe that landed there
    /// would be overwritten when a child puts its stdio in place.
    pub(crate) fn null() -> Result<Fd, Errno> {
        let mut null = Fd::open(c"/dev/null", libc::O_RDWR)?;
        while null.raw() <= 2 {
            let next = Fd::open(c"/dev/null", libc::O_RDWR)?;
            // Left open on purpose, for the life of the agent.
            let _ = core::mem::ManuallyDrop::new(core::mem::replace(&mut null, next));
        }
        Ok(null)
    }

    /// This program's file, wherever it lies: the image's root does not lead to it.
    pub(crate) fn own_program() -> Result<Fd, Errno> {
        Fd::open(c"/proc/self/exe", libc::O_PATH)
    }

    pub(crate) fn read(&self, into: &mut [u8]) -> Result<usize, Errno> {
        // SAFETY: the kernel writes at most `into.len()` bytes to `into`.
        unsafe { syscall(libc::SYS_read, [self.raw(), into.as_mut_ptr() as usize, into.len(), 0, 0, 0]) }
    }

    pub(crate) fn write(&self, from: &[u8]) -> Result<usize, Errno> {
        // SAFETY: the kernel reads at most `from.len()` bytes of `from`.
        unsafe { syscall(libc::SYS_write, [self.raw(), from.as_ptr() as usize, from.len(), 0, 0, 0]) }
    }

    /// Writes these bytes at the beginning of a file, all of them.
    pub(crate) fn write_start(&self, bytes: &[u8]) -> Result<(), Errno> {
        let from = bytes.as_ptr() as usize;
        // SAFETY: the kernel reads at most `bytes.len()` bytes of `bytes`.
        let written = unsafe { syscall(libc::SYS_pwrite64, [self.raw(), from, bytes.len(), 0, 0, 0]) }?;
        if written == bytes.len() { Ok(()) } else { Err(Errno::AGAIN) }
    }

    /// How many bytes a read would find.
    pub(crate) fn bytes_waiting(&self) -> Result<usize, Errno> {
        let mut bytes: c_int = 0;
        let into = &raw mut bytes as usize;
        // SAFETY: FIONREAD writes one int.
        unsafe { syscall(libc::SYS_ioctl, [self.raw(), libc::FIONREAD as usize, into, 0, 0, 0]) }?;
        Ok(usize::try_from(bytes).unwrap_or(0))
    }

    /// Lets a pipe hold more. May fail; the pipe then works as before.
    pub(crate) fn widen_pipe(&self, bytes: usize) {
        // SAFETY: takes no pointers.
        let _ =
            unsafe { syscall(libc::SYS_fcntl, [self.raw(), libc::F_SETPIPE_SZ as usize, bytes, 0, 0, 0]) };
    }

    /// Throws away up to `bytes` bytes of a pipe without copying them. 0 is the end of the pipe.
    pub(crate) fn discard_into(&self, null: &Fd, bytes: usize) -> Result<usize, Errno> {
        let flags = (libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK) as usize;
        // SAFETY: null offset pointers mean "none".
        unsafe { syscall(libc::SYS_splice, [self.raw(), 0, null.raw(), 0, bytes, flags]) }
    }

    pub(super) fn never_wait(&self) -> Result<(), Errno> {
        // Both ends of a fresh pipe have no other status flags to keep.
        // SAFETY: takes no pointers.
        unsafe {
            syscall(libc::SYS_fcntl, [self.raw(), libc::F_SETFL as usize, libc::O_NONBLOCK as usize, 0, 0, 0])
        }
        .map(drop)
    }
}

/// Keeps an inherited descriptor from the agent's children.
pub(super) fn close_on_exec(fd: &Fd) -> Result<(), Errno> {
    // SAFETY: takes no pointers.
    unsafe {
        syscall(libc::SYS_fcntl, [fd.raw(), libc::F_SETFD as usize, libc::FD_CLOEXEC as usize, 0, 0, 0])
    }
    .map(drop)
}

/// A pipe between the agent and a child.
pub(crate) struct PipeEnds {
    /// The agent's end; never waits.
    pub(crate) ours: Fd,
    /// The child's end; waits, as programs expect.
    pub(crate) theirs: Fd,
}

/// Makes a pipe that the child reads (`child_reads`) or writes.
pub(crate) fn pipe(child_reads: bool) -> Result<PipeEnds, Errno> {
    let mut ends = [0u32; 2];
    // SAFETY: the kernel writes two ints.
    unsafe { syscall(libc::SYS_pipe2, [ends.as_mut_ptr() as usize, libc::O_CLOEXEC as usize, 0, 0, 0, 0]) }?;
    let [read, write] = ends.map(|end| Fd::own(end as usize));
    let (ours, theirs) = if child_reads { (write, read) } else { (read, write) };
    ours.never_wait()?;
    Ok(PipeEnds { ours, theirs })
}

/// The one place where the agent waits. Edge-triggered: an event says that something has changed,
/// and the agent remembers what is ready, so there is nothing to switch off and on.
pub(crate) struct Epoll(Fd);

/// What an event says about a file.
#[derive(Clone, Copy)]
pub(crate) struct Ready {
    /// There are bytes.
    pub(crate) readable: bool,
    /// There is room.
    pub(crate) writable: bool,
    /// The other side is gone; a pipe without bytes is then at its end.
    pub(crate) hung_up: bool,
}

/// What [`Epoll::wait`] has seen.
pub(crate) struct Events {
    list: [epoll_event; EVENTS_PER_WAIT],
    count: usize,
}

impl Epoll {
    pub(crate) fn new() -> Result<Epoll, Errno> {
        // SAFETY: takes no pointers.
        unsafe { syscall(libc::SYS_epoll_create1, [libc::EPOLL_CLOEXEC as usize, 0, 0, 0, 0, 0]) }
            .map(|fd| Epoll(Fd::own(fd)))
    }

    /// Watches a file under `key`; closing the file ends that.
    pub(crate) fn watch(&self, fd: &Fd, interest: u32, key: u64) -> Result<(), Errno> {
        self.control(libc::EPOLL_CTL_ADD, fd, interest, key)
    }

    /// Changes what a watched file is watched for.
    pub(crate) fn change(&self, fd: &Fd, interest: u32, key: u64) -> Result<(), Errno> {
        self.control(libc::EPOLL_CTL_MOD, fd, interest, key)
    }

    fn control(&self, operation: c_int, fd: &Fd, interest: u32, key: u64) -> Result<(), Errno> {
        let mut event =
            epoll_event { events: interest | (libc::EPOLLET | libc::EPOLLRDHUP) as u32, u64: key };
        let event = &raw mut event as usize;
        // SAFETY: `event` is a valid epoll_event for the length of the call.
        unsafe { syscall(libc::SYS_epoll_ctl, [self.0.raw(), operation as usize, fd.raw(), event, 0, 0]) }
            .map(drop)
    }

    /// Waits for events; with `peek` only looks.
    pub(crate) fn wait(&self, events: &mut Events, peek: bool) -> Result<(), Errno> {
        let timeout_ms = if peek { 0 } else { usize::MAX };
        let list = events.list.as_mut_ptr() as usize;
        events.count = 0;
        // SAFETY: the kernel writes at most EVENTS_PER_WAIT events to a list of that many.
        let result =
            unsafe { syscall(libc::SYS_epoll_wait, [self.0.raw(), list, EVENTS_PER_WAIT, timeout_ms, 0, 0]) };
        match result {
            Ok(count) => events.count = count.min(EVENTS_PER_WAIT),
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        Ok(())
    }
}

impl Events {
    pub(crate) const fn new() -> Events {
        Events { list: [epoll_event { events: 0, u64: 0 }; EVENTS_PER_WAIT], count: 0 }
    }

    /// What was seen, by key.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (u64, Ready)> {
        self.list.iter().take(self.count).map(|event| {
            let (events, key) = (event.events, event.u64);
            let hung_up = events & HUNG_UP != 0;
            (key, Ready { readable: events & READABLE != 0, writable: events & WRITABLE != 0, hung_up })
        })
    }
}
