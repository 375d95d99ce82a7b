//! The page walk: what it finds, what it marks, how it faults.

use super::*;
use crate::assist::Reason;

/// `popcnt rax, [rsi]`: reads 8 bytes.
const READ: &[u8] = &[0xf3, 0x48, 0x0f, 0xb8, 0x06];
/// `movbe [rsi], rax`: writes 8 bytes.
const WRITE: &[u8] = &[0x48, 0x0f, 0x38, 0xf1, 0x06];
/// A linear address nothing is mapped at.
const FREE: u64 = 0xffff_9000_0000_0000;
const GPA: u64 = 0x30_0000;

fn machine_at(linear: u64) -> Machine {
    let mut m = Machine::new();
    m.cpu.regs.rsi = linear;
    m.cpu.regs.rax = 0x0807_0605_0403_0201;
    m
}

#[test]
fn large_pages_map_their_whole_range() {
    for (level, base, offset) in [(1, GPA, 0x123), (2, 0x20_0000, 0x1f_0123), (3, 0, 0x30_0123)] {
        let mut m = machine_at(FREE + offset);
        m.map_at(FREE, base, KERNEL, level);
        m.done(WRITE);
        assert_eq!(m.bytes(base + offset, 8), [8, 7, 6, 5, 4, 3, 2, 1], "level {level}");
        m.done(READ);
        assert_eq!(m.cpu.regs.rax, 13, "level {level}");
    }
}

#[test]
fn five_level_paging_walks_five_levels() {
    let linear = 0xff00_0000_0000_0000;
    let mut m = machine_at(linear);
    assert_eq!(m.fault(READ), general_protection(), "not canonical with 4 levels");
    m.cpu.sregs.cr4 |= CR4_LA57;
    m.cpu.sregs.cr3 = 0x18_0000;
    m.map(linear, GPA, KERNEL);
    m.write_u64(GPA, 0xff);
    m.done(READ);
    assert_eq!(m.cpu.regs.rax, 8);
}

#[test]
fn reading_sets_accessed_and_writing_dirty_at_the_leaf() {
    let mut m = machine_at(FREE);
    m.map(FREE, GPA, KERNEL);
    let entries: Vec<u64> = (1..=4).map(|level| m.entry(FREE, level)).collect();
    let marks =
        |m: &Machine| entries.iter().map(|at| m.read_u64(*at) & (ACCESSED | DIRTY)).collect::<Vec<_>>();
    assert_eq!(marks(&m), [0; 4]);
    m.done(READ);
    assert_eq!(marks(&m), [ACCESSED; 4]);
    m.done(WRITE);
    assert_eq!(marks(&m), [ACCESSED | DIRTY, ACCESSED, ACCESSED, ACCESSED]);
}

#[test]
fn a_faulting_walk_leaves_the_leaf_unmarked() {
    let mut m = machine_at(FREE);
    m.map(FREE, GPA, PRESENT);
    m.fault(WRITE);
    let at = m.entry(FREE, 1);
    assert_eq!(m.read_u64(at), GPA | PRESENT);
}

#[test]
fn an_absent_entry_at_any_level_faults_with_the_address() {
    for level in 1..=4 {
        let mut m = machine_at(FREE + 0x10);
        m.map(FREE, GPA, KERNEL);
        let at = m.entry(FREE, level);
        m.write_u64(at, m.read_u64(at) & !PRESENT);
        assert_eq!(m.fault(READ), page_fault(0, FREE + 0x10), "level {level}");
        assert_eq!(m.fault(WRITE), page_fault(2, FREE + 0x10), "level {level}");
    }
}

#[test]
fn a_read_only_page_is_written_only_without_write_protection() {
    for level in 1..=4 {
        let mut m = machine_at(FREE);
        m.map(FREE, GPA, KERNEL);
        let at = m.entry(FREE, level);
        m.write_u64(at, m.read_u64(at) & !WRITABLE);
        m.done(READ);
        assert_eq!(m.fault(WRITE), page_fault(3, FREE), "level {level}");
        m.cpu.sregs.cr0 &= !CR0_WP;
        m.done(WRITE);
    }
}

