//! The one io_uring of a microVM, and the few system calls that move bytes between a file
//! descriptor and guest memory.
//!
//! May touch: raw guest memory addresses, io_uring, `libc`. Must not: know any device.
//!
//! This is the only module of `devices` and `event_loop` with unsafe code. Its invariants:
//!
//! 1. **The mapping outlives the I/O.** [`GuestBuffers`] can only be made from ranges that
//!    `vm-memory` has bounds-checked, and it holds an `Arc` of the memory they came from.
//! 2. **Buffers are pinned until completion.** [`Ring::push`] moves buffers and file into a slot
//!    that is emptied only when the kernel has posted the operation's last completion;
//!    dropping the ring waits for every operation that may still write to guest memory.
//! 3. **No Rust reference to guest memory exists.** The guest changes it at any time, so only raw
//!    pointers are kept, and only the kernel follows them.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use io_uring::{IoUring, cqueue, opcode, squeue, types};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::devices::GuestMemory;

#[cfg(test)]
mod tests;

/// The range is not (wholly) in guest memory, or there are more pieces than one call may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("buffer lies outside guest memory or has too many pieces")]
pub struct BadBuffers;

/// Most pieces one vectored call takes (Linux' `UIO_MAXIOV`).
const MAX_PIECES: usize = 1024;

/// Bounds-checked pieces of guest memory, ready for a vectored system call.
pub struct GuestBuffers {
    pieces: Vec<libc::iovec>,
    len_bytes: usize,
    // Invariant 1: keeps the mapping that `pieces` points into.
    _mem: Arc<GuestMemory>,
}

// SAFETY: the raw pointers are addresses in a shared mapping that `_mem` keeps alive; they are
// never dereferenced by Rust code, and the kernel may be given them from any thread.
unsafe impl Send for GuestBuffers {}

impl fmt::Debug for GuestBuffers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestBuffers")
            .field("pieces", &self.pieces.len())
            .field("len_bytes", &self.len_bytes)
            .finish()
    }
}

impl GuestBuffers {
    /// Translates guest-physical ranges; every byte must be inside guest memory.
    pub fn new(mem: &Arc<GuestMemory>, ranges: &[(GuestAddress, u32)]) -> Result<Self, BadBuffers> {
        let mut pieces = Vec::with_capacity(ranges.len());
        let mut len_bytes = 0usize;
        for &(addr, len) in ranges {
            let slices =
                mem.get_slices(addr, len as usize, Permissions::ReadWrite).map_err(|_| BadBuffers)?;
            for slice in slices {
                let slice = slice.map_err(|_| BadBuffers)?;
                if pieces.len() == MAX_PIECES {
                    return Err(BadBuffers);
                }
                len_bytes = len_bytes.checked_add(slice.len()).ok_or(BadBuffers)?;
                pieces.push(libc::iovec {
                    iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                    iov_len: slice.len(),
                });
            }
        }
        Ok(Self { pieces, len_bytes, _mem: Arc::clone(mem) })
    }

    /// Bytes in all pieces together.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len_bytes
    }

    /// Whether there is nothing (left) to move.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len_bytes == 0
    }

    /// Forgets the first `count` bytes, which have been moved already.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.len_bytes);
        self.len_bytes -= left;
        let whole = self
            .pieces
            .iter()
            .take_while(|piece| {
                let gone = piece.iov_len <= left;
                if gone {
                    left -= piece.iov_len;
                }
                gone
            })
            .count();
        self.pieces.drain(..whole);
        if let Some(first) = self.pieces.first_mut() {
            // In bounds: `left` is less than this piece's length, or the loop had taken it.
            first.iov_base = first.iov_base.wrapping_byte_add(left);
            first.iov_len -= left;
        }
    }

    /// Keeps only the first `count` bytes.
    pub fn truncate(&mut self, count: usize) {
        let mut left = count.min(self.len_bytes);
        self.len_bytes = left;
        self.pieces.retain_mut(|piece| {
            piece.iov_len = piece.iov_len.min(left);
            left -= piece.iov_len;
            piece.iov_len > 0
        });
    }

    /// Reads what the page cache has at `offset`, without waiting for the disk (`RWF_NOWAIT`).
    pub fn read_cached(&self, file: &File, offset: u64) -> io::Result<usize> {
        let offset =
            libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: `pieces` are live, writable guest memory (invariants 1 and 3).
        let read = unsafe {
            libc::preadv2(
                file.as_raw_fd(),
                self.pieces.as_ptr(),
                self.piece_count(),
                offset,
                libc::RWF_NOWAIT,
            )
        };
        usize::try_from(read).map_err(|_| io::Error::last_os_error())
    }

    /// Receives from a socket into the buffers, never waiting.
    pub fn receive(&self, socket: &impl AsRawFd) -> io::Result<usize> {
        let mut message = self.message();
        // SAFETY: `message` points at `pieces`, live and writable guest memory (invariants 1 and 3).
        bytes_moved(|| unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) })
    }

    /// Sends the buffers to a socket, never waiting and never raising SIGPIPE.
    pub fn send(&self, socket: &impl AsRawFd) -> io::Result<usize> {
        let message = self.message();
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: `message` points at `pieces`, live guest memory the kernel only reads (1 and 3).
        bytes_moved(|| unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) })
    }

    fn piece_count(&self) -> libc::c_int {
        // At most MAX_PIECES plus the pieces of the last range, far below the type's limit.
        libc::c_int::try_from(self.pieces.len()).unwrap_or(libc::c_int::MAX)
    }

    fn message(&self) -> libc::msghdr {
        // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = self.pieces.as_ptr().cast_mut();
        message.msg_iovlen = self.pieces.len();
        message
    }
}

