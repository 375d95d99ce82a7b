//! The guest's page tables: from linear to guest-physical addresses, as the processor walks them
//! (SDM vol. 3, chapter 4), for supervisor accesses in 64-bit mode.
//!
//! Reads the tables and sets accessed and dirty bits in them; touches nothing else. A [`Span`] is a
//! linear range of which every page was translated and found in RAM, so what is written through it
//! is written whole or not at all.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, VolatileMemory};

use super::step::{Stop, page_fault};
use super::xstate::{HostCpu, Image};
use super::{CpuState, Reason};

const PAGE_BYTES: u64 = 4096;
/// Enough for the largest XSAVE area ([`super::xstate::MAX_AREA_BYTES`]) at any alignment.
const MAX_PAGES: usize = 6;

const CR0_WP: u64 = 1 << 16;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_NXE: u64 = 1 << 11;
const RFLAGS_AC: u64 = 1 << 18;

// Page-table entry bits, SDM vol. 3, 4.5.4.
const PRESENT: u64 = 1;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

// Page-fault error code bits, SDM vol. 3, 4.7.
const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_RESERVED: u32 = 1 << 3;
const FAULT_FETCH: u32 = 1 << 4;
const FAULT_KEY: u32 = 1 << 5;

/// How often a walk starts again when an entry changes between being read and being marked.
const MAX_RACES: usize = 1000;

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Read,
    Write,
    /// An instruction fetch that KVM has already allowed: permissions are not checked again.
    Fetch,
}

/// The registers that decide a walk, read once for each instruction.
pub(crate) struct Paging<'a> {
    mem: &'a GuestMemoryMmap<()>,
    root: u64,
    levels: u32,
    write_protect: bool,
    /// CR4.SMAP with RFLAGS.AC clear: user pages are out of reach.
    no_user: bool,
    /// The accesses are a user program's: only user pages are in reach.
    only_user: bool,
    /// PKRU, when CR4.PKE is set.
    keys: Option<u32>,
    /// Entry bits that must be zero at every level.
    reserved: u64,
}

/// A translated address: `gpa`, and the last linear address the same leaf entry maps.
struct Leaf {
    gpa: u64,
    last_linear: u64,
}

