//! What a worker and its owner say to each other: one message, one packet of a SOCK_SEQPACKET socket, with
//! descriptors.
//!
//! A daemon takes over workers that an older one has made: new messages come last, or the others would mean something
//! else, and an older worker must not be sent one.

use crate::snapshot::AgentState;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

/// Longest message.
const MESSAGE_BYTES: usize = 128 * 1024;
/// Most descriptors in a message (SCM_MAX_FD is 253).
pub(crate) const MOST_FDS: usize = 250;

/// What the owner asks for.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Request {
    /// Restore a snapshot and stand still. Its memory has been verified by the owner.
    Prepare {
        /// The snapshot's directory.
        dir: PathBuf,
        /// Path and read-only flag of each disk.
        disks: Vec<(PathBuf, bool)>,
    },
    /// Let the guest go. What is not empty is left in its mailbox. A socket that comes with it is where the next
    /// owner may come when this one is gone.
    Go {
        /// Whole frames for the agent.
        mailbox: Vec<u8>,
        /// How long to wait for the next owner.
        patience: Duration,
    },
    /// The first word of the next owner.
    Attach,
    /// End, and the guest with it.
    End,
    /// Fork the running guest.
    Fork {
        /// How many children: their control sockets come with the message.
        children: u32,
        /// The owner's part of the conversation with the agent.
        agent: AgentState,
    },
    /// Save a snapshot of the running guest. The last descriptor of the message is a socket for the word that
    /// it is durable; those before it are held open until then.
    Snapshot {
        /// The snapshot's directory, which must not exist.
        dir: PathBuf,
        /// The owner's part of the conversation with the agent.
        agent: AgentState,
    },
    /// Counters.
    Stats,
    /// The socket that comes with the message is the guest's bulk stream of this number.
    Bulk {
        /// See [`crate::MicroVm::attach_bulk`].
        number: u64,
    },
    /// To a zygote: become two. The new worker's control socket comes with the message.
    Hatch,
    /// The guest has closed its agent's connection: why has it ended?
    Why,
    /// The guest runs no more, and will be ended; its owner has no successor. Not answered.
    Halt,
    /// To a zygote: know the code that the snapshot in this directory lists.
    Learn {
        /// The snapshot's directory.
        dir: PathBuf,
    },
}

/// What the worker answers.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// A guest stands ready. Its agent's connection comes with the message.
    Ready {
        /// The worker's process.
        pid: u32,
        /// Where the conversation with the agent stands.
        agent: AgentState,
        /// The guest takes its first frames from the mailbox.
        at_gate: bool,
        /// When the request had been decoded; for a forked child, when it began to build.
        decoded_ns: u64,
    },
    /// The guest runs.
    Going {
        /// When the request had been decoded.
        decoded_ns: u64,
        /// When the guest made its first VM exit; 0 if it had not within a second.
        first_exit_ns: u64,
    },
    /// What the next owner needs to go on. The agent's connection comes with the message.
    Attached {
        /// The worker's process.
        pid: u32,
        /// How many bytes of the connection had been read, modulo 2^32.
        position: u32,
        /// What the first reader was to find before the connection's first byte, if it has read nothing.
        unread: Vec<u8>,
    },
    /// The guest was forked; each child says `Ready` on its own socket.
    Forked {
        /// When the request had been decoded.
        decoded_ns: u64,
        /// When the vCPUs had been told to stop.
        stopped_ns: u64,
        /// When they were let go again.
        resumed_ns: u64,
    },
    /// A snapshot is on disk, durable.
    Saved,
    /// There is no space for the snapshot; the guest is as it was before.
    NoSpace(String),
    /// See [`super::WorkerStats`].
    Stats(super::WorkerStats),
    /// It could not be done; the guest is as it was before.
    Failed(String),
    /// The guest has the bulk stream.
    HasBulk,
    /// The zygote could not fork: there is no worker.
    NoProcess {
        /// Linux's error number.
        errno: i32,
    },
    /// Why the guest has ended; nothing if it still runs.
    Stopped(Option<String>),
}

/// Sends one message.
pub(crate) fn send(socket: &OwnedFd, message: &impl Serialize, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, message, fds, SendFlags::empty())
}

/// The same, with these flags.
pub(super) fn send_with(
    socket: &OwnedFd,
    message: &impl Serialize,
    fds: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let bytes = postcard::to_stdvec(message).map_err(io::Error::other)?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::other("too many descriptors"));
    }
    let sent = rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(socket, &[IoSlice::new(&bytes)], &mut control, flags | SendFlags::NOSIGNAL)
    })?;
    if sent == bytes.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one message; `UnexpectedEof` when the other end has gone.
pub(crate) fn receive<T: DeserializeOwned>(socket: &OwnedFd) -> io::Result<(T, Vec<OwnedFd>)> {
    let mut bytes = vec![0; MESSAGE_BYTES];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match rustix::net::recvmsg(socket.as_fd(), &mut [IoSliceMut::new(&mut bytes)], &mut control, flags) {
            Err(rustix::io::Errno::INTR) => {}
            // The other end has gone without reading everything. Linux says so once, before what it had said.
            Err(rustix::io::Errno::CONNRESET) => {}
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fds = fds.flatten().collect();
    let message = postcard::from_bytes(&bytes[..received.bytes]).map_err(io::Error::other)?;
    Ok((message, fds))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::{Reply, Request, receive, send};
    use crate::worker::client::pair;
    use std::io::ErrorKind;

    /// A zygote that cannot fork says why and goes, whether it is already asked for more or not.
    #[test]
    fn last_words_are_heard_over_what_was_not_read() {
        let (ours, theirs) = pair().unwrap();
        send(&ours, &Request::Stats, &[]).unwrap();
        send(&theirs, &Reply::NoProcess { errno: 11 }, &[]).unwrap();
        drop(theirs);
        assert!(matches!(receive(&ours).unwrap().0, Reply::NoProcess { errno: 11 }));
        assert_eq!(receive::<Reply>(&ours).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
