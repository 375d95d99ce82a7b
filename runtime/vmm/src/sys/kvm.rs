//! KVM calls that kvm-ioctls has not, or has only as unsafe.

use crate::VmmError;
use crate::memory::GuestMemory;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

// Numbers from include/uapi/linux/kvm.h; KVMIO is 0xae.
const KVM_SET_SIGNAL_MASK: libc::c_ulong = 0x4004_ae8b;
const KVM_GET_XSAVE2: libc::c_ulong = 0x9000_aecf;
const KVM_SET_XSAVE: libc::c_ulong = 0x5000_aea5;
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// Registers every region of `mem` as a memslot of `vm`.
pub(crate) fn register_memslots(vm: &VmFd, mem: &GuestMemory) -> Result<(), VmmError> {
    for (slot, region) in mem.iter().enumerate() {
        let host = mem
            .get_host_address(GuestAddress(region.start_addr().0))
            .map_err(|e| VmmError::Memory(e.to_string()))?;
        let slot = kvm_userspace_memory_region {
            slot: slot as u32,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: host as u64,
        };
        // SAFETY: the range is a live mapping of exactly `region.len()` bytes owned by `mem`; MicroVm keeps
        // `mem` until after the VM's last file descriptor is closed, so KVM never sees it unmapped.
        unsafe { vm.set_user_memory_region(slot) }.map_err(VmmError::kvm("SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Sets the signals that are blocked inside KVM_RUN (bit n-1 is signal n).
pub(super) fn set_signal_mask(vcpu: &impl AsRawFd, blocked: u64) -> io::Result<()> {
    /// `struct kvm_signal_mask` with the kernel's 8-byte sigset in place of its flexible array.
    #[repr(C)]
    struct SignalMask {
        len: u32,
        set: [u8; 8],
    }
    let mask = SignalMask { len: 8, set: blocked.to_ne_bytes() };
    // SAFETY: KVM reads `len` and then `len` bytes after it; the struct has both.
    check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_SIGNAL_MASK, &raw const mask) })?;
    Ok(())
}

/// The vCPU's XSAVE image in the standard (not compacted) format, as KVM keeps it for the guest's ring 3.
#[derive(Debug)]
pub(crate) struct XsaveArea {
    bytes: Vec<u8>,
}

impl XsaveArea {
    /// An area of the size that this VM's vCPUs need (KVM_CAP_XSAVE2, at least 4,096 bytes).
    pub(crate) fn new(vm: &VmFd) -> Self {
        let size = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
        Self { bytes: vec![0; usize::try_from(size).unwrap_or(0).max(4096)] }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }

    pub(crate) fn read(&mut self, vcpu: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: KVM writes at most the size it reported for KVM_CAP_XSAVE2, which `bytes` has.
        check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_XSAVE2, self.bytes.as_mut_ptr()) })?;
        Ok(())
    }

    pub(crate) fn write(&self, vcpu: &impl AsRawFd) -> io::Result<()> {
        // SAFETY: KVM reads at most the size it reported for KVM_CAP_XSAVE2, which `bytes` has.
        check(unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_XSAVE, self.bytes.as_ptr()) })?;
        Ok(())
    }
}

/// Opens a vCPU's binary statistics (Documentation/virt/kvm/api.rst, 4.133).
pub(crate) fn stats_fd(vcpu: &impl AsRawFd) -> io::Result<File> {
    // SAFETY: the call takes no argument and returns a new file descriptor that nobody else owns.
    unsafe {
        let fd: RawFd = check(libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0))?;
        Ok(File::from_raw_fd(fd))
    }
}

// The request numbers encode the size of `struct kvm_signal_mask` (4) and `struct kvm_xsave` (4096).
const _: () = assert!((KVM_SET_SIGNAL_MASK >> 16) & 0x3fff == 4);
const _: () = assert!((KVM_GET_XSAVE2 >> 16) & 0x3fff == 4096);

/// Leaves the value that a KVM_EXIT_MMIO read waits for in the run page. Call it only after that exit.
pub(crate) fn answer_mmio(run: &mut kvm_bindings::kvm_run, value: u32) {
    // Writing to a member of a union of plain integers is safe; after another exit it would garble that one's data.
    run.__bindgen_anon_1.mmio.data = u64::from(value).to_le_bytes();
}

/// Which way a KVM_EXIT_IO went. Call it only after that exit.
pub(crate) fn io_direction(run: &kvm_bindings::kvm_run) -> u8 {
    // SAFETY: as in `internal_error`: plain integers, whichever member was written.
    unsafe { run.__bindgen_anon_1.io.direction }
}

/// Data of a KVM_EXIT_INTERNAL_ERROR.
pub(crate) struct InternalError {
    pub(crate) suberror: u32,
    data: [u64; 16],
    len: usize,
}

impl InternalError {
    /// The instruction bytes that KVM's emulator gave up on, if it gave them
    /// (KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES).
    pub(crate) fn instruction(&self) -> Vec<u8> {
        // data[0] is flags; from data[1] on lie a length byte and up to 15 instruction bytes.
        if self.len < 3 || self.data[0] & 1 == 0 {
            return Vec::new();
        }
        let bytes: Vec<u8> = self.data[1..3].iter().flat_map(|w| w.to_ne_bytes()).collect();
        let count = usize::from(bytes[0]).min(15);
        bytes[1..=count].to_vec()
    }
}

/// Reads the data of an internal error from the run page. Call it only after that exit.
pub(crate) fn internal_error(run: &kvm_bindings::kvm_run) -> InternalError {
    // SAFETY: every member of the union is plain integers, so reading the wrong one after another exit
    // would give wrong numbers and nothing worse.
    let internal = unsafe { run.__bindgen_anon_1.internal };
    InternalError { suberror: internal.suberror, data: internal.data, len: (internal.ndata as usize).min(16) }
}