impl<'a> Paging<'a> {
    pub(crate) fn new(
        cpu: &mut dyn CpuState,
        host: &HostCpu,
        mem: &'a GuestMemoryMmap<()>,
    ) -> Result<Self, Stop> {
        let keys = match cpu.sregs().cr4 & CR4_PKE {
            0 => None,
            _ => Some(Image::new(cpu.xsave()?, &host.layout)?.pkru()),
        };
        let sregs = cpu.sregs();
        let above_physical = ADDRESS & !((1u64 << host.physical_address_bits) - 1);
        let no_execute = if sregs.efer & EFER_NXE == 0 { NO_EXECUTE } else { 0 };
        Ok(Self {
            mem,
            root: sregs.cr3 & ADDRESS & !above_physical,
            levels: if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 },
            write_protect: sregs.cr0 & CR0_WP != 0,
            no_user: sregs.cr4 & CR4_SMAP != 0 && cpu.regs().rflags & RFLAGS_AC == 0,
            only_user: false,
            keys,
            reserved: above_physical | no_execute,
        })
    }

    /// For accesses by a program in ring 3 (SDM vol. 3, 4.6.1, "for user-mode accesses").
    pub(crate) fn of_user(self) -> Self {
        // CR0.WP and SMAP are about the supervisor.
        Self { only_user: true, no_user: false, write_protect: true, ..self }
    }

    /// Whether every byte of a range has a canonical address (SDM vol. 1, 3.3.7.1).
    pub(super) fn is_canonical(&self, linear: u64, len: usize) -> bool {
        let unused = 64 - (12 + 9 * self.levels);
        let canonical = |at: u64| ((at << unused) as i64 >> unused) as u64 == at;
        let last = linear.checked_add(len.saturating_sub(1) as u64);
        canonical(linear) && last.is_some_and(canonical)
    }

    /// Where `linear` lies in guest-physical memory, and how many bytes from there one leaf entry maps;
    /// `None` where an access would fault.
    pub(crate) fn reach(&self, linear: u64, access: Access) -> Option<(u64, u64)> {
        if !self.is_canonical(linear, 1) {
            return None;
        }
        let leaf = self.translate(linear, access).ok()?;
        Some((leaf.gpa, leaf.last_linear.wrapping_sub(linear).saturating_add(1)))
    }

    fn translate(&self, linear: u64, access: Access) -> Result<Leaf, Stop> {
        for _ in 0..MAX_RACES {
            if let Some(leaf) = self.walk(linear, access)? {
                return Ok(leaf);
            }
        }
        Err(Reason::PagingRace(linear).into())
    }

    /// One walk; `None` if an entry changed before it could be marked as used.
    fn walk(&self, linear: u64, access: Access) -> Result<Option<Leaf>, Stop> {
        let mut path: [Option<(&AtomicU64, u64)>; 5] = [None; 5];
        let mut table = self.root;
        let mut rights = WRITABLE | USER;
        for level in (1..=self.levels).rev() {
            let shift = 12 + 9 * (level - 1);
            let at = table + ((linear >> shift) & 511) * 8;
            let cell = atomic_u64(self.mem, at)?;
            let entry = cell.load(Ordering::Acquire);
            if entry & PRESENT == 0 {
                return Err(page_fault(linear, code(access)));
            }
            let leaf = level == 1 || (level <= 3 && entry & LARGE != 0);
            if entry & self.reserved_at(level, leaf) != 0 {
                return Err(page_fault(linear, code(access) | FAULT_PRESENT | FAULT_RESERVED));
            }
            rights &= entry;
            path[level as usize - 1] = Some((cell, entry));
            if leaf {
                self.check(linear, access, rights, entry)?;
                if !mark(&path, level as usize - 1, access) {
                    return Ok(None);
                }
                let within = (1u64 << shift) - 1;
                return Ok(Some(Leaf {
                    gpa: (entry & ADDRESS & !within) | (linear & within),
                    last_linear: linear | within,
                }));
            }
            table = entry & ADDRESS;
        }
        // Level 1 is always a leaf.
        Ok(None)
    }

    /// Bits that must be zero in an entry (SDM vol. 3, tables 4-14 to 4-20).
    fn reserved_at(&self, level: u32, leaf: bool) -> u64 {
        match (level, leaf) {
            (4 | 5, _) => self.reserved | LARGE,
            // Between the PAT bit (12) and the frame of a large page.
            (2 | 3, true) => self.reserved | ((1 << (12 + 9 * (level - 1))) - 1) & !0x1fff,
            _ => self.reserved,
        }
    }

    /// Access rights of a supervisor access (SDM vol. 3, 4.6.1 and 4.6.2).
    fn check(&self, linear: u64, access: Access, rights: u64, leaf: u64) -> Result<(), Stop> {
        if access == Access::Fetch {
            return Ok(());
        }
        let fault = |extra| Err(page_fault(linear, code(access) | FAULT_PRESENT | extra));
        let user = rights & USER != 0;
        if user && self.no_user || !user && self.only_user {
            return fault(0);
        }
        if let (true, Some(keys)) = (user, self.keys) {
            let key = keys >> (2 * ((leaf >> 59) & 15));
            let no_write = key & 2 != 0 && access == Access::Write && self.write_protect;
            if key & 1 != 0 || no_write {
                return fault(FAULT_KEY);
            }
        }
        if access == Access::Write && self.write_protect && rights & WRITABLE == 0 {
            return fault(0);
        }
        Ok(())
    }
}

fn code(access: Access) -> u32 {
    match access {
        Access::Read => 0,
        Access::Write => FAULT_WRITE,
        Access::Fetch => FAULT_FETCH,
    }
}

