//! Files, directories and loopback connections, for the file tool.

use core::ffi::CStr;
use core::mem::{ManuallyDrop, zeroed};

use libc::{c_int, pollfd, sockaddr_in, sockaddr_in6, stat};

use super::raw::syscall;
use super::{Errno, Fd};

/// What fstat says.
#[derive(Clone, Copy)]
pub(crate) struct Looked {
    pub(crate) mode: u32,
    pub(crate) size: u64,
    pub(crate) mtime: i64,
}

impl Looked {
    fn of(stat: &stat) -> Looked {
        Looked { mode: stat.st_mode, size: stat.st_size as u64, mtime: stat.st_mtime }
    }

    pub(crate) fn is_regular(self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }

    pub(crate) fn is_directory(self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }
}

/// One of the descriptors that every command has; dropping it closes nothing.
pub(crate) fn stdio(number: u8) -> ManuallyDrop<Fd> {
    ManuallyDrop::new(Fd::own(number.into()))
}

/// Opens without waiting: a FIFO or a device must not hold the tool up.
pub(crate) fn open_for_reading(path: &CStr) -> Result<Fd, Errno> {
    Fd::open(path, libc::O_RDONLY | libc::O_NONBLOCK)
}

/// Opens or makes a file and empties it.
pub(crate) fn open_for_writing(path: &CStr) -> Result<Fd, Errno> {
    let flags =
        libc::O_WRONLY | libc::O_CREAT | libc::O_TRUNC | libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: `path` is a NUL-terminated string that lives through the call.
    unsafe { syscall(libc::SYS_open, [path.as_ptr() as usize, flags as usize, 0o644, 0, 0, 0]) }.map(Fd::own)
}

pub(crate) fn open_directory(path: &CStr) -> Result<Directory, Errno> {
    let fd = Fd::open(path, libc::O_RDONLY | libc::O_DIRECTORY)?;
    Ok(Directory { fd, list: [0; LIST_BYTES], at: 0, end: 0 })
}

/// mkdir(2).
pub(crate) fn make_new_directory(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a NUL-terminated string.
    unsafe { syscall(libc::SYS_mkdir, [path.as_ptr() as usize, 0o755, 0, 0, 0, 0]) }.map(drop)
}

impl Fd {
    pub(crate) fn look(&self) -> Result<Looked, Errno> {
        // SAFETY: all-zero is a valid stat, which is numbers only.
        let mut stat: stat = unsafe { zeroed() };
        // SAFETY: the kernel writes one stat.
        unsafe { syscall(libc::SYS_fstat, [self.raw(), &raw mut stat as usize, 0, 0, 0, 0]) }?;
        Ok(Looked::of(&stat))
    }

    /// From now on reads and writes do not wait.
    pub(crate) fn stop_waiting(&self) -> Result<(), Errno> {
        self.never_wait()
    }

    /// No more bytes will be written to this socket.
    pub(crate) fn end_writing(&self) {
        // SAFETY: takes no pointers.
        let _ = unsafe { syscall(libc::SYS_shutdown, [self.raw(), libc::SHUT_WR as usize, 0, 0, 0, 0]) };
    }
}

/// Moves bytes between a file and a pipe inside the kernel. 0 is the end.
pub(crate) fn splice(from: &Fd, to: &Fd, bytes: usize) -> Result<usize, Errno> {
    let flags = libc::SPLICE_F_MOVE as usize;
    // SAFETY: null offset pointers mean "where it stands".
    unsafe { syscall(libc::SYS_splice, [from.raw(), 0, to.raw(), 0, bytes, flags]) }
}

const LIST_BYTES: usize = 8192;
/// Offsets in linux_dirent64 (getdents64(2)): d_reclen and d_name.
const RECLEN_AT: usize = 16;
const NAME_AT: usize = 19;

/// A directory and the entries read ahead.
pub(crate) struct Directory {
    fd: Fd,
    list: [u8; LIST_BYTES],
    at: usize,
    end: usize,
}

