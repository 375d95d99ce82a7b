//! Which stores to page tables KVM is shown, one by one: those that take something away, and no others.

use super::guest::{CR4, DIRECT, Guest, ROOT};
use crate::cpu::RAX;
use crate::paging::{ACCESSED, CR4_LA57, DIRTY, FRAME, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use crate::stop::Stop;

const LINEAR: u64 = 0x7f12_3456_7000;
const GLOBAL: u64 = 1 << 8;
const NONE: [u64; 0] = [];
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED;
const LEAF: u64 = 0x10_0000 | TABLE | DIRTY;

impl Guest {
    /// A guest whose ring 3 has run with `LINEAR` mapped.
    fn with_a_program() -> Self {
        let mut guest = Self::new();
        guest.map_at(LINEAR, LEAF, 1);
        assert_eq!(guest.touches(), NONE);
        guest
    }

    /// Ring 3 is entered: what KVM is shown, by guest-physical address.
    fn touches(&mut self) -> Vec<u64> {
        let mut touches = Vec::new();
        self.engine.enter_ring3(&mut touches);
        let mut all: Vec<u64> = touches.iter().map(|touch| touch.at as u64).collect();
        assert!(touches.iter().all(|touch| touch.linear == DIRECT + touch.at as u64));
        all.sort_unstable();
        all
    }

    fn store(&mut self, at: u64, value: u64) {
        self.engine.cpu_mut().store(DIRECT + at, 8, value).unwrap();
    }

    fn watches(&self, page: u64) -> bool {
        self.engine.cpu().shadow.watches(page as usize)
    }
}

/// The place in a page that has KVM forget all of it.
fn whole(page: u64) -> u64 {
    page + 4
}

#[test]
fn what_adds_to_an_entry_is_shown_to_nobody_and_what_takes_from_it_is() {
    let bits = [PRESENT, WRITABLE, USER, ACCESSED, DIRTY];
    for bit in bits {
        let mut guest = Guest::with_a_program();
        let at = guest.entry_of(LINEAR, 1);
        guest.store(at, LEAF & !bit);
        assert_eq!(guest.touches(), [at], "{bit:#x}");
        guest.store(at, LEAF);
        assert_eq!(guest.touches(), NONE, "{bit:#x}");
    }
    let mut guest = Guest::with_a_program();
    let at = guest.entry_of(LINEAR, 1);
    guest.store(at, LEAF | NO_EXECUTE);
    assert_eq!(guest.touches(), [at]);
    guest.store(at, LEAF | GLOBAL);
    assert_eq!(guest.touches(), NONE);
    guest.store(at, LEAF + 0x1000);
    assert_eq!(guest.touches(), [at]);
    // What was there no translation can be of, and was there twice.
    guest.store(at, 0);
    guest.store(at, LEAF & !PRESENT);
    guest.store(at, LEAF);
    assert_eq!(guest.touches(), [at]);
    assert_eq!(guest.touches(), NONE, "once is enough");
}

/// KVM would add what the link allows now to what it keeps for links of the former rights, and find it there again when
/// the link has those again.
#[test]
fn a_link_that_allows_more_is_shown_too() {
    for (before, after) in [(TABLE & !WRITABLE, TABLE), (TABLE & !USER, TABLE), (TABLE | NO_EXECUTE, TABLE)] {
        for level in 2..=4 {
            let mut guest = Guest::new();
            guest.map_at(LINEAR, LEAF, 1);
            let at = guest.entry_of(LINEAR, level);
            let table = guest.read(at) & FRAME;
            guest.write(at, table | before);
            assert_eq!(guest.touches(), NONE);
            guest.store(at, table | after);
            assert_eq!(guest.touches(), [at]);
            assert!(guest.watches(table));
            guest.store(at, table | after | DIRTY);
            assert_eq!(guest.touches(), NONE, "what is no right");
        }
    }
}

#[test]
fn many_entries_of_a_table_are_shown_as_all_of_it() {
    for count in 1..7 {
        let mut guest = Guest::with_a_program();
        let table = guest.entry_of(LINEAR, 1) & FRAME;
        for slot in 0..count {
            guest.store(table + slot * 8, LEAF);
            guest.store(table + slot * 8, 0);
        }
        let expected =
            if count > 4 { vec![whole(table)] } else { (0..count).map(|slot| table + slot * 8).collect() };
        assert_eq!(guest.touches(), expected);
        assert_eq!(guest.touches(), NONE);
    }
}

#[test]
fn a_table_that_nothing_leads_to_is_forgotten_with_all_below_it() {
    for level in 2..=4 {
        let mut guest = Guest::with_a_program();
        let places = [1, 2, 3, 4].map(|level| guest.entry_of(LINEAR, level));
        let tables = places.map(|place| place & FRAME);
        assert!(tables.iter().all(|&table| guest.watches(table)));
        let other = guest.page();
        assert!(!guest.watches(other) && !guest.watches(0x10_0000));
        if level == 4 {
            // Something is left, so that it stays a root.
            guest.store(ROOT, other | TABLE);
        }
        guest.store(places[level - 1], 0);
        let mut expected: Vec<u64> = tables[..level - 1].iter().map(|&table| whole(table)).collect();
        expected.push(places[level - 1]);
        expected.sort_unstable();
        assert_eq!(guest.touches(), expected);
        for (number, &table) in tables.iter().enumerate() {
            assert_eq!(guest.watches(table), number >= level - 1);
        }
        // It is data now.
        guest.store(tables[0], LEAF);
        guest.store(tables[0], 0);
        assert_eq!(guest.touches(), NONE);
    }
}

#[test]
fn a_table_that_moves_stays_one_or_becomes_one_again() {
    for old_first in [true, false] {
        let mut guest = Guest::with_a_program();
        let from = guest.entry_of(LINEAR, 2);
        let to = from ^ 8;
        let entry = guest.read(from);
        let table = entry & FRAME;
        let mut expected = vec![from];
        if old_first {
            guest.store(from, 0);
            guest.store(to, entry);
            expected.push(whole(table));
        } else {
            guest.store(to, entry);
            guest.store(from, 0);
        }
        expected.sort_unstable();
        assert_eq!(guest.touches(), expected);
        assert!(guest.watches(table));
        guest.store(table, LEAF);
        guest.store(table, 0);
        assert_eq!(guest.touches(), [table]);
    }
}

#[test]
fn the_kernels_half_of_a_root_is_no_business_of_ring_3() {
    let mut guest = Guest::with_a_program();
    for slot in [256, 300, 511] {
        let old = guest.read(ROOT + slot * 8);
        guest.store(ROOT + slot * 8, LEAF);
        guest.store(ROOT + slot * 8, old);
    }
    assert_eq!(guest.touches(), NONE);
    assert!(!guest.watches(guest.entry_of(DIRECT, 3)));
    // But that of other tables is everybody's.
    let table = guest.entry_of(LINEAR, 1) & FRAME;
    guest.store(table + 511 * 8, LEAF);
    guest.store(table + 511 * 8, 0);
    assert_eq!(guest.touches(), [table + 511 * 8]);
}

#[test]
fn a_root_without_a_program_is_none() {
    let mut guest = Guest::with_a_program();
    let (place, second) = (guest.entry_of(LINEAR, 4), guest.page());
    guest.store(ROOT, second | TABLE);
    guest.store(ROOT, 0);
    assert_eq!(guest.touches(), [ROOT, whole(second)]);
    assert!(guest.watches(ROOT));
    guest.store(place, 0);
    assert!(!guest.watches(ROOT));
    let mut touches = Vec::new();
    guest.engine.cpu_mut().shadow.take_touches(&mut touches);
    assert!(touches.iter().any(|touch| touch.at as u64 == whole(ROOT)));
}

#[test]
fn a_table_of_two_parents_is_one_until_both_are_gone() {
    let mut guest = Guest::with_a_program();
    let place = guest.entry_of(LINEAR, 3);
    let (entry, other) = (guest.read(place), place ^ 8);
    let below = [entry & FRAME, guest.entry_of(LINEAR, 1) & FRAME];
    guest.store(other, entry);
    guest.store(place, 0);
    assert_eq!(guest.touches(), [place]);
    assert!(below.iter().all(|&table| guest.watches(table)));
    guest.store(other, 0);
    let mut expected = vec![other, whole(below[0]), whole(below[1])];
    expected.sort_unstable();
    assert_eq!(guest.touches(), expected);
    assert!(!below.iter().any(|&table| guest.watches(table)));
}

#[test]
fn the_root_of_five_levels_is_one_too() {
    let mut guest = Guest::new();
    guest.map_at(LINEAR, LEAF, 1);
    let root = guest.page();
    guest.write(root, ROOT | TABLE);
    guest.write(root + 511 * 8, ROOT | TABLE);
    let mut sregs = guest.engine.cpu().sregs;
    (sregs.cr3, sregs.cr4) = (root, CR4 | CR4_LA57);
    guest.engine.cpu_mut().set_sregs(&sregs);
    assert_eq!(guest.touches(), NONE);
    assert!(guest.watches(root) && guest.watches(ROOT));
    // Its second level has no kernel's half.
    let at = ROOT + 300 * 8;
    let spare = guest.page();
    guest.engine.cpu_mut().store((DIRECT & !(511 << 48)) + at, 8, spare | TABLE).unwrap_err();
    let kernel = 511 << 48 | DIRECT;
    guest.engine.cpu_mut().store(kernel + at, 8, spare | TABLE).unwrap();
    assert!(guest.watches(spare));
}

#[test]
fn a_store_across_two_entries_is_one_to_both() {
    for (offset, bytes) in [(4, 8), (1, 8), (7, 8), (6, 4), (7, 2)] {
        let mut guest = Guest::with_a_program();
        let table = guest.entry_of(LINEAR, 1) & FRAME;
        for slot in 0..3 {
            guest.store(table + slot * 8, u64::MAX);
        }
        assert_eq!(guest.touches(), NONE);
        guest.engine.cpu_mut().store(DIRECT + table + offset, bytes, 0).unwrap();
        // The last byte of an entry is software's and NX, which is given here; the others have more.
        let expected = if offset == 7 { vec![table + 8] } else { vec![table, table + 8] };
        let second = guest.read(table + 8);
        assert_ne!(second, u64::MAX);
        assert_eq!(guest.touches(), expected, "{offset}");
    }
    // Across the end of the table, into a page that is none.
    let mut guest = Guest::with_a_program();
    let table = guest.entry_of(LINEAR, 1) & FRAME;
    guest.store(table + 0xff8, u64::MAX);
    guest.engine.cpu_mut().store(DIRECT + table + 0xffc, 8, 0).unwrap();
    assert_eq!(guest.touches(), [table + 0xff8]);
}

#[test]
fn a_large_page_is_no_table_and_a_table_in_its_place_is_one() {
    let mut guest = Guest::with_a_program();
    let (place, spare) = (guest.entry_of(LINEAR, 2), guest.page());
    let large = 0x20_0000 | TABLE | DIRTY | LARGE;
    guest.store(place ^ 8, large);
    assert!(!guest.watches(0x20_0000));
    assert_eq!(guest.touches(), NONE);
    guest.store(place ^ 8, spare | TABLE);
    assert!(guest.watches(spare));
    assert_eq!(guest.touches(), [place ^ 8]);
    guest.store(place ^ 8, large);
    let mut expected = vec![place ^ 8, whole(spare)];
    expected.sort_unstable();
    assert_eq!(guest.touches(), expected);
    assert!(!guest.watches(spare) && !guest.watches(0x20_0000));
}

#[test]
fn a_page_of_code_that_is_a_table_too_is_still_code() {
    let mut guest = Guest::with_a_program();
    let table = guest.page();
    // mov eax, 0; hlt
    guest.write(table, 0xf400_0000_00b8);
    assert_eq!(guest.run_at(DIRECT + table), Stop::Halt);
    let place = guest.entry_of(LINEAR, 2) ^ 8;
    guest.store(place, table | TABLE);
    guest.engine.cpu_mut().store(DIRECT + table + 1, 1, 7).unwrap();
    assert_eq!(guest.run_at(DIRECT + table), Stop::Halt);
    assert_eq!(guest.reg(RAX), 7);
    // Nor does it stop being a table when it is code no more.
    assert!(guest.watches(table));
    guest.store(place, 0);
    assert_eq!(guest.touches().len(), 2);
}

/// Linux never does these; a guest that does must not be able to hide anything.
#[test]
fn a_page_that_is_a_table_of_two_levels_is_followed_as_the_higher() {
    let mut guest = Guest::with_a_program();
    let (low, data) = (guest.entry_of(LINEAR, 1) & FRAME, guest.page());
    guest.store(low + 8, data | TABLE);
    assert!(!guest.watches(data));
    let third = guest.entry_of(LINEAR, 3);
    guest.store(third ^ 8, low | TABLE);
    assert!(guest.watches(data), "it is a table's table now");
    guest.touches();
    guest.store(data, LEAF);
    guest.store(data, 0);
    assert_eq!(guest.touches(), [data]);
}

#[test]
fn a_root_that_is_linked_as_a_table_stays_a_root_when_the_link_goes() {
    let mut guest = Guest::with_a_program();
    let root = guest.page();
    let third = guest.entry_of(LINEAR, 4);
    guest.write(root, guest.read(third));
    for slot in 256..512 {
        guest.write(root + slot * 8, guest.read(ROOT + slot * 8));
    }
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr3 = root;
    guest.engine.cpu_mut().set_sregs(&sregs);
    assert_eq!(guest.touches(), NONE);
    guest.store(ROOT, root | TABLE);
    guest.store(ROOT, 0);
    assert_eq!(guest.touches(), [ROOT]);
    assert!(guest.watches(root));
    guest.store(root, guest.read(root) & !WRITABLE);
    assert_eq!(guest.touches(), [root]);
}

#[test]
fn a_single_byte_of_a_link_takes_its_table_away() {
    let mut guest = Guest::with_a_program();
    let place = guest.entry_of(LINEAR, 2);
    let table = guest.read(place) & FRAME;
    // Beyond RAM.
    guest.engine.cpu_mut().store(DIRECT + place + 5, 1, 1).unwrap();
    let mut expected = vec![place, whole(table)];
    expected.sort_unstable();
    assert_eq!(guest.touches(), expected);
    assert!(!guest.watches(table));
}
