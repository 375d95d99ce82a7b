//! What the instructions do. Each function does one and touches nothing before all that can fault has not.

pub(crate) mod arithmetic;
pub(crate) mod bits;
pub(crate) mod control;
pub(crate) mod movement;
pub(crate) mod string;
pub(crate) mod system;

use crate::cpu::Cpu;
use crate::op::Op;
use crate::stop::{Exec, foreign};

/// Leaves the instruction to KVM.
pub(crate) fn left_to_kvm(_: &mut Cpu, _: &Op) -> Exec {
    Err(foreign())
}
