//! The instructions themselves, run on this processor: what the assist's work is compared with.
//!
//! The only unsafe code of the assist, and test code.
#![allow(unsafe_code)]

use std::arch::asm;
use std::fmt;
use std::ptr;
use std::sync::Once;

/// Components these tests load with random bytes. PKRU would take away access to memory, AMX needs
/// permission from the kernel.
pub(super) const SAFE: u64 = 0xe7;
/// Bytes of the buffers below.
pub(super) const AREA_BYTES: usize = 4096;

/// An XSAVE area.
#[repr(C, align(64))]
#[derive(Clone)]
pub(super) struct Area(pub(super) [u8; AREA_BYTES]);

/// Shows what decides a test: x87 control, MXCSR, header.
impl fmt::Debug for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Area({:02x?}, header {:02x?})", &self.0[..32], &self.0[512..576])
    }
}

/// XCR0 of this process.
pub(super) fn xcr0() -> u64 {
    let (low, high): (u32, u32);
    // SAFETY: the kernel set CR4.OSXSAVE (every x86-64 host with KVM has XSAVE); no memory is touched.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack)) };
    u64::from(high) << 32 | u64::from(low)
}

/// The image of a vCPU in its initial configuration.
pub(super) fn initial_image() -> Vec<u8> {
    let mut area = Area([0; AREA_BYTES]);
    area.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    state_after(&area).0.to_vec()
}

/// The state XRSTOR64 makes of an area whose safe components are valid, as XSAVE64 writes it.
pub(super) fn state_after(load: &Area) -> Area {
    let mut dest = Area([0; AREA_BYTES]);
    let mut own = Area([0; AREA_BYTES]);
    // SAFETY: all three areas are 64-byte aligned and hold every component of SAFE; the process's
    // own state is put back before the block ends, so no register changes for the compiler.
    unsafe {
        asm!(
            "xsave64 [{own}]", "xrstor64 [{load}]", "xsave64 [{dest}]", "xrstor64 [{own}]",
            own = in(reg) &mut own, load = in(reg) load, dest = in(reg) &mut dest,
            in("eax") SAFE as u32, in("edx") 0,
        );
    }
    dest
}

macro_rules! saves {
    ($($name:ident $insn:literal;)+) => {
        $(
            #[doc = concat!("`", $insn, "` of the state `load` makes, into `dest`.")]
            pub(super) fn $name(load: &Area, dest: &mut Area, mask: u64) {
                let mut own = Area([0; AREA_BYTES]);
                // SAFETY: as in `state_after`; `mask` asks for no component outside SAFE or XCR0.
                unsafe {
                    asm!(
                        "xsave64 [{own}]",
                        "xrstor64 [{load}]",
                        "mov eax, {low:e}",
                        "mov edx, {high:e}",
                        concat!($insn, " [{dest}]"),
                        "mov eax, {safe}",
                        "xor edx, edx",
                        "xrstor64 [{own}]",
                        own = in(reg) &mut own, load = in(reg) load, dest = in(reg) dest,
                        low = in(reg) mask as u32, high = in(reg) (mask >> 32) as u32,
                        safe = const SAFE,
                        inout("eax") SAFE as u32 => _, inout("edx") 0 => _,
                    );
                }
            }
        )+
    };
}

saves! {
    xsave "xsave";
    xsave64 "xsave64";
    xsaveopt64 "xsaveopt64";
    xsavec64 "xsavec64";
    fxsave "fxsave";
    fxsave64 "fxsave64";
}

/// Marks a block whose faulting instruction the signal handler may skip.
const SKIPPABLE: u64 = 0x7065_7265_6772_696e;

macro_rules! restores {
    ($($name:ident $insn:literal;)+) => {
        $(
            #[doc = concat!("The state `", $insn, "` of `source` makes of the state `load` makes; none if it faults.")]
            pub(super) fn $name(load: &Area, source: &Area, mask: u64) -> Option<Area> {
                skip_faults();
                let mut own = Area([0; AREA_BYTES]);
                let mut dest = Area([0; AREA_BYTES]);
                let faulted: u64;
                // SAFETY: as in `state_after`. If the instruction faults, the handler installed
                // above goes on at label 2 with R13 set, with the state as it was before.
                unsafe {
                    asm!(
                        "xsave64 [{own}]",
                        "xrstor64 [{load}]",
                        "mov eax, {low:e}",
                        "mov edx, {high:e}",
                        "lea r12, [rip + 2f]",
                        "xor r13d, r13d",
                        concat!($insn, " [{source}]"),
                        "2:",
                        "mov eax, {safe}",
                        "xor edx, edx",
                        "xsave64 [{dest}]",
                        "xrstor64 [{own}]",
                        own = in(reg) &mut own, load = in(reg) load, source = in(reg) source,
                        dest = in(reg) &mut dest,
                        low = in(reg) mask as u32, high = in(reg) (mask >> 32) as u32,
                        safe = const SAFE,
                        inout("eax") SAFE as u32 => _, inout("edx") 0 => _,
                        out("r12") _, out("r13") faulted, in("r14") SKIPPABLE,
                    );
                }
                (faulted == 0).then_some(dest)
            }
        )+
    };
}

