//! A guest: some RAM, page tables, descriptor tables, and handlers that halt.
//!
//! ```text
//!   0x1000   page tables, the root first
//!   0x40000  IDT, GDT, TSS, one page each; handlers of 16 bytes a vector; the IST's stack
//!   0x50000  pages for the test
//! ```
//!
//! All of RAM is mapped at [`DIRECT`], where Linux has it.

use crate::book::CodeBook;
use crate::cpu::FIXED;
use crate::engine::Engine;
use crate::paging::{ACCESSED, DIRTY, LARGE, PRESENT, USER, WRITABLE};
use crate::ram::Ram;
use crate::stop::Stop;
use kvm_bindings::kvm_segment;
use std::sync::Arc;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

pub(super) const RAM_BYTES: u64 = 8 << 20;
/// Where all of RAM is mapped.
pub(super) const DIRECT: u64 = 0xffff_8880_0000_0000;
pub(super) const ROOT: u64 = 0x1000;
pub(super) const IDT: u64 = 0x4_0000;
pub(super) const GDT: u64 = 0x4_1000;
pub(super) const TSS: u64 = 0x4_2000;
pub(super) const HANDLERS: u64 = 0x4_3000;
/// One beyond the stack that all vectors of [`Guest::new`] use.
pub(super) const IST_TOP: u64 = 0x4_5000;
const FREE: u64 = 0x5_0000;

/// Selectors of the ring's code and data, as in Linux.
pub(super) const KERNEL_CS: u16 = 0x10;
pub(super) const KERNEL_SS: u16 = 0x18;
pub(super) const USER_SS: u16 = 0x2b;
pub(super) const USER_CS: u16 = 0x33;

pub(super) const CR4: u64 = 1 << 5 | 1 << 7;
pub(super) const CR4_SMEP: u64 = 1 << 20;
pub(super) const CR4_SMAP: u64 = 1 << 21;
const CR0: u64 = 1 << 31 | 1 << 16 | 1 << 5 | 1;
const EFER: u64 = 1 << 11 | 1 << 10 | 1 << 8 | 1;

/// A page of an exception's stack: what the processor leaves there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) code: Option<u64>,
    pub(super) rip: u64,
    pub(super) cs: u64,
    pub(super) flags: u64,
    pub(super) rsp: u64,
    pub(super) ss: u64,
}

/// See the module's text.
pub(super) struct Guest {
    pub(super) engine: Engine,
    memory: Arc<GuestMemoryMmap<()>>,
    next_table: u64,
    next_page: u64,
}

impl Guest {
    pub(super) fn new() -> Self {
        Self::with_book(Arc::default())
    }

