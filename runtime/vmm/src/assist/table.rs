//! Which instruction is done by which function, and how often each was.

use std::fmt;

use iced_x86::Mnemonic;

use super::step::{Step, Stop};
use super::{descriptor, fxsave, integer, system, xsave};

/// Does one instruction's work; the caller then moves RIP past it.
type Run = fn(&mut Step<'_>) -> Result<(), Stop>;

/// Builds [`Op`] and the table: one line is an op, its printed name, what does it, and the
/// mnemonics that count as it.
macro_rules! instructions {
    ($($op:ident $name:literal $run:path: $($mnemonic:ident),+;)+) => {
        /// An instruction the assist does, as it is counted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(usize)]
        pub enum Op {
            $(#[doc = $name] $op,)+
        }

        impl Op {
            /// Every op.
            pub const ALL: &[Op] = &[$(Op::$op),+];

            /// The name it is printed with.
            pub fn name(self) -> &'static str {
                match self {
                    $(Op::$op => $name,)+
                }
            }
        }

        pub(super) fn find(mnemonic: Mnemonic) -> Option<(Op, Run)> {
            Some(match mnemonic {
                $($(Mnemonic::$mnemonic)|+ => (Op::$op, $run),)+
                _ => return None,
            })
        }
    };
}

instructions! {
    Xsave "xsave" xsave::xsave: Xsave, Xsave64;
    Xsaveopt "xsaveopt" xsave::xsaveopt: Xsaveopt, Xsaveopt64;
    Xsavec "xsavec" xsave::xsavec: Xsavec, Xsavec64;
    Xsaves "xsaves" xsave::xsaves: Xsaves, Xsaves64;
    Xrstor "xrstor" xsave::xrstor: Xrstor, Xrstor64;
    Xrstors "xrstors" xsave::xrstors: Xrstors, Xrstors64;
    Fxsave "fxsave" fxsave::fxsave: Fxsave, Fxsave64;
    Fxrstor "fxrstor" fxsave::fxrstor: Fxrstor, Fxrstor64;
    Ldmxcsr "ldmxcsr" fxsave::ldmxcsr: Ldmxcsr;
    Stmxcsr "stmxcsr" fxsave::stmxcsr: Stmxcsr;
    Wait "fwait" fxsave::wait: Wait;
    Popcnt "popcnt" integer::popcnt: Popcnt;
    Tzcnt "tzcnt" integer::tzcnt: Tzcnt;
    Lzcnt "lzcnt" integer::lzcnt: Lzcnt;
    Andn "andn" integer::andn: Andn;
    Shlx "shlx" integer::shlx: Shlx;
    Shrx "shrx" integer::shrx: Shrx;
    Sarx "sarx" integer::sarx: Sarx;
    Movbe "movbe" integer::movbe: Movbe;
    Crc32 "crc32" integer::crc32: Crc32;
    Random "rdrand" integer::random: Rdrand, Rdseed;
    Cmpxchg8b "cmpxchg8b" integer::cmpxchg8b: Cmpxchg8b;
    Cmpxchg16b "cmpxchg16b" integer::cmpxchg16b: Cmpxchg16b;
    Int3 "int3" system::int3: Int3;
    Undefined "ud2" system::undefined: Ud0, Ud1, Ud2;
    Clac "clac" system::clac: Clac;
    Stac "stac" system::stac: Stac;
    Fence "fence" system::nothing: Lfence, Mfence, Sfence, Serialize;
    Hint "hint" system::nothing: Pause, Nop, Reservednop, Endbr64, Endbr32, Prefetchnta, Prefetcht0,
        Prefetcht1, Prefetcht2, Prefetch, Prefetchw, Prefetchwt1;
    Flush "clflush" system::flush: Clflush, Clflushopt, Clwb;
    Rdpid "rdpid" system::rdpid: Rdpid;
    Rdtscp "rdtscp" system::rdtscp: Rdtscp;
    Rdpkru "rdpkru" system::rdpkru: Rdpkru;
    Wrpkru "wrpkru" system::wrpkru: Wrpkru;
    Lar "lar" descriptor::lar: Lar;
    Lsl "lsl" descriptor::lsl: Lsl;
    Verr "verr" descriptor::verr: Verr;
    Verw "verw" descriptor::verw: Verw;
    Xgetbv "xgetbv" system::xgetbv: Xgetbv;
    Rdfsbase "rdfsbase" system::rdfsbase: Rdfsbase;
    Rdgsbase "rdgsbase" system::rdgsbase: Rdgsbase;
    Wrfsbase "wrfsbase" system::wrfsbase: Wrfsbase;
    Wrgsbase "wrgsbase" system::wrgsbase: Wrgsbase;
}

/// How often each instruction was done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counters([u64; Op::ALL.len()]);

impl Default for Counters {
    fn default() -> Self {
        Self([0; Op::ALL.len()])
    }
}

impl Counters {
    /// Counts one.
    pub fn count(&mut self, op: Op) {
        self.0[op as usize] += 1;
    }

    /// How often one was done.
    pub fn get(&self, op: Op) -> u64 {
        self.0[op as usize]
    }

    /// How often any was done.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    /// Adds another vCPU's counts.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.0.iter_mut().zip(other.0) {
            *mine += theirs;
        }
    }

    /// Those done at all, in the order of [`Op::ALL`].
    pub fn iter(&self) -> impl Iterator<Item = (Op, u64)> + '_ {
        let counts = Op::ALL.iter().map(|op| (*op, self.get(*op)));
        counts.filter(|(_, count)| *count > 0)
    }
}

/// `xsave 812, xrstor 811, popcnt 40`, or `none`.
impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.total() == 0 {
            return f.write_str("none");
        }
        for (index, (op, count)) in self.iter().enumerate() {
            let gap = if index == 0 { "" } else { ", " };
            write!(f, "{gap}{} {count}", op.name())?;
        }
        Ok(())
    }
}