/// Sends bytes to a socket, never waiting and never raising SIGPIPE.
pub fn send_bytes(socket: &impl AsRawFd, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: pointer and length are those of one live slice, which the kernel only reads.
    bytes_moved(|| unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) })
}

/// What a call that moves bytes and does not wait has moved. One that was interrupted all the same is made again: its
/// caller could not wait for anything.
fn bytes_moved(mut call: impl FnMut() -> libc::ssize_t) -> io::Result<usize> {
    loop {
        match usize::try_from(call()).map_err(|_| io::Error::last_os_error()) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            moved => return moved,
        }
    }
}

/// What a stream socket holds to be read, left in it.
pub fn peek_bytes(socket: &impl AsRawFd) -> io::Result<Vec<u8>> {
    let mut waiting: libc::c_int = 0;
    // SAFETY: FIONREAD writes one int, which lives here. If it fails the count stays 0, and recv says why.
    unsafe { libc::ioctl(socket.as_raw_fd(), libc::FIONREAD, &raw mut waiting) };
    // Most often there is nothing, and this is asked while a guest stands still. One byte tells an end from silence.
    let mut bytes = vec![0; usize::try_from(waiting).unwrap_or(0).max(1)];
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    let (to, len) = (bytes.as_mut_ptr().cast(), bytes.len());
    // SAFETY: pointer and length are those of one live, exclusively borrowed buffer.
    match bytes_moved(|| unsafe { libc::recv(socket.as_raw_fd(), to, len, flags) }) {
        Ok(count) => {
            bytes.truncate(count);
            bytes.shrink_to_fit();
            Ok(bytes)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// Whether the other end of a stream socket is closed for good, not merely half closed.
pub fn is_hung_up(socket: &impl AsRawFd) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one valid pollfd, and a zero timeout.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready == 1 && poll.revents & (libc::POLLHUP | libc::POLLERR | libc::POLLNVAL) != 0
}

/// Fills `bytes` from the kernel's random number generator.
pub fn fill_random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        // SAFETY: pointer and length are those of one live, exclusively borrowed slice.
        let got = unsafe { libc::getrandom(rest.as_mut_ptr().cast(), rest.len(), 0) };
        match usize::try_from(got) {
            Ok(count) => done += count,
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// Anything with a file descriptor that a poll may hold on to.
pub type Pollable = Arc<dyn AsRawFd + Send + Sync>;

/// An operation a device wants done; its `token` comes back with the completion.
#[allow(missing_docs)]
pub enum Op {
    /// Read the file at `offset` into guest memory.
    Read { token: u32, file: Arc<File>, buffers: GuestBuffers, offset: u64 },
    /// Write guest memory to the file at `offset`.
    Write { token: u32, file: Arc<File>, buffers: GuestBuffers, offset: u64 },
    /// `fdatasync`.
    Sync { token: u32, file: Arc<File> },
    /// `fallocate` with `mode`.
    Allocate { token: u32, file: Arc<File>, mode: i32, offset: u64, len: u64 },
    /// Report readiness: once, or until cancelled.
    Poll { token: u32, fd: Pollable, events: i16, multi: bool },
    /// End the poll with this token; both may complete afterwards.
    Unpoll { token: u32 },
}

impl fmt::Debug for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Read { token, buffers, offset, .. } => {
                write!(f, "Read({token}, {} B at {offset})", buffers.len())
            }
            Self::Write { token, buffers, offset, .. } => {
                write!(f, "Write({token}, {} B at {offset})", buffers.len())
            }
            Self::Sync { token, .. } => write!(f, "Sync({token})"),
            Self::Allocate { token, mode, offset, len, .. } => {
                write!(f, "Allocate({token}, mode {mode}, {len} B at {offset})")
            }
            Self::Poll { token, events, multi, .. } => write!(f, "Poll({token}, {events:#x}, multi {multi})"),
            Self::Unpoll { token } => write!(f, "Unpoll({token})"),
        }
    }
}