#[test]
fn smap_keeps_user_pages_out_of_reach_unless_ac_is_set() {
    let mut m = machine_at(0x40_0000);
    m.map(0x40_0000, GPA, KERNEL | USER);
    m.done(READ);
    m.cpu.sregs.cr4 |= CR4_SMAP;
    assert_eq!(m.fault(READ), page_fault(1, 0x40_0000));
    assert_eq!(m.fault(WRITE), page_fault(3, 0x40_0000));
    m.cpu.regs.rflags |= RFLAGS_AC;
    m.done(WRITE);
    // A supervisor page below a user-accessible path stays reachable.
    m.cpu.regs.rflags &= !RFLAGS_AC;
    m.cpu.regs.rsi = DATA;
    m.done(WRITE);
}

#[test]
fn protection_keys_bind_the_kernel_on_user_pages() {
    let mut m = machine_at(0x40_0000);
    m.map(0x40_0000, GPA, KERNEL | USER | 3 << 59);
    m.cpu.sregs.cr4 |= CR4_PKE;
    m.host = intel();
    m.cpu.image[513] |= 2;
    for (pkru, read, write) in [(0, true, true), (2, true, false), (1, false, false)] {
        m.cpu.image[2688] = pkru << 6;
        for (bytes, allowed, code) in [(READ, read, 0x21), (WRITE, write, 0x23)] {
            if allowed {
                m.done(bytes);
            } else {
                assert_eq!(m.fault(bytes), page_fault(code, 0x40_0000), "PKRU {pkru}");
            }
        }
    }
    m.cpu.image[513] = 0;
    m.done(READ);
}

#[test]
fn reserved_bits_fault_as_such() {
    let above_physical = 1 << 51;
    for (level, leaf, bit) in [
        (4, 1, LARGE),
        (4, 1, above_physical),
        (3, 1, above_physical),
        (2, 2, 1 << 13),
        (2, 2, 1 << 20),
        (3, 3, 1 << 29),
        (1, 1, above_physical),
    ] {
        let mut m = machine_at(FREE);
        m.host.physical_address_bits = 48;
        m.map_at(FREE, 0, KERNEL, leaf);
        m.done(READ);
        let at = m.entry(FREE, level);
        m.write_u64(at, m.read_u64(at) | bit);
        assert_eq!(m.fault(WRITE), page_fault(0xb, FREE), "level {level}, bit {bit:#x}");
    }
}

#[test]
fn the_pat_bit_of_a_large_page_is_not_part_of_its_address() {
    let mut m = machine_at(FREE);
    m.map_at(FREE, 0x20_0000 | 1 << 12, KERNEL, 2);
    m.done(WRITE);
    assert_eq!(m.bytes(0x20_0000, 1), [8]);
}

#[test]
fn no_execute_is_reserved_only_while_it_is_off() {
    let mut m = machine_at(FREE);
    m.map(FREE, GPA, KERNEL | 1 << 63);
    m.done(READ);
    m.cpu.sregs.efer &= !EFER_NXE;
    assert_eq!(m.fault(READ), page_fault(9, FREE));
}

#[test]
fn an_access_across_pages_goes_to_both_frames() {
    let mut m = machine_at(FREE + 0xffd);
    m.map(FREE, GPA, KERNEL);
    m.map(FREE + 0x1000, GPA + 0x5000, KERNEL);
    m.done(WRITE);
    assert_eq!(m.bytes(GPA + 0xffd, 3), [8, 7, 6]);
    assert_eq!(m.bytes(GPA + 0x5000, 5), [5, 4, 3, 2, 1]);
    m.done(READ);
    assert_eq!(m.cpu.regs.rax, 13);
}

