//! The owner's end of a worker.

use super::wire::{MOST_FDS, Reply, Request, receive, send, send_with};
use super::{Rendezvous, WorkerStats, rendezvous};
use crate::agent::{Agent, AgentError, Identity};
use crate::snapshot::{AgentState, Claim, SnapshotError};
use crate::vm::DiskConfig;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

/// A disk may take so many times as long as a process.
const PATIENCES_FOR_THE_DISK: u32 = 20;
/// A worker that does not answer its next owner for so long is stuck.
const ATTACH_PATIENCE: Duration = Duration::from_secs(10);
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
    /// It did not answer in time: stopped, starved or hung. Its guest is as it was, or will be: a late answer is
    /// thrown away.
    #[error("the microVM's process does not answer")]
    Stuck,
    /// More children than one fork may have.
    #[error("children: {0}, but must be 1 to {MOST_CHILDREN}")]
    Children(usize),
}

/// A worker's process. Dropping it ends the process, and the guest in it.
#[derive(Debug)]
pub struct Worker {
    control: OwnedFd,
    /// `None` for a forked one: its parent process is another worker or the zygote, which does not wait for it.
    child: Option<Child>,
    /// The process, if it is no child process of this one: a forked child's, or another owner's before.
    process: Option<OwnedFd>,
    /// How long it may take to answer.
    patience: Option<Duration>,
    /// Answers that did not come in time. One question at a time: they have no other order.
    owed: Mutex<u32>,
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

/// A guest that was told to go; its worker has not answered yet.
#[derive(Debug)]
pub struct Starting {
    worker: Worker,
    agent: Agent,
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

/// A worker whose last owner has gone.
#[derive(Debug)]
pub struct Attached {
    /// It.
    pub worker: Worker,
    /// Its process.
    pub pid: u32,
    /// The agent's connection.
    pub connection: UnixStream,
    /// How many of its bytes have been read, modulo 2^32.
    pub position: u32,
    /// What comes before its next byte.
    pub unread: Vec<u8>,
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

/// A fork whose children are on their way.
#[derive(Debug)]
pub struct Forking {
    decoded_ns: u64,
    stopped_ns: u64,
    resumed_ns: u64,
    children: Vec<Worker>,
}

impl Forking {
    /// Waits until all children stand ready.
    ///
    /// # Errors
    /// What one of them said; all are gone then.
    pub fn finish(self) -> Result<Fork, WorkerError> {
        let Self { decoded_ns, stopped_ns, resumed_ns, children } = self;
        let children = children.into_iter().map(Worker::parked).collect::<Result<_, _>>()?;
        Ok(Fork { decoded_ns, stopped_ns, resumed_ns, children })
    }
}

/// A snapshot that is being written.
#[derive(Debug)]
pub struct Saving {
    done: OwnedFd,
    saved: Saved,
}

impl Saving {
    /// Waits until it is durable.
    ///
    /// # Errors
    /// Why it is not; then nothing of it is left.
    pub fn finish(self) -> Result<Saved, WorkerError> {
        match receive(&self.done) {
            Ok((Reply::Saved, _)) => Ok(self.saved),
            Ok((other, _)) => Err(refused(other)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(WorkerError::Stuck),
            Err(_) => Err(WorkerError::NotSaved),
        }
    }
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
        Ok(Self::new(ours, Some(child), None))
    }

    /// A worker whose process is on its way to the other end of this socket.
    pub(super) fn hatched(control: OwnedFd) -> Self {
        Self::new(control, None, None)
    }

    fn new(control: OwnedFd, child: Option<Child>, patience: Option<Duration>) -> Self {
        Self { control, child, process: None, patience, owed: Mutex::new(0) }
    }

    /// From now on it, and its children, must answer within `patience`; what waits for the disk has
    /// twenty times as long.
    ///
    /// # Errors
    /// If the socket does not take it.
    pub fn with_patience(mut self, patience: Duration) -> Result<Self, WorkerError> {
        be_patient(&self.control, Some(patience))?;
        self.patience = Some(patience);
        Ok(self)
    }

