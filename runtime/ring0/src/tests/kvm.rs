//! What software KVM keeps of a guest's page tables: a model of its shadow paging.
//!
//! It makes a shadow table of a guest's table when ring 3 needs it, entry by entry, and finds it again by the page's
//! number, the level and the rights above. It never looks at a guest's entry again while it has made something of it: only a
//! touch makes it forget.

use crate::paging::{ACCESSED, DIRTY, FRAME, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use std::collections::HashMap;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

/// What ring 3 does to an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Want {
    Read,
    Write,
    Fetch,
}

/// Writable, executable; always of the user's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Rights {
    write: bool,
    execute: bool,
}

const ALL: Rights = Rights { write: true, execute: true };

impl Rights {
    fn below(self, entry: u64) -> Self {
        Self { write: self.write && entry & WRITABLE != 0, execute: self.execute && entry & NO_EXECUTE == 0 }
    }

    fn allow(self, want: Want) -> bool {
        match want {
            Want::Read => true,
            Want::Write => self.write,
            Want::Fetch => self.execute,
        }
    }
}

/// How a shadow table is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Key {
    page: u64,
    level: u8,
    rights: Rights,
}

#[derive(Clone, Copy, Debug)]
enum Made {
    Link(Key),
    Leaf { frame: u64, rights: Rights },
}

/// See the module's text.
#[derive(Default)]
pub(super) struct Kvm {
    tables: HashMap<Key, HashMap<u64, Made>>,
}

/// Where a walk of the guest's own tables leads.
struct Walk {
    /// Places and entries from the root down.
    path: Vec<(u64, u64)>,
    rights: Rights,
}

fn index(linear: u64, level: u8) -> u64 {
    linear >> (12 + 9 * (u32::from(level) - 1)) & 511
}

fn is_leaf(entry: u64, level: u8) -> bool {
    level == 1 || (level < 4 && entry & LARGE != 0)
}

/// `None` if it is nothing of the user's.
fn walk(memory: &GuestMemoryMmap<()>, root: u64, linear: u64) -> Option<Walk> {
    let mut walk = Walk { path: Vec::new(), rights: ALL };
    let mut table = root;
    for level in (1..=4).rev() {
        let at = table + index(linear, level) * 8;
        let entry: u64 = memory.read_obj(GuestAddress(at)).unwrap();
        if entry & PRESENT == 0 || entry & USER == 0 {
            return None;
        }
        walk.path.push((at, entry));
        walk.rights = walk.rights.below(entry);
        if is_leaf(entry, level) {
            break;
        }
        table = entry & FRAME;
    }
    Some(walk)
}

impl Kvm {
    fn root(page: u64) -> Key {
        Key { page, level: 4, rights: ALL }
    }

    /// Ring 3 reaches for an address: the processor finds it in the shadow tables, or KVM walks the guest's, sets the
    /// bits that a processor sets, and makes shadows of what it has found.
    pub(super) fn access(&mut self, memory: &GuestMemoryMmap<()>, root: u64, linear: u64, want: Want) {
        if self.has(root, linear, want) {
            return;
        }
        let Some(mut found) = walk(memory, root, linear).filter(|walk| walk.rights.allow(want)) else {
            return;
        };
        let last = found.path.len() - 1;
        for (number, (at, entry)) in found.path.iter_mut().enumerate() {
            *entry |= ACCESSED | if number == last && want == Want::Write { DIRTY } else { 0 };
            memory.write_obj(*entry, GuestAddress(*at)).unwrap();
        }
        let mut key = Self::root(root);
        let mut rights = ALL;
        for (number, (_, entry)) in found.path.into_iter().enumerate() {
            rights = rights.below(entry);
            let table = self.tables.entry(key).or_default();
            let slot = index(linear, key.level);
            if number == last {
                // What is not dirty is not writable, so that KVM sees the first write.
                let write = rights.write && entry & DIRTY != 0;
                let frame = entry & FRAME;
                table.insert(slot, Made::Leaf { frame, rights: Rights { write, ..rights } });
                return;
            }
            let child = match table.get(&slot) {
                Some(&Made::Link(child)) => child,
                _ => Key { page: entry & FRAME, level: key.level - 1, rights },
            };
            table.insert(slot, Made::Link(child));
            key = child;
        }
    }

    fn has(&self, root: u64, linear: u64, want: Want) -> bool {
        let mut key = Self::root(root);
        loop {
            match self.tables.get(&key).and_then(|table| table.get(&index(linear, key.level))) {
                Some(&Made::Link(child)) => key = child,
                Some(Made::Leaf { rights, .. }) => return rights.allow(want),
                None => return false,
            }
        }
    }

    /// A store to a guest-physical address that KVM has emulated.
    pub(super) fn touch(&mut self, gpa: u64) {
        let (page, offset) = (gpa & FRAME, gpa % 4096);
        if offset % 8 == 0 {
            let of_page = self.tables.iter_mut().filter(|(key, _)| key.page == page);
            of_page.for_each(|(_, table)| _ = table.remove(&(offset / 8)));
            return;
        }
        // It crosses entries: all that was made of the page goes, and what leads there.
        self.tables.retain(|key, _| key.page != page);
        for table in self.tables.values_mut() {
            table.retain(|_, made| !matches!(made, Made::Link(child) if child.page == page));
        }
    }

    /// What is kept for this root and is more than the guest's tables allow now.
    pub(super) fn wrong(&self, memory: &GuestMemoryMmap<()>, root: u64) -> Option<String> {
        self.wrong_below(memory, root, Self::root(root), 0)
    }

    fn wrong_below(&self, memory: &GuestMemoryMmap<()>, root: u64, key: Key, base: u64) -> Option<String> {
        for (&slot, made) in self.tables.get(&key)? {
            let linear = base | slot << (12 + 9 * (u32::from(key.level) - 1));
            let wrong = match made {
                Made::Link(child) => self.wrong_below(memory, root, *child, linear),
                Made::Leaf { frame, rights } => {
                    let right = walk(memory, root, linear).is_some_and(|now| {
                        let (_, leaf) = *now.path.last().unwrap();
                        let marked = now.path.iter().all(|(_, entry)| entry & ACCESSED != 0);
                        now.path.len() == 5 - key.level as usize
                            && leaf & FRAME == *frame
                            && (now.rights.write && leaf & DIRTY != 0 || !rights.write)
                            && (now.rights.execute || !rights.execute)
                            && marked
                    });
                    (!right).then(|| format!("{linear:#x} of root {root:#x}: {made:x?} of {key:x?}"))
                }
            };
            if wrong.is_some() {
                return wrong;
            }
        }
        None
    }
}
