//! A second opinion on the doorbell and on bulk streams: the processor's page walk written down once more, as
//! plainly as possible, over a copy of guest memory. What they did must be what this allows.

use crate::cpu::FakeCpu;
use std::collections::BTreeSet;

const PAGE: u64 = 4096;
const PRESENT: u64 = 1;
const WRITABLE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 0x80;
const FRAME: u64 = 0x000f_ffff_ffff_f000;
/// Bits 46 to 51: over the width of [`crate::cpu::intel`].
const TOO_HIGH: u64 = 0x000f_c000_0000_0000;
const NO_EXECUTE: u64 = 1 << 63;

/// Guest memory as it was: ranges of guest-physical addresses and their bytes.
pub(crate) struct Ram {
    pub(crate) ranges: Vec<(u64, Vec<u8>)>,
    /// Addresses of the page-table entries that walks have read.
    pub(crate) walked: BTreeSet<u64>,
}

impl Ram {
    /// The bytes of the page frame at `gpa`, if it is RAM.
    pub(crate) fn page(&mut self, gpa: u64) -> Option<&mut [u8]> {
        let start = gpa & !(PAGE - 1);
        self.ranges.iter_mut().find_map(|(at, bytes)| {
            let offset = usize::try_from(start.checked_sub(*at)?).ok()?;
            bytes.get_mut(offset..offset + PAGE as usize)
        })
    }

    /// Whether a walk has read an entry in the page frame at `gpa`.
    pub(crate) fn is_table(&self, gpa: u64) -> bool {
        let start = gpa & !(PAGE - 1);
        self.walked.range(start..start + PAGE).next().is_some()
    }

    /// Sets bits of the entry at `gpa`.
    pub(crate) fn mark(&mut self, gpa: u64, bits: u64) {
        let within = (gpa % PAGE) as usize;
        if let Some(page) = self.page(gpa) {
            // All marks stand in its first byte.
            page[within] |= bits.to_le_bytes()[0];
        }
    }

    fn entry(&mut self, gpa: u64) -> Option<u64> {
        self.walked.insert(gpa);
        let within = (gpa % PAGE) as usize;
        let page = self.page(gpa)?;
        page.get(within..within + 8)?.try_into().ok().map(u64::from_le_bytes)
    }
}

/// Whose access it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Supervisor,
    /// A supervisor's instruction fetch.
    Fetch,
    /// A program in ring 3.
    User,
}

/// A translated address.
pub(crate) struct Reached {
    pub(crate) gpa: u64,
    /// Where the entry is that maps it.
    pub(crate) entry: u64,
    /// One leaf maps more than a page: it may leave RAM, and then the doorbell may give up early.
    pub(crate) large: bool,
}

/// Where an access to `linear` goes; `None` if it faults. What is there may be no RAM.
pub(crate) fn walk(
    ram: &mut Ram,
    cpu: &FakeCpu,
    pkru: u32,
    who: Who,
    linear: u64,
    write: bool,
) -> Option<Reached> {
    let cr4 = cpu.sregs.cr4;
    let five = cr4 >> 12 & 1 == 1;
    let sign = linear as i64 >> if five { 56 } else { 47 };
    if sign != 0 && sign != -1 {
        return None;
    }
    let bad = if cpu.sregs.efer >> 11 & 1 == 0 { TOO_HIGH | NO_EXECUTE } else { TOO_HIGH };
    let (mut table, mut all_writable, mut all_user) = (cpu.sregs.cr3 & FRAME & !TOO_HIGH, true, true);
    let mut no_execute = false;
    let shifts: &[u32] = if five { &[48, 39, 30, 21, 12] } else { &[39, 30, 21, 12] };
    for &shift in shifts {
        let at = table + (linear >> shift & 511) * 8;
        let entry = ram.entry(at)?;
        if entry & PRESENT == 0 || entry & bad != 0 {
            return None;
        }
        all_writable &= entry & WRITABLE != 0;
        all_user &= entry & USER != 0;
        no_execute |= entry & NO_EXECUTE != 0;
        if shift >= 39 && entry & LARGE != 0 {
            return None;
        }
        let large = shift != 12 && entry & LARGE != 0;
        let mask = (1_u64 << shift) - 1;
        if large && entry & mask & !0x1fff != 0 {
            return None;
        }
        if shift != 12 && !large {
            table = entry & FRAME;
            continue;
        }
        let smap = cr4 >> 21 & 1 == 1 && cpu.regs.rflags >> 18 & 1 == 0;
        let protected = cpu.sregs.cr0 >> 16 & 1 == 1;
        let key = pkru >> (2 * (entry >> 59 & 15));
        let keyed = cr4 >> 22 & 1 == 1 && all_user;
        let denied = match who {
            Who::Supervisor => {
                all_user && smap
                    || keyed && key & 1 == 1
                    || keyed && write && protected && key & 2 == 2
                    || write && protected && !all_writable
            }
            Who::Fetch => no_execute || all_user && cr4 >> 20 & 1 == 1,
            // CR0.WP and SMAP are none of a program's business.
            Who::User => {
                !all_user || write && !all_writable || keyed && (key & 1 == 1 || write && key & 2 == 2)
            }
        };
        if denied {
            return None;
        }
        let gpa = (entry & FRAME & !mask) | (linear & mask);
        return Some(Reached { gpa, entry: at, large });
    }
    None
}
