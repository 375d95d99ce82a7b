//! A program for the guest (and, to compare with, the host): do vector registers survive?
//!
//! `registers switch N` starts a second process; each fills all vector registers with its own pattern, gives
//! up the CPU with the registers live, and looks at them again, N times. It prints `switches mismatches`,
//! summed over both. `registers work` prints a checksum of vectorised arithmetic.
//!
//! Built by the tests with rustc alone, as one static file.

use std::arch::{asm, is_x86_feature_detected};

/// 32 registers of 64 bytes, aligned as the aligned moves want.
#[repr(C, align(64))]
struct Registers([[u8; 64]; 32]);

const fn filled(byte: u8) -> Registers {
    Registers([[byte; 64]; 32])
}

impl Registers {
    /// A pattern that differs by process, register and byte.
    fn pattern(seed: u8) -> Self {
        let mut all = filled(0);
        for (r, register) in all.0.iter_mut().enumerate() {
            for (b, byte) in register.iter_mut().enumerate() {
                *byte = seed.wrapping_mul(31).wrapping_add((r * 64 + b) as u8).rotate_left(seed.into());
            }
        }
        all
    }
}

/// Loads the registers, calls `sched_yield` with them live, and stores them, in one asm block so that the
/// compiler cannot touch a vector register in between.
macro_rules! across_a_switch {
    ($name:ident, $feature:literal, $mov:literal, $reg:literal, [$($n:literal $xmm:tt)*]) => {
        #[target_feature(enable = $feature)]
        unsafe fn $name(before: &Registers, after: &mut Registers) {
            // SAFETY: `target_feature` makes the caller vouch for the instructions; `Registers` is aligned
            // and large enough for every move; SYSCALL clobbers RCX and R11 alone.
            unsafe {
                asm!(
                    $(concat!($mov, " ", $reg, $n, ", [{before} + 64*", $n, "]"),)*
                    "syscall",
                    $(concat!($mov, " [{after} + 64*", $n, "], ", $reg, $n),)*
                    before = in(reg) before,
                    after = in(reg) after,
                    inout("rax") 24_u64 => _,
                    out("rcx") _, out("r11") _,
                    $(out($xmm) _,)*
                    options(nostack),
                );
            }
        }
    };
}

across_a_switch!(with_ymm, "avx", "vmovdqa", "ymm", [
    "0" "xmm0" "1" "xmm1" "2" "xmm2" "3" "xmm3" "4" "xmm4" "5" "xmm5" "6" "xmm6" "7" "xmm7"
    "8" "xmm8" "9" "xmm9" "10" "xmm10" "11" "xmm11" "12" "xmm12" "13" "xmm13" "14" "xmm14" "15" "xmm15"
]);
across_a_switch!(with_zmm, "avx512f", "vmovdqa64", "zmm", [
    "0" "xmm0" "1" "xmm1" "2" "xmm2" "3" "xmm3" "4" "xmm4" "5" "xmm5" "6" "xmm6" "7" "xmm7"
    "8" "xmm8" "9" "xmm9" "10" "xmm10" "11" "xmm11" "12" "xmm12" "13" "xmm13" "14" "xmm14" "15" "xmm15"
    "16" "xmm16" "17" "xmm17" "18" "xmm18" "19" "xmm19" "20" "xmm20" "21" "xmm21" "22" "xmm22" "23" "xmm23"
    "24" "xmm24" "25" "xmm25" "26" "xmm26" "27" "xmm27" "28" "xmm28" "29" "xmm29" "30" "xmm30" "31" "xmm31"
]);

/// (registers, bytes each) that this CPU offers a program.
fn width() -> (usize, usize) {
    if is_x86_feature_detected!("avx512f") { (32, 64) } else { (16, 32) }
}

/// `sched_setaffinity` of this process and its children to CPU 0.
fn run_on_the_first_cpu() {
    let mask = 1_u64;
    // SAFETY: the call reads 8 bytes at `mask`; SYSCALL clobbers RCX and R11 alone.
    unsafe {
        asm!("syscall", inout("rax") 203_u64 => _, in("rdi") 0, in("rsi") 8, in("rdx") &raw const mask,
            out("rcx") _, out("r11") _, options(nostack));
    }
}

/// Gives up after so many yields for each switch asked for: the other process is gone then.
const MOST_YIELDS_A_SWITCH: u32 = 50;

fn stress(seed: u8, rounds: u32) -> (u64, u64) {
    let before = Registers::pattern(seed);
    let mut after = filled(0);
    let (count, bytes) = width();
    let mut mismatches = 0;
    // A yield is a switch only while the other process runs too, so it is switches that are counted.
    for round in 0..rounds.saturating_mul(MOST_YIELDS_A_SWITCH) {
        if round % 64 == 0 && switches() >= u64::from(rounds) {
            break;
        }
        // SAFETY: the CPU has the feature (checked above); both buffers are aligned and large enough.
        unsafe {
            if bytes == 64 { with_zmm(&before, &mut after) } else { with_ymm(&before, &mut after) }
        }
        let same = (0..count).all(|r| before.0[r][..bytes] == after.0[r][..bytes]);
        mismatches += u64::from(!same);
    }
    (switches(), mismatches)
}

/// Context switches of this process so far, from the kernel.
fn switches() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .filter(|l| l.contains("ctxt_switches"))
        .filter_map(|l| l.split_whitespace().last()?.parse::<u64>().ok())
        .sum()
}

fn work() -> u64 {
    #[target_feature(enable = "avx2,fma")]
    unsafe fn vectorised(data: &mut [f32]) {
        for round in 1..64_u32 {
            let factor = 1.0 + 1.0 / round as f32;
            for (i, x) in data.iter_mut().enumerate() {
                *x = x.mul_add(factor, (i as f32).sqrt()) * 0.5;
            }
        }
    }
    let mut data: Vec<f32> = (0..40_000).map(|i| (i % 977) as f32 * 0.25).collect();
    // SAFETY: the caller checked for AVX2 and FMA.
    unsafe { vectorised(&mut data) };
    data.iter().fold(0xcbf2_9ce4_8422_2325, |hash, x| (hash ^ u64::from(x.to_bits())).wrapping_mul(0x100_0000_01b3))
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let rounds = args.get(2).and_then(|n| n.parse().ok()).unwrap_or(1);
    match args.get(1).map(String::as_str) {
        Some("switch") => {
            // Both processes on one CPU, so that each yield is a switch to the other.
            run_on_the_first_cpu();
            let mut other = std::process::Command::new(&args[0])
                .args(["half", &rounds.to_string()])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .expect("start the second process");
            let (switches, mismatches) = stress(1, rounds);
            let mut text = String::new();
            std::io::Read::read_to_string(&mut other.stdout.take().expect("piped"), &mut text).expect("read");
            other.wait().expect("wait");
            let theirs: Vec<u64> = text.split_whitespace().filter_map(|n| n.parse().ok()).collect();
            println!("{} {}", switches + theirs[0], mismatches + theirs[1]);
        }
        Some("half") => {
            let (switches, mismatches) = stress(2, rounds);
            println!("{switches} {mismatches}");
        }
        Some("work") if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") => {
            println!("{:016x}", work());
        }
        _ => println!("usage: registers switch N | work"),
    }
}