    /// Asks one question and waits for its answer.
    fn ask(&self, request: &Request, fds: &[BorrowedFd<'_>]) -> Result<Reply, WorkerError> {
        let mut owed = self.owed.lock().unwrap_or_else(PoisonError::into_inner);
        while *owed > 0 {
            // It did not answer the last time. Did it since? If not, whoever asked is told at once: nothing is done
            // that was given up.
            if !readable(&self.control)? {
                return Err(WorkerError::Stuck);
            }
            receive::<Reply>(&self.control)?;
            *owed -= 1;
        }
        in_time(send(&self.control, request, fds))?;
        let answer = in_time(receive(&self.control));
        *owed += u32::from(matches!(answer, Err(WorkerError::Stuck)));
        Ok(answer?.0)
    }

    /// Becomes the owner of the worker that waits at `path`, whose last owner has gone. Its guest runs.
    ///
    /// # Errors
    /// If none waits there.
    pub fn attach(path: &Path, patience: Duration) -> Result<Attached, WorkerError> {
        let control = in_time(rendezvous::meet(path, ATTACH_PATIENCE))?;
        in_time(send(&control, &Request::Attach, &[]))?;
        let (reply, mut fds) = in_time(receive(&control))?;
        let mut worker = Self::new(control, None, None).with_patience(patience)?;
        match (reply, fds.pop()) {
            (Reply::Attached { pid, position, unread }, Some(connection)) => {
                worker.process = Some(worker.process(pid)?);
                Ok(Attached { worker, pid, connection: connection.into(), position, unread })
            }
            (other, _) => Err(refused(other)),
        }
    }

    /// Has it restore the snapshot in `dir` and stand still. Whoever calls has verified the memory image
    /// once.
    ///
    /// # Errors
    /// [`WorkerError::Refused`] with the reason.
    pub fn prepare(self, dir: &Path, disks: &[DiskConfig]) -> Result<Parked, WorkerError> {
        let disks = disks.iter().map(|disk| (disk.path.clone(), disk.read_only)).collect();
        match send(&self.control, &Request::Prepare { dir: dir.to_owned(), disks }, &[]) {
            // A zygote that could not fork has said why.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            sent => in_time(sent)?,
        }
        self.parked()
    }

    /// The process of a worker that has just said its number.
    fn process(&self, pid: u32) -> Result<OwnedFd, WorkerError> {
        let gone = || io::Error::from(io::ErrorKind::UnexpectedEof);
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or_else(gone)?;
        let process = pidfd_open(number, PidfdFlags::empty()).map_err(io::Error::from)?;
        let mut control = [PollFd::new(&self.control, PollFlags::empty())];
        poll(&mut control, Some(&Timespec::default())).map_err(io::Error::from)?;
        // While its socket is open it lives, so the number has not gone to another one.
        if control[0].revents().contains(PollFlags::HUP) { Err(gone().into()) } else { Ok(process) }
    }

    /// Waits for the worker's word that its guest is complete.
    fn parked(mut self) -> Result<Parked, WorkerError> {
        let (reply, mut fds) = in_time(receive(&self.control))?;
        match (reply, fds.pop()) {
            (Reply::Ready { pid, agent, at_gate, decoded_ns }, Some(connection)) => {
                if self.child.is_none() {
                    self.process = Some(self.process(pid)?);
                }
                Ok(Parked { worker: self, pid, connection: connection.into(), agent, at_gate, decoded_ns })
            }
            // The kernel had no descriptor left for it here (unix(7)).
            (Reply::Ready { .. }, None) => Err(io::Error::from(Errno::MFILE).into()),
            (other, _) => Err(refused(other)),
        }
    }

    /// Forks the running guest into `count` children that stand still. The guest goes on, and so does its
    /// agent's conversation.
    ///
    /// # Errors
    /// [`WorkerError::Refused`]: the guest is as it was.
    pub fn fork(&self, agent: impl Into<AgentState>, count: usize) -> Result<Fork, WorkerError> {
        self.begin_fork(agent, count)?.finish()
    }

    /// As [`Worker::fork`], but returns when the parent's guest goes on: the children are not ready yet.
    ///
    /// # Errors
    /// [`WorkerError::Refused`]: the guest is as it was.
    pub fn begin_fork(&self, agent: impl Into<AgentState>, count: usize) -> Result<Forking, WorkerError> {
        if !(1..=MOST_CHILDREN).contains(&count) {
            return Err(WorkerError::Children(count));
        }
        let pairs = (0..count).map(|_| pair()).collect::<io::Result<Vec<_>>>()?;
        let theirs: Vec<BorrowedFd<'_>> = pairs.iter().map(|(_, theirs)| theirs.as_fd()).collect();
        let request = Request::Fork { children: count as u32, agent: agent.into() };
        let answer = self.ask(&request, &theirs)?;
        let ours: Vec<OwnedFd> = pairs.into_iter().map(|(ours, _)| ours).collect();
        let (decoded_ns, stopped_ns, resumed_ns) = match answer {
            Reply::Forked { decoded_ns, stopped_ns, resumed_ns } => (decoded_ns, stopped_ns, resumed_ns),
            other => return Err(refused(other)),
        };
        let child = |control: OwnedFd| {
            be_patient(&control, self.patience)?;
            Ok(Self::new(control, None, self.patience))
        };
        let children = ours.into_iter().map(child).collect::<Result<_, WorkerError>>()?;
        Ok(Forking { decoded_ns, stopped_ns, resumed_ns, children })
    }

    /// Saves a snapshot of the running guest in `dir`, durable when this returns; nobody else may be writing
    /// there. The guest stands still for a fork, not for the disk, and goes on. Restoring the snapshot, any
    /// number of times, is [`Worker::prepare`].
    ///
    /// # Errors
    /// The guest is as it was, and nothing of the snapshot is left; after [`WorkerError::NotSaved`] a
    /// directory whose name ends in `.partial` is.
    pub fn snapshot(&self, agent: impl Into<AgentState>, dir: &Path) -> Result<Saved, WorkerError> {
        self.begin_snapshot(agent, dir)?.finish()
    }

    /// As [`Worker::snapshot`], but returns when the guest goes on: nothing is durable yet.
    ///
    /// # Errors
    /// As for [`Worker::snapshot`].
    pub fn begin_snapshot(&self, agent: impl Into<AgentState>, dir: &Path) -> Result<Saving, WorkerError> {
        self.save(agent.into(), dir, None)
    }

    /// Saves the running guest as the next generation of a claimed sandbox, durable when this returns. The
    /// guest goes on; dropping the worker and then the claim is hibernation.
    ///
    /// # Errors
    /// The newest generation is what it was, and so is the guest.
    pub fn hibernate(&self, agent: impl Into<AgentState>, claim: &Claim) -> Result<Saved, WorkerError> {
        let saved = self.save(agent.into(), &claim.next()?, Some(claim)).and_then(Saving::finish);
        match &saved {
            Ok(_) => claim.saved(),
            // What it left is swept at the next claim if it cannot be now.
            Err(_) => drop(claim.sweep()),
        }
        saved
    }

    fn save(&self, agent: AgentState, dir: &Path, claim: Option<&Claim>) -> Result<Saving, WorkerError> {
        let (ours, theirs) = pair()?;
        let request = Request::Snapshot { dir: dir.to_owned(), agent };
        // The socket last: a process that ends closes its files in order, and when its end is seen here the
        // claim is this owner's alone.
        let fds: Vec<_> = claim.map(|claim| claim.as_fd()).into_iter().chain([theirs.as_fd()]).collect();
        let answer = self.ask(&request, &fds)?;
        // The only other end is then the child's: if it dies, that is seen.
        drop(theirs);
        be_patient(&ours, self.patience.map(|patience| patience * PATIENCES_FOR_THE_DISK))?;
        let (decoded_ns, resumed_ns) = match answer {
            Reply::Forked { decoded_ns, resumed_ns, .. } => (decoded_ns, resumed_ns),
            other => return Err(refused(other)),
        };
        Ok(Saving { done: ours, saved: Saved { decoded_ns, resumed_ns } })
    }

    /// Has a program in the guest exchange bytes with the other end of `socket`, as the bulk stream of this number
    /// (see guest-init). The number must be a new one.
    ///
    /// # Errors
    /// [`WorkerError::Refused`] if there are too many at once; or if the worker is gone.
    pub fn attach_bulk(&self, number: u64, socket: &UnixStream) -> Result<(), WorkerError> {
        match self.ask(&Request::Bulk { number }, &[socket.as_fd()])? {
            Reply::HasBulk => Ok(()),
            other => Err(refused(other)),
        }
    }

    /// Waits for the answer of a worker whose guest was told to go ([`Parked::start`]): [`Going::decoded_ns`] and
    /// [`Going::first_exit_ns`].
    ///
    /// # Errors
    /// What it said; the guest is gone.
    pub fn went(&self) -> Result<(u64, u64), WorkerError> {
        match in_time(receive(&self.control))?.0 {
            Reply::Going { decoded_ns, first_exit_ns } => Ok((decoded_ns, first_exit_ns)),
            other => Err(refused(other)),
        }
    }

    /// Whether [`Worker::went`] need not wait.
    ///
    /// # Errors
    /// If the kernel cannot say.
    pub fn has_answered(&self) -> Result<bool, WorkerError> {
        readable(&self.control)
    }

    /// What its guest has cost.
    ///
    /// # Errors
    /// If the worker is gone.
    pub fn stats(&self) -> Result<WorkerStats, WorkerError> {
        match self.ask(&Request::Stats, &[])? {
            Reply::Stats(stats) => Ok(stats),
            other => Err(refused(other)),
        }
    }

    /// Has its guest stand still for good. Ending the process costs the host's kernel some milliseconds; that may come when
    /// it is in nobody's way. A worker that does not take the word goes on until it is dropped.
    pub fn halt(&self) {
        let _ = send_with(&self.control, &Request::Halt, &[], SendFlags::DONTWAIT);
    }

    /// Why its guest, which has closed its agent's connection, has ended; `None` if it has not, a second later. It must be
    /// given up: a worker of an older build takes the question for its owner's end.
    ///
    /// # Errors
    /// If the worker is gone.
    pub fn why(&self) -> Result<Option<String>, WorkerError> {
        match self.ask(&Request::Why, &[])? {
            Reply::Stopped(reason) => Ok(reason),
            other => Err(refused(other)),
        }
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        match (&mut self.child, &self.process) {
            // It would end by itself when it hears of it; killed, its guest cannot delay that.
            (Some(child), _) => {
                let _ = child.kill();
                let _ = child.wait();
            }
            // The same; if it stands still it would not hear of it.
            (None, Some(process)) => {
                if pidfd_send_signal(process, Signal::KILL).is_ok() {
                    // Readable when it has ended (pidfd_open(2)).
                    let _ =
                        rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(process, PollFlags::IN)], None));
                }
            }
            // A closed socket alone might mean that this owner was killed.
            (None, None) => drop(send(&self.control, &Request::End, &[])),
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
        let mut going = self.begin(identity)?;
        going.agent.set_timeout(Some(timeout))?;
        going.agent.end_adopt()?;
        going.agent.set_timeout(None)?;
        Ok(going)
    }

