//! This machine's processor: runs bytes with all registers as they are given, and says what has come of it.
//!
//! ```text
//!   control page (entry and exit code, registers)   code pages, writable and executable
//!   data: [nothing][writable x 3][read only][nothing]
//! ```
//!
//! Both lie below 2 GiB, so that code reaches them by absolute addresses when no register is free. A fault of the
//! bytes goes through a signal handler to the exit code, as if the bytes had ended there.
#![allow(unsafe_code)]

use std::ptr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

pub(super) const PAGE: u64 = 4096;
pub(super) const CODE_PAGES: u64 = 2;
/// Pages of data that can be written.
pub(super) const WRITABLE_PAGES: u64 = 3;
/// The base of GS while the bytes run.
pub(super) const GS_BASE: u64 = 0x1234_5000;

const DATA_PAGES: u64 = WRITABLE_PAGES + 3;
const STACK_BYTES: usize = 1 << 16;
const ARCH_SET_GS: i32 = 0x1001;

// In the control page.
const IN: u64 = 0;
const FLAGS_IN: u64 = 0x80;
const TARGET: u64 = 0x88;
const HOST_STACK: u64 = 0x90;
const MARKER: u64 = 0x98;
const FAULT: u64 = 0xa0;
const OUT: u64 = 0x100;
const FLAGS_OUT: u64 = 0x180;
const ENTRY: u64 = 0x400;
const EXIT: u64 = 0x800;

/// Where the control page is, for the signal handler.
static BASE: AtomicU64 = AtomicU64::new(0);

/// General registers by number, and flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub(super) registers: [u64; 16],
    pub(super) flags: u64,
}

/// How a run has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// At the landing of this number.
    Landed(u64),
    /// With an exception.
    Trap { vector: u8, code: u64, linear: u64 },
}

/// See the module's text.
pub(super) struct Native {
    base: u64,
    data: u64,
}

