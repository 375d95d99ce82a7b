//! Processes: fork, and the descriptors that a forked child must not keep.

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

/// Children that end leave nothing behind to wait for (sigaction(2), SIG_IGN for SIGCHLD).
pub(crate) fn ignore_children() {
    // SAFETY: SIG_IGN is a valid disposition for SIGCHLD.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}
