//! The worker's process: one control thread, and the threads of its microVM.

use super::wire::{Reply, Request, receive, send};
use super::{WorkerStats, monotonic_ns, rendezvous};
use crate::VmmError;
use crate::agent::AGENT_PORT;
use crate::assist::HostCpu;
use crate::code_book;
use crate::devices::Disk;
use crate::devices::mmio::State;
use crate::event_loop::ring::peek_bytes;
use crate::memory::GuestMemory;
use crate::priority;
use crate::snapshot::{AgentState, Compat, MachineState, Run, Snapshot, Stored};
use crate::sys::process::{Forked, close_all_but, exit_now, fork, ignore_children, set_name};
use crate::vm::{DiskConfig, MicroVm, Shell, open_disks, open_kvm};
use kvm_ioctls::Kvm;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a worker is called in lists of processes.
const NAME: &CStr = c"worker";
/// How long `Go` waits for the guest's first VM exit: a guest that computes makes none.
const FIRST_EXIT_PATIENCE: Duration = Duration::from_secs(1);
/// How long a guest that has been let go stands back behind whoever else has something to do, if there is nothing for it before:
/// a hundred that begin at once, and need 3 to 5 ms of a processor each to take their identities, are done on two of them by then,
/// about. Nobody waits for that, and their creators have the answers.
const STANDS_BACK: Duration = Duration::from_millis(200);
/// How long `Why` waits for the reason: a guest that shuts down closes its connections first.
const REASON_PATIENCE: Duration = Duration::from_secs(1);

/// A guest and what is needed to clone it.
struct Sandbox {
    vm: MicroVm,
    compat: Compat,
    disks: Vec<Disk>,
    /// The memory image that it was restored from, and which pages of it were another file's.
    base: Arc<File>,
    runs: Arc<[Run]>,
    /// A second descriptor of the agent's connection: to see what its reader has not read when the guest is
    /// forked, and to outlive its reader.
    agent: UnixStream,
    /// What the connection's first reader was told it would find before its first byte.
    unread: Vec<u8>,
    /// Bytes that the agent had sent on it before it was restored.
    sent_before: u32,
    /// Where the next owner may come, and how long to wait for one.
    rendezvous: Option<(OwnedFd, Duration)>,
}

/// Serves one owner until it goes away. Ends the process, so that nothing can be left of its guest.
pub fn serve(control: OwnedFd) -> ! {
    get_ready();
    set_name(NAME);
    serve_with(control, make_shell().ok(), None)
}

/// Forks itself for each worker that its owner wants, until the owner goes away: a worker that is forked has its pages
/// already, and what does not differ it has in common with all others.
///
/// The process must have no other thread.
pub fn serve_zygote(control: OwnedFd) -> ! {
    get_ready();
    set_name(c"zygote");
    if let Ok(kvm) = open_kvm() {
        let _ = crate::vcpu::supported_cpuid(&kvm);
    }
    while let Ok((request, mut fds)) = receive::<Request>(&control) {
        if let Request::Learn { dir } = request {
            // What cannot be read is not known; the guests find it out for themselves.
            let _ = code_book::learn(&dir);
        }
        let Some(theirs) = fds.pop() else { continue };
        match fork() {
            Ok(Forked::Child) => {
                let _guard = AbortOnUnwind;
                close_all_but(&[theirs.as_raw_fd()]);
                set_name(NAME);
                serve_with(theirs, make_shell().ok(), None)
            }
            Ok(Forked::Parent) => drop(theirs),
            Err(error) => {
                let errno = error.raw_os_error().unwrap_or(0);
                // If nobody hears it, nobody waits for it.
                let _ = send(&theirs, &Reply::NoProcess { errno }, &[]);
            }
        }
    }
    exit_now(0)
}