impl Directory {
    /// The next entry's name and what lstat says of it; `.` and `..` are left out.
    pub(crate) fn next(&mut self) -> Result<Option<(&CStr, Looked)>, Errno> {
        loop {
            if self.at == self.end {
                let list = self.list.as_mut_ptr() as usize;
                // SAFETY: the kernel writes at most LIST_BYTES to a list of that many.
                self.end =
                    unsafe { syscall(libc::SYS_getdents64, [self.fd.raw(), list, LIST_BYTES, 0, 0, 0]) }?;
                self.at = 0;
                if self.end == 0 {
                    return Ok(None);
                }
            }
            let entry = self.list.get(self.at..self.end).ok_or(Errno::INVAL)?;
            let len = entry.get(RECLEN_AT..RECLEN_AT + 2).ok_or(Errno::INVAL)?;
            let len = usize::from(u16::from_le_bytes([len[0], len[1]]));
            let name_at = self.at + NAME_AT;
            self.at += len;
            let name = self.list.get(name_at..self.at).ok_or(Errno::INVAL)?;
            let name = CStr::from_bytes_until_nul(name).map_err(|_| Errno::INVAL)?;
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            match look_at(&self.fd, name) {
                Ok(looked) => {
                    let name = self.list.get(name_at..self.at).ok_or(Errno::INVAL)?;
                    let name = CStr::from_bytes_until_nul(name).map_err(|_| Errno::INVAL)?;
                    return Ok(Some((name, looked)));
                }
                // Removed since.
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
}

fn look_at(directory: &Fd, name: &CStr) -> Result<Looked, Errno> {
    // SAFETY: all-zero is a valid stat, which is numbers only.
    let mut stat: stat = unsafe { zeroed() };
    let (name, into) = (name.as_ptr() as usize, &raw mut stat as usize);
    let flags = libc::AT_SYMLINK_NOFOLLOW as usize;
    // SAFETY: a NUL-terminated name; the kernel writes one stat.
    unsafe { syscall(libc::SYS_newfstatat, [directory.raw(), name, into, flags, 0, 0]) }?;
    Ok(Looked::of(&stat))
}

/// A TCP connection to a port of the guest's loopback, of either family.
pub(crate) fn connect_loopback(port: u16) -> Result<Fd, Errno> {
    // SAFETY: all-zero is a valid address, which is numbers only.
    let mut four: sockaddr_in = unsafe { zeroed() };
    four.sin_family = libc::AF_INET as libc::sa_family_t;
    four.sin_port = port.to_be();
    four.sin_addr.s_addr = u32::from_ne_bytes([127, 0, 0, 1]);
    // SAFETY: as above.
    let mut six: sockaddr_in6 = unsafe { zeroed() };
    six.sin6_family = libc::AF_INET6 as libc::sa_family_t;
    six.sin6_port = port.to_be();
    six.sin6_addr.s6_addr[15] = 1;
    let first = connect(libc::AF_INET, &raw const four as usize, size_of::<sockaddr_in>());
    // Why IPv4 refused is what people know.
    first.or_else(|errno| {
        connect(libc::AF_INET6, &raw const six as usize, size_of::<sockaddr_in6>()).map_err(|_| errno)
    })
}

fn connect(family: c_int, address: usize, bytes: usize) -> Result<Fd, Errno> {
    let kind = (libc::SOCK_STREAM | libc::SOCK_CLOEXEC) as usize;
    // SAFETY: takes no pointers.
    let socket = unsafe { syscall(libc::SYS_socket, [family as usize, kind, 0, 0, 0, 0]) }.map(Fd::own)?;
    // SAFETY: both callers pass the address and size of a socket address that lives through the call.
    unsafe { syscall(libc::SYS_connect, [socket.raw(), address, bytes, 0, 0, 0]) }?;
    Ok(socket)
}

/// What to wait for at a descriptor; afterwards what came of it.
#[derive(Clone, Copy, Default)]
pub(crate) struct Watched {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
}

/// Waits until one of these can go on. A descriptor with nothing wanted is left out.
pub(crate) fn poll<const N: usize>(fds: [&Fd; N], watched: &mut [Watched; N]) -> Result<(), Errno> {
    let mut list = [pollfd { fd: -1, events: 0, revents: 0 }; N];
    for ((slot, fd), watched) in list.iter_mut().zip(fds).zip(watched.iter()) {
        slot.events = if watched.readable { libc::POLLIN } else { 0 }
            | if watched.writable { libc::POLLOUT } else { 0 };
        if slot.events != 0 {
            slot.fd = fd.raw() as c_int;
        }
    }
    let at = list.as_mut_ptr() as usize;
    // SAFETY: the kernel reads and writes N pollfds.
    unsafe { syscall(libc::SYS_poll, [at, N, usize::MAX, 0, 0, 0]) }?;
    let ended = libc::POLLHUP | libc::POLLERR | libc::POLLNVAL;
    for (slot, watched) in list.iter().zip(watched.iter_mut()) {
        watched.readable = watched.readable && slot.revents & (libc::POLLIN | ended) != 0;
        watched.writable = watched.writable && slot.revents & (libc::POLLOUT | ended) != 0;
    }
    Ok(())
}
