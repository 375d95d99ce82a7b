//! Processes: fork, and the descriptors that a forked child must not keep.

use std::ffi::CStr;
use std::io;
use std::os::fd::RawFd;

/// What [`fork`] returns in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Forked {
    Parent,
    Child,
}

/// fork(2). The child has the calling thread and no other, and memory as it was at this moment. So it must
/// not wait for a thread of its parent, nor take a lock that one may hold, nor drop what other threads used:
/// it leaks it.
pub(crate) fn fork() -> io::Result<Forked> {
    // SAFETY: the C library makes its own locks (the allocator's) good again in the child. Other locks that
    // were held stay held there, which can make it wait for ever but not touch what is not valid: the memory
    // is a whole copy.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        _ => Ok(Forked::Parent),
    }
}

/// In a forked child: closes every descriptor but standard error and those given. The others' owners were
/// leaked.
pub(crate) fn close_all_but(keep: &[RawFd]) {
    let mut keep: Vec<u32> = keep.iter().filter_map(|fd| u32::try_from(*fd).ok()).chain([2]).collect();
    keep.sort_unstable();
    keep.dedup();
    let mut next = 0;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > next {
            let last = if fd == u32::MAX { u32::MAX } else { fd - 1 };
            // SAFETY: it takes no pointers. The threads that used these descriptors do not exist in this
            // process, and the objects that owned them are never used or dropped in it (the caller's part).
            // It fails only for bad ranges.
            unsafe { libc::syscall(libc::SYS_close_range, next, last, 0) };
        }
        next = fd.saturating_add(1);
    }
}

/// Ends the process at once: no destructor runs, no buffer is written.
pub(crate) fn exit_now(code: i32) -> ! {
    // SAFETY: it never returns and touches no memory.
    unsafe { libc::_exit(code) }
}

/// Gives the calling thread, and with it a process of one thread, its name in ps(1) and top(1).
pub(crate) fn set_name(name: &CStr) {
    // SAFETY: a NUL-terminated string, of which the kernel takes the first 15 bytes. It cannot fail otherwise.
    unsafe { libc::prctl(libc::PR_SET_NAME, name.as_ptr()) };
}

/// Children that end leave nothing behind to wait for (sigaction(2), SIG_IGN for SIGCHLD).
pub(crate) fn ignore_children() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// How the host's scheduler treats a thread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Scheduling {
    /// Everybody else comes first (SCHED_IDLE); else the ordinary policy (SCHED_OTHER).
    pub(crate) idle: bool,
    pub(crate) nice: i32,
    /// Its slice; 0 is the kernel's own.
    pub(crate) slice_ns: u64,
}

/// `struct sched_attr`, version 0 (sched_setattr(2)).
#[repr(C)]
#[derive(Default)]
struct SchedAttr {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const SCHED_ATTR_BYTES: u32 = 48;
const _: () = assert!(size_of::<SchedAttr>() == SCHED_ATTR_BYTES as usize);

/// A thread, for [`schedule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ThreadId(libc::pid_t);

impl ThreadId {
    /// Whoever calls it.
    pub(crate) const MINE: Self = Self(0);

    /// The calling thread, as others name it. When it has ended, its name may be another one's.
    pub(crate) fn current() -> Self {
        // SAFETY: it has no preconditions.
        Self(unsafe { libc::gettid() })
    }
}

/// Sets it for a thread.
pub(crate) fn schedule(thread: ThreadId, to: Scheduling) -> io::Result<()> {
    let Scheduling { idle, nice, slice_ns } = to;
    let policy = if idle { libc::SCHED_IDLE } else { libc::SCHED_OTHER } as u32;
    let attr = SchedAttr { size: SCHED_ATTR_BYTES, policy, nice, runtime: slice_ns, ..SchedAttr::default() };
    // SAFETY: the kernel reads as many bytes as the structure says it has, which it has, and keeps nothing.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, thread.0, &raw const attr, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// What it is for the calling thread.
#[cfg(test)]
pub(crate) fn scheduling() -> io::Result<Scheduling> {
    let mut attr = SchedAttr::default();
    // SAFETY: the kernel writes no more than it is told the structure has.
    match unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attr, SCHED_ATTR_BYTES, 0) } {
        0 => Ok(Scheduling {
            idle: attr.policy == libc::SCHED_IDLE as u32,
            nice: attr.nice,
            slice_ns: attr.runtime,
        }),
        _ => Err(io::Error::last_os_error()),
    }
}