/// What is the same for every guest is found out before there is one: CPUID traps where this host is a virtual machine,
/// and KVM's answer takes a third of a millisecond. If there is no KVM, the first request says so.
fn get_ready() {
    ignore_children();
    // Guests are made, and run, when nobody is about to answer somebody.
    let _ = priority::guest();
    let _ = (Compat::host(), HostCpu::this());
}

/// What a guest is built in.
fn make_shell() -> Result<(Kvm, Shell), VmmError> {
    let kvm = open_kvm()?;
    crate::vcpu::supported_cpuid(&kvm)?;
    let shell = Shell::build(&kvm)?;
    Ok((kvm, shell))
}

/// The owner has gone, or broken its word. Without a successor the guest goes too; it runs on meanwhile.
fn successor(sandbox: Option<&Sandbox>) -> OwnedFd {
    let rendezvous = sandbox.and_then(|sandbox| sandbox.rendezvous.as_ref());
    let Some((listener, patience)) = rendezvous else { exit_now(0) };
    rendezvous::accept(listener, *patience).unwrap_or_else(|| exit_now(0))
}

fn serve_with(mut control: OwnedFd, mut shell: Option<(Kvm, Shell)>, mut sandbox: Option<Sandbox>) -> ! {
    let mut stands_back = false;
    loop {
        let come_forward = |sandbox: &Option<Sandbox>| sandbox.as_ref().map(|it| it.vm.come_forward());
        if std::mem::take(&mut stands_back) && !is_heard(&control, STANDS_BACK) {
            come_forward(&sandbox);
        }
        let received = receive::<Request>(&control);
        let decoded_ns = monotonic_ns();
        if !matches!(received, Ok((Request::Halt, _))) {
            // What is asked may have to wait for the guest.
            come_forward(&sandbox);
        }
        let Ok((request, mut fds)) = received else {
            control = successor(sandbox.as_ref());
            continue;
        };
        let answered = match (request, &mut sandbox) {
            (Request::End, _) => exit_now(0),
            (Request::Halt, Some(sandbox)) => {
                sandbox.vm.hold();
                sandbox.rendezvous = None;
                Ok(())
            }
            (Request::Prepare { dir, disks }, slot @ None) => {
                match prepare(&mut shell, &dir, &disks, decoded_ns) {
                    Ok((prepared, reply, connection)) => {
                        let prepared = slot.insert(prepared);
                        let sent = send(&control, &reply, &[connection.as_fd()]);
                        // Its owner knows; what is still to do need not be waited for.
                        prepared.vm.approach();
                        let _ = priority::first();
                        sent
                    }
                    Err(error) => send(&control, &Reply::Failed(error.to_string()), &[]),
                }
            }
            (Request::Go { mailbox, patience }, Some(sandbox)) => {
                sandbox.rendezvous = fds.pop().map(|listener| (listener, patience));
                stands_back = true;
                send(&control, &go(sandbox, &mailbox, decoded_ns), &[])
            }
            (Request::Attach, Some(sandbox)) => match attach(sandbox) {
                Ok(reply) => send(&control, &reply, &[sandbox.agent.as_fd()]),
                Err(error) => send(&control, &Reply::Failed(error.to_string()), &[]),
            },
            (Request::Fork { children, agent }, Some(sandbox)) => {
                // What comes with the message are the children's control sockets.
                let reply = if !fds.is_empty() && fds.iter().all(given_up) {
                    Reply::Failed("nobody waits for the children any more".to_owned())
                } else if fds.len() == children as usize && children > 0 {
                    fork_guest(sandbox, fds, agent, decoded_ns)
                        .unwrap_or_else(|e| Reply::Failed(e.to_string()))
                } else {
                    Reply::Failed(format!("{} control sockets for {children} children", fds.len()))
                };
                send(&control, &reply, &[])
            }
            (Request::Snapshot { dir, agent }, Some(sandbox)) => {
                let reply = save(sandbox, fds, agent, &dir, decoded_ns)
                    .unwrap_or_else(|e| Reply::Failed(e.to_string()));
                send(&control, &reply, &[])
            }
            (Request::Bulk { number }, Some(sandbox)) => {
                let reply = match fds.pop().map(|socket| sandbox.vm.attach_bulk(number, socket.into())) {
                    Some(Ok(())) => Reply::HasBulk,
                    Some(Err(error)) => Reply::Failed(error.to_string()),
                    None => Reply::Failed("a bulk stream needs a socket".to_owned()),
                };
                send(&control, &reply, &[])
            }
            (Request::Stats, Some(sandbox)) => {
                let stats = WorkerStats {
                    emulated_instructions: sandbox.vm.emulated_instructions(),
                    exits: sandbox.vm.exits(),
                };
                send(&control, &Reply::Stats(stats), &[])
            }
            (Request::Why, Some(sandbox)) => {
                let reason = sandbox.vm.wait(REASON_PATIENCE).map(|reason| reason.to_string());
                send(&control, &Reply::Stopped(reason), &[])
            }
            (request, _) => send(&control, &Reply::Failed(format!("out of turn: {request:?}")), &[]),
        };
        if answered.is_err() {
            control = successor(sandbox.as_ref());
        }
    }
}

