//! The connection to the host: vsock, or whatever stream socket a test passes in.

use guest_init::HOST_CID;
use libc::{c_int, sockaddr_vm};

use super::raw::syscall;
use super::{Errno, Fd};

/// A stream socket on which nothing waits and nothing raises SIGPIPE.
pub(crate) struct Socket(Fd);

const ADDRESS_BYTES: usize = size_of::<sockaddr_vm>();

fn address(cid: u32, port: u32) -> sockaddr_vm {
    sockaddr_vm {
        svm_family: libc::AF_VSOCK as libc::sa_family_t,
        svm_reserved1: 0,
        svm_port: port,
        svm_cid: cid,
        svm_zero: [0; 4],
    }
}

fn vsock() -> Result<Fd, Errno> {
    let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
    // SAFETY: takes no pointers.
    unsafe { syscall(libc::SYS_socket, [libc::AF_VSOCK as usize, kind as usize, 0, 0, 0, 0]) }.map(Fd::own)
}

impl Socket {
    pub(crate) fn from_fd(fd: Fd) -> Socket {
        Socket(fd)
    }

    pub(crate) fn fd(&self) -> &Fd {
        &self.0
    }

    /// Connects to the host and waits for its answer: at boot there is nothing else to do.
    pub(crate) fn connect(port: u32) -> Result<Socket, Errno> {
        let socket = vsock()?;
        let host = address(HOST_CID, port);
        // SAFETY: `host` is an address of the given length.
        unsafe {
            syscall(libc::SYS_connect, [socket.raw(), &raw const host as usize, ADDRESS_BYTES, 0, 0, 0])
        }?;
        Ok(Socket(socket))
    }

    /// A listening socket for later connections.
    pub(crate) fn listen(port: u32) -> Result<Fd, Errno> {
        let socket = vsock()?;
        let any = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: `any` is an address of the given length.
        unsafe { syscall(libc::SYS_bind, [socket.raw(), &raw const any as usize, ADDRESS_BYTES, 0, 0, 0]) }?;
        // SAFETY: takes no pointers.
        unsafe { syscall(libc::SYS_listen, [socket.raw(), 4, 0, 0, 0, 0]) }?;
        // SAFETY: takes no pointers. A fresh socket has no other status flags.
        unsafe {
            syscall(
                libc::SYS_fcntl,
                [socket.raw(), libc::F_SETFL as usize, libc::O_NONBLOCK as usize, 0, 0, 0],
            )
        }?;
        Ok(socket)
    }

    /// The next connection from the host. Programs in the guest may find the port too; theirs
    /// are closed here and nothing is said to them.
    pub(crate) fn accept(listener: &Fd) -> Result<Option<Socket>, Errno> {
        let mut peer = address(0, 0);
        let mut peer_bytes = ADDRESS_BYTES as c_int;
        let (at, len) = (&raw mut peer as usize, &raw mut peer_bytes as usize);
        let flags = libc::SOCK_CLOEXEC as usize;
        // SAFETY: the kernel writes at most the given length of an address, and that length.
        let fd =
            unsafe { syscall(libc::SYS_accept4, [listener.raw(), at, len, flags, 0, 0]) }.map(Fd::own)?;
        let from_guest = c_int::from(peer.svm_family) == libc::AF_VSOCK && peer.svm_cid != HOST_CID;
        Ok(if from_guest { None } else { Some(Socket(fd)) })
    }

    pub(crate) fn receive(&self, into: &mut [u8]) -> Result<usize, Errno> {
        let (at, flags) = (into.as_mut_ptr() as usize, libc::MSG_DONTWAIT as usize);
        // SAFETY: the kernel writes at most `into.len()` bytes; null for "no address wanted".
        unsafe { syscall(libc::SYS_recvfrom, [self.0.raw(), at, into.len(), flags, 0, 0]) }
    }

    pub(crate) fn send(&self, from: &[u8]) -> Result<usize, Errno> {
        let (at, flags) = (from.as_ptr() as usize, (libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) as usize);
        // SAFETY: the kernel reads at most `from.len()` bytes; null for "no address".
        unsafe { syscall(libc::SYS_sendto, [self.0.raw(), at, from.len(), flags, 0, 0]) }
    }
}