    /// As [`Parked::go`], but does not wait for the guest's word that it has taken its identity: that is the
    /// first message which the agent's connection will carry. What is sent to the guest after this it does
    /// after that.
    ///
    /// # Errors
    /// What the worker said; the guest is gone.
    pub fn begin(self, identity: &Identity) -> Result<Going, WorkerError> {
        self.begin_at(identity, None)
    }

    /// As [`Parked::begin`]; the guest outlives this owner, if the next one comes to `rendezvous` in time.
    ///
    /// # Errors
    /// As for [`Parked::begin`].
    pub fn begin_at(
        self,
        identity: &Identity,
        rendezvous: Option<&Rendezvous>,
    ) -> Result<Going, WorkerError> {
        self.start(identity, rendezvous)?.finish()
    }

    /// As [`Parked::begin_at`], but does not wait for the worker's answer.
    ///
    /// # Errors
    /// If it cannot be told; the guest is gone.
    pub fn start(
        self,
        identity: &Identity,
        rendezvous: Option<&Rendezvous>,
    ) -> Result<Starting, WorkerError> {
        let frame = Agent::adopt_frame(identity)?;
        let agent = Agent::resume(self.connection, &self.agent)?;
        let mailbox = if self.at_gate {
            frame
        } else {
            agent.send_frame(&frame)?;
            Vec::new()
        };
        let patience = rendezvous.map(Rendezvous::patience).unwrap_or_default();
        let listener = rendezvous.and_then(Rendezvous::listener);
        let request = Request::Go { mailbox, patience };
        in_time(send(&self.worker.control, &request, listener.as_slice()))?;
        Ok(Starting { worker: self.worker, agent })
    }
}

impl Starting {
    /// Waits for the worker's answer.
    ///
    /// # Errors
    /// What it said; the guest is gone.
    pub fn finish(self) -> Result<Going, WorkerError> {
        let (decoded_ns, first_exit_ns) = self.worker.went()?;
        Ok(Going { worker: self.worker, agent: self.agent, decoded_ns, first_exit_ns })
    }