fn prepare(
    shell: &mut Option<(Kvm, Shell)>,
    dir: &Path,
    disks: &[(PathBuf, bool)],
    decoded_ns: u64,
) -> Result<(Sandbox, Reply, UnixStream), VmmError> {
    let stored = Stored::open(dir)?;
    let configs: Vec<_> = disks
        .iter()
        .map(|(path, read_only)| DiskConfig { path: path.clone(), read_only: *read_only })
        .collect();
    let disks = open_disks(&configs)?;
    let (kvm, shell) = shell.take().map_or_else(make_shell, Ok)?;
    let vm = MicroVm::restore_in(&stored, duplicates(&disks)?, &kvm, shell)?;
    let Snapshot { compat, machine } = stored.snapshot;
    let runs = machine.runs.as_slice().into();
    ready(vm, (compat, disks, stored.memory, runs), &machine, decoded_ns)
}

/// The parked guest, what to say of it, and its agent's connection.
fn ready(
    vm: MicroVm,
    (compat, disks, base, runs): (Compat, Vec<Disk>, Arc<File>, Arc<[Run]>),
    machine: &MachineState,
    decoded_ns: u64,
) -> Result<(Sandbox, Reply, UnixStream), VmmError> {
    let lost = || VmmError::Agent("the snapshot has none".to_owned());
    let connection = vm.event_loop().restored_connection(AGENT_PORT).ok_or_else(lost)?;
    let second = connection.try_clone().map_err(os("cannot duplicate a descriptor"))?;
    let agent = machine.agent.clone();
    let unread = agent.unread.clone();
    let reply = Reply::Ready { pid: std::process::id(), agent, at_gate: vm.is_at_gate(), decoded_ns };
    let sent_before = sent_by_agent(&machine.devices).ok_or_else(lost)?;
    let rendezvous = None;
    let sandbox = Sandbox { vm, compat, disks, base, runs, agent: second, unread, sent_before, rendezvous };
    Ok((sandbox, reply, connection))
}

/// Bytes that the agent's connection has carried to the host, modulo 2^32.
fn sent_by_agent(devices: &[State]) -> Option<u32> {
    let mut streams = devices.iter().flat_map(|device| &device.streams);
    streams.find(|stream| stream.host_port == AGENT_PORT).map(|stream| stream.forwarded_bytes)
}

