//! A program that exits, and nothing else: what spawning a program costs, without what its run-time library
//! does.
//!
//! Built by the suite with rustc alone, without libc and start-up files.
#![no_std]
#![no_main]

use core::arch::asm;
use core::panic::PanicInfo;

#[unsafe(no_mangle)]
extern "C" fn _start() -> ! {
    // SAFETY: exit_group(0) does not return.
    unsafe { asm!("syscall", in("rax") 231, in("rdi") 0, options(noreturn, nostack)) }
}

#[panic_handler]
fn panic(_: &PanicInfo<'_>) -> ! {
    loop {}
}
