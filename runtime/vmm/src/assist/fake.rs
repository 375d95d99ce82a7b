//! A vCPU of plain data, and what a guest may ask of the assist: for its own tests and for the fuzz targets,
//! which take this file in as a module of theirs (a feature for them would have the whole crate built twice).
//! The parent module has the names that are imported here.

use super::{CpuState, Exception};
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::io;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Prefixes of instructions that the assist does.
pub(crate) const PREFIXES: &[&[u8]] =
    &[&[], &[0x48], &[0x66], &[0xf2], &[0xf3], &[0xf3, 0x48], &[0x65, 0x48], &[0xf0, 0x48], &[0x36, 0x67]];
/// Opcodes of the table; operands and immediates follow.
pub(crate) const OPCODES: &[&[u8]] = &[
    &[0x0f, 0xae],
    &[0x0f, 0xc7],
    &[0x0f, 0xb8],
    &[0x0f, 0xbc],
    &[0x0f, 0xbd],
    &[0x0f, 0x00],
    &[0x0f, 0x01],
    &[0x0f, 0x02],
    &[0x0f, 0x03],
    &[0x0f, 0x38, 0xf0],
    &[0x0f, 0x38, 0xf1],
    &[0xc4, 0xe2],
    &[0xc4, 0xe2, 0x60, 0xf2],
    &[0xc4, 0xe2, 0x72, 0xf7],
    &[0x9b],
    &[0xcc],
];

/// The general registers, RAX to R15.
pub(crate) fn general(regs: &mut kvm_regs) -> [&mut u64; 16] {
    [
        &mut regs.rax,
        &mut regs.rbx,
        &mut regs.rcx,
        &mut regs.rdx,
        &mut regs.rsi,
        &mut regs.rdi,
        &mut regs.rsp,
        &mut regs.rbp,
        &mut regs.r8,
        &mut regs.r9,
        &mut regs.r10,
        &mut regs.r11,
        &mut regs.r12,
        &mut regs.r13,
        &mut regs.r14,
        &mut regs.r15,
    ]
}

/// A vCPU of plain data: it holds what it is given.
#[derive(Default)]
pub(crate) struct FakeCpu {
    pub(crate) regs: kvm_regs,
    pub(crate) sregs: kvm_sregs,
    pub(crate) image: Vec<u8>,
    pub(crate) commits: usize,
    pub(crate) xcr0: u64,
    /// What every MSR holds, unless one of its own is here.
    pub(crate) msr: u64,
    pub(crate) tsc: u64,
    pub(crate) injected: Vec<Exception>,
}

impl CpuState for FakeCpu {
    fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn regs_mut(&mut self) -> &mut kvm_regs {
        &mut self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn sregs_mut(&mut self) -> &mut kvm_sregs {
        &mut self.sregs
    }

    fn xsave(&mut self) -> io::Result<&mut [u8]> {
        Ok(&mut self.image)
    }

    fn commit_xsave(&mut self) -> io::Result<()> {
        self.commits += 1;
        Ok(())
    }

    fn xcr0(&mut self) -> io::Result<u64> {
        Ok(self.xcr0)
    }

    fn msr(&mut self, index: u32) -> io::Result<u64> {
        Ok(if index == 0x10 { self.tsc } else { self.msr })
    }

    fn random(&mut self) -> io::Result<u64> {
        Ok(0x0123_4567_89ab_cdef)
    }

    fn cmpxchg16(
        &mut self,
        mem: &GuestMemoryMmap<()>,
        at: GuestAddress,
        old: u128,
        new: u128,
    ) -> io::Result<u128> {
        assert_eq!(at.0 % 16, 0, "the assist promises an aligned address");
        let mut bytes = [0; 16];
        mem.read_slice(&mut bytes, at).map_err(io::Error::other)?;
        let found = u128::from_le_bytes(bytes);
        if found == old {
            mem.write_slice(&new.to_le_bytes(), at).map_err(io::Error::other)?;
        }
        Ok(found)
    }

    fn inject(&mut self, exception: Exception) {
        self.injected.push(exception);
    }
}
