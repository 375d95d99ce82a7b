//! A stopped vCPU of plain data: the one of the assist's own tests, as these targets want it.

use kvm_bindings::kvm_sregs;
use peregrine_vmm::assist::{CpuState, Exception, HostCpu};

// See there why it is no dependency.
#[path = "../../../runtime/vmm/src/assist/fake.rs"]
mod fake;

pub(crate) use fake::{FakeCpu, OPCODES, PREFIXES, general};

/// Where PKRU stands in the image of [`processor`].
const PKRU_OFFSET: usize = 2688;
const IMAGE_BYTES: usize = 11_008;
/// IA32_XSS where every component is one for XSAVES.
const XSS: u64 = 0xda0;

/// Ring 0 of a 64-bit kernel, all extended state in its initial configuration.
pub(crate) fn kernel() -> FakeCpu {
    let mut sregs = kvm_sregs { cr0: 0x8005_0033, cr4: 0x5_0620, efer: 0xd00, ..Default::default() };
    sregs.cs.l = 1;
    sregs.cs.selector = 0x10;
    let mut image = vec![0; IMAGE_BYTES];
    image[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    FakeCpu { sregs, image, xcr0: 0x2e7, msr: XSS, ..FakeCpu::default() }
}

/// Sets PKRU in the image.
pub(crate) fn set_pkru(cpu: &mut FakeCpu, pkru: u32) {
    // XSTATE_BV, component 9.
    cpu.image[513] |= 2;
    cpu.image[PKRU_OFFSET..PKRU_OFFSET + 4].copy_from_slice(&pkru.to_le_bytes());
}

/// A processor with every component that has a place in the image, the same on every host.
pub(crate) fn processor() -> HostCpu {
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
