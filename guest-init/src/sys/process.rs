//! Children: hearing of their end, reaping them, signalling them.

use core::mem::zeroed;

use libc::{rusage, signalfd_siginfo, timeval};

use super::raw::syscall;
use super::{Errno, Fd};

const SIGNAL_SET_BYTES: usize = 8;

/// The bit of a signal in the kernel's signal set.
const fn bit(signo: i32) -> u64 {
    1 << (signo - 1)
}

/// Becomes readable when a child has ended.
pub(crate) struct ChildEvents(Fd);

impl ChildEvents {
    /// Blocks SIGCHLD, to read it instead, and SIGPIPE, so that a closed pipe is an error code also
    /// where the agent is not PID 1. Children get an empty mask.
    pub(crate) fn new() -> Result<ChildEvents, Errno> {
        let blocked = bit(libc::SIGCHLD) | bit(libc::SIGPIPE);
        let (how, at) = (libc::SIG_SETMASK as usize, &raw const blocked as usize);
        // SAFETY: the kernel reads one signal set; null for "no old set wanted".
        unsafe { syscall(libc::SYS_rt_sigprocmask, [how, at, 0, SIGNAL_SET_BYTES, 0, 0]) }?;
        let wanted = bit(libc::SIGCHLD);
        let flags = (libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) as usize;
        let at = &raw const wanted as usize;
        // SAFETY: the kernel reads one signal set; -1 makes a new descriptor.
        unsafe { syscall(libc::SYS_signalfd4, [usize::MAX, at, SIGNAL_SET_BYTES, flags, 0, 0]) }
            .map(|fd| ChildEvents(Fd::own(fd)))
    }

    pub(crate) fn fd(&self) -> &Fd {
        &self.0
    }

    /// Takes the pending signal, so that the next child's end is a new event. SIGCHLD does not
    /// queue: one signal may stand for many children, so [`reap`] must go on until there is none.
    pub(crate) fn clear(&self) {
        let mut info = [0u8; size_of::<signalfd_siginfo>()];
        let _ = self.0.read(&mut info);
    }
}

/// A child that has ended.
pub(crate) struct Reaped {
    pub(crate) pid: u32,
    status: i32,
    pub(crate) user_us: u64,
    pub(crate) sys_us: u64,
    pub(crate) max_rss_kib: u64,
}

impl Reaped {
    /// The signal that ended it, or else its exit code.
    pub(crate) fn outcome(&self) -> guest_init::Outcome {
        match self.status & 0x7f {
            0 => guest_init::Outcome::Code((self.status >> 8) as u8),
            signo => guest_init::Outcome::Signal(signo as u8),
        }
    }
}

/// Reaps one child, if any has ended.
pub(crate) fn reap() -> Option<Reaped> {
    let mut status = 0i32;
    // SAFETY: all-zero is a valid rusage, which is numbers only.
    let mut usage: rusage = unsafe { zeroed() };
    let (at_status, at_usage) = (&raw mut status as usize, &raw mut usage as usize);
    let flags = (libc::WNOHANG | libc::__WALL) as usize;
    // SAFETY: the kernel writes one int and one rusage.
    let pid = unsafe { syscall(libc::SYS_wait4, [usize::MAX, at_status, flags, at_usage, 0, 0]) };
    match pid {
        Ok(pid) if pid > 0 => Some(Reaped {
            pid: pid as u32,
            status,
            user_us: microseconds(usage.ru_utime),
            sys_us: microseconds(usage.ru_stime),
            max_rss_kib: usage.ru_maxrss as u64,
        }),
        _ => None,
    }
}

fn microseconds(time: timeval) -> u64 {
    (time.tv_sec as u64).saturating_mul(1_000_000).saturating_add(time.tv_usec as u64)
}

/// The agent's own time in user space and in the kernel.
pub(crate) fn usage_us() -> (u64, u64) {
    // SAFETY: all-zero is a valid rusage, which is numbers only.
    let mut usage: rusage = unsafe { zeroed() };
    let at = &raw mut usage as usize;
    // SAFETY: the kernel writes one rusage.
    let _ = unsafe { syscall(libc::SYS_getrusage, [libc::RUSAGE_SELF as usize, at, 0, 0, 0, 0]) };
    (microseconds(usage.ru_utime), microseconds(usage.ru_stime))
}

/// Sends a signal to the process group that `pid` leads. `pid` must not have been reaped.
pub(crate) fn kill_group(pid: u32, signo: u32) -> Result<(), Errno> {
    // SAFETY: takes no pointers. A pid is at least 2 here, so this is never "everyone".
    unsafe { syscall(libc::SYS_kill, [-(pid as isize) as usize, signo as usize, 0, 0, 0, 0]) }.map(drop)
}

/// Ends a process group, if it is still there.
pub(crate) fn kill_if_alive(pid: u32) {
    let _ = kill_group(pid, libc::SIGKILL as u32);
}

/// Ends the agent. As PID 1 this is a kernel panic, which the VMM reports.
pub(crate) fn exit(code: u8) -> ! {
    loop {
        // SAFETY: takes no pointers, and does not return.
        let _ = unsafe { syscall(libc::SYS_exit_group, [code.into(), 0, 0, 0, 0, 0]) };
    }
}