/// What the next owner is told. Nobody reads the connection now; the guest stands still while it is looked at.
fn attach(sandbox: &Sandbox) -> Result<Reply, VmmError> {
    let lost = || VmmError::Agent("its connection has ended".to_owned());
    let paused = sandbox.vm.pause()?;
    let sent = sent_by_agent(paused.devices()).ok_or_else(lost)?.wrapping_sub(sandbox.sent_before);
    let waiting = peek_bytes(&sandbox.agent).map_err(os("cannot look at the agent's connection"))?.len();
    let position = sent.wrapping_sub(waiting as u32);
    let unread = if position == 0 { sandbox.unread.clone() } else { Vec::new() };
    Ok(Reply::Attached { pid: std::process::id(), position, unread })
}

fn duplicates(disks: &[Disk]) -> Result<Vec<Disk>, VmmError> {
    let duplicate = |disk: &Disk| {
        let file = disk.file.try_clone().map_err(os("cannot duplicate a descriptor"))?;
        Ok(Disk { file, read_only: disk.read_only, id: disk.id.clone() })
    };
    disks.iter().map(duplicate).collect()
}

fn os(what: &'static str) -> impl FnOnce(io::Error) -> VmmError {
    move |source| VmmError::Os { what, source }
}

fn go(sandbox: &Sandbox, mailbox: &[u8], decoded_ns: u64) -> Reply {
    if let Err(error) = sandbox.vm.go(mailbox) {
        return Reply::Failed(error.to_string());
    }
    let first = sandbox.vm.wait_first_exit(!mailbox.is_empty(), FIRST_EXIT_PATIENCE);
    // Both clocks are the same; an `Instant` just does not say its number.
    let ago = |at: Instant| u64::try_from(at.elapsed().as_nanos()).unwrap_or(0);
    let first_exit_ns = first.map_or(0, |at| monotonic_ns() - ago(at));
    Reply::Going { decoded_ns, first_exit_ns }
}

/// Ends a forked child that panics: the frames below it are its parent's, and what they would drop belongs to
/// threads that the child does not have.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        std::process::abort();
    }
}

/// Forks the process while the guest stands still. `child` gets the guest's memory and state; the guest goes on in
/// the parent, which stands still for this one fork whatever the child does with it.
fn split(
    sandbox: &Sandbox,
    mut agent: AgentState,
    decoded_ns: u64,
    child: impl FnOnce(GuestMemory, MachineState),
) -> Result<Reply, VmmError> {
    let paused = sandbox.vm.pause()?;
    let stopped_ns = monotonic_ns();
    // Nothing moves any more: what the owner had not read is the rest of the conversation.
    agent.add_unread(&sandbox.agent).map_err(|e| VmmError::Agent(e.to_string()))?;
    let machine = paused.capture(agent)?;
    // The child uses this thread's own data only, leaks the microVM and never waits for its threads.
    match fork().map_err(os("fork"))? {
        Forked::Parent => {
            drop(paused);
            Ok(Reply::Forked { decoded_ns, stopped_ns, resumed_ns: monotonic_ns() })
        }
        Forked::Child => {
            let _guard = AbortOnUnwind;
            child(ManuallyDrop::new(paused).memory(), machine);
            exit_now(0)
        }
    }
}

/// Forks the guest. The first child makes the others, from its own copy.
fn fork_guest(
    sandbox: &Sandbox,
    sockets: Vec<OwnedFd>,
    agent: AgentState,
    decoded_ns: u64,
) -> Result<Reply, VmmError> {
    if let Some(disk) = sandbox.disks.iter().find(|disk| !disk.read_only) {
        return Err(VmmError::Agent(format!("disk {} is writable, and two guests cannot share it", disk.id)));
    }
    split(sandbox, agent, decoded_ns, |mem, machine| become_children(mem, sandbox, machine, sockets))
}

