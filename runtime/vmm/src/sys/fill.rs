//! Filling guest memory at the host's own speed.

use crate::memory::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// Sets `len` bytes at guest-physical `at` to `byte`; false, and nothing written, if they are not all RAM of
/// one region.
pub(crate) fn fill(mem: &GuestMemory, at: u64, byte: u8, len: usize) -> bool {
    let Ok(slice) = mem.get_slice(GuestAddress(at), len) else {
        return false;
    };
    let host = slice.ptr_guard_mut();
    // SAFETY: `get_slice` checked that `len` bytes from here lie in one mapped region, which outlives
    // `slice`. The guest may write there at the same time; these are plain bytes that nothing of ours has a
    // reference to.
    unsafe { std::ptr::write_bytes(host.as_ptr(), byte, len) };
    true
}
