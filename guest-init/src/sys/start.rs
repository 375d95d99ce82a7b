//! How the agent is entered.
//!
//! As PID 1 it has its own `_start` and the few memory routines that compiled code calls, and no C
//! library. Otherwise (tests) the C library's `main` leads to the same place.

use core::ffi::{CStr, c_char};

/// The arguments that the agent was started with, without its own name.
#[derive(Clone, Copy)]
pub(crate) struct Arguments {
    left: usize,
    next: *const *const c_char,
}

impl Arguments {
    /// # Safety
    ///
    /// `argv` must have `argc` NUL-terminated strings that live for ever.
    #[cfg_attr(test, allow(dead_code))]
    unsafe fn new(argc: usize, argv: *const *const c_char) -> Arguments {
        let skip = argc.min(1);
        // SAFETY: `skip` is at most `argc`.
        Arguments { left: argc - skip, next: unsafe { argv.add(skip) } }
    }
}

impl Iterator for Arguments {
    type Item = &'static CStr;

    fn next(&mut self) -> Option<&'static CStr> {
        self.left = self.left.checked_sub(1)?;
        // SAFETY: by `new`, there are `left` strings from here on.
        unsafe {
            let argument = CStr::from_ptr(*self.next);
            self.next = self.next.add(1);
            Some(argument)
        }
    }
}

#[cfg(all(not(test), not(feature = "freestanding")))]
// SAFETY: the name is the C library's entry of a program, and this is the program.
#[unsafe(no_mangle)]
unsafe extern "C" fn main(argc: i32, argv: *const *const c_char) -> i32 {
    // SAFETY: the C library passes main's arguments as the standard says.
    crate::enter(unsafe { Arguments::new(argc as usize, argv) })
}

#[cfg(all(not(test), feature = "freestanding"))]
mod freestanding {
    use core::arch::global_asm;
    use core::ffi::c_char;
    use core::panic::PanicInfo;

    use super::Arguments;

    // The kernel enters with RSP at argc, then the pointers of argv (x86-64 psABI 3.4.1).
    // The memory routines are what rustc's output may call. They are in assembly because the compiler
    // would turn a loop written in Rust into a call of the very routine that it is in. The string
    // instructions are as fast as anything in ring 3, where the agent runs, also on software KVM.
    global_asm!(
        ".globl _start",
        "_start:",
        "xor ebp, ebp",
        "mov rdi, [rsp]",
        "lea rsi, [rsp + 8]",
        "and rsp, -16",
        "call {enter}",
        "ud2",
        ".globl memcpy",
        "memcpy:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "rep movsb",
        "ret",
        ".globl memmove",
        "memmove:",
        "mov rax, rdi",
        "mov rcx, rdx",
        "mov r8, rdi",
        "sub r8, rsi",
        "cmp r8, rdx",
        "jb 2f",
        "rep movsb",
        "ret",
        "2:",
        "lea rdi, [rdi + rdx - 1]",
        "lea rsi, [rsi + rdx - 1]",
        "std",
        "rep movsb",
        "cld",
        "ret",
        ".globl memset",
        "memset:",
        "mov r8, rdi",
        "mov eax, esi",
        "mov rcx, rdx",
        "rep stosb",
        "mov rax, r8",
        "ret",
        ".globl memcmp",
        ".globl bcmp",
        "memcmp:",
        "bcmp:",
        "mov rcx, rdx",
        "xor eax, eax",
        "cmp rcx, rcx",
        "repe cmpsb",
        "je 2f",
        "movzx eax, byte ptr [rdi - 1]",
        "movzx ecx, byte ptr [rsi - 1]",
        "sub eax, ecx",
        "2:",
        "ret",
        ".globl strlen",
        "strlen:",
        "xor eax, eax",
        "mov rcx, -1",
        "repne scasb",
        "not rcx",
        "lea rax, [rcx - 1]",
        "ret",
        enter = sym enter,
    );

    unsafe extern "C" fn enter(argc: usize, argv: *const *const c_char) -> ! {
        // SAFETY: the kernel's initial stack, which is never unmapped.
        crate::enter(unsafe { Arguments::new(argc, argv) })
    }

    #[panic_handler]
    fn panic(info: &PanicInfo<'_>) -> ! {
        // The place is enough to find it, and needs no formatting code.
        let mut text = *b"guest-init: bug at line 000000 of ";
        if let Some(place) = info.location() {
            let mut line = place.line();
            for digit in text[24..30].iter_mut().rev() {
                *digit = b'0' + (line % 10) as u8;
                line /= 10;
            }
            crate::sys::report_fatal(&text);
            crate::sys::report_fatal(place.file().as_bytes());
        }
        crate::sys::exit(101)
    }
}