/// Saves a snapshot: the child, which has the guest's memory as it was, writes it out.
fn save(
    sandbox: &Sandbox,
    mut held: Vec<OwnedFd>,
    agent: AgentState,
    dir: &Path,
    decoded_ns: u64,
) -> Result<Reply, VmmError> {
    let Some(done) = held.pop() else {
        return Err(VmmError::Agent("a snapshot needs a socket".to_owned()));
    };
    if given_up(&done) {
        return Err(VmmError::Agent("nobody waits for the snapshot any more".to_owned()));
    }
    split(sandbox, agent, decoded_ns, move |mem, machine| {
        // The claim on the place outlives its owner, or another one could come and be overtaken.
        let keep = held.iter().chain([&done]).map(|fd| fd.as_raw_fd()).chain([sandbox.base.as_raw_fd()]);
        close_all_but(&keep.collect::<Vec<_>>());
        // Its parent may have stood still since it looked.
        if given_up(&done) {
            return;
        }
        let machine = MachineState { runs: sandbox.runs.to_vec(), ..machine };
        let snapshot = Snapshot { compat: sandbox.compat.clone(), machine };
        let reply = match snapshot.save(&mem, &sandbox.base, dir) {
            Ok(()) => Reply::Saved,
            Err(error) if error.is_no_space() => Reply::NoSpace(error.to_string()),
            Err(error) => Reply::Failed(error.to_string()),
        };
        // When the owner has the word, the claim is the owner's alone.
        drop(held);
        // If the owner has gone, what is on disk is complete or absent all the same.
        let _ = send(&done, &reply, &[]);
    })
}

/// Whether the owner says something, or goes away, within this time.
fn is_heard(control: &OwnedFd, patience: Duration) -> bool {
    let wait = Timespec::try_from(patience).unwrap_or_default();
    poll(&mut [PollFd::new(control, PollFlags::IN)], Some(&wait)).is_ok_and(|heard| heard > 0)
}

/// Has the owner closed its end? It waits for so long and no longer, and this process may have stood still.
fn given_up(socket: &OwnedFd) -> bool {
    let mut sockets = [PollFd::new(socket, PollFlags::empty())];
    poll(&mut sockets, Some(&Timespec::default())).is_ok() && sockets[0].revents().contains(PollFlags::HUP)
}

/// In the first child: makes its siblings, then goes on as a worker of its own.
fn become_children(
    mem: GuestMemory,
    sandbox: &Sandbox,
    machine: MachineState,
    mut sockets: Vec<OwnedFd>,
) -> ! {
    let Some(mut mine) = sockets.pop() else { exit_now(1) };
    while let Some(next) = sockets.pop() {
        match fork() {
            Ok(Forked::Child) => {
                mine = next;
                break;
            }
            // The owner sees that this child's socket closes.
            Ok(Forked::Parent) | Err(_) => drop(next),
        }
    }
    let disks = sandbox.disks.iter().map(|disk| disk.file.as_raw_fd());
    let keep: Vec<_> = disks.chain([sandbox.base.as_raw_fd(), mine.as_raw_fd()]).collect();
    // What else is open belongs to the parent's microVM, which is leaked here: this function never returns.
    close_all_but(&keep);
    let _ = priority::guest();
    match rebuild(mem, sandbox, &machine) {
        Ok((sandbox, reply, connection)) => {
            let _ = send(&mine, &reply, &[connection.as_fd()]);
            drop(connection);
            let _ = priority::first();
            serve_with(mine, None, Some(sandbox))
        }
        Err(error) => {
            let _ = send(&mine, &Reply::Failed(error.to_string()), &[]);
            exit_now(1)
        }
    }
}

fn rebuild(
    mem: GuestMemory,
    parent: &Sandbox,
    machine: &MachineState,
) -> Result<(Sandbox, Reply, UnixStream), VmmError> {
    let begun_ns = monotonic_ns();
    let disks = duplicates(&parent.disks)?;
    let vm = MicroVm::restore_over(mem, &parent.compat, machine, duplicates(&disks)?, &open_kvm()?)?;
    let parts = (parent.compat.clone(), disks, Arc::clone(&parent.base), Arc::clone(&parent.runs));
    ready(vm, parts, machine, begun_ns)
}
