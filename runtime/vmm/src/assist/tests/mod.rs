//! Tests of the assist on a machine made of plain data: a fake vCPU, 8 MiB of RAM with a hole, real
//! page tables. `native.rs` alone runs the instructions themselves, to compare.
#![allow(clippy::unwrap_used)]

mod arbitrary;
mod decoding;
mod descriptor;
mod integer;
mod native;
mod paging;
mod system;
mod xstate;
mod xstate_faults;

use kvm_bindings::{kvm_regs, kvm_sregs};
use proptest::prelude::ProptestConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::fake::FakeCpu;
use super::{Exception, HostCpu, Op, Unassisted, assist};

pub(crate) const PRESENT: u64 = 1;
pub(crate) const WRITABLE: u64 = 1 << 1;
pub(crate) const USER: u64 = 1 << 2;
pub(crate) const ACCESSED: u64 = 1 << 5;
pub(crate) const DIRTY: u64 = 1 << 6;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const KERNEL: u64 = PRESENT | WRITABLE;

pub(crate) const CR0_MP: u64 = 1 << 1;
pub(crate) const CR0_TS: u64 = 1 << 3;
pub(crate) const CR0_WP: u64 = 1 << 16;
pub(crate) const CR4_OSFXSR: u64 = 1 << 9;
pub(crate) const CR4_LA57: u64 = 1 << 12;
pub(crate) const CR4_FSGSBASE: u64 = 1 << 16;
pub(crate) const CR4_OSXSAVE: u64 = 1 << 18;
pub(crate) const CR4_SMAP: u64 = 1 << 21;
pub(crate) const CR4_PKE: u64 = 1 << 22;
pub(crate) const EFER_NXE: u64 = 1 << 11;
pub(crate) const RFLAGS_AC: u64 = 1 << 18;

/// RAM is 0 to 4 MiB and 6 to 10 MiB.
pub(crate) const RAM: [(u64, usize); 2] = [(0, 4 << 20), (6 << 20, 4 << 20)];
/// A guest-physical address in the hole.
pub(crate) const HOLE: u64 = 5 << 20;
/// Where page tables start.
const TABLES: u64 = 0x10_0000;
/// Where code is.
pub(crate) const RIP: u64 = 0xffff_ffff_8100_0000;
/// Eight writable kernel pages, and the RAM behind them.
pub(crate) const DATA: u64 = 0xffff_8880_0000_0000;
pub(crate) const DATA_GPA: u64 = 0x20_0000;
pub(crate) const DATA_PAGES: u64 = 8;

/// Settings of the property tests: no files of failed seeds beside the sources.
pub(crate) fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

/// A fake vCPU with RAM and page tables.
pub(crate) struct Machine {
    pub(crate) cpu: FakeCpu,
    pub(crate) mem: GuestMemoryMmap<()>,
    pub(crate) host: HostCpu,
    next_table: u64,
}

impl Machine {
    /// Ring 0 of a 64-bit kernel, with [`DATA`] mapped.
    pub(crate) fn new() -> Self {
        Self::with_ram(&RAM)
    }

    pub(crate) fn with_ram(ram: &[(u64, usize)]) -> Self {
        let ranges: Vec<_> = ram.iter().map(|(at, len)| (GuestAddress(*at), *len)).collect();
        let mut sregs = kvm_sregs {
            cr0: 0x8005_0033 & !CR0_TS,
            cr3: TABLES,
            cr4: 0x20 | CR4_OSFXSR | CR4_OSXSAVE | CR4_FSGSBASE,
            efer: 0x500 | EFER_NXE,
            ..Default::default()
        };
        sregs.cs.l = 1;
        sregs.cs.selector = 0x10;
        let cpu = FakeCpu {
            regs: kvm_regs { rip: RIP, rflags: 2, rsp: DATA + 0x800, ..Default::default() },
            sregs,
            image: native::initial_image(),
            commits: 0,
            xcr0: native::xcr0(),
            msr: 0,
            tsc: 0x0123_4567_89ab_cdef,
            injected: Vec::new(),
        };
        let mut machine = Self {
            cpu,
            mem: GuestMemoryMmap::from_ranges(&ranges).unwrap(),
            host: (*HostCpu::this()).clone(),
            next_table: TABLES + 0x1000,
        };
        for page in 0..DATA_PAGES {
            machine.map(DATA + page * 0x1000, DATA_GPA + page * 0x1000, KERNEL);
        }
        machine
    }

