//! The instructions that enter the kernel. May be used within `sys` only.

use core::arch::asm;
use core::ffi::c_long;

use super::Errno;

/// Errors are the top page of values (Linux's `MAX_ERRNO`).
const MAX_ERRNO: isize = 4095;

/// Makes a system call.
///
/// # Safety
///
/// The arguments must be what the call `number` asks for: every pointer valid for what the kernel reads or
/// writes there, and any descriptor that the call closes not used again.
#[inline]
pub(super) unsafe fn syscall(number: c_long, arguments: [usize; 6]) -> Result<usize, Errno> {
    let [a, b, c, d, e, f] = arguments;
    let mut result = number as isize;
    // SAFETY: the x86-64 convention of Linux: it changes RAX, RCX and R11, and memory as the caller
    // of this function has vouched for.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") result,
            in("rdi") a, in("rsi") b, in("rdx") c, in("r10") d, in("r8") e, in("r9") f,
            out("rcx") _, out("r11") _,
            options(nostack),
        );
    }
    if (-MAX_ERRNO..0).contains(&result) { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}

/// Starts a child that shares this process's memory and runs `entry(argument)` on its own stack,
/// while this process waits until the child has executed a program or ended: what vfork does, but
/// without two processes returning on one stack. Returns the child's process id.
///
/// # Safety
///
/// `stack_top` must be the 16-byte aligned end of memory that nobody else uses until this returns;
/// `entry` must be sound to run while this process stands still, and to write what it writes to this
/// process's memory; `argument` must be valid for it.
pub(super) unsafe fn clone_vfork<T>(
    stack_top: *mut u8,
    entry: unsafe extern "C" fn(*mut T) -> !,
    argument: *mut T,
) -> Result<usize, Errno> {
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let mut result = libc::SYS_clone as isize;
    // SAFETY: in the parent this is an ordinary system call. The child begins at the instruction after it
    // with the same registers and an empty stack, calls `entry` as the C convention wants it (RSP 16-byte
    // aligned before the call), and never comes back from it.
    unsafe {
        asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, {argument}",
            "call {entry}",
            "ud2",
            "2:",
            argument = in(reg) argument,
            entry = in(reg) entry,
            inlateout("rax") result,
            in("rdi") flags as usize, in("rsi") stack_top,
            in("rdx") 0usize, in("r10") 0usize, in("r8") 0usize,
            out("rcx") _, out("r11") _,
        );
    }
    if (-MAX_ERRNO..0).contains(&result) { Err(Errno(-result as i32)) } else { Ok(result as usize) }
}
