//! Guest memory: which guest-physical ranges are RAM and the host mapping behind them.
//!
//! May touch: anonymous mappings of this process. Must not: know devices, vCPUs or KVM.

use crate::VmmError;
use crate::arch::layout;
use vm_memory::{GuestAddress, GuestMemoryMmap};

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
    check_size(mem_mib)?;
    let ranges: Vec<(GuestAddress, usize)> = layout::ram_ranges(mem_mib << 20)
        .into_iter()
        .map(|r| (GuestAddress(r.start), (r.end - r.start) as usize))
        .collect();
    GuestMemory::from_ranges(&ranges).map_err(|e| VmmError::Memory(format!("cannot map {mem_mib} MiB: {e}")))
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
    use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

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