restores! {
    xrstor "xrstor";
    xrstor64 "xrstor64";
    fxrstor "fxrstor";
    fxrstor64 "fxrstor64";
}

/// Installs the handler that skips a faulting instruction of a marked block.
fn skip_faults() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the action is fully initialised; the handler is async-signal-safe (it only writes
        // to the context it is given, or restores the default action).
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = handler as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
            assert_eq!(libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()), 0);
        }
    });
}

extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid ucontext to an SA_SIGINFO handler.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        if registers[libc::REG_R14 as usize] as u64 == SKIPPABLE {
            registers[libc::REG_RIP as usize] = registers[libc::REG_R12 as usize];
            registers[libc::REG_R13 as usize] = 1;
        } else {
            libc::signal(libc::SIGSEGV, libc::SIG_DFL);
        }
    }
}

/// Runs an instruction on RAX, RBX and RCX; returns RAX and RFLAGS.
macro_rules! on_registers {
    ($($name:ident $insn:literal;)+) => {
        $(
            #[doc = concat!("RAX and RFLAGS after `", $insn, "`.")]
            pub(super) fn $name(rax: u64, rbx: u64, rcx: u64) -> (u64, u64) {
                let mut result = rax;
                let rflags: u64;
                // SAFETY: touches only the registers named and the stack (RBX is put back).
                unsafe {
                    asm!(
                        "xchg rbx, {b}",
                        "pushfq", "and qword ptr [rsp], ~0x8d5", "popfq",
                        $insn,
                        "pushfq", "pop {f}",
                        "xchg rbx, {b}",
                        b = inout(reg) rbx => _, f = out(reg) rflags,
                        inout("rax") result, inout("rcx") rcx => _,
                    );
                }
                (result, rflags)
            }
        )+
    };
}

on_registers! {
    popcnt64 "popcnt rax, rbx";
    popcnt32 "popcnt eax, ebx";
    popcnt16 "popcnt ax, bx";
    tzcnt64 "tzcnt rax, rbx";
    tzcnt32 "tzcnt eax, ebx";
    tzcnt16 "tzcnt ax, bx";
    lzcnt64 "lzcnt rax, rbx";
    lzcnt32 "lzcnt eax, ebx";
    lzcnt16 "lzcnt ax, bx";
    andn64 "andn rax, rbx, rcx";
    andn32 "andn eax, ebx, ecx";
    shlx64 "shlx rax, rbx, rcx";
    shlx32 "shlx eax, ebx, ecx";
    shrx64 "shrx rax, rbx, rcx";
    shrx32 "shrx eax, ebx, ecx";
    sarx64 "sarx rax, rbx, rcx";
    sarx32 "sarx eax, ebx, ecx";
    crc32_64 "crc32 rax, rbx";
    crc32_32 "crc32 eax, ebx";
    crc32_16 "crc32 eax, bx";
    crc32_8 "crc32 eax, bl";
    crc32_8_high "crc32 eax, bh";
}

/// RAX, RDX, RFLAGS and memory after `lock cmpxchg8b` or, if wide, `lock cmpxchg16b`.
pub(super) fn compare_exchange(
    wide: bool,
    memory: u128,
    [rax, rbx, rcx, rdx]: [u64; 4],
) -> (u64, u64, u64, u128) {
    let mut memory = memory;
    let at: *mut u128 = &mut memory;
    let (mut low, mut high) = (rax, rdx);
    let rflags: u64;
    // SAFETY: `at` is 16-byte aligned and ours; RBX is put back.
    unsafe {
        if wide {
            asm!(
                "xchg rbx, {b}", "lock cmpxchg16b [{at}]", "pushfq", "pop {f}", "xchg rbx, {b}",
                b = inout(reg) rbx => _, at = in(reg) at, f = out(reg) rflags,
                inout("rax") low, inout("rdx") high, in("rcx") rcx,
            );
        } else {
            asm!(
                "xchg rbx, {b}", "lock cmpxchg8b [{at}]", "pushfq", "pop {f}", "xchg rbx, {b}",
                b = inout(reg) rbx => _, at = in(reg) at, f = out(reg) rflags,
                inout("rax") low, inout("rdx") high, in("rcx") rcx,
            );
        }
    }
    (low, high, rflags, memory)
}