#[test]
fn an_access_that_faults_on_its_second_page_writes_nothing() {
    let mut m = machine_at(FREE + 0xffd);
    m.map(FREE, GPA, KERNEL);
    assert_eq!(m.fault(WRITE), page_fault(2, FREE + 0x1000));
    assert_eq!(m.bytes(GPA + 0xffd, 3), [0; 3]);
}

#[test]
fn non_canonical_addresses_fault_by_segment() {
    let stack = Exception { vector: 12, error_code: Some(0), cr2: None };
    let mut m = machine_at(0x8000_0000_0000);
    assert_eq!(m.fault(READ), general_protection());
    // The last byte counts too, and the address space does not wrap.
    for rsi in [0x7fff_ffff_fffc, u64::MAX - 3] {
        m.cpu.regs.rsi = rsi;
        assert_eq!(m.fault(READ), general_protection());
    }
    // popcnt rax, [rbp]
    m.cpu.regs.rbp = 0x8000_0000_0000;
    assert_eq!(m.fault(&[0xf3, 0x48, 0x0f, 0xb8, 0x45, 0x00]), stack);
    // popcnt rax, gs:[rbp]
    assert_eq!(m.fault(&[0x65, 0xf3, 0x48, 0x0f, 0xb8, 0x45, 0x00]), general_protection());
}

#[test]
fn addresses_are_computed_as_the_processor_does() {
    let mut m = Machine::new();
    m.write_u64(DATA_GPA + 0x100, 0xff);
    m.cpu.sregs.gs.base = DATA;
    m.cpu.regs.rbx = 0xffff_ffff_0000_0100;
    // popcnt rax, gs:[ebx]
    m.done(&[0x65, 0x67, 0xf3, 0x48, 0x0f, 0xb8, 0x03]);
    assert_eq!(m.cpu.regs.rax, 8);
    // popcnt rax, [rdi+rcx*8-0x10]
    m.cpu.regs.rdi = DATA;
    m.cpu.regs.rcx = 0x22;
    m.cpu.regs.rax = 0;
    m.done(&[0xf3, 0x48, 0x0f, 0xb8, 0x44, 0xcf, 0xf0]);
    assert_eq!(m.cpu.regs.rax, 8);
    // popcnt rax, [rip+0x100], from the end of the instruction
    m.cpu.regs.rip = DATA - 9;
    m.cpu.regs.rax = 0;
    m.done(&[0xf3, 0x48, 0x0f, 0xb8, 0x05, 0x00, 0x01, 0x00, 0x00]);
    assert_eq!(m.cpu.regs.rax, 8);
}

#[test]
fn guest_physical_addresses_outside_ram_are_refused() {
    let beyond = 1 << 40;
    for gpa in [HOLE, beyond] {
        let mut m = machine_at(FREE);
        m.map(FREE, gpa, KERNEL);
        for bytes in [READ, WRITE] {
            let refused = m.run(bytes).unwrap_err();
            assert!(matches!(refused.reason(), Reason::NotRam(at) if *at == gpa), "{refused}");
        }
    }
    for level in 2..=4 {
        let mut m = machine_at(FREE);
        m.map(FREE, GPA, KERNEL);
        let at = m.entry(FREE, level);
        m.write_u64(at, HOLE | KERNEL);
        assert!(matches!(m.run(READ).unwrap_err().reason(), Reason::NotRam(_)), "level {level}");
    }
    let mut m = machine_at(FREE);
    m.cpu.sregs.cr3 = beyond;
    assert!(matches!(m.run(READ).unwrap_err().reason(), Reason::NotRam(_)));
}

#[test]
fn an_access_that_leaves_ram_halfway_writes_nothing() {
    let mut m = machine_at(FREE + 0xffd);
    m.map(FREE, 0x3f_f000, KERNEL);
    m.map(FREE + 0x1000, 0x40_0000, KERNEL);
    assert!(matches!(m.run(WRITE).unwrap_err().reason(), Reason::NotRam(0x3f_fffd | 0x40_0000)));
    assert_eq!(m.bytes(0x3f_fffd, 3), [0; 3]);
}
