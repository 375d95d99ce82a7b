//! What KVM may have made of the guest's page tables, and how it is told that they have changed.
//!
//! Software KVM runs ring 3 on shadow page tables. It builds them from the guest's while ring 3 runs, and mends
//! them when it sees a store to a guest page table, which it does while it emulates ring 0 itself. Stores of ours
//! it does not see. So: a page is *marked* with its level while it is a page table that KVM can have walked for
//! ring 3, that is, reachable from a root that was in CR3 then, through entries of the lower half. Each store to a marked page
//! is looked at. What adds a translation needs nothing, for KVM walks the guest's tables where it has none. What
//! takes one away, or takes rights or the accessed or dirty bit from it, is a *touch*: before ring 3 runs again KVM
//! must emulate a store to that entry. So is any change of a link's rights, for they are part of how KVM finds the
//! table again. A page that stops being a table is touched as a whole, for KVM remembers it by its number, and loses
//! its mark.
//!
//! ```text
//!   no mark --root in CR3 at ring 3; link written in a marked table--> marked, level n
//!   marked --last link to it taken away; root without entries--> whole page touched, no mark
//! ```

use crate::paging::{ACCESSED, DIRTY, FRAME, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use crate::ram::{PAGE, Ram};
use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

/// In a page's mark: code was decoded from it.
const CODE: u8 = 0x80;
/// In a page's mark: its level as a table.
const LEVEL: u8 = 0x07;
/// Entries of a table touched one by one; beyond, KVM is to forget the whole table.
const MOST_ENTRIES: usize = 4;
/// A root's entries below this one are the lower half's.
const LOWER_HALF: usize = 256;
/// What a page that becomes a table, or is one no more, takes by itself, in entries looked at.
const WATCH: u64 = 16;
/// Eight bytes at this offset of a page lie across two entries: KVM takes such a store for no page-table update, and
/// drops all that it made of the page. (Four bytes would do, but for those KVM looks at the whole entry around them.)
const ACROSS_ENTRIES: u64 = 4;

/// Page numbers need no hash that withstands anybody: whoever makes them collide slows himself down.
#[derive(Default)]
pub(crate) struct PageHasher(u64);

impl Hasher for PageHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.write_u64(u64::from(byte));
        }
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = (self.0 ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }

    fn write_usize(&mut self, value: usize) {
        self.write_u64(value as u64);
    }
}

pub(crate) type PageMap<V> = HashMap<usize, V, BuildHasherDefault<PageHasher>>;

/// Entries of one table that KVM must see touched.
#[derive(Clone, Copy, Debug)]
struct Touched {
    /// A linear address of the page, and its offset in RAM.
    linear: u64,
    at: usize,
    entries: [u16; MOST_ENTRIES],
    count: usize,
    whole: bool,
}

/// See the module's text.
pub(crate) struct Shadow {
    /// By page of RAM.
    marks: Vec<u8>,
    /// How many marked entries link to a marked table that is no root.
    links: PageMap<u32>,
    touched: PageMap<Touched>,
    /// Pages with [`CODE`].
    code: Vec<usize>,
    root_level: u8,
    /// Entries looked at for a table that became one or was one: a guest's store can make that very many.
    looked: u64,
}

/// A store that KVM must be shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Touch {
    /// The linear address of eight bytes to store to.
    pub linear: u64,
    /// Where in RAM they are.
    pub at: usize,
}

