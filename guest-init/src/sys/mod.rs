//! The kernel's interface, and the only module of the agent where `unsafe` may be.
//!
//! System calls are made directly, not through a C library: the static agent then has no start-up
//! code, no thread-local memory and no relocations, which on a host where a page fault in the guest costs
//! two milliseconds is most of its start. What is exported from here is safe to call.
#![allow(unsafe_code)]

#[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
compile_error!("the agent knows the system call conventions of x86-64 Linux only");

mod bulk;
mod files;
mod gate;
mod io;
mod once;
mod process;
mod raw;
mod socket;
mod spawn;
mod start;
mod system;
mod terminal;

use core::num::NonZeroU32;

pub(crate) use bulk::{Bulk, Moved, nap};
pub(crate) use files::{
    Looked, Watched, connect_loopback, make_new_directory, open_directory, open_for_reading,
    open_for_writing, poll, stdio,
};
pub(crate) use gate::Gate;
pub(crate) use io::{Epoll, Events, READABLE, Ready, WRITABLE, pipe};
pub(crate) use once::TakeOnce;
pub(crate) use process::{ChildEvents, exit, kill_group, kill_if_alive, reap, usage_us};
pub(crate) use socket::Socket;
pub(crate) use spawn::{Scratch, SpawnFailed, SpawnRequest, spawn};
pub(crate) use start::Arguments;
pub(crate) use system::{
    MountFlags, add_entropy, be_patient, become_subreaper, boottime_ns, chroot_here, enter, loopback_up,
    make_directory, make_link, mount, raise_file_limit, read_file, reboot, remove, report_fatal,
    set_hostname, set_umask, set_wall_clock, write_file,
};
pub(crate) use terminal::open_terminal;

/// An error number of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Errno(pub(crate) i32);

impl Errno {
    pub(crate) const AGAIN: Errno = Errno(libc::EAGAIN);
    pub(crate) const EXIST: Errno = Errno(libc::EEXIST);
    pub(crate) const INTR: Errno = Errno(libc::EINTR);
    pub(crate) const INVAL: Errno = Errno(libc::EINVAL);
    pub(crate) const ISDIR: Errno = Errno(libc::EISDIR);
    pub(crate) const NOENT: Errno = Errno(libc::ENOENT);
    pub(crate) const PIPE: Errno = Errno(libc::EPIPE);
    pub(crate) const PERM: Errno = Errno(libc::EPERM);
    pub(crate) const TOOBIG: Errno = Errno(libc::E2BIG);
}

/// An open file, closed when dropped. `Option<Fd>` is zero when there is none, so that tables of
/// them cost nothing until they are used.
#[derive(Debug)]
pub(crate) struct Fd(NonZeroU32);

impl Fd {
    /// Takes over a file descriptor that a system call has just returned.
    fn own(fd: usize) -> Fd {
        // File descriptors are below 2^31, so one more is neither zero nor an overflow.
        Fd(NonZeroU32::MIN.saturating_add(fd as u32))
    }

    /// Takes over a descriptor that the agent was started with.
    pub(crate) fn inherited(number: u32) -> Result<Fd, Errno> {
        let fd = Fd::own(number as usize);
        io::close_on_exec(&fd)?;
        Ok(fd)
    }

    pub(crate) fn raw(&self) -> usize {
        self.0.get() as usize - 1
    }
}

impl Drop for Fd {
    fn drop(&mut self) {
        // SAFETY: this value owned the descriptor, and nothing can use it any more.
        let _ = unsafe { raw::syscall(libc::SYS_close, [self.raw(), 0, 0, 0, 0, 0]) };
    }
}