    /// Maps one 4 KiB page.
    pub(crate) fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        self.map_at(linear, gpa, flags, 1);
    }

    /// Maps one page at a level: 1 is 4 KiB, 2 is 2 MiB, 3 is 1 GiB.
    pub(crate) fn map_at(&mut self, linear: u64, gpa: u64, flags: u64, level: u32) {
        let large = if level > 1 { LARGE } else { 0 };
        let at = self.entry(linear, level);
        self.write_u64(at, gpa | flags | large);
    }

    /// Guest-physical address of the entry that maps `linear` at a level, making tables on the way.
    pub(crate) fn entry(&mut self, linear: u64, level: u32) -> u64 {
        let top = if self.cpu.sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 };
        let mut table = self.cpu.sregs.cr3;
        for current in (1..=top).rev() {
            let at = table + (linear >> (12 + 9 * (current - 1)) & 511) * 8;
            if current == level {
                return at;
            }
            let mut entry = self.read_u64(at);
            if entry & PRESENT == 0 {
                entry = self.next_table | KERNEL | USER;
                self.next_table += 0x1000;
                self.write_u64(at, entry);
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        unreachable!("level {level}")
    }

    pub(crate) fn read_u64(&self, gpa: u64) -> u64 {
        self.mem.read_obj(GuestAddress(gpa)).unwrap()
    }

    pub(crate) fn write_u64(&self, gpa: u64, value: u64) {
        self.mem.write_obj(value, GuestAddress(gpa)).unwrap();
    }

    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
        bytes
    }

    pub(crate) fn write(&self, gpa: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(gpa)).unwrap();
    }

    /// Does one instruction, whatever comes of it.
    pub(crate) fn run(&mut self, bytes: &[u8]) -> Result<Op, Unassisted> {
        assist(&mut self.cpu, &self.host, &self.mem, bytes)
    }

    /// Does one instruction that must complete.
    pub(crate) fn done(&mut self, bytes: &[u8]) -> Op {
        let rip = self.cpu.regs.rip;
        let op = self.run(bytes).unwrap();
        assert_eq!(self.cpu.injected, [], "no exception");
        assert_eq!(self.cpu.regs.rip, rip.wrapping_add(bytes.len() as u64), "RIP is past it");
        op
    }

    /// Does one instruction that must fault, and leave RIP and the extended state as they were.
    pub(crate) fn fault(&mut self, bytes: &[u8]) -> Exception {
        let (rip, commits) = (self.cpu.regs.rip, self.cpu.commits);
        self.run(bytes).unwrap();
        assert_eq!(self.cpu.regs.rip, rip, "RIP stays at a fault");
        assert_eq!(self.cpu.commits, commits, "no state is committed at a fault");
        assert_eq!(self.cpu.injected.len(), 1, "one exception");
        self.cpu.injected.remove(0)
    }
}

/// A processor as Intel makes them: a hole where MPX was, PKRU, and AMX aligned when compacted.
pub(crate) fn intel() -> HostCpu {
    HostCpu::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0xd, 0) => [0x602e7, 0, 0, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 1088, 0, 0],
        (0xd, 6) => [512, 1152, 0, 0],
        (0xd, 7) => [1024, 1664, 0, 0],
        (0xd, 9) => [8, 2688, 0, 0],
        (0xd, 17) => [64, 2752, 2, 0],
        (0xd, 18) => [8192, 2816, 6, 0],
        (0x8000_0000, _) => [0x8000_0008, 0, 0, 0],
        (0x8000_0008, _) => [46, 0, 0, 0],
        _ => [0; 4],
    })
}

pub(crate) fn general_protection() -> Exception {
    Exception { vector: 13, error_code: Some(0), cr2: None }
}

pub(crate) fn page_fault(error_code: u32, cr2: u64) -> Exception {
    Exception { vector: 14, error_code: Some(error_code), cr2: Some(cr2) }
}

pub(crate) fn plain(vector: u8) -> Exception {
    Exception { vector, error_code: None, cr2: None }
}