impl Shadow {
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            marks: vec![0; pages],
            links: PageMap::default(),
            touched: PageMap::default(),
            code: Vec::new(),
            root_level: 4,
            looked: 0,
        }
    }

    /// Entries looked at so far, all tables together.
    #[inline]
    pub(crate) fn looked(&self) -> u64 {
        self.looked
    }

    /// Whether stores to the page of this offset must be looked at.
    #[inline]
    pub(crate) fn watches(&self, at: usize) -> bool {
        self.marks[at / PAGE] != 0
    }

    /// Whether the page is marked as a table.
    #[inline]
    pub(crate) fn is_table(&self, at: usize) -> bool {
        self.marks[at / PAGE] & LEVEL != 0
    }

    /// Whether code was decoded from the page.
    #[inline]
    pub(crate) fn is_code(&self, at: usize) -> bool {
        self.marks[at / PAGE] & CODE != 0
    }

    /// Code is decoded from the page of this offset; true if it was not before.
    pub(crate) fn mark_code(&mut self, at: usize) -> bool {
        let mark = &mut self.marks[at / PAGE];
        let new = *mark & CODE == 0;
        if new {
            *mark |= CODE;
            self.code.push(at / PAGE);
        }
        new
    }

    /// Nothing decoded is left.
    pub(crate) fn forget_code(&mut self) {
        for page in self.code.drain(..) {
            self.marks[page] &= !CODE;
        }
    }

    /// The tables below this root will be walked by KVM. Pages whose stores are watched from now on go to `watch`.
    pub(crate) fn enter(&mut self, ram: &Ram, root: u64, levels: u8, watch: &mut impl FnMut(usize)) {
        self.root_level = levels;
        if let Some(at) = ram.offset(root & FRAME)
            && self.marks[at / PAGE] & LEVEL != levels
        {
            self.mark(ram, at, levels, watch);
        }
    }

    fn mark(&mut self, ram: &Ram, at: usize, level: u8, watch: &mut impl FnMut(usize)) {
        let page = at & !(PAGE - 1);
        let mark = &mut self.marks[page / PAGE];
        *mark = *mark & CODE | level;
        watch(page);
        self.looked += WATCH;
        if level == 1 {
            return;
        }
        self.looked += self.entries(level) as u64;
        for index in 0..self.entries(level) {
            self.link(ram, ram.load(page + index * 8, 8), level, watch);
        }
    }

    fn entries(&self, level: u8) -> usize {
        if level == self.root_level { LOWER_HALF } else { PAGE / 8 }
    }

    /// The table that an entry of level `level` leads to.
    fn child(ram: &Ram, entry: u64, level: u8) -> Option<usize> {
        let leads = entry & PRESENT != 0 && level > 1 && (level > 3 || entry & LARGE == 0);
        leads.then(|| ram.offset(entry & FRAME)).flatten()
    }

    fn link(&mut self, ram: &Ram, entry: u64, level: u8, watch: &mut impl FnMut(usize)) {
        let Some(child) = Self::child(ram, entry, level) else {
            return;
        };
        *self.links.entry(child / PAGE).or_insert(0) += 1;
        let known = self.marks[child / PAGE] & LEVEL;
        // A table that is linked at two levels (a hostile guest's) keeps its higher mark: tables below it are followed.
        if known < level - 1 {
            self.mark(ram, child, level - 1, watch);
        }
    }

    fn unlink(&mut self, ram: &Ram, entry: u64, level: u8, distance: u64) {
        let Some(child) = Self::child(ram, entry, level) else {
            return;
        };
        let page = child / PAGE;
        if let Some(links) = self.links.get_mut(&page) {
            *links -= 1;
            if *links > 0 {
                return;
            }
            self.links.remove(&page);
        }
        let known = self.marks[page] & LEVEL;
        // A root that is linked as a table (never Linux') stays marked as long as it is one.
        if known != 0 && known < self.root_level {
            self.unmark(ram, child, known, distance);
        }
    }

    /// A page is a table no more: KVM forgets it, and what it leads to.
    fn unmark(&mut self, ram: &Ram, at: usize, level: u8, distance: u64) {
        let page = at & !(PAGE - 1);
        self.marks[page / PAGE] &= !LEVEL;
        let linear = ram.gpa(page).unwrap_or(0).wrapping_add(distance);
        self.touch(linear, page, None);
        self.looked += WATCH;
        if level > 1 {
            self.looked += self.entries(level) as u64;
            for index in 0..self.entries(level) {
                self.unlink(ram, ram.load(page + index * 8, 8), level, distance);
            }
        }
    }

    fn touch(&mut self, linear: u64, at: usize, entry: Option<usize>) {
        let page = at / PAGE;
        let fresh = Touched {
            linear: linear & !(PAGE as u64 - 1),
            at: at & !(PAGE - 1),
            entries: [0; MOST_ENTRIES],
            count: 0,
            whole: false,
        };
        let touched = self.touched.entry(page).or_insert(fresh);
        match entry.map(|index| index as u16) {
            Some(index) if touched.entries[..touched.count].contains(&index) => {}
            Some(index) if touched.count < MOST_ENTRIES => {
                touched.entries[touched.count] = index;
                touched.count += 1;
            }
            _ => touched.whole = true,
        }
    }

    /// An entry of a marked table has changed: `at` is its offset in RAM, `linear` where it was written.
    pub(crate) fn changed(
        &mut self,
        ram: &Ram,
        linear: u64,
        at: usize,
        (old, new): (u64, u64),
        watch: &mut impl FnMut(usize),
    ) {
        let level = self.marks[at / PAGE] & LEVEL;
        let index = at % PAGE / 8;
        if old == new || level == 0 || index >= self.entries(level) {
            return;
        }
        let (led, leads) = (Self::child(ram, old, level), Self::child(ram, new, level));
        // Below a link KVM keeps translations under the link's rights: with more of them it must not add to those.
        let other_rights = led.is_some() && (old ^ new) & (WRITABLE | USER | NO_EXECUTE) != 0;
        if takes_away(old, new) || other_rights {
            self.touch(linear, at, Some(index));
        }
        if led != leads {
            let distance = linear.wrapping_sub(ram.gpa(at).unwrap_or(0));
            // New before old: a table that moves keeps its mark if this is the same store.
            self.link(ram, new, level, watch);
            self.unlink(ram, old, level, distance);
        }
        let page = at & !(PAGE - 1);
        if level == self.root_level && new & PRESENT == 0 && self.is_empty_root(ram, page) {
            self.marks[page / PAGE] &= !LEVEL;
            self.touch(linear, page, None);
        }
    }

    fn is_empty_root(&self, ram: &Ram, page: usize) -> bool {
        (0..LOWER_HALF).all(|index| ram.load(page + index * 8, 8) & PRESENT == 0)
    }

    /// Whether there is something that KVM must be shown.
    #[inline]
    pub(crate) fn has_touches(&self) -> bool {
        !self.touched.is_empty()
    }

    /// The stores that KVM must be shown before ring 3 runs.
    pub(crate) fn take_touches(&mut self, into: &mut Vec<Touch>) {
        for (_, table) in self.touched.drain() {
            if table.whole {
                let touch =
                    Touch { linear: table.linear + ACROSS_ENTRIES, at: table.at + ACROSS_ENTRIES as usize };
                into.push(touch);
                continue;
            }
            for &index in &table.entries[..table.count] {
                let offset = usize::from(index) * 8;
                into.push(Touch { linear: table.linear + offset as u64, at: table.at + offset });
            }
        }
    }
}

/// Whether a translation that KVM has made of `old` is more than `new` allows.
fn takes_away(old: u64, new: u64) -> bool {
    if old & PRESENT == 0 {
        return false;
    }
    let kept = PRESENT | FRAME | WRITABLE | USER | ACCESSED | DIRTY | LARGE;
    let lost = old & !new & kept != 0;
    let moved = (old ^ new) & (FRAME | LARGE) != 0;
    lost || moved || new & !old & NO_EXECUTE != 0
}
