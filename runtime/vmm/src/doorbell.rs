//! The bulk-memory doorbell: on software KVM a guest kernel asks the VMM to copy and fill its memory, because
//! its own string instructions are emulated turn by turn (0.5 to 2 us for 8 bytes; the VMM moves 10 GB/s).
//!
//! The guest executes `out dx, eax` with DX = [`PORT`], EAX = the operation, RDI and RSI linear addresses,
//! RCX a length; on return RCX holds the bytes *not* done, and the guest's ordinary path does those. A
//! hostile guest can ask for anything: what is touched is what its own page tables map, checked page by page
//! as the processor would check a supervisor access, and never anything but its RAM; one call moves at most
//! [`MAX_BYTES`], so that it takes well under a millisecond.
//!
//! Page tables may change under another vCPU meanwhile. That is no worse than on a processor: the guest frees
//! a page after every CPU has acknowledged a TLB shootdown, and this vCPU acknowledges nothing before its
//! `out` is complete. KVM marks a vCPU preempted, so that a paravirtual shootdown would pass over it, only at
//! an instruction boundary, never inside an I/O exit.
//!
//! Pure over guest memory and a vCPU's state; no KVM here.

use crate::assist::{Access, CpuState, HostCpu, Paging};
use crate::memory::GuestMemory;
use crate::sys::fill::fill;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// The I/O port, in a range that no PC device has.
pub const PORT: u16 = 0x6b0;
/// Most bytes of one call: a few huge pages, under half a millisecond.
pub const MAX_BYTES: u64 = 4 << 20;

/// Most pieces of one call. A piece ends where a page does on either side, so that this is never reached; it
/// is here so that no page tables, however they change meanwhile, can make a call longer.
const MAX_PIECES: u64 = 2 * (MAX_BYTES / 4096 + 1);

/// Copies RCX bytes from RSI to RDI, which must not overlap.
const COPY: u32 = 1;
/// Fills RCX bytes at RDI with RSI's lowest byte.
const FILL: u32 = 2;

/// How often the doorbell was rung, and for how much.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Counters {
    /// Calls.
    pub calls: u64,
    /// Bytes copied.
    pub copied_bytes: u64,
    /// Bytes filled.
    pub filled_bytes: u64,
    /// Calls that stopped before their end, at a page that would fault.
    pub partial: u64,
}

impl Counters {
    /// Adds another count to this one.
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.copied_bytes += other.copied_bytes;
        self.filled_bytes += other.filled_bytes;
        self.partial += other.partial;
    }
}

/// Answers one call: does the work and leaves in RCX what was not done. An unknown operation does nothing.
pub fn ring(
    cpu: &mut dyn CpuState,
    host: &HostCpu,
    mem: &GuestMemory,
    operation: u32,
    counters: &mut Counters,
) {
    let (to, from, len) = {
        let regs = cpu.regs();
        (regs.rdi, regs.rsi, regs.rcx)
    };
    counters.calls += 1;
    let Ok(paging) = Paging::new(cpu, host, mem) else {
        return;
    };
    let most = len.min(MAX_BYTES);
    let done = match operation {
        COPY => {
            let done = pieces(most, |at| copy_piece(&paging, mem, to, from, at, most - at));
            counters.copied_bytes += done;
            done
        }
        FILL => {
            let byte = from.to_le_bytes()[0];
            let done = pieces(most, |at| fill_piece(&paging, mem, to, byte, at, most - at));
            counters.filled_bytes += done;
            done
        }
        _ => 0,
    };
    counters.partial += u64::from(done < len);
    cpu.regs_mut().rcx = len - done;
}

/// Calls `piece` with the bytes done so far until it does none or all are done.
fn pieces(len: u64, mut piece: impl FnMut(u64) -> u64) -> u64 {
    let mut done = 0;
    for _ in 0..MAX_PIECES {
        match if done < len { piece(done) } else { 0 } {
            0 => break,
            n => done += n,
        }
    }
    done
}

fn copy_piece(paging: &Paging<'_>, mem: &GuestMemory, to: u64, from: u64, at: u64, left: u64) -> u64 {
    let source = paging.reach(from.wrapping_add(at), Access::Read);
    let Some((source, source_bytes)) = source else {
        return 0;
    };
    let Some((target, target_bytes)) = paging.reach(to.wrapping_add(at), Access::Write) else {
        return 0;
    };
    let len = left.min(source_bytes).min(target_bytes) as usize;
    let slice = |gpa| mem.get_slice(GuestAddress(gpa), len).ok();
    let (Some(source), Some(target)) = (slice(source), slice(target)) else {
        return 0;
    };
    source.copy_to_volatile_slice(target);
    len as u64
}

fn fill_piece(paging: &Paging<'_>, mem: &GuestMemory, to: u64, byte: u8, at: u64, left: u64) -> u64 {
    match paging.reach(to.wrapping_add(at), Access::Write) {
        Some((gpa, bytes)) if fill(mem, gpa, byte, left.min(bytes) as usize) => left.min(bytes),
        _ => 0,
    }
}

#[cfg(test)]
mod tests;
