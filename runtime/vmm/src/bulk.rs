//! Bulk streams: bytes between a socket of the host and the memory of a program in the guest, without the guest's
//! kernel.
//!
//! A program that has mapped the page of the gate's register reads one of two registers there, with a linear address, a
//! length and the stream's number in RDI, RSI and RDX (see guest-init). What is touched is what the guest's own page tables map for that
//! program, checked page by page as the processor would check an access in ring 3, and never anything but its RAM; one
//! read moves at most [`BULK_MAX_BYTES`] and waits at most [`PATIENCE`] for the socket. That page tables may change
//! under another vCPU meanwhile is no worse than on a processor, for the reason given in [`crate::doorbell`].
//!
//! No KVM here.

use crate::VmmError;
use crate::assist::{Access, CpuState, HostCpu, Paging};
use crate::event_loop::ring::{GuestBuffers, is_hung_up};
use crate::memory::GuestMemory;
use guest_init::{BULK_FAULT, BULK_MAX_BYTES, BULK_NONE, BULK_RECEIVE, BULK_SEND, BULK_WAIT};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use vm_memory::GuestAddress;

/// How long a read waits for the socket. A daemon at work has the next bytes in less, and to ask again costs the guest
/// a sleep; but the guest's interrupts wait meanwhile.
const PATIENCE: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
/// Most pieces of one read: a piece ends where a page does. It is here so that no page tables, however they change
/// meanwhile, can make a read longer.
const MAX_PIECES: usize = BULK_MAX_BYTES / 4096 + 1;

/// Most streams of a guest at once.
pub const MOST_STREAMS: usize = 16;

/// Whether this is a bulk register.
pub(crate) fn owns(address: u64) -> bool {
    matches!(address, BULK_RECEIVE | BULK_SEND)
}

/// The bulk streams of a guest, by number.
#[derive(Debug, Default)]
pub struct Streams(Mutex<BTreeMap<u64, Arc<UnixStream>>>);

impl Streams {
    /// A socket becomes a stream. Those are forgotten whose other end is closed: nobody waits for them.
    ///
    /// # Errors
    /// [`VmmError::OutOfRange`] if there are too many at once.
    pub fn attach(&self, number: u64, socket: UnixStream) -> Result<(), VmmError> {
        let mut streams = self.streams();
        streams.retain(|_, socket| !is_hung_up(&**socket));
        if streams.len() >= MOST_STREAMS {
            let (value, limit) = (streams.len() as u64 + 1, MOST_STREAMS as u64);
            return Err(VmmError::OutOfRange {
                field: "bulk streams at once",
                value,
                limit: limit.to_string(),
            });
        }
        streams.insert(number, Arc::new(socket));
        Ok(())
    }

    fn streams(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<UnixStream>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a read of the register at `address` gives.
    #[must_use]
    pub fn transfer(
        &self,
        address: u64,
        cpu: &mut dyn CpuState,
        host: &HostCpu,
        mem: &Arc<GuestMemory>,
    ) -> u32 {
        let number = cpu.regs().rdx;
        let Some(socket) = self.streams().get(&number).cloned() else {
            return BULK_NONE;
        };
        let sends = address == BULK_SEND;
        if sends && cpu.regs().rsi == 0 {
            self.streams().remove(&number);
            return 0;
        }
        let access = if sends { Access::Read } else { Access::Write };
        let Some(buffers) = reach(cpu, host, mem, access) else {
            return BULK_FAULT;
        };
        let go = || if sends { buffers.send(&*socket) } else { buffers.receive(&*socket) };
        let awaited = if sends { PollFlags::OUT } else { PollFlags::IN };
        let moved = match go() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                // Not in time, or interrupted because the guest is to stand still: it will ask again.
                match poll(&mut [PollFd::new(&*socket, awaited)], Some(&PATIENCE)) {
                    Ok(1..) => go(),
                    _ => Err(error),
                }
            }
            moved => moved,
        };
        match moved {
            // At most BULK_MAX_BYTES.
            Ok(count) => count as u32,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => BULK_WAIT,
            Err(_) => {
                self.streams().remove(&number);
                BULK_NONE
            }
        }
    }
}

/// RSI bytes at RDI, as far as the calling program may access them; `None` if that is nowhere, or nothing was asked for.
fn reach(
    cpu: &mut dyn CpuState,
    host: &HostCpu,
    mem: &Arc<GuestMemory>,
    access: Access,
) -> Option<GuestBuffers> {
    let (start, len) = (cpu.regs().rdi, cpu.regs().rsi.min(BULK_MAX_BYTES as u64));
    let paging = Paging::new(cpu, host, mem).ok()?.of_user();
    let mut ranges: Vec<(GuestAddress, u32)> = Vec::new();
    let mut done = 0;
    while done < len && ranges.len() < MAX_PIECES {
        let Some((gpa, mapped)) = paging.reach(start.wrapping_add(done), access) else { break };
        let bytes = mapped.min(len - done);
        match ranges.last_mut() {
            // Both are at most BULK_MAX_BYTES.
            Some((at, before)) if at.0 + u64::from(*before) == gpa => *before += bytes as u32,
            _ => ranges.push((GuestAddress(gpa), bytes as u32)),
        }
        done += bytes;
    }
    let buffers = GuestBuffers::new(mem, &ranges).ok()?;
    (!buffers.is_empty()).then_some(buffers)
}

#[cfg(test)]
mod tests;
