//! The guest's page tables, walked as the processor does for supervisor accesses in 64-bit mode (SDM vol. 3,
//! chapter 4): rights, accessed and dirty bits, page faults.

use crate::ram::Ram;
use crate::stop::{Break, Stop, page_fault};
use crate::tlb::Access;
use kvm_bindings::kvm_sregs;

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const NO_EXECUTE: u64 = 1 << 63;
pub(crate) const FRAME: u64 = 0x000f_ffff_ffff_f000;
const GLOBAL: u64 = 1 << 8;
const KEY: u64 = 15 << 59;

pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR4_LA57: u64 = 1 << 12;
const CR4_SMEP: u64 = 1 << 20;
const CR4_SMAP: u64 = 1 << 21;
const CR4_PKE: u64 = 1 << 22;
const EFER_NXE: u64 = 1 << 11;

const FAULT_PRESENT: u32 = 1;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_FETCH: u32 = 1 << 4;

/// How often a walk starts again when an entry changes under it.
const MOST_RACES: u32 = 1000;

/// Where a walk led.
pub(crate) struct Leaf {
    pub(crate) gpa: u64,
    /// It belongs to every address space (CR4.PGE is always on in a 64-bit Linux).
    pub(crate) global: bool,
}

/// How many levels the tables have.
pub(crate) fn levels(sregs: &kvm_sregs) -> u8 {
    if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 }
}

/// Whether the address is one that this mode has.
pub(crate) fn is_canonical(sregs: &kvm_sregs, linear: u64) -> bool {
    let unused = 64 - (12 + 9 * u32::from(levels(sregs)));
    ((linear << unused) as i64 >> unused) as u64 == linear
}

/// Walks the tables. `alignment_check` is RFLAGS.AC, which suspends SMAP.
pub(crate) fn walk(
    ram: &Ram,
    sregs: &kvm_sregs,
    linear: u64,
    access: Access,
    alignment_check: bool,
) -> Result<Leaf, Break> {
    for _ in 0..MOST_RACES {
        if let Some(leaf) = walk_once(ram, sregs, linear, access, alignment_check)? {
            return Ok(leaf);
        }
    }
    Err(Break::Stop(Stop::Foreign))
}

fn walk_once(
    ram: &Ram,
    sregs: &kvm_sregs,
    linear: u64,
    access: Access,
    alignment_check: bool,
) -> Result<Option<Leaf>, Break> {
    let code = match access {
        Access::Read => 0,
        Access::Write => FAULT_WRITE,
        Access::Fetch => FAULT_FETCH,
    };
    let mut path = [(0_usize, 0_u64); 5];
    let mut table = sregs.cr3 & FRAME;
    let mut rights = WRITABLE | USER;
    let mut no_execute = 0;
    for level in (1..=levels(sregs)).rev() {
        let shift = 12 + 9 * (u32::from(level) - 1);
        let gpa = table + ((linear >> shift) & 511) * 8;
        // A table outside RAM is KVM's to make sense of.
        let at = ram.offset(gpa).ok_or(Break::Stop(Stop::Foreign))?;
        let entry = ram.load(at, 8);
        if entry & PRESENT == 0 {
            return Err(page_fault(linear, code));
        }
        if has_reserved_bits(sregs, entry, level, shift) {
            return Err(Break::Stop(Stop::Foreign));
        }
        rights &= entry;
        no_execute |= entry & NO_EXECUTE;
        path[level as usize - 1] = (at, entry);
        if level == 1 || (level <= 3 && entry & LARGE != 0) {
            check(sregs, linear, access, rights, no_execute, code, alignment_check)?;
            if sregs.cr4 & CR4_PKE != 0 && rights & USER != 0 && entry & KEY != 0 {
                // Protection keys: PKRU lies in the vector state.
                return Err(Break::Stop(Stop::Foreign));
            }
            if !mark(ram, &path, level as usize - 1, access) {
                return Ok(None);
            }
            let within = (1_u64 << shift) - 1;
            let gpa = (entry & FRAME & !within) | (linear & within);
            return Ok(Some(Leaf { gpa, global: entry & GLOBAL != 0 }));
        }
        table = entry & FRAME;
    }
    Ok(None)
}

/// Whether a present entry has a bit that must be clear, so that an access faults however it is meant. Bits beyond the
/// processor's addresses need no look: there is no RAM.
fn has_reserved_bits(sregs: &kvm_sregs, entry: u64, level: u8, shift: u32) -> bool {
    // Bit 12 of a large page's entry is one of its memory type.
    let within = ((1_u64 << shift) - 1) & !0x1fff;
    let large = level > 1 && entry & LARGE != 0;
    (entry & NO_EXECUTE != 0 && sregs.efer & EFER_NXE == 0) || (large && (level > 3 || entry & within != 0))
}

/// The rights of a supervisor access (SDM vol. 3, 4.6.1).
fn check(
    sregs: &kvm_sregs,
    linear: u64,
    access: Access,
    rights: u64,
    no_execute: u64,
    code: u32,
    alignment_check: bool,
) -> Result<(), Break> {
    let user = rights & USER != 0;
    let refused = match access {
        Access::Fetch => {
            (user && sregs.cr4 & CR4_SMEP != 0) || (no_execute != 0 && sregs.efer & EFER_NXE != 0)
        }
        _ if user && sregs.cr4 & CR4_SMAP != 0 && !alignment_check => true,
        Access::Write => rights & WRITABLE == 0 && sregs.cr0 & CR0_WP != 0,
        Access::Read => false,
    };
    if refused { Err(page_fault(linear, code | FAULT_PRESENT)) } else { Ok(()) }
}

/// Sets accessed and dirty bits (SDM vol. 3, 4.8); false if an entry has changed meanwhile.
fn mark(ram: &Ram, path: &[(usize, u64); 5], leaf: usize, access: Access) -> bool {
    path.iter().enumerate().skip(leaf).all(|(index, &(at, entry))| {
        let dirty = if index == leaf && access == Access::Write { DIRTY } else { 0 };
        let marked = entry | ACCESSED | dirty;
        // Entries above the root are zero: there is nothing to mark.
        entry == 0 || marked == entry || ram.compare_exchange(at, 8, entry, marked).is_ok()
    })
}
