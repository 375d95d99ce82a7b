//! Guest memory: which guest-physical ranges are RAM and the host mapping behind them.
//!
//! May touch: mappings of this process. Must not: know devices, vCPUs or KVM.
//!
//! The ranges of RAM lie one after the other in a memory image, so a guest-physical address below the device
//! hole is also an offset in it.
#![allow(unsafe_code)]

use crate::VmmError;
use crate::arch::layout;
use crate::snapshot::Run;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::sync::Arc;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap, MmapRegion,
};

/// The guest's RAM. Every device and the loader reach it through this type, which checks bounds.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Smallest guest this VMM boots, in MiB: the kernel image, its page structs and PID 1 fit, little else does.
pub const MIN_MIB: u64 = 64;

/// Maps `mem_mib` MiB of zeroed guest RAM, around the device hole below 4 GiB (see [`layout::ram_ranges`]).
///
/// # Errors
/// [`VmmError::OutOfRange`] under [`MIN_MIB`] or over the host's physical memory; [`VmmError::Memory`] if the
/// mapping fails.
pub fn allocate(mem_mib: u64) -> Result<GuestMemory, VmmError> {
    map(mem_mib, None, libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
}

/// Maps a memory image as RAM, shared: what the guest writes is in the file. `file` gets the right length.
///
/// # Errors
/// As [`allocate`], and if the file cannot be made so long.
pub fn map_shared(mem_mib: u64, file: &Arc<File>) -> Result<GuestMemory, VmmError> {
    let resized = file.set_len(mem_mib << 20);
    resized.map_err(|source| VmmError::Os { what: "cannot make the memory image", source })?;
    map(mem_mib, Some(file), libc::MAP_SHARED)
}

/// Maps a memory image as RAM, privately: the guest starts with its contents, and what it writes is its own.
///
/// # Errors
/// As [`allocate`].
pub fn map_private(mem_mib: u64, file: &Arc<File>) -> Result<GuestMemory, VmmError> {
    map(mem_mib, Some(file), libc::MAP_PRIVATE)
}

/// Maps pages of `file`, which lie in it one after the other, privately over those of a private mapping whose place they take. No
/// KVM and no device may know `mem` yet.
///
/// # Errors
/// [`VmmError::Memory`] for a run that does not lie within one range of RAM; runs before it are mapped then.
pub fn map_pages(mem: &GuestMemory, file: &Arc<File>, runs: &[Run]) -> Result<(), VmmError> {
    const PAGE_BYTES: u64 = 4096;
    let mut offset = 0;
    for run in runs {
        let refused = || VmmError::Memory(format!("pages {} to {} are not its own", run.first, run.end()));
        let bytes = run.pages.checked_mul(PAGE_BYTES).filter(|bytes| *bytes > 0).ok_or_else(refused)?;
        let at = run.first.checked_mul(PAGE_BYTES).ok_or_else(refused)?;
        let mut left = at;
        let region = mem.iter().find(|region| {
            let inside = left < region.len();
            left = if inside { left } else { left - region.len() };
            inside
        });
        let region = region.filter(|region| bytes <= region.len() - left).ok_or_else(refused)?;
        // SAFETY: `left` lies inside the region's mapping.
        let place = unsafe { region.as_ptr().add(left as usize) };
        // SAFETY: the range lies inside the region's mapping (checked above) and stays mapped, with the same
        // rights; nobody holds a reference into it (the caller's part).
        let mapped = unsafe {
            libc::mmap(
                place.cast(),
                bytes as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if mapped == libc::MAP_FAILED {
            let source = std::io::Error::last_os_error();
            return Err(VmmError::Os { what: "cannot map the snapshot's pages", source });
        }
        offset += bytes;
    }
    Ok(())
}

fn map(mem_mib: u64, file: Option<&Arc<File>>, flags: i32) -> Result<GuestMemory, VmmError> {
    check_size(mem_mib)?;
    let failed = |e: String| VmmError::Memory(format!("cannot map {mem_mib} MiB: {e}"));
    let mut offset = 0;
    let mut regions = Vec::new();
    for range in layout::ram_ranges(mem_mib << 20) {
        let bytes = range.end - range.start;
        let place = file.map(|file| FileOffset::from_arc(Arc::clone(file), offset));
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, flags | libc::MAP_NORESERVE);
        let region = MmapRegion::build(place, bytes as usize, protection, flags);
        let region = region.map_err(|e| failed(e.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start));
        regions.push(region.ok_or_else(|| failed("an address overflows".to_owned()))?);
        offset += bytes;
    }
    GuestMemory::from_regions(regions).map_err(|e| failed(e.to_string()))
}

/// Size of all RAM in MiB.
#[must_use]
pub fn mib(mem: &GuestMemory) -> u64 {
    mem.iter().map(|region| region.len()).sum::<u64>() >> 20
}

/// Refuses a guest size that cannot work, before anything is spent on it.
///
/// # Errors
/// [`VmmError::OutOfRange`] naming the limit.
pub fn check_size(mem_mib: u64) -> Result<(), VmmError> {
    let host_mib = crate::host::memory_mib();
    if (MIN_MIB..=host_mib).contains(&mem_mib) {
        return Ok(());
    }
    Err(VmmError::OutOfRange {
        field: "memory (MiB)",
        value: mem_mib,
        limit: format!("{MIN_MIB} to {host_mib} (what this host has)"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_outside_the_range_are_refused_with_the_limit() {
        for mib in [0, MIN_MIB - 1, 1 << 40] {
            let text = check_size(mib).unwrap_err().to_string();
            assert!(text.contains(&format!("{MIN_MIB} to ")), "{text}");
        }
    }

    #[test]
    fn memory_adds_up_to_what_was_asked_for() {
        let mem = allocate(96).unwrap();
        let total: u64 = mem.iter().map(|r| r.len()).sum();
        assert_eq!(total, 96 << 20);
    }
}
