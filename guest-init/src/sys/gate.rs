//! The gate: a register page of the VMM and a page range of the guest's own memory, both mapped into this
//! process, so that a frozen guest gets its first request without an interrupt and without its kernel.

use core::ffi::c_int;
use core::ptr;

use guest_init::{GATE_FREEZE, GATE_MAILBOX, GATE_MAILBOX_BYTES, GATE_REGISTER, GATE_TAKEN};

use super::raw::syscall;
use super::{Errno, Fd};

/// See the module's text.
#[derive(Clone, Copy)]
pub(crate) struct Gate {
    register: *mut u32,
    mailbox: *const u8,
}

/// The machine's memory and registers, by physical address.
pub(super) fn physical_memory() -> Result<Fd, Errno> {
    Fd::open(c"/dev/mem", libc::O_RDWR)
}

/// Maps a part of it, for ever.
pub(super) fn map(memory: &Fd, bytes: usize, protection: c_int, at: u64) -> Result<usize, Errno> {
    let (shared, file) = (libc::MAP_SHARED as usize, memory.raw());
    // SAFETY: a new mapping at an address of the kernel's choice takes nothing away from anybody.
    unsafe { syscall(libc::SYS_mmap, [0, bytes, protection as usize, shared, file, at as usize]) }
}

impl Gate {
    /// Maps register and mailbox; fails on a kernel without /dev/mem.
    pub(crate) fn open() -> Result<Gate, Errno> {
        let memory = physical_memory()?;
        let register = map(&memory, 4096, libc::PROT_READ | libc::PROT_WRITE, GATE_REGISTER)?;
        let mailbox = map(&memory, GATE_MAILBOX_BYTES, libc::PROT_READ, GATE_MAILBOX)?;
        Ok(Gate { register: register as *mut u32, mailbox: mailbox as *const u8 })
    }

    /// Stands still until the host lets the guest go on: this instruction is where clones of it begin. Then
    /// copies what the host has left for it to `into` and says how much that is.
    pub(crate) fn freeze(self, into: &mut [u8]) -> usize {
        // SAFETY: register page and mailbox are mapped for ever. Each access to the register is one exit to the
        // VMM, which may keep the guest in the second for long: what is touched before that need not be
        // mapped, or copied, after it.
        let len = unsafe {
            ptr::write_volatile(self.register, GATE_FREEZE);
            let first = ptr::read_volatile(self.mailbox);
            if let Some(byte) = into.first_mut() {
                ptr::write_volatile(byte, first);
            }
            ptr::read_volatile(self.register)
        };
        let len = (len as usize).min(into.len()).min(GATE_MAILBOX_BYTES);
        for (at, byte) in into[..len].iter_mut().enumerate() {
            // SAFETY: inside the mailbox, which is mapped for ever; only the VMM writes it, while the guest
            // stands still.
            *byte = unsafe { ptr::read_volatile(self.mailbox.add(at)) };
        }
        // SAFETY: as above.
        unsafe { ptr::write_volatile(self.register, GATE_TAKEN) };
        len
    }
}
