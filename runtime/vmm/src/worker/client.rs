//! The owner's end of a worker.

use super::WorkerStats;
use super::wire::{MOST_FDS, Reply, Request, receive, send};
use crate::agent::{Agent, AgentError, Identity};
use crate::snapshot::{AgentState, Claim, SnapshotError};
use crate::vm::DiskConfig;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Most children of one fork.
pub const MOST_CHILDREN: usize = MOST_FDS;

/// What can go wrong with a worker.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// The process could not be started or spoken to; it and its guest are gone or useless.
    #[error("worker: {0}")]
    Io(#[from] io::Error),
    /// It says why it did not do it; its guest is as it was.
    #[error("{0}")]
    Refused(String),
    /// The snapshot does not fit on the disk. Nothing of it is left, and the guest is as it was.
    #[error("no space for the snapshot: {0}; free some and try again")]
    NoSpace(String),
    /// The process that saved the snapshot was killed. It does not count, and the guest is as it was unless its
    /// worker ended too.
    #[error("the snapshot was not saved: the process that wrote it ended before it was durable")]
    NotSaved,
    /// The sandbox's place on disk.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// It answered something else.
    #[error("the worker answered {0}, out of turn")]
    OutOfTurn(String),
    /// The guest's agent failed.
    #[error(transparent)]
    Agent(#[from] AgentError),
    /// More children than one fork may have.
    #[error("children: {0}, but must be 1 to {MOST_CHILDREN}")]
    Children(usize),
}

/// A worker's process. Dropping it ends the process, and the guest in it.
#[derive(Debug)]
pub struct Worker {
    control: OwnedFd,
    /// `None` for a forked child: its parent worker is its parent process, which does not wait for it.
    child: Option<Child>,
}

/// A guest that stands still, complete.
#[derive(Debug)]
pub struct Parked {
    worker: Worker,
    pid: u32,
    connection: UnixStream,
    agent: AgentState,
    at_gate: bool,
    decoded_ns: u64,
}

/// A guest that runs, and when it began to.
#[derive(Debug)]
pub struct Going {
    /// Its worker.
    pub worker: Worker,
    /// Its agent, which knows who it is now.
    pub agent: Agent,
    /// CLOCK_MONOTONIC when the worker had decoded the request.
    pub decoded_ns: u64,
    /// CLOCK_MONOTONIC of the guest's first VM exit; 0 if it made none within a second.
    pub first_exit_ns: u64,
}

/// When a fork's steps were, on CLOCK_MONOTONIC, and the children.
#[derive(Debug)]
pub struct Fork {
    /// The worker had decoded the request.
    pub decoded_ns: u64,
    /// The parent's vCPUs had stopped.
    pub stopped_ns: u64,
    /// They went on.
    pub resumed_ns: u64,
    /// The children, in no order that means anything.
    pub children: Vec<Parked>,
}

/// When a snapshot's steps were, on CLOCK_MONOTONIC.
#[derive(Debug, Clone, Copy)]
pub struct Saved {
    /// The worker had decoded the request.
    pub decoded_ns: u64,
    /// The guest went on.
    pub resumed_ns: u64,
}

impl Worker {
    /// Starts a worker: `program` with `arguments` must call [`super::serve`] with its standard input.
    ///
    /// # Errors
    /// If the process cannot be started.
    pub fn spawn(program: &Path, arguments: &[&OsStr]) -> Result<Self, WorkerError> {
        let (ours, theirs) = pair()?;
        let child =
            Command::new(program).args(arguments).stdin(Stdio::from(theirs)).stdout(Stdio::null()).spawn()?;
        Ok(Self { control: ours, child: Some(child) })
    }

    /// Has it restore the snapshot in `dir` and stand still. Whoever calls has verified the memory image
    /// once.
    ///
    /// # Errors
    /// [`WorkerError::Refused`] with the reason.
    pub fn prepare(self, dir: &Path, disks: &[DiskConfig]) -> Result<Parked, WorkerError> {
        let disks = disks.iter().map(|disk| (disk.path.clone(), disk.read_only)).collect();
        send(&self.control, &Request::Prepare { dir: dir.to_owned(), disks }, &[])?;
        self.parked()
    }

    /// Waits for the worker's word that its guest is complete.
    fn parked(self) -> Result<Parked, WorkerError> {
        let (reply, mut fds) = receive(&self.control)?;
        match (reply, fds.pop()) {
            (Reply::Ready { pid, agent, at_gate, decoded_ns }, Some(connection)) => {
                Ok(Parked { worker: self, pid, connection: connection.into(), agent, at_gate, decoded_ns })
            }
            (other, _) => Err(refused(other)),
        }
    }

    /// Forks the running guest into `count` children that stand still. The guest goes on, and so does its
    /// agent's conversation.
    ///
    /// # Errors
    /// [`WorkerError::Refused`]: the guest is as it was.
    pub fn fork(&self, agent: &Agent, count: usize) -> Result<Fork, WorkerError> {
        if !(1..=MOST_CHILDREN).contains(&count) {
            return Err(WorkerError::Children(count));
        }
        let pairs = (0..count).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
        let theirs: Vec<BorrowedFd<'_>> = pairs.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        let request = Request::Fork { children: count as u32, agent: agent.own_state() };
        send(&self.control, &request, &theirs)?;
        let ours: Vec<OwnedFd> = pairs.into_iter().map(|(ours, _)| ours).collect();
        let (decoded_ns, stopped_ns, resumed_ns) = match receive(&self.control)?.0 {
            Reply::Forked { decoded_ns, stopped_ns, resumed_ns } => (decoded_ns, stopped_ns, resumed_ns),
            other => return Err(refused(other)),
        };
        let children = ours.into_iter().map(|control| Self { control, child: None }.parked());
        Ok(Fork { decoded_ns, stopped_ns, resumed_ns, children: children.collect::<Result<_, _>>()? })
    }

    /// Saves a snapshot of the running guest in `dir`, durable when this returns; nobody else may be writing
    /// there. The guest stands still for a fork, not for the disk, and goes on. Restoring the snapshot, any
    /// number of times, is [`Worker::prepare`].
    ///
    /// # Errors
    /// The guest is as it was, and nothing of the snapshot is left; after [`WorkerError::NotSaved`] a
    /// directory whose name ends in `.partial` is.
    pub fn snapshot(&self, agent: &Agent, dir: &Path) -> Result<Saved, WorkerError> {
        self.save(agent, dir, None)
    }

    /// Saves the running guest as the next generation of a claimed sandbox, durable when this returns. The
    /// guest goes on; dropping the worker and then the claim is hibernation.
    ///
    /// # Errors
    /// The newest generation is what it was, and so is the guest.
    pub fn hibernate(&self, agent: &Agent, claim: &Claim) -> Result<Saved, WorkerError> {
        let saved = self.save(agent, &claim.next()?, Some(claim));
        match &saved {
            Ok(_) => claim.saved(),
            // What it left is swept at the next claim if it cannot be now.
            Err(_) => drop(claim.sweep()),
        }
        saved
    }

    fn save(&self, agent: &Agent, dir: &Path, claim: Option<&Claim>) -> Result<Saved, WorkerError> {
        let (ours, theirs) = pair()?;
        let request = Request::Snapshot { dir: dir.to_owned(), agent: agent.own_state() };
        // The socket last: a process that ends closes its files in order, and when its end is seen here the
        // claim is this owner's alone.
        let fds: Vec<_> = claim.map(|claim| claim.as_fd()).into_iter().chain([theirs.as_fd()]).collect();
        send(&self.control, &request, &fds)?;
        // The only other end is then the child's: if it dies, that is seen.
        drop(theirs);
        let (decoded_ns, resumed_ns) = match receive(&self.control)?.0 {
            Reply::Forked { decoded_ns, resumed_ns, .. } => (decoded_ns, resumed_ns),
            other => return Err(refused(other)),
        };
        match receive(&ours) {
            Ok((Reply::Saved, _)) => Ok(Saved { decoded_ns, resumed_ns }),
            Ok((other, _)) => Err(refused(other)),
            Err(_) => Err(WorkerError::NotSaved),
        }
    }

    /// What its guest has cost.
    ///
    /// # Errors
    /// If the worker is gone.
    pub fn stats(&self) -> Result<WorkerStats, WorkerError> {
        send(&self.control, &Request::Stats, &[])?;
        match receive(&self.control)?.0 {
            Reply::Stats(stats) => Ok(stats),
            other => Err(refused(other)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It would end by itself when the control socket closes; killed, its guest cannot delay that.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Parked {
    /// The worker's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// CLOCK_MONOTONIC when the worker had decoded the request to prepare it; for a forked child, when it
    /// began to build.
    #[must_use]
    pub fn decoded_ns(&self) -> u64 {
        self.decoded_ns
    }

    /// Lets the guest go as a sandbox of its own: it is told who it is before it does anything else.
    ///
    /// # Errors
    /// What the worker or the agent said; the guest is gone.
    pub fn go(self, identity: &Identity, timeout: Duration) -> Result<Going, WorkerError> {
        let frame = Agent::adopt_frame(identity)?;
        let mut agent = Agent::resume(self.connection, &self.agent)?;
        agent.set_timeout(Some(timeout))?;
        let mailbox = if self.at_gate {
            frame
        } else {
            agent.send_frame(&frame)?;
            Vec::new()
        };
        send(&self.worker.control, &Request::Go { mailbox }, &[])?;
        let (decoded_ns, first_exit_ns) = match receive(&self.worker.control)?.0 {
            Reply::Going { decoded_ns, first_exit_ns } => (decoded_ns, first_exit_ns),
            other => return Err(refused(other)),
        };
        agent.end_adopt()?;
        agent.set_timeout(None)?;
        Ok(Going { worker: self.worker, agent, decoded_ns, first_exit_ns })
    }
}

fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

fn refused(reply: Reply) -> WorkerError {
    match reply {
        Reply::Failed(why) => WorkerError::Refused(why),
        Reply::NoSpace(why) => WorkerError::NoSpace(why),
        other => WorkerError::OutOfTurn(format!("{other:?}")),
    }
}
