//! The guest's RAM as the engine reaches it: by offset into all of it, one page at a time.
//!
//! The one file of this crate with unsafe code. An offset that is not RAM's own panics; nothing a guest does
//! leads to one, because offsets come from [`Ram::offset`] alone.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;

/// One range of RAM.
struct Region {
    gpa: u64,
    offset: usize,
    len: usize,
    host: *mut u8,
}

/// All of a guest's RAM, its ranges one after the other.
pub struct Ram {
    regions: Vec<Region>,
    bytes: usize,
    /// Keeps the mappings of `regions` alive.
    _owner: Arc<GuestMemoryMmap<()>>,
}

// SAFETY: the pointers are to mappings that live as long as `_owner`, which is shared between threads itself;
// what is done through them is atomic or, for bulk copies, of plain bytes that nobody has a reference to.
unsafe impl Send for Ram {}

impl Ram {
    /// The RAM of `memory`.
    #[must_use]
    pub fn new(memory: Arc<GuestMemoryMmap<()>>) -> Self {
        let mut bytes = 0;
        let regions = memory
            .iter()
            .map(|region| {
                let len = region.len() as usize & !(PAGE - 1);
                let offset = bytes;
                bytes += len;
                Region { gpa: region.start_addr().0, offset, len, host: region.as_ptr() }
            })
            .collect();
        Self { regions, bytes, _owner: memory }
    }

    /// Bytes in all.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where a guest-physical address lies, if it is RAM.
    #[must_use]
    pub fn offset(&self, gpa: u64) -> Option<usize> {
        self.regions.iter().find_map(|region| {
            let within = gpa.checked_sub(region.gpa)?;
            (within < region.len as u64).then(|| region.offset + within as usize)
        })
    }

    /// The guest-physical address of an offset.
    pub(crate) fn gpa(&self, at: usize) -> Option<u64> {
        let inside = |region: &&Region| at >= region.offset && at - region.offset < region.len;
        self.regions.iter().find(inside).map(|region| region.gpa + (at - region.offset) as u64)
    }

    /// A host address of `len` bytes that lie in one range.
    #[inline]
    fn host(&self, at: usize, len: usize) -> *mut u8 {
        for region in &self.regions {
            if let Some(within) = at.checked_sub(region.offset)
                && within < region.len
            {
                assert!(len <= region.len - within, "an access beyond its range of RAM");
                // SAFETY: `within` lies inside the region's mapping, checked above.
                return unsafe { region.host.add(within) };
            }
        }
        panic!("an offset outside RAM")
    }

    /// Loads 1, 2, 4 or 8 bytes that lie in one page, zero-extended.
    #[inline]
    #[must_use]
    pub fn load(&self, at: usize, bytes: u8) -> u64 {
        let host = self.host(at, bytes as usize);
        // SAFETY: `host` checked that so many bytes are mapped, and the mapping is alive. Aligned accesses are
        // atomic, as a processor's; others are copies of bytes that may be torn, as a processor's may.
        unsafe {
            match bytes {
                1 => u64::from((*host.cast::<AtomicU8>()).load(Ordering::Acquire)),
                8 if host.addr().is_multiple_of(8) => (*host.cast::<AtomicU64>()).load(Ordering::Acquire),
                4 if host.addr().is_multiple_of(4) => {
                    u64::from((*host.cast::<AtomicU32>()).load(Ordering::Acquire))
                }
                2 if host.addr().is_multiple_of(2) => {
                    u64::from((*host.cast::<AtomicU16>()).load(Ordering::Acquire))
                }
                8 => host.cast::<u64>().read_unaligned(),
                4 => u64::from(host.cast::<u32>().read_unaligned()),
                _ => u64::from(host.cast::<u16>().read_unaligned()),
            }
        }
    }

    /// Stores 1, 2, 4 or 8 bytes that lie in one page.
    #[inline]
    pub fn store(&self, at: usize, bytes: u8, value: u64) {
        let host = self.host(at, bytes as usize);
        // SAFETY: as in `load`.
        unsafe {
            match bytes {
                1 => (*host.cast::<AtomicU8>()).store(value as u8, Ordering::Release),
                8 if host.addr().is_multiple_of(8) => {
                    (*host.cast::<AtomicU64>()).store(value, Ordering::Release);
                }
                4 if host.addr().is_multiple_of(4) => {
                    (*host.cast::<AtomicU32>()).store(value as u32, Ordering::Release);
                }
                2 if host.addr().is_multiple_of(2) => {
                    (*host.cast::<AtomicU16>()).store(value as u16, Ordering::Release);
                }
                8 => host.cast::<u64>().write_unaligned(value),
                4 => host.cast::<u32>().write_unaligned(value as u32),
                _ => host.cast::<u16>().write_unaligned(value as u16),
            }
        }
    }

    /// Stores `new` if `old` is there, as one atomic step where the address is aligned; otherwise tells what is.
    #[inline]
    pub fn compare_exchange(&self, at: usize, bytes: u8, old: u64, new: u64) -> Result<(), u64> {
        let host = self.host(at, bytes as usize);
        let (success, failure) = (Ordering::SeqCst, Ordering::SeqCst);
        if !host.addr().is_multiple_of(bytes as usize) {
            // A split lock: Linux has none, and no other processor of this guest runs.
            let found = self.load(at, bytes);
            if found == old {
                self.store(at, bytes, new);
                return Ok(());
            }
            return Err(found);
        }
        // SAFETY: as in `load`; the address is aligned.
        let done = unsafe {
            match bytes {
                1 => (*host.cast::<AtomicU8>())
                    .compare_exchange(old as u8, new as u8, success, failure)
                    .map(u64::from)
                    .map_err(u64::from),
                2 => (*host.cast::<AtomicU16>())
                    .compare_exchange(old as u16, new as u16, success, failure)
                    .map(u64::from)
                    .map_err(u64::from),
                4 => (*host.cast::<AtomicU32>())
                    .compare_exchange(old as u32, new as u32, success, failure)
                    .map(u64::from)
                    .map_err(u64::from),
                _ => (*host.cast::<AtomicU64>()).compare_exchange(old, new, success, failure),
            }
        };
        done.map(|_| ())
    }

    /// Copies bytes within RAM; either side lies in one page.
    pub(crate) fn copy(&self, to: usize, from: usize, len: usize) {
        let (to, from) = (self.host(to, len), self.host(from, len));
        // SAFETY: both sides were checked; `copy` allows them to overlap.
        unsafe { std::ptr::copy(from, to, len) };
    }

    /// Sets bytes of one page.
    pub(crate) fn fill(&self, at: usize, byte: u8, len: usize) {
        let to = self.host(at, len);
        // SAFETY: the range was checked.
        unsafe { std::ptr::write_bytes(to, byte, len) };
    }

    /// Reads bytes of one page.
    pub(crate) fn read(&self, at: usize, into: &mut [u8]) {
        let from = self.host(at, into.len());
        // SAFETY: the range was checked; `into` is not guest memory.
        unsafe { std::ptr::copy_nonoverlapping(from, into.as_mut_ptr(), into.len()) };
    }

    /// The host's time-stamp counter: software KVM offsets none.
    pub(crate) fn tsc() -> u64 {
        // SAFETY: RDTSC reads a counter; every x86-64 processor has it.
        unsafe { std::arch::x86_64::_rdtsc() }
    }
}
