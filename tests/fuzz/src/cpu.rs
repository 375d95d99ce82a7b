//! A stopped vCPU of plain data.

use kvm_bindings::{kvm_regs, kvm_sregs};
use peregrine_vmm::assist::{CpuState, Exception, HostCpu};
use std::io;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// Where PKRU stands in the image of [`processor`].
pub const PKRU_OFFSET: usize = 2688;
const IMAGE_BYTES: usize = 11_008;

/// A vCPU that holds what it is given.
pub struct Cpu {
    /// General registers.
    pub regs: kvm_regs,
    /// Special registers.
    pub sregs: kvm_sregs,
    /// The XSAVE image, standard format.
    pub image: Vec<u8>,
    /// XCR0.
    pub xcr0: u64,
    /// Exceptions injected.
    pub injected: Vec<Exception>,
}

impl Default for Cpu {
    /// Ring 0 of a 64-bit kernel, all extended state in its initial configuration.
    fn default() -> Self {
        let mut sregs = kvm_sregs { cr0: 0x8005_0033, cr4: 0x5_0620, efer: 0xd00, ..Default::default() };
        sregs.cs.l = 1;
        sregs.cs.selector = 0x10;
        let mut image = vec![0; IMAGE_BYTES];
        image[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        Self { regs: kvm_regs::default(), sregs, image, xcr0: 0x2e7, injected: Vec::new() }
    }
}

impl Cpu {
    /// Sets PKRU in the image.
    pub fn set_pkru(&mut self, pkru: u32) {
        // XSTATE_BV, component 9.
        self.image[513] |= 2;
        self.image[PKRU_OFFSET..PKRU_OFFSET + 4].copy_from_slice(&pkru.to_le_bytes());
    }
}

/// A processor with every component that has a place in the image, the same on every host.
#[must_use]
pub fn processor() -> HostCpu {
    HostCpu::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0xd, 0) => [0x602e7, 0, 0, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 1088, 0, 0],
        (0xd, 6) => [512, 1152, 0, 0],
        (0xd, 7) => [1024, 1664, 0, 0],
        (0xd, 9) => [8, 2688, 0, 0],
        (0xd, 17) => [64, 2752, 2, 0],
        (0xd, 18) => [8192, 2816, 6, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0008, _) => [46, 0, 0, 0],
        _ => [0; 4],
    })
}

impl CpuState for Cpu {
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
        Ok(())
    }

    fn xcr0(&mut self) -> io::Result<u64> {
        Ok(self.xcr0)
    }

    fn msr(&mut self, index: u32) -> io::Result<u64> {
        Ok(index.into())
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