    /// For who waits with [`Worker::went`], before the worker is asked anything else.
    #[must_use]
    pub fn into_parts(self) -> (Worker, Agent) {
        (self.worker, self.agent)
    }
}

/// Readable when what is waited for need not be: the answer to what was asked, or the worker's end.
impl AsFd for Worker {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.control.as_fd()
    }
}

pub(super) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// A socket's timeout looks like one that has nothing (socket(7), SO_RCVTIMEO).
fn in_time<T>(result: io::Result<T>) -> Result<T, WorkerError> {
    result.map_err(|error| match error.kind() {
        io::ErrorKind::WouldBlock => WorkerError::Stuck,
        _ => error.into(),
    })
}

/// Has waiting at this socket end after a time.
fn be_patient(socket: &OwnedFd, patience: Option<Duration>) -> Result<(), WorkerError> {
    for timeout in [Timeout::Recv, Timeout::Send] {
        set_socket_timeout(socket, timeout, patience).map_err(io::Error::from)?;
    }
    Ok(())
}

/// Is there something to receive, or has the other end gone?
fn readable(socket: &OwnedFd) -> Result<bool, WorkerError> {
    let (mut sockets, at_once) = ([PollFd::new(socket, PollFlags::IN)], Timespec::default());
    Ok(rustix::io::retry_on_intr(|| poll(&mut sockets, Some(&at_once))).map_err(io::Error::from)? > 0)
}

fn refused(reply: Reply) -> WorkerError {
    match reply {
        Reply::Failed(why) => WorkerError::Refused(why),
        Reply::NoSpace(why) => WorkerError::NoSpace(why),
        Reply::NoProcess { errno } => io::Error::from_raw_os_error(errno).into(),
        other => WorkerError::OutOfTurn(format!("{other:?}")),
    }
}
