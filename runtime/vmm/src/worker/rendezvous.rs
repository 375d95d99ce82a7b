//! Where the next owner of a worker finds it when the present one is gone.
//!
//! A listening socket in a directory of the owner's, which the worker holds open: its name may be left by workers
//! that have ended, but only one that lives answers. No process id is looked at, so none can be mistaken.

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Owners that may wait to be let in.
const BACKLOG: i32 = 4;

/// A place where a worker can be found. Its name goes when this is dropped; the worker then ends with its owner.
#[derive(Debug)]
pub struct Rendezvous {
    path: PathBuf,
    /// `None` where a worker has it already.
    listener: Option<OwnedFd>,
    patience: Duration,
}

impl Rendezvous {
    /// A new place at `path`, where a worker will wait `patience` long for its next owner.
    ///
    /// # Errors
    /// If the directory is not there, or the name is taken.
    pub fn new(path: PathBuf, patience: Duration) -> io::Result<Self> {
        let listener = socket()?;
        rustix::net::bind(&listener, &address(&path)?.1)?;
        rustix::net::listen(&listener, BACKLOG)?;
        Ok(Self { path, listener: Some(listener), patience })
    }

    /// The place at `path`, where a worker was found.
    #[must_use]
    pub fn of_worker(path: PathBuf) -> Self {
        Self { path, listener: None, patience: Duration::ZERO }
    }

    /// The name of the place in its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    pub(super) fn listener(&self) -> Option<BorrowedFd<'_>> {
        self.listener.as_ref().map(OwnedFd::as_fd)
    }
}

impl Drop for Rendezvous {
    fn drop(&mut self) {
        // If it stays, nobody answers there, and whoever comes by next removes it.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Meets the worker that waits at `path`; it must answer each time within `patience`.
pub(super) fn meet(path: &Path, patience: Duration) -> io::Result<OwnedFd> {
    let socket = socket()?;
    // Connecting waits as sending does: for a worker that stands still and has let nobody in for a while.
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(&socket, timeout, Some(patience))?;
    }
    rustix::net::connect(&socket, &address(path)?.1)?;
    Ok(socket)
}

/// The next owner, if one comes in time. Others than this user's processes are sent away.
pub(super) fn accept(listener: &OwnedFd, patience: Duration) -> Option<OwnedFd> {
    let until = std::time::Instant::now() + patience;
    loop {
        let left = until.saturating_duration_since(std::time::Instant::now());
        let timeout = Timespec::try_from(left).ok()?;
        match poll(&mut [PollFd::new(listener, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return None,
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(_) => return None,
        }
        let Ok(socket) = rustix::net::accept_with(listener, SocketFlags::CLOEXEC) else { continue };
        let peer = rustix::net::sockopt::socket_peercred(&socket);
        if peer.is_ok_and(|peer| peer.uid == rustix::process::geteuid()) {
            return Some(socket);
        }
    }
}

fn socket() -> io::Result<OwnedFd> {
    let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
    Ok(rustix::net::socket_with(family, kind, SocketFlags::CLOEXEC, None)?)
}

/// A path may be longer than an address (108 bytes, unix(7)); through its directory's descriptor it never is.
fn address(path: &Path) -> io::Result<(OwnedFd, SocketAddrUnix)> {
    let (Some(dir), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let dir = rustix::fs::open(dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let through = Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name);
    let address = SocketAddrUnix::new(&through)?;
    Ok((dir, address))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_however_long_its_path_until_it_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("a".repeat(120)).join("b".repeat(120));
        std::fs::create_dir_all(&deep).unwrap();
        let place = Rendezvous::new(deep.join("here"), Duration::from_secs(5)).unwrap();
        let met = std::thread::spawn({
            let path = place.path().to_owned();
            move || meet(&path, Duration::from_secs(60)).is_ok()
        });
        assert!(accept(place.listener.as_ref().unwrap(), Duration::from_secs(60)).is_some());
        assert!(met.join().unwrap());
        assert!(Rendezvous::new(deep.join("here"), Duration::ZERO).is_err());
        drop(place);
        assert_eq!(
            meet(&deep.join("here"), Duration::from_secs(1)).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
    }

    #[test]
    fn nobody_comes_and_a_worker_that_has_ended_answers_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let place = Rendezvous::new(dir.path().join("here"), Duration::ZERO).unwrap();
        assert!(accept(place.listener.as_ref().unwrap(), Duration::ZERO).is_none());
        let Rendezvous { path, listener, .. } = &place;
        // Closed, with its name left.
        rustix::net::shutdown(listener.as_ref().unwrap(), rustix::net::Shutdown::Both).unwrap();
        assert_eq!(meet(path, Duration::from_secs(1)).unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
    }
}
