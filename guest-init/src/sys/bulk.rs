//! A bulk stream: the VMM moves bytes between this process's memory and a socket of the host, and the kernel has
//! nothing to do with it.

use core::arch::asm;
use core::ptr;

use guest_init::{BULK_FAULT, BULK_NONE, BULK_RECEIVE, BULK_SEND, BULK_WAIT, GATE_REGISTER};
use libc::timespec;

use super::Errno;
use super::gate::{map, physical_memory};
use super::raw::syscall;

const PAGE_BYTES: usize = 4096;

/// See the module's text.
pub(crate) struct Bulk {
    page: usize,
    stream: u64,
}

/// What came of asking the VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moved {
    /// So many bytes; none is the end of what there is to receive.
    Bytes(usize),
    /// Nothing at present.
    Wait,
    /// The other side is not there: not yet, or not any more.
    None,
}

impl Bulk {
    /// Maps the registers; fails without /dev/mem.
    pub(crate) fn open(stream: u64) -> Result<Bulk, Errno> {
        let page = map(&physical_memory()?, PAGE_BYTES, libc::PROT_READ, GATE_REGISTER)?;
        Ok(Bulk { page, stream })
    }

    /// Receives what there is.
    pub(crate) fn receive(&self, into: &mut [u8]) -> Moved {
        let (at, len) = (into.as_mut_ptr() as usize, into.len());
        // SAFETY: the VMM writes to no more than `into`, which is borrowed for that.
        moved(|| unsafe { self.read(BULK_RECEIVE, at, len) }, || touch(into))
    }

    /// Sends what there is room for.
    pub(crate) fn send(&self, from: &mut [u8]) -> Moved {
        let (at, len) = (from.as_mut_ptr() as usize, from.len());
        // SAFETY: the VMM reads no more than `from`.
        moved(|| unsafe { self.read(BULK_SEND, at, len) }, || touch(from))
    }

    /// Says that it was all.
    pub(crate) fn end(&self) {
        // SAFETY: no bytes are moved.
        unsafe { self.read(BULK_SEND, 0, 0) };
    }

    /// Reads a register with what it looks for in RDI, RSI and RDX.
    ///
    /// # Safety
    ///
    /// If `register` is the one that receives, nothing else may use the `len` bytes at `at`.
    unsafe fn read(&self, register: u64, at: usize, len: usize) -> u32 {
        let register = self.page + (register - GATE_REGISTER) as usize;
        let value: u32;
        // SAFETY: `page` is mapped for ever, and both registers lie in it; for the rest by this function's contract.
        // The compiler takes it that any memory may have changed.
        unsafe {
            asm!("mov {value:e}, [{register}]", register = in(reg) register, value = lateout(reg) value,
                in("rdi") at, in("rsi") len, in("rdx") self.stream, options(nostack, preserves_flags));
        }
        value
    }
}

fn moved(mut ask: impl FnMut() -> u32, mut touch: impl FnMut()) -> Moved {
    loop {
        match ask() {
            BULK_WAIT => return Moved::Wait,
            BULK_NONE => return Moved::None,
            // The kernel has taken the first page away, or not given it yet.
            BULK_FAULT => touch(),
            bytes => return Moved::Bytes(bytes as usize),
        }
    }
}

/// Has the kernel give this process its memory, page by page.
fn touch(bytes: &mut [u8]) {
    for byte in bytes.iter_mut().step_by(PAGE_BYTES) {
        let byte = ptr::from_mut(byte);
        // SAFETY: one byte that is borrowed here; it keeps its value.
        unsafe { ptr::write_volatile(byte, ptr::read_volatile(byte)) };
    }
}

/// Sleeps.
pub(crate) fn nap(ms: u32) {
    let time = timespec { tv_sec: i64::from(ms / 1000), tv_nsec: i64::from(ms % 1000) * 1_000_000 };
    let at = ptr::from_ref(&time) as usize;
    // SAFETY: the kernel reads one timespec. A signal may end the sleep early, which is as good.
    let _ = unsafe { syscall(libc::SYS_nanosleep, [at, 0, 0, 0, 0, 0]) };
}