impl Native {
    /// The one there is: what its code uses cannot be used twice at a time.
    pub(super) fn lock() -> MutexGuard<'static, Self> {
        static ONE: OnceLock<Mutex<Native>> = OnceLock::new();
        let guard =
            ONE.get_or_init(|| Mutex::new(Self::new())).lock().unwrap_or_else(PoisonError::into_inner);
        guard.prepare_thread();
        guard
    }

    fn new() -> Self {
        let base = map((1 + CODE_PAGES) * PAGE, libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC);
        let data = map(DATA_PAGES * PAGE, libc::PROT_READ | libc::PROT_WRITE);
        let native = Self { base, data };
        for page in 0..DATA_PAGES {
            let allowed = match page {
                0 => libc::PROT_NONE,
                p if p == DATA_PAGES - 1 => libc::PROT_NONE,
                p if p == DATA_PAGES - 2 => libc::PROT_READ,
                _ => libc::PROT_READ | libc::PROT_WRITE,
            };
            // SAFETY: the pages are ours; they are written so that they are there, and are protected then.
            unsafe {
                let at = (data + page * PAGE) as *mut u8;
                ptr::write_bytes(at, page as u8, PAGE as usize);
                assert_eq!(libc::mprotect(at.cast(), PAGE as usize, allowed), 0);
            }
        }
        native.write_stubs();
        native.catch_signals();
        BASE.store(base, Ordering::SeqCst);
        native
    }

    /// Where code may be put: the address of [`CODE_PAGES`] pages.
    pub(super) fn code(&self) -> u64 {
        self.base + PAGE
    }

    /// The first writable byte of data.
    pub(super) fn data(&self) -> u64 {
        self.data + PAGE
    }

    /// The writable pages of data.
    pub(super) fn memory(&mut self) -> &mut [u8] {
        // SAFETY: so many bytes are mapped for good, and nobody else has a reference: `self` is borrowed.
        unsafe { std::slice::from_raw_parts_mut(self.data() as *mut u8, (WRITABLE_PAGES * PAGE) as usize) }
    }

    /// Puts code somewhere in its pages.
    pub(super) fn write_code(&mut self, at: u64, bytes: &[u8]) {
        let within = at.checked_sub(self.code()).unwrap();
        assert!(within + bytes.len() as u64 <= CODE_PAGES * PAGE);
        // SAFETY: inside the code pages, checked above; nothing there runs while `self` is borrowed.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), at as *mut u8, bytes.len()) };
    }

    /// Code that ends a run with [`Outcome::Landed`]; 16 bytes.
    pub(super) fn landing(&self, at: u64, number: u32) -> Vec<u8> {
        let mut code = vec![0xc7, 0x04, 0x25];
        code.extend(((self.base + MARKER) as u32).to_le_bytes());
        code.extend(number.to_le_bytes());
        code.push(0xe9);
        code.extend(((self.base + EXIT).wrapping_sub(at + 16) as u32).to_le_bytes());
        code
    }

    /// Runs the code at an address.
    pub(super) fn run(&mut self, at: u64, state: &State) -> (Outcome, State) {
        for (number, value) in (0..).zip(state.registers) {
            self.set(IN + 8 * number, value);
        }
        self.set(FLAGS_IN, state.flags);
        self.set(TARGET, at);
        self.set(FAULT, u64::MAX);
        // SAFETY: the entry code keeps to the ABI: it saves what the caller owns and the exit code puts it back. The
        // bytes under test reach memory through registers that their test points into the data pages; other accesses
        // fault, and faults lead to the exit code.
        unsafe {
            let entry: extern "sysv64" fn() = std::mem::transmute((self.base + ENTRY) as *const u8);
            entry();
        }
        let mut after = State { registers: [0; 16], flags: self.get(FLAGS_OUT) };
        for (number, value) in (0..).zip(&mut after.registers) {
            *value = self.get(OUT + 8 * number);
        }
        let outcome = match self.get(FAULT) {
            u64::MAX => Outcome::Landed(self.get(MARKER)),
            vector => Outcome::Trap {
                vector: vector as u8,
                code: self.get(FAULT + 8),
                linear: if vector == 14 { self.get(FAULT + 16) } else { 0 },
            },
        };
        (outcome, after)
    }

    fn set(&mut self, offset: u64, value: u64) {
        // SAFETY: in the control page, which is mapped for good.
        unsafe { ((self.base + offset) as *mut u64).write_volatile(value) };
    }

    fn get(&self, offset: u64) -> u64 {
        // SAFETY: as in `set`.
        unsafe { ((self.base + offset) as *const u64).read_volatile() }
    }

    /// One instruction on a quadword of the control page at an absolute address, given its bytes before that.
    fn absolute(&self, code: &mut Vec<u8>, bytes: &[u8], offset: u64) {
        code.extend(bytes);
        code.push(0x25);
        code.extend(((self.base + offset) as u32).to_le_bytes());
    }

    fn write_stubs(&self) {
        const STACK_POINTER: u8 = 4;
        let modrm = |number: u8| 0x04 | (number & 7) << 3;
        let rex = |number: u8| 0x48 | (number >> 3) << 2;
        // push rbx, rbp, r12 to r15
        let mut entry = vec![0x53, 0x55, 0x41, 0x54, 0x41, 0x55, 0x41, 0x56, 0x41, 0x57];
        self.absolute(&mut entry, &[0x48, 0x89, modrm(STACK_POINTER)], HOST_STACK);
        self.absolute(&mut entry, &[0xff, 0x34], FLAGS_IN);
        entry.push(0x9d);
        let mut exit = Vec::new();
        for number in 0..16 {
            let offset = 8 * u64::from(number);
            self.absolute(&mut entry, &[rex(number), 0x8b, modrm(number)], IN + offset);
            self.absolute(&mut exit, &[rex(number), 0x89, modrm(number)], OUT + offset);
        }
        self.absolute(&mut entry, &[0xff, 0x24], TARGET);
        self.absolute(&mut exit, &[0x48, 0x8b, modrm(STACK_POINTER)], HOST_STACK);
        exit.push(0x9c);
        self.absolute(&mut exit, &[0x8f, 0x04], FLAGS_OUT);
        // cld; pop r15 to r12, rbp, rbx; ret
        exit.extend([0xfc, 0x41, 0x5f, 0x41, 0x5e, 0x41, 0x5d, 0x41, 0x5c, 0x5d, 0x5b, 0xc3]);
        for (offset, code) in [(ENTRY, entry), (EXIT, exit)] {
            // SAFETY: in the control page; nothing runs there yet.
            unsafe { ptr::copy_nonoverlapping(code.as_ptr(), (self.base + offset) as *mut u8, code.len()) };
        }
    }

    fn catch_signals(&self) {
        // SAFETY: the action is fully initialised, its handler changes nothing but the context and the control page.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
            for signal in [libc::SIGSEGV, libc::SIGFPE, libc::SIGBUS, libc::SIGILL] {
                assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
            }
        }
    }

    /// Signals on a stack of their own, for the bytes use theirs; and the base of GS, which is nobody's here.
    fn prepare_thread(&self) {
        let stack = vec![0_u8; STACK_BYTES].leak();
        // SAFETY: the stack is never freed; the base of GS is unused in 64-bit programs.
        unsafe {
            let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: STACK_BYTES };
            assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
            assert_eq!(libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE), 0);
        }
    }
}

fn map(bytes: u64, allowed: i32) -> u64 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_32BIT;
    // SAFETY: a new mapping where the kernel finds room.
    let at = unsafe { libc::mmap(ptr::null_mut(), bytes as usize, allowed, flags, -1, 0) };
    assert_ne!(at, libc::MAP_FAILED);
    at as u64
}

extern "C" fn handler(signal: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let base = BASE.load(Ordering::SeqCst);
    // SAFETY: the kernel gives a valid context to such a handler; the control page is mapped for good.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let rip = registers[libc::REG_RIP as usize] as u64;
        if base == 0 || !(base + PAGE..base + (1 + CODE_PAGES) * PAGE).contains(&rip) {
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let fault = (base + FAULT) as *mut u64;
        fault.write_volatile(registers[libc::REG_TRAPNO as usize] as u64);
        fault.add(1).write_volatile(registers[libc::REG_ERR as usize] as u64);
        fault.add(2).write_volatile(registers[libc::REG_CR2 as usize] as u64);
        registers[libc::REG_RIP as usize] = (base + EXIT) as i64;
    }
}
