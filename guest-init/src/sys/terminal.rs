//! Pseudo-terminals.

use core::ffi::CStr;

use libc::{c_int, winsize};

use super::raw::syscall;
use super::{Errno, Fd};

/// Linux's TIOCSPTLCK and TIOCGPTPEER, which need no look-up of a path under /dev/pts.
const TIOCSPTLCK: usize = 0x4004_5431;
const TIOCGPTPEER: usize = 0x5441;
const PTMX: &CStr = c"/dev/ptmx";

/// Both ends of a pseudo-terminal.
pub(crate) struct Terminal {
    /// The agent's end; never waits.
    pub(crate) ours: Fd,
    /// The child's end.
    pub(crate) theirs: Fd,
}

/// Makes a terminal of the given size, owned by `owner` if it is not root.
pub(crate) fn open_terminal(rows: u16, cols: u16, owner: Option<(u32, u32)>) -> Result<Terminal, Errno> {
    let ours = Fd::open(PTMX, libc::O_RDWR | libc::O_NONBLOCK)?;
    let unlocked: c_int = 0;
    // SAFETY: TIOCSPTLCK reads one int.
    unsafe { syscall(libc::SYS_ioctl, [ours.raw(), TIOCSPTLCK, &raw const unlocked as usize, 0, 0, 0]) }?;
    let flags = (libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) as usize;
    // SAFETY: TIOCGPTPEER takes flags and returns a new descriptor.
    let theirs =
        unsafe { syscall(libc::SYS_ioctl, [ours.raw(), TIOCGPTPEER, flags, 0, 0, 0]) }.map(Fd::own)?;
    if rows != 0 || cols != 0 {
        ours.set_size(rows, cols)?;
    }
    if let Some((uid, gid)) = owner {
        // SAFETY: takes no pointers.
        unsafe { syscall(libc::SYS_fchown, [theirs.raw(), uid as usize, gid as usize, 0, 0, 0]) }?;
    }
    Ok(Terminal { ours, theirs })
}

impl Fd {
    /// Sets a terminal's size; the kernel tells its foreground programs with SIGWINCH.
    pub(crate) fn set_size(&self, rows: u16, cols: u16) -> Result<(), Errno> {
        let size = winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
        let size = &raw const size as usize;
        // SAFETY: TIOCSWINSZ reads one winsize.
        unsafe { syscall(libc::SYS_ioctl, [self.raw(), libc::TIOCSWINSZ as usize, size, 0, 0, 0]) }.map(drop)
    }
}