impl Op {
    /// The device's name for the operation.
    #[must_use]
    pub fn token(&self) -> u32 {
        match self {
            Self::Read { token, .. }
            | Self::Write { token, .. }
            | Self::Sync { token, .. }
            | Self::Allocate { token, .. }
            | Self::Poll { token, .. }
            | Self::Unpoll { token } => *token,
        }
    }
}

/// What the kernel says about an operation.
#[derive(Debug)]
pub struct Completion {
    /// Whose operation it was (see [`Ring::push`]).
    pub owner: u64,
    /// The system call's result: a count, an event mask, or a negated errno.
    pub result: i32,
    /// The operation is still armed and will complete again.
    pub more: bool,
    /// The buffers, given back.
    pub buffers: Option<GuestBuffers>,
}

/// What must stay alive while the kernel works on one operation (invariant 2).
struct Pinned {
    owner: u64,
    buffers: Option<GuestBuffers>,
    /// The kernel may still read or write guest memory, or the file on the guest's behalf.
    moves_data: bool,
    polls: bool,
    _file: Option<Pollable>,
}

/// Slot number of operations whose completion interests nobody.
const NOBODY: u64 = u64::MAX;

/// An io_uring that owns everything its operations point at.
pub struct Ring {
    uring: IoUring,
    slots: Vec<Option<Pinned>>,
    free: Vec<usize>,
    backlog: VecDeque<squeue::Entry>,
    unsubmitted: bool,
}

impl Ring {
    /// Sets up a ring for the calling thread, which alone may use it.
    pub fn new(entries: u32) -> io::Result<Self> {
        let tuned = IoUring::builder().setup_single_issuer().setup_coop_taskrun().build(entries);
        // Kernels before 6.0 know neither flag.
        let uring = tuned.or_else(|_| IoUring::new(entries))?;
        Ok(Self { uring, slots: Vec::new(), free: Vec::new(), backlog: VecDeque::new(), unsubmitted: false })
    }

