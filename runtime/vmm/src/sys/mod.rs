//! The system calls that have no safe wrapper: memslots, KVM calls kvm-ioctls lacks, kick signals, and the
//! 16-byte compare-exchange. One of the rooms for unsafe code; each block names its invariant. May touch
//! file descriptors and memory it is handed; must not know policy, devices or boot.
#![allow(unsafe_code)]

pub(crate) mod atomic;
pub(crate) mod fill;
pub(crate) mod kick;
pub(crate) mod kvm;
pub(crate) mod process;