/// Sets the accessed bits of a walked path and the leaf's dirty bit (SDM vol. 3, 4.8); false if an
/// entry is no longer the one the walk read.
fn mark(path: &[Option<(&AtomicU64, u64)>; 5], leaf: usize, access: Access) -> bool {
    path.iter().enumerate().all(|(index, step)| {
        let Some((cell, entry)) = step else {
            return true;
        };
        let dirty = if index == leaf && access == Access::Write { DIRTY } else { 0 };
        let marked = entry | ACCESSED | dirty;
        marked == *entry || cell.compare_exchange(*entry, marked, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    })
}

/// The naturally aligned 8 bytes of RAM at `at`, for atomic access.
pub(super) fn atomic_u64(mem: &GuestMemoryMmap<()>, at: u64) -> Result<&AtomicU64, Stop> {
    let region: Option<(&GuestRegionMmap<()>, _)> = mem.to_region_addr(GuestAddress(at));
    region
        .and_then(|(region, offset)| region.get_atomic_ref(offset.0 as usize).ok())
        .ok_or_else(|| Reason::NotRam(at).into())
}

/// A linear range whose every page is translated and lies in RAM.
pub(super) struct Span {
    linear: u64,
    len: usize,
    access: Access,
    /// Guest-physical frames of the pages, in order.
    frames: [u64; MAX_PAGES],
    pages: usize,
}

impl Span {
    /// Translates `len` bytes at `linear`, which the caller knows to be canonical.
    pub(super) fn open(paging: &Paging<'_>, linear: u64, len: usize, access: Access) -> Result<Self, Stop> {
        let mut span = Self { linear, len: 0, access, frames: [0; MAX_PAGES], pages: 0 };
        span.extend(paging, len)?;
        Ok(span)
    }

    /// Translates the pages that make the range `len` bytes long.
    pub(super) fn extend(&mut self, paging: &Paging<'_>, len: usize) -> Result<(), Stop> {
        if len <= self.len {
            return Ok(());
        }
        let first_page = self.linear & !(PAGE_BYTES - 1);
        let last = self.linear.wrapping_add(len as u64 - 1);
        let wanted = (last.wrapping_sub(first_page) / PAGE_BYTES) as usize + 1;
        if wanted > MAX_PAGES {
            return Err(Reason::Operand.into());
        }
        // The rest of a large page that was walked needs no second walk.
        let mut reach = None;
        while self.pages < wanted {
            let page = first_page.wrapping_add(self.pages as u64 * PAGE_BYTES);
            let frame = match (reach, self.pages) {
                (Some(last_linear), n) if page <= last_linear => self.frames[n - 1] + PAGE_BYTES,
                (_, n) => {
                    let at = if n == 0 { self.linear } else { page };
                    let leaf = paging.translate(at, self.access)?;
                    reach = Some(leaf.last_linear);
                    leaf.gpa & !(PAGE_BYTES - 1)
                }
            };
            self.frames[self.pages] = frame;
            self.pages += 1;
        }
        self.len = len;
        for (at, part) in self.pieces(0, len) {
            if !paging.mem.check_range(at, part.len()) {
                return Err(Reason::NotRam(at.0).into());
            }
        }
        Ok(())
    }

    /// The one guest-physical address of a range that does not cross a page.
    pub(super) fn single(&self) -> Option<u64> {
        (self.pages == 1).then(|| self.physical(0))
    }

    /// Reads bytes at `offset` of the range.
    pub(super) fn read(&self, mem: &GuestMemoryMmap<()>, offset: usize, into: &mut [u8]) -> Result<(), Stop> {
        for (at, part) in self.pieces(offset, into.len()) {
            mem.read_slice(&mut into[part], at).map_err(|_| Reason::NotRam(at.0))?;
        }
        Ok(())
    }

    /// Writes bytes at `offset` of the range.
    pub(super) fn write(&self, mem: &GuestMemoryMmap<()>, offset: usize, bytes: &[u8]) -> Result<(), Stop> {
        for (at, part) in self.pieces(offset, bytes.len()) {
            mem.write_slice(&bytes[part], at).map_err(|_| Reason::NotRam(at.0))?;
        }
        Ok(())
    }

    fn physical(&self, offset: usize) -> u64 {
        let within = (self.linear & (PAGE_BYTES - 1)) as usize + offset;
        self.frames[within / PAGE_BYTES as usize] + within as u64 % PAGE_BYTES
    }

    /// Splits a part of the range into physically contiguous pieces: where each is, and which of
    /// the caller's bytes it holds.
    fn pieces(&self, offset: usize, len: usize) -> impl Iterator<Item = (GuestAddress, Range<usize>)> + '_ {
        debug_assert!(offset + len <= self.len);
        let mut done = 0;
        std::iter::from_fn(move || {
            if done == len {
                return None;
            }
            let start = self.physical(offset + done);
            let first = done;
            loop {
                let at = self.physical(offset + done);
                let left_in_page = (PAGE_BYTES - at % PAGE_BYTES) as usize;
                done = len.min(done + left_in_page);
                let contiguous = done < len && self.physical(offset + done) == start + (done - first) as u64;
                if !contiguous {
                    return Some((GuestAddress(start), first..done));
                }
            }
        })
    }
}