    /// One whose engine has a book.
    pub(super) fn with_book(book: Arc<CodeBook>) -> Self {
        let ranges = [(GuestAddress(0), RAM_BYTES as usize)];
        let memory = Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap());
        let engine = Engine::with_book(Ram::new(Arc::clone(&memory)), book);
        let mut guest = Self { engine, memory, next_table: ROOT + 0x1000, next_page: FREE };
        for at in (0..RAM_BYTES).step_by(2 << 20) {
            guest.map_at(DIRECT + at, at | PRESENT | WRITABLE | LARGE | ACCESSED | DIRTY, 2);
        }
        guest.describe();
        guest
    }

    fn describe(&mut self) {
        let flat = 0x00cf_9300_0000_ffff_u64;
        let code = 0x00af_9b00_0000_ffff_u64;
        for (selector, descriptor) in [
            (KERNEL_CS, code),
            (KERNEL_SS, flat),
            (USER_SS & !3, flat | 3 << 45),
            (USER_CS & !3, code | 3 << 45),
        ] {
            self.write(GDT + u64::from(selector), descriptor);
        }
        for vector in 0..32 {
            self.gate(vector, 14, 1);
            self.write_bytes(HANDLERS + 16 * u64::from(vector), &[0xf4]);
        }
        self.write_bytes(TSS + 0x24, &(DIRECT + IST_TOP).to_le_bytes());
        let kernel = kvm_segment { limit: 0xffff_ffff, present: 1, s: 1, g: 1, ..Default::default() };
        let sregs = &mut self.engine.cpu_mut().sregs;
        sregs.cs = kvm_segment { selector: KERNEL_CS, type_: 11, l: 1, ..kernel };
        sregs.ss = kvm_segment { selector: KERNEL_SS, type_: 3, db: 1, ..kernel };
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (CR0, ROOT, CR4, EFER);
        (sregs.gdt.base, sregs.gdt.limit) = (DIRECT + GDT, 0x7f);
        (sregs.idt.base, sregs.idt.limit) = (DIRECT + IDT, 0xfff);
        (sregs.tr.base, sregs.tr.limit) = (DIRECT + TSS, 0x67);
        self.engine.cpu_mut().flags = FIXED;
    }

    /// A gate of the IDT to the vector's handler: `kind` is 14 for interrupts, 15 for traps.
    pub(super) fn gate(&mut self, vector: u8, kind: u64, ist: u64) {
        let handler = Self::handler(vector);
        let selector = u64::from(KERNEL_CS);
        let low = handler & 0xffff | selector << 16 | ist << 32 | kind << 40 | 1 << 47;
        self.write(IDT + 16 * u64::from(vector), low | (handler & 0xffff_0000) << 32);
        self.write(IDT + 16 * u64::from(vector) + 8, handler >> 32);
    }

    /// Where a vector's handler is.
    pub(super) fn handler(vector: u8) -> u64 {
        DIRECT + HANDLERS + 16 * u64::from(vector)
    }

    /// The vector whose handler the guest has halted in.
    pub(super) fn vector(&self) -> Option<u8> {
        let within = self.rip().checked_sub(DIRECT + HANDLERS).filter(|&within| within < 32 * 16)?;
        (within % 16 == 0).then_some((within / 16) as u8)
    }

    /// What an exception has left below `top`.
    pub(super) fn frame(&self, top: u64) -> Frame {
        let rsp = self.engine.cpu().regs().rsp;
        let words = (top - rsp) / 8;
        let mut at = rsp - DIRECT;
        let mut next = || {
            at += 8;
            self.read(at - 8)
        };
        let code = (words == 6).then(&mut next);
        Frame { code, rip: next(), cs: next(), flags: next(), rsp: next(), ss: next() }
    }

    /// An unused page of RAM, zeroed.
    pub(super) fn page(&mut self) -> u64 {
        self.next_page += 0x1000;
        assert!(self.next_page <= RAM_BYTES);
        self.next_page - 0x1000
    }

    /// Maps a page of 4 KiB.
    pub(super) fn map(&mut self, linear: u64, gpa: u64, rights: u64) {
        self.map_at(linear, gpa | rights, 1);
    }

    /// Writes the entry of a linear address at some level.
    pub(super) fn map_at(&mut self, linear: u64, entry: u64, level: u8) {
        let at = self.entry(linear, level);
        self.write(at, entry);
    }

    /// Where the entry of a linear address at some level is; tables on the way are made.
    pub(super) fn entry(&mut self, linear: u64, level: u8) -> u64 {
        let mut table = ROOT;
        for above in (level + 1..=4).rev() {
            let at = table + Self::index(linear, above) * 8;
            if self.read(at) & PRESENT == 0 {
                assert!(self.next_table < IDT);
                self.write(at, self.next_table | PRESENT | WRITABLE | USER);
                self.next_table += 0x1000;
            }
            table = self.read(at) & crate::paging::FRAME;
        }
        table + Self::index(linear, level) * 8
    }

    /// The same of one that is there.
    pub(super) fn entry_of(&self, linear: u64, level: u8) -> u64 {
        let mut table = ROOT;
        for above in (level + 1..=4).rev() {
            table = self.read(table + Self::index(linear, above) * 8) & crate::paging::FRAME;
        }
        table + Self::index(linear, level) * 8
    }

    /// A page of code, where all of RAM is mapped.
    pub(super) fn code(&mut self, bytes: &[u8]) -> u64 {
        let page = self.page();
        self.write_bytes(page, bytes);
        self.write_bytes(page + bytes.len() as u64, &[0xf4]);
        DIRECT + page
    }

    /// The middle of a page for a stack.
    pub(super) fn stack(&mut self) -> u64 {
        DIRECT + self.page() + 0x800
    }

    fn index(linear: u64, level: u8) -> u64 {
        linear >> (12 + 9 * (u32::from(level) - 1)) & 511
    }

    pub(super) fn read(&self, gpa: u64) -> u64 {
        self.memory.read_obj(GuestAddress(gpa)).unwrap()
    }

    pub(super) fn write(&mut self, gpa: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    pub(super) fn read_bytes(&self, gpa: u64, into: &mut [u8]) {
        self.memory.read_slice(into, GuestAddress(gpa)).unwrap();
    }

    /// Bytes as somebody else writes them: the engine does not see it.
    pub(super) fn write_bytes(&mut self, gpa: u64, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    pub(super) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    pub(super) fn rip(&self) -> u64 {
        self.engine.cpu().rip
    }

    pub(super) fn reg(&self, number: u8) -> u64 {
        self.engine.cpu().gpr[number as usize]
    }

    pub(super) fn registers(&self) -> [u64; 16] {
        std::array::from_fn(|number| self.engine.cpu().gpr[number])
    }

    pub(super) fn set_reg(&mut self, number: u8, value: u64) {
        self.engine.cpu_mut().gpr[number as usize] = value;
    }

    /// Runs from an address until the engine stops.
    pub(super) fn run_at(&mut self, rip: u64) -> Stop {
        self.engine.cpu_mut().rip = rip;
        self.engine.run(1 << 20)
    }
}
