//! Page tables as a kernel changes them, against a model of what KVM makes of them: after the touches, KVM believes
//! nothing that is no longer so.

use super::guest::{DIRECT, Guest};
use super::kvm::{Kvm, Want};
use super::random::Random;
use crate::BULK_PORT;
use crate::cpu::{RAX, RCX, RDI, RDX, RSI};
use crate::paging::{ACCESSED, DIRTY, FRAME, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use crate::stop::Stop;
use std::collections::HashMap;

/// Pages that are tables or data.
const PAGES: usize = 48;
const MOST_ROOTS: usize = 3;
const TABLE: u64 = PRESENT | WRITABLE | USER | ACCESSED | DIRTY;

/// A kernel: address spaces, and pages that become tables and data in turn.
struct Kernel {
    guest: Guest,
    kvm: Kvm,
    random: Random,
    roots: Vec<u64>,
    current: usize,
    free: Vec<u64>,
    data: Vec<u64>,
    /// How many entries lead to a table.
    links: HashMap<u64, u32>,
    /// rep stosq; rep movsq; out dx, eax; each with a HLT behind it.
    code: [u64; 3],
    template: u64,
}

impl Kernel {
    fn new(seed: u64) -> Self {
        let mut guest = Guest::new();
        let code = [&[0xf3, 0x48, 0xab][..], &[0xf3, 0x48, 0xa5], &[0xef]].map(|bytes| guest.code(bytes));
        let free = (0..PAGES).map(|_| guest.page()).collect();
        let mut kernel = Self {
            guest,
            kvm: Kvm::default(),
            random: Random::new(seed),
            roots: Vec::new(),
            current: 0,
            free,
            data: Vec::new(),
            links: HashMap::new(),
            code,
            template: super::guest::ROOT,
        };
        kernel.new_root();
        kernel.switch(0);
        kernel
    }

    // Stores, in the ways that kernels have for them.

    fn read(&self, at: u64) -> u64 {
        self.guest.read(at)
    }

    fn put(&mut self, at: u64, value: u64) {
        let old = self.read(at);
        let cpu = self.guest.engine.cpu_mut();
        let linear = DIRECT + at;
        let differ = old ^ value;
        let byte = differ.trailing_zeros() / 8;
        match self.random.below(4) {
            0 => {
                let place = cpu.place(linear, 8).unwrap();
                cpu.modify_place(place, 8, true, |_, _| value);
            }
            1 if differ != 0 && differ >> (8 * byte) < 256 => {
                let (linear, value) = (linear + u64::from(byte), value >> (8 * byte) & 0xff);
                let place = cpu.place(linear, 1).unwrap();
                cpu.modify_place(place, 1, true, |_, _| value);
            }
            2 => {
                cpu.store(linear, 4, value & 0xffff_ffff).unwrap();
                cpu.store(linear + 4, 4, value >> 32).unwrap();
            }
            _ => cpu.store(linear, 8, value).unwrap(),
        }
        assert_eq!(self.read(at), value);
    }

    fn clear(&mut self, page: u64, bytes: u64) {
        let doorbell = self.random.once_in(2);
        self.guest.set_reg(RAX, if doorbell { 2 } else { 0 });
        self.guest.set_reg(RDI, DIRECT + page);
        self.guest.set_reg(RSI, 0);
        self.guest.set_reg(RDX, u64::from(BULK_PORT));
        self.guest.set_reg(RCX, if doorbell { bytes } else { bytes / 8 });
        assert_eq!(self.guest.run_at(self.code[if doorbell { 2 } else { 0 }]), Stop::Halt);
        assert_eq!(self.guest.reg(RCX), 0);
    }

    fn copy(&mut self, to: u64, from: u64, bytes: u64) {
        self.guest.set_reg(RDI, DIRECT + to);
        self.guest.set_reg(RSI, DIRECT + from);
        self.guest.set_reg(RCX, bytes / 8);
        assert_eq!(self.guest.run_at(self.code[1]), Stop::Halt);
    }

    // Address spaces.

    fn new_root(&mut self) {
        let Some(root) = self.take_page() else { return };
        self.clear(root, 2048);
        self.copy(root + 2048, self.template + 2048, 2048);
        self.roots.push(root);
    }

    fn switch(&mut self, to: usize) {
        self.current = to;
        let mut sregs = self.guest.engine.cpu().sregs;
        sregs.cr3 = self.roots[to];
        self.guest.engine.cpu_mut().set_sregs(&sregs);
    }

    fn exit(&mut self) {
        if self.roots.len() < 2 {
            return;
        }
        let mut gone = self.random.below(self.roots.len() as u64) as usize;
        if gone == self.current {
            gone = (gone + 1) % self.roots.len();
        }
        let root = self.roots[gone];
        self.exit_root(root);
        self.roots.remove(gone);
        self.current -= usize::from(gone < self.current);
    }

    fn exit_root(&mut self, root: u64) {
        for slot in 0..256 {
            self.unlink(root + slot * 8);
        }
        self.free.push(root);
    }

    // Tables.

    /// A page for a table or for data: one that was something else a moment ago, rather.
    fn take_page(&mut self) -> Option<u64> {
        let recent = self.free.len().min(3) as u64;
        if recent == 0 {
            return None;
        }
        let at = self.free.len() - 1 - self.random.below(recent) as usize;
        Some(self.free.swap_remove(at))
    }

    fn address(&mut self) -> u64 {
        let random = &mut self.random;
        random.pick(&[0, 5, 255]) << 39
            | random.pick(&[0, 511]) << 30
            | random.pick(&[0, 1, 300]) << 21
            | random.pick(&[0, 1, 255, 256, 511]) << 12
    }

    fn index(linear: u64, level: u8) -> u64 {
        linear >> (12 + 9 * (u32::from(level) - 1)) & 511
    }

    /// The place of an address's entry of a level, if there is a table for it.
    fn place(&self, root: u64, linear: u64, level: u8) -> Option<u64> {
        let mut table = root;
        for above in (level + 1..=4).rev() {
            let entry = self.read(table + Self::index(linear, above) * 8);
            if entry & PRESENT == 0 || (above < 4 && entry & LARGE != 0) {
                return None;
            }
            table = entry & FRAME;
        }
        Some(table + Self::index(linear, level) * 8)
    }

    /// The same, with tables made where there are none.
    fn place_made(&mut self, root: u64, linear: u64, level: u8) -> Option<u64> {
        for above in (level + 1..=4).rev() {
            let at = self.place(root, linear, above)?;
            if self.read(at) & PRESENT != 0 {
                continue;
            }
            let table = self.take_page()?;
            self.clear(table, 4096);
            if self.random.once_in(2) && above == 2 {
                // Filled before it is linked.
                let slot = table + Self::index(linear, 1) * 8;
                let leaf = self.leaf();
                self.put(slot, leaf);
            }
            self.links.insert(table, 1);
            let fewer = self.random.pick(&[0, 0, 0, WRITABLE, USER, ACCESSED]);
            self.put(at, table | TABLE & !fewer);
        }
        self.place(root, linear, level)
    }

    fn leaf(&mut self) -> u64 {
        let frame = 0x10_0000 + self.random.below(8) * 0x1000;
        let bits = self.random.next() & (WRITABLE | USER | ACCESSED | DIRTY | NO_EXECUTE);
        let usual = if self.random.once_in(2) { WRITABLE | USER | ACCESSED | DIRTY } else { USER };
        frame | PRESENT | bits | usual
    }

    /// Clears an entry, and frees what only it led to.
    fn unlink(&mut self, at: u64) {
        let entry = self.read(at);
        if entry & PRESENT == 0 {
            return;
        }
        self.put(at, 0);
        self.drop_link(entry);
    }

    fn drop_link(&mut self, entry: u64) {
        let page = entry & FRAME;
        let Some(links) = self.links.get_mut(&page).filter(|_| entry & (PRESENT | LARGE) == PRESENT) else {
            return;
        };
        *links -= 1;
        if *links > 0 {
            return;
        }
        self.links.remove(&page);
        // Its entries stay, or are cleared one by one: the page is nobody's any more either way.
        let tidy = self.random.once_in(2);
        for slot in 0..512 {
            let below = self.read(page + slot * 8);
            if tidy && below != 0 {
                self.put(page + slot * 8, 0);
            }
            self.drop_link(below);
        }
        self.free.push(page);
    }

    // What a kernel does.

    fn step(&mut self) {
        let root = self.random.pick(&self.roots);
        let linear = self.address();
        match self.random.below(20) {
            0..5 => self.fault(root, linear),
            5..8 => self.change(root, linear),
            8 => self.unmap(root, linear),
            9 => self.relocate(root, linear),
            10 => self.share(root, linear),
            11 | 12 => self.large(root, linear),
            13 | 14 => self.use_data(),
            15 if self.roots.len() < MOST_ROOTS => self.new_root(),
            15 => self.exit(),
            16 => {
                let to = self.random.below(self.roots.len() as u64) as usize;
                self.switch(to);
            }
            _ => self.ring3(),
        }
    }

    fn fault(&mut self, root: u64, linear: u64) {
        if let Some(at) = self.place_made(root, linear, 1) {
            let leaf = self.leaf();
            self.put(at, leaf);
        }
    }

    /// An entry of any level loses or gains a right or a bit, or all, or its frame.
    fn change(&mut self, root: u64, linear: u64) {
        let level = self.random.pick(&[1, 1, 1, 2, 3]);
        let Some(at) = self.place(root, linear, level) else { return };
        let entry = self.read(at);
        if entry & PRESENT == 0 {
            return;
        }
        let bit = self.random.pick(&[WRITABLE, USER, ACCESSED, DIRTY, NO_EXECUTE]);
        let is_leaf = level == 1 || entry & LARGE != 0;
        match self.random.below(6) {
            0 if is_leaf => self.put(at, 0),
            1 if is_leaf => self.put(at, entry & !PRESENT),
            2 if is_leaf => {
                let other = self.leaf() & FRAME;
                self.put(at, entry & !FRAME | if level == 1 { other } else { entry & FRAME ^ 0x20_0000 });
            }
            3 => self.put(at, entry | bit),
            _ => self.put(at, entry & !bit),
        }
    }

    fn unmap(&mut self, root: u64, linear: u64) {
        let level = self.random.pick(&[2, 2, 3, 4]);
        if let Some(at) = self.place(root, linear, level) {
            self.unlink(at);
        }
    }

    /// A table goes to another address.
    fn relocate(&mut self, root: u64, linear: u64) {
        let level = self.random.pick(&[2, 2, 3]);
        let elsewhere = self.address();
        let (Some(from), Some(to)) =
            (self.place(root, linear, level), self.place_made(root, elsewhere, level))
        else {
            return;
        };
        let entry = self.read(from);
        if from == to || entry & PRESENT == 0 || self.read(to) & PRESENT != 0 {
            return;
        }
        if self.random.once_in(2) {
            self.put(from, 0);
            self.put(to, entry);
        } else {
            self.put(to, entry);
            self.put(from, 0);
        }
    }

    /// Two address spaces have one table.
    fn share(&mut self, root: u64, linear: u64) {
        let other = self.random.pick(&self.roots);
        let (Some(from), Some(to)) = (self.place(root, linear, 3), self.place_made(other, linear, 3)) else {
            return;
        };
        let entry = self.read(from);
        if root != other && entry & (PRESENT | LARGE) == PRESENT && self.read(to) & PRESENT == 0 {
            *self.links.get_mut(&(entry & FRAME)).unwrap() += 1;
            self.put(to, entry);
        }
    }

    /// A large page comes, takes the place of a table, or is taken apart.
    fn large(&mut self, root: u64, linear: u64) {
        let Some(at) = self.place_made(root, linear, 2) else { return };
        let entry = self.read(at);
        let page = self.leaf() & !FRAME | LARGE | (1 + self.random.below(2)) << 21;
        if entry & (PRESENT | LARGE) != PRESENT | LARGE {
            if self.random.once_in(2) {
                self.unlink(at);
                self.put(at, page);
            } else {
                self.put(at, page);
                self.drop_link(entry);
            }
            return;
        }
        let Some(table) = self.take_page() else { return };
        self.clear(table, 4096);
        for slot in [0, 1, 255, 256, 511] {
            let rights = self.random.pick(&[TABLE, TABLE & !WRITABLE]);
            self.put(table + slot * 8, entry & FRAME | slot << 12 | rights);
        }
        self.links.insert(table, 1);
        if self.random.once_in(2) {
            self.put(at, entry & !PRESENT);
        }
        self.put(at, table | TABLE);
    }

    /// A page becomes data, is written to, or is no data any more. What is written may look like entries.
    fn use_data(&mut self) {
        if let Some(page) = self.take_page() {
            self.data.push(page);
        }
        if self.data.is_empty() {
            return;
        }
        let at = self.random.below(self.data.len() as u64) as usize;
        let page = self.data[at];
        for _ in 0..self.random.below(20) {
            let slot = self.random.pick(&[0, 1, 5, 255, 256, 300, 511]);
            let value = match self.random.below(3) {
                0 => self.random.next(),
                1 => self.leaf(),
                _ => self.free.first().copied().unwrap_or(0) | TABLE,
            };
            self.put(page + slot * 8, value);
        }
        if self.data.len() > 6 {
            let page = self.data.swap_remove(at);
            self.free.push(page);
        }
    }

    /// Ring 3 runs for a while.
    fn ring3(&mut self) {
        let root = self.roots[self.current];
        if (0..256).all(|slot| self.read(root + slot * 8) & PRESENT == 0) {
            // There is no program.
            return;
        }
        let mut touches = Vec::new();
        self.guest.engine.enter_ring3(&mut touches);
        for touch in touches {
            assert_eq!(touch.linear, DIRECT + touch.at as u64);
            self.kvm.touch(touch.at as u64);
        }
        for &root in &self.roots {
            if let Some(wrong) = self.kvm.wrong(self.guest.memory(), root) {
                panic!("KVM believes in {wrong}");
            }
        }
        for _ in 0..self.random.below(12) {
            let linear = self.address();
            let want = self.random.pick(&[Want::Read, Want::Write, Want::Fetch]);
            self.kvm.access(self.guest.memory(), root, linear, want);
        }
    }
}

#[test]
fn kvm_is_told_of_everything_that_it_must_not_believe_any_more() {
    for seed in 0..super::differential::number("RING0_SEEDS", 60) {
        println!("seed {seed}");
        let mut kernel = Kernel::new(seed);
        for _ in 0..2000 {
            kernel.step();
        }
        // All ends: nothing is watched for nothing.
        for root in std::mem::take(&mut kernel.roots) {
            kernel.exit_root(root);
        }
        let shadow = &kernel.guest.engine.cpu().shadow;
        let marked = kernel.free.iter().chain(&kernel.data).filter(|page| shadow.is_table(**page as usize));
        assert_eq!(marked.count(), 0, "pages that are no tables are watched");
    }
}
