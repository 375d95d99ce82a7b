//! Translations of linear pages, kept between accesses.
//!
//! Direct-mapped, one array for each kind of access. A flush of the lower or upper half of the address space is a
//! new generation; a translation whose page needs a second look at each store (it holds code or a page table)
//! is not kept for writing.

use crate::ram::PAGE;

const ENTRIES: usize = 512;
/// Where the generation stands in a tag; the page number is below.
const GENERATION: u32 = 52;
const LAST_GENERATION: u64 = (1 << (64 - GENERATION)) - 1;

#[derive(Clone, Copy, Default)]
struct Entry {
    tag: u64,
    /// Offset of the page in RAM.
    at: usize,
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Loads.
    Read,
    /// Stores, or loads of what is about to be stored to.
    Write,
    /// Instruction fetches.
    Fetch,
}

/// See the module's text.
pub(crate) struct Tlb {
    kinds: [Box<[Entry; ENTRIES]>; 3],
    /// Of the lower half, the user's, and of the upper, the kernel's.
    generations: [u64; 2],
}

impl Tlb {
    pub(crate) fn new() -> Self {
        let empty = || Box::new([Entry::default(); ENTRIES]);
        Self { kinds: [empty(), empty(), empty()], generations: [1, 1] }
    }

    #[inline]
    fn tag(&self, linear: u64) -> u64 {
        (linear >> 12) | (self.generations[(linear >> 63) as usize] << GENERATION)
    }

    /// Where in RAM `linear` lies, if `bytes` from there are in one page whose translation is known.
    #[inline]
    pub(crate) fn find(&self, linear: u64, bytes: usize, access: Access) -> Option<usize> {
        let entry = &self.kinds[access as usize][(linear >> 12) as usize % ENTRIES];
        let within = linear as usize % PAGE;
        (entry.tag == self.tag(linear) && within + bytes <= PAGE).then_some(entry.at + within)
    }

    /// Keeps a translation; `at` is anywhere in the page.
    pub(crate) fn keep(&mut self, linear: u64, at: usize, access: Access) {
        let tag = self.tag(linear);
        self.kinds[access as usize][(linear >> 12) as usize % ENTRIES] = Entry { tag, at: at & !(PAGE - 1) };
    }

    /// Forgets all of one half of the address space.
    pub(crate) fn flush_half(&mut self, upper: bool) {
        let generation = &mut self.generations[usize::from(upper)];
        *generation += 1;
        if *generation > LAST_GENERATION {
            *generation = 1;
            for kind in &mut self.kinds {
                kind.fill(Entry::default());
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn flush(&mut self) {
        self.flush_half(false);
        self.flush_half(true);
    }

    /// Stores to this page of RAM have to be looked at from now on.
    pub(crate) fn watch(&mut self, at: usize) {
        let page = at & !(PAGE - 1);
        for entry in self.kinds[Access::Write as usize].iter_mut().filter(|entry| entry.at == page) {
            *entry = Entry::default();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const USER: u64 = 0x7fff_1234_5000;
    const KERNEL: u64 = 0xffff_8880_0000_3000;

    #[test]
    fn a_translation_is_found_until_its_half_is_flushed() {
        let mut tlb = Tlb::new();
        tlb.keep(USER, 0x1234, Access::Read);
        tlb.keep(KERNEL, 0x5678, Access::Read);
        assert_eq!(tlb.find(USER + 8, 8, Access::Read), Some(0x1008));
        assert_eq!(tlb.find(USER + 8, 8, Access::Write), None);
        assert_eq!(tlb.find(USER + 0xffc, 8, Access::Read), None, "crosses a page");
        tlb.flush_half(false);
        assert_eq!(tlb.find(USER, 1, Access::Read), None);
        assert_eq!(tlb.find(KERNEL, 1, Access::Read), Some(0x5000));
        tlb.flush_half(true);
        assert_eq!(tlb.find(KERNEL, 1, Access::Read), None);
    }

    #[test]
    fn a_generation_never_comes_back_with_what_it_knew() {
        let mut tlb = Tlb::new();
        tlb.keep(USER, 0x1000, Access::Write);
        for _ in 0..2 * LAST_GENERATION {
            tlb.flush_half(false);
            assert_eq!(tlb.find(USER, 1, Access::Write), None);
        }
    }

    #[test]
    fn a_watched_page_is_not_written_unseen() {
        let mut tlb = Tlb::new();
        for linear in [USER, KERNEL] {
            tlb.keep(linear, 0x3000, Access::Write);
            tlb.keep(linear, 0x3000, Access::Read);
        }
        tlb.watch(0x3123);
        assert_eq!(tlb.find(USER, 1, Access::Write), None);
        assert_eq!(tlb.find(KERNEL, 1, Access::Write), None);
        assert_eq!(tlb.find(USER, 1, Access::Read), Some(0x3000));
    }
}