    /// Queues an operation; it reaches the kernel with the next [`Ring::submit`] or [`Ring::wait`].
    ///
    /// `owner` comes back in the completion, and names a poll to end in [`Op::Unpoll`]'s place.
    pub fn push(&mut self, owner: u64, op: Op) {
        match op {
            Op::Read { file, buffers, offset, .. } => {
                let (fd, pieces, count) = Self::vectored(&file, &buffers);
                let entry = opcode::Readv::new(fd, pieces, count).offset(offset).build();
                self.pin_and_queue(owner, entry, Some(buffers), file, true, false);
            }
            Op::Write { file, buffers, offset, .. } => {
                let (fd, pieces, count) = Self::vectored(&file, &buffers);
                let entry = opcode::Writev::new(fd, pieces, count).offset(offset).build();
                self.pin_and_queue(owner, entry, Some(buffers), file, true, false);
            }
            Op::Sync { file, .. } => {
                let fd = types::Fd(file.as_raw_fd());
                let entry = opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build();
                self.pin_and_queue(owner, entry, None, file, true, false);
            }
            Op::Allocate { file, mode, offset, len, .. } => {
                let fd = types::Fd(file.as_raw_fd());
                let entry = opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build();
                self.pin_and_queue(owner, entry, None, file, true, false);
            }
            Op::Poll { fd, events, multi, .. } => {
                let mask = u32::from(events.cast_unsigned());
                let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), mask).multi(multi).build();
                self.pin_and_queue(owner, entry, None, fd, false, true);
            }
            Op::Unpoll { .. } => self.unpoll(owner),
        }
    }

    fn vectored(file: &Arc<File>, buffers: &GuestBuffers) -> (types::Fd, *const libc::iovec, u32) {
        (types::Fd(file.as_raw_fd()), buffers.pieces.as_ptr(), buffers.piece_count().cast_unsigned())
    }

    fn pin_and_queue(
        &mut self,
        owner: u64,
        entry: squeue::Entry,
        buffers: Option<GuestBuffers>,
        file: Pollable,
        moves_data: bool,
        polls: bool,
    ) {
        let pinned = Pinned { owner, buffers, moves_data, polls, _file: Some(file) };
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        // Moving `buffers` moves the Vec's handle, not the pieces on the heap that `entry` points at.
        self.slots[slot] = Some(pinned);
        self.queue(entry.user_data(slot as u64));
    }

    fn unpoll(&mut self, owner: u64) {
        let same = |pinned: &Pinned| pinned.polls && pinned.owner == owner;
        let armed: Vec<usize> =
            (0..self.slots.len()).filter(|&slot| self.slots[slot].as_ref().is_some_and(same)).collect();
        for slot in armed {
            self.queue(opcode::PollRemove::new(slot as u64).build().user_data(NOBODY));
        }
    }

    fn queue(&mut self, entry: squeue::Entry) {
        self.unsubmitted = true;
        if !self.backlog.is_empty() || !self.try_queue(&entry) {
            self.backlog.push_back(entry);
        }
    }

    fn try_queue(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what `entry` points at is pinned in `slots` until its completion (invariant 2);
        // entries without a slot (PollRemove) point at nothing.
        unsafe { self.uring.submission().push(entry).is_ok() }
    }

    fn refill(&mut self) {
        while let Some(entry) = self.backlog.pop_front() {
            if !self.try_queue(&entry) {
                self.backlog.push_front(entry);
                break;
            }
        }
    }

    /// Hands queued operations to the kernel without waiting.
    pub fn submit(&mut self) -> io::Result<()> {
        if !self.unsubmitted {
            return Ok(());
        }
        self.enter(0)
    }

    /// Hands queued operations to the kernel and waits for at least one completion.
    pub fn wait(&mut self) -> io::Result<()> {
        self.enter(1)
    }

    fn enter(&mut self, want: usize) -> io::Result<()> {
        loop {
            self.refill();
            let overfull = !self.backlog.is_empty();
            match self.uring.submit_and_wait(if overfull { 0 } else { want }) {
                Ok(_) if overfull => {}
                Ok(_) => {
                    self.unsubmitted = false;
                    return Ok(());
                }
                Err(error) => match error.raw_os_error() {
                    Some(libc::EINTR) => {}
                    // The completion queue is full: the caller drains it and comes again.
                    Some(libc::EBUSY | libc::EAGAIN) => return Ok(()),
                    _ => return Err(error),
                },
            }
        }
    }

    /// Takes all completions that have arrived.
    pub fn drain(&mut self, out: &mut Vec<Completion>) {
        let Self { uring, slots, free, .. } = self;
        for entry in uring.completion() {
            let Ok(slot) = usize::try_from(entry.user_data()) else {
                continue;
            };
            let Some(place) = slots.get_mut(slot) else {
                continue;
            };
            let more = cqueue::more(entry.flags());
            if more {
                if let Some(pinned) = place {
                    out.push(Completion { owner: pinned.owner, result: entry.result(), more, buffers: None });
                }
            } else if let Some(pinned) = place.take() {
                free.push(slot);
                out.push(Completion {
                    owner: pinned.owner,
                    result: entry.result(),
                    more,
                    buffers: pinned.buffers,
                });
            }
        }
    }

    /// Operations that may still move data.
    #[must_use]
    pub fn moving(&self) -> usize {
        self.slots.iter().flatten().filter(|pinned| pinned.moves_data).count()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let mut completions = Vec::new();
        while self.moving() > 0 {
            if self.wait().is_err() {
                // The kernel may still write into guest memory: leak what it points at rather
                // than let go of it (invariants 1 and 2).
                for pinned in self.slots.drain(..).flatten() {
                    Box::leak(Box::new(pinned));
                }
                return;
            }
            self.drain(&mut completions);
        }
    }
}
