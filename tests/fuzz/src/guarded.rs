//! Guest memory between pages that nobody may touch: an access one byte outside a region is a SIGSEGV, and so
//! are those up to [`GUARD_BYTES`] away.
#![allow(unsafe_code)]

use peregrine_vmm::memory::GuestMemory;
use vm_memory::{GuestAddress, GuestRegionMmap, MmapRegion};

/// Inaccessible bytes before, between and after the regions.
pub const GUARD_BYTES: usize = 64 << 20;

/// Maps guest memory of these ranges (address, length in bytes; whole pages), for the rest of the process.
///
/// # Panics
/// If the host maps no memory.
#[must_use]
pub fn memory(ranges: &[(u64, usize)]) -> GuestMemory {
    let regions = ranges.iter().map(|&(at, len)| {
        let host = map(len);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: `map` gave `len` accessible bytes that stay mapped to the end of the process.
        let region = unsafe { MmapRegion::build_raw(host, len, prot, flags) };
        let region = region.unwrap_or_else(|e| panic!("region of {len} bytes: {e}"));
        GuestRegionMmap::new(region, GuestAddress(at)).unwrap_or_else(|| panic!("region at {at:#x}"))
    });
    GuestMemory::from_regions(regions.collect()).unwrap_or_else(|e| panic!("guest memory: {e}"))
}

/// `len` accessible bytes with [`GUARD_BYTES`] of none on either side.
fn map(len: usize) -> *mut u8 {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    // SAFETY: a new mapping at an address of the kernel's choice.
    let base =
        unsafe { libc::mmap(std::ptr::null_mut(), len + 2 * GUARD_BYTES, libc::PROT_NONE, flags, -1, 0) };
    assert!(base != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    // SAFETY: inside the mapping made above, which is longer than GUARD_BYTES.
    let middle = unsafe { base.byte_add(GUARD_BYTES) };
    // SAFETY: `len` bytes of the same mapping, which nothing else knows of.
    let done = unsafe { libc::mprotect(middle, len, libc::PROT_READ | libc::PROT_WRITE) };
    assert_eq!(done, 0, "mprotect: {}", std::io::Error::last_os_error());
    middle.cast()
}
