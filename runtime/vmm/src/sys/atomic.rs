//! A 16-byte compare-exchange on guest memory, for the instruction assist's `cmpxchg16b`.

use crate::memory::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Compares the 16 bytes at guest-physical `at` with `old` and, if equal, stores `new`, as one atomic step
/// against every other CPU. Returns what was there, or `None` if `at` is not 16-byte aligned RAM or this CPU
/// lacks the instruction.
pub(crate) fn compare_exchange_16(mem: &GuestMemory, at: u64, old: u128, new: u128) -> Option<u128> {
    if !at.is_multiple_of(16) || !std::arch::is_x86_feature_detected!("cmpxchg16b") {
        return None;
    }
    let slice = mem.get_slice(GuestAddress(at), 16).ok()?;
    let host = slice.ptr_guard_mut();
    // Regions are page-aligned on both sides, so guest alignment is host alignment.
    debug_assert!((host.as_ptr() as usize).is_multiple_of(16));
    let (mut low, mut high) = (old as u64, (old >> 64) as u64);
    // SAFETY: `get_slice` checked that the 16 bytes lie in one mapped region, which outlives `slice`; the
    // address is 16-byte aligned (checked above, regions are page-aligned); the CPU has the instruction
    // (checked above). RBX is saved and restored because LLVM reserves it. Guest memory is shared with the
    // guest, and a locked instruction is the one way of touching it that needs no exclusive reference.
    unsafe {
        std::arch::asm!(
            "xchg {new_low}, rbx",
            "lock cmpxchg16b [{at}]",
            "mov rbx, {new_low}",
            new_low = inout(reg) new as u64 => _,
            at = in(reg) host.as_ptr(),
            inout("rax") low,
            inout("rdx") high,
            in("rcx") (new >> 64) as u64,
            options(nostack),
        );
    }
    Some(u128::from(low) | (u128::from(high) << 64))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

    #[test]
    fn it_exchanges_when_equal_and_reports_when_not() {
        let mem = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        mem.write_obj(7_u128, GuestAddress(0x40)).unwrap();
        assert_eq!(compare_exchange_16(&mem, 0x40, 8, 1 << 100), Some(7));
        assert_eq!(mem.read_obj::<u128>(GuestAddress(0x40)).unwrap(), 7);
        assert_eq!(compare_exchange_16(&mem, 0x40, 7, 1 << 100), Some(7));
        assert_eq!(mem.read_obj::<u128>(GuestAddress(0x40)).unwrap(), 1 << 100);
        assert_eq!(compare_exchange_16(&mem, 0x48, 0, 0), None, "unaligned");
        assert_eq!(compare_exchange_16(&mem, 0x1000, 0, 0), None, "past the end");
    }
}
