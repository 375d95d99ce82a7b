//! Page faults and general protection: which, with what code and address, and what is as it was before.

use super::guest::{CR4, CR4_SMAP, CR4_SMEP, DIRECT, Frame, Guest, IST_TOP};
use crate::cpu::{AC, RAX, RCX, RDI, RDX, RSI, RSP};
use crate::paging::{ACCESSED, CR0_WP, CR4_LA57, DIRTY, FRAME, LARGE, NO_EXECUTE, PRESENT, USER, WRITABLE};
use crate::stop::Stop;

const RBX: u8 = 3;
const LINEAR: u64 = 0x7f12_3456_7000;
const UPPER: u64 = 0xffff_c900_1234_5000;
/// In error codes.
const P: u64 = 1;
const W: u64 = 2;
const I: u64 = 16;

/// mov rcx, [rax]; hlt
const LOAD: &[u8] = &[0x48, 0x8b, 0x08, 0xf4];
/// mov [rax], rcx; hlt
const STORE: &[u8] = &[0x48, 0x89, 0x08, 0xf4];
/// add [rax], rcx; hlt
const MODIFY: &[u8] = &[0x48, 0x01, 0x08, 0xf4];
/// jmp rax
const JUMP: &[u8] = &[0xff, 0xe0];

impl Guest {
    /// Runs code with RAX pointing somewhere; the exception it ends with, if any: vector, code, CR2.
    fn attempt(&mut self, code: &[u8], linear: u64) -> Option<(u8, u64, u64)> {
        let at = self.code(code);
        self.set_reg(RAX, linear);
        let before = self.registers();
        self.engine.cpu_mut().sregs.cr2 = 0;
        assert_eq!(self.run_at(at), Stop::Halt);
        let vector = self.vector()?;
        let frame = self.frame(DIRECT + IST_TOP);
        let fetch = code == JUMP;
        assert_eq!(frame.rip, if fetch { linear } else { at });
        let mut after = self.registers();
        after[RSP as usize] = frame.rsp;
        assert_eq!(after, before, "registers are as they were");
        Some((vector, frame.code.unwrap(), self.engine.cpu().sregs.cr2))
    }

    fn page_fault(&mut self, code: &[u8], linear: u64) -> Option<(u64, u64)> {
        self.attempt(code, linear).map(|(vector, code, cr2)| {
            assert_eq!(vector, 14);
            (code, cr2)
        })
    }
}

#[test]
fn a_missing_entry_of_any_level_is_a_page_fault_with_the_accesss_code() {
    for level in 1..=4 {
        let mut guest = Guest::new();
        for linear in [LINEAR + 0xabc, UPPER + 0x123] {
            let gpa = guest.page();
            guest.map(linear & !0xfff, gpa, PRESENT | WRITABLE | USER);
            let entry = guest.read(guest.entry_of(linear, level));
            guest.map_at(linear, entry & !PRESENT, level);
            assert_eq!(guest.page_fault(LOAD, linear), Some((0, linear)));
            assert_eq!(guest.page_fault(STORE, linear), Some((W, linear)));
            assert_eq!(guest.page_fault(MODIFY, linear), Some((W, linear)));
            assert_eq!(guest.page_fault(JUMP, linear), Some((I, linear)));
        }
    }
}

#[test]
fn writing_needs_the_right_at_every_level_unless_wp_is_clear() {
    for level in 1..=4 {
        let mut guest = Guest::new();
        let gpa = guest.page();
        guest.map(LINEAR, gpa, PRESENT | WRITABLE | USER);
        let entry = guest.read(guest.entry_of(LINEAR, level));
        guest.map_at(LINEAR, entry & !WRITABLE, level);
        assert_eq!(guest.page_fault(LOAD, LINEAR), None);
        assert_eq!(guest.page_fault(STORE, LINEAR + 8), Some((P | W, LINEAR + 8)));
        assert_eq!(guest.page_fault(MODIFY, LINEAR + 16), Some((P | W, LINEAR + 16)));
        assert_eq!(guest.read(guest.entry_of(LINEAR, 1)) & DIRTY, 0, "nothing was written");
        let mut sregs = guest.engine.cpu().sregs;
        sregs.cr0 &= !CR0_WP;
        guest.engine.cpu_mut().set_sregs(&sregs);
        assert_eq!(guest.page_fault(STORE, LINEAR + 8), None);
        sregs.cr0 |= CR0_WP;
        guest.engine.cpu_mut().set_sregs(&sregs);
        assert_eq!(guest.page_fault(STORE, LINEAR + 8), Some((P | W, LINEAR + 8)));
    }
}

#[test]
fn no_execute_at_any_level_forbids_fetches_only() {
    for level in 1..=4 {
        let mut guest = Guest::new();
        let gpa = guest.page();
        guest.write_bytes(gpa, &[0xf4]);
        guest.map(UPPER, gpa, PRESENT | WRITABLE);
        assert_eq!(guest.page_fault(JUMP, UPPER), None);
        let entry = guest.read(guest.entry_of(UPPER, level));
        guest.map_at(UPPER, entry | NO_EXECUTE, level);
        guest.engine.cpu_mut().tlb.flush();
        assert_eq!(guest.page_fault(JUMP, UPPER), Some((P | I, UPPER)));
        assert_eq!(guest.page_fault(STORE, UPPER + 8), None);
        let mut sregs = guest.engine.cpu().sregs;
        sregs.efer &= !(1 << 11);
        guest.engine.cpu_mut().set_sregs(&sregs);
        // Now the bit is a reserved one.
        assert_eq!(guest.run_at(UPPER), Stop::Foreign);
        guest.map_at(UPPER, entry, level);
        assert_eq!(guest.page_fault(JUMP, UPPER), None);
    }
}

#[test]
fn an_entry_with_a_reserved_bit_is_for_kvm() {
    // Of a page of 4 KiB the bit is one of its memory type, and of a table nothing at all.
    for (level, bits, stop) in [
        (1, LARGE, Stop::Halt),
        (4, LARGE, Stop::Foreign),
        (2, LARGE, Stop::Halt),
        (2, LARGE | 1 << 12, Stop::Halt),
        (2, LARGE | 1 << 13, Stop::Foreign),
        (2, LARGE | 1 << 20, Stop::Foreign),
        (3, LARGE, Stop::Halt),
        (3, LARGE | 1 << 21, Stop::Foreign),
        (3, LARGE | 1 << 29, Stop::Foreign),
    ] {
        let mut guest = Guest::new();
        let load = guest.code(LOAD);
        // It begins where pages of all sizes do.
        let linear = LINEAR & !0xffff_ffff;
        guest.map(linear, 0, PRESENT | WRITABLE);
        let entry = guest.read(guest.entry_of(linear, level));
        // A large page of the first RAM there is.
        let frame = if level == 2 || level == 3 { 0 } else { entry & FRAME };
        guest.map_at(linear, frame | PRESENT | WRITABLE | bits, level);
        guest.set_reg(RAX, linear);
        assert_eq!(guest.run_at(load), stop, "level {level}, {bits:#x}");
        assert_eq!(guest.vector(), None);
    }
}

#[test]
fn user_pages_are_executed_only_without_smep_and_reached_only_without_smap_or_with_ac() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.write_bytes(gpa, &[0xf4]);
    guest.map(LINEAR, gpa, PRESENT | WRITABLE | USER);
    assert_eq!(guest.page_fault(JUMP, LINEAR), None);
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr4 = CR4 | CR4_SMEP;
    guest.engine.cpu_mut().set_sregs(&sregs);
    assert_eq!(guest.page_fault(JUMP, LINEAR), Some((P | I, LINEAR)));
    assert_eq!(guest.page_fault(STORE, LINEAR + 8), None);
    sregs.cr4 = CR4 | CR4_SMAP;
    guest.engine.cpu_mut().set_sregs(&sregs);
    assert_eq!(guest.page_fault(LOAD, LINEAR), Some((P, LINEAR)));
    assert_eq!(guest.page_fault(STORE, LINEAR), Some((P | W, LINEAR)));
    assert_eq!(guest.page_fault(JUMP, LINEAR), None);
    // stac; mov rcx, [rax]; clac; mov rcx, [rax]
    let at = guest.code(&[0x0f, 0x01, 0xcb, 0x48, 0x8b, 0x08, 0x0f, 0x01, 0xca, 0x48, 0x8b, 0x08]);
    guest.set_reg(RAX, LINEAR);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(14));
    assert_eq!(guest.frame(DIRECT + IST_TOP).rip, at + 9);
}

/// AC comes and goes by POPF, IRET and from outside too.
#[test]
fn what_was_reached_with_ac_is_out_of_reach_without_whoever_took_it() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE | USER);
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr4 = CR4 | CR4_SMAP;
    guest.engine.cpu_mut().set_sregs(&sregs);
    let stack = guest.stack();
    // popfq; mov rcx, [rax]
    let pops = guest.code(&[0x9d, 0x48, 0x8b, 0x08]);
    // iretq
    let returns = guest.code(&[0x48, 0xcf]);
    let loads = guest.code(LOAD);
    for way in 0..3 {
        guest.engine.cpu_mut().set_flags(AC | 2);
        guest.set_reg(RAX, LINEAR);
        assert_eq!(guest.run_at(loads), Stop::Halt);
        assert_eq!(guest.vector(), None);
        guest.set_reg(RSP, stack);
        let start = match way {
            0 => {
                guest.write(stack - DIRECT, 2);
                pops
            }
            1 => {
                for (at, word) in (0..).zip([loads, 0x10, 2, stack, 0x18]) {
                    guest.write(stack - DIRECT + 8 * at, word);
                }
                returns
            }
            _ => {
                let mut regs = guest.engine.cpu().regs();
                regs.rflags = 2;
                guest.engine.cpu_mut().set_regs(&regs);
                loads
            }
        };
        assert_eq!(guest.run_at(start), Stop::Halt);
        assert_eq!(guest.vector(), Some(14), "way {way}");
    }
}

#[test]
fn a_user_page_with_a_protection_key_is_for_kvm() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE | USER | 3 << 59);
    guest.map(UPPER, gpa, PRESENT | WRITABLE | 3 << 59);
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr4 |= 1 << 22;
    guest.engine.cpu_mut().set_sregs(&sregs);
    let at = guest.code(LOAD);
    guest.set_reg(RAX, UPPER);
    assert_eq!(guest.run_at(at), Stop::Halt);
    guest.set_reg(RAX, LINEAR);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!(guest.rip(), at);
}

#[test]
fn walks_set_accessed_bits_on_the_way_and_the_dirty_bit_of_the_leaf_when_written() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE | USER);
    let marks = |guest: &Guest| {
        [4, 3, 2, 1].map(|level| guest.read(guest.entry_of(LINEAR, level)) & (ACCESSED | DIRTY))
    };
    // What the guest has of its own: nothing at these addresses.
    assert_eq!(marks(&guest), [0; 4]);
    assert_eq!(guest.page_fault(JUMP, LINEAR - 0x1000), Some((I, LINEAR - 0x1000)));
    assert_eq!(marks(&guest), [0; 4], "a walk that fails marks nothing");
    assert_eq!(guest.page_fault(LOAD, LINEAR), None);
    assert_eq!(marks(&guest), [ACCESSED; 4]);
    assert_eq!(guest.page_fault(STORE, LINEAR), None);
    assert_eq!(marks(&guest), [ACCESSED, ACCESSED, ACCESSED, ACCESSED | DIRTY]);
}

#[test]
fn large_pages_lead_to_all_of_their_bytes() {
    for (level, linear) in [(2, LINEAR & !0x1f_ffff), (3, LINEAR & !0x3fff_ffff)] {
        let mut guest = Guest::new();
        // The page's number in the entry is cut to the page's size: what lies below is PAT and must be ignored.
        guest.map_at(linear, PRESENT | WRITABLE | USER | LARGE | 1 << 12, level);
        let target = 0x6_6128;
        guest.write(target, 0x1122_3344_5566_7788);
        assert_eq!(guest.page_fault(LOAD, linear + target), None);
        assert_eq!(guest.reg(RCX), 0x1122_3344_5566_7788);
        guest.set_reg(RCX, 0x99);
        assert_eq!(guest.page_fault(STORE, linear + target), None);
        assert_eq!(guest.read(target), 0x99);
        let entry = guest.read(guest.entry_of(linear, level));
        assert_eq!(entry & (ACCESSED | DIRTY), ACCESSED | DIRTY);
    }
}

#[test]
fn five_levels_are_walked_when_cr4_says_so() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE);
    let root = guest.page();
    let index = 0x00ab_u64;
    let lower = super::guest::ROOT | PRESENT | WRITABLE;
    guest.write(root + index * 8, lower);
    guest.write(root + 511 * 8, lower);
    let mut sregs = guest.engine.cpu().sregs;
    (sregs.cr3, sregs.cr4) = (root, CR4 | CR4_LA57);
    guest.engine.cpu_mut().set_sregs(&sregs);
    guest.write(gpa, 77);
    let linear = LINEAR | index << 48;
    assert_eq!(guest.page_fault(LOAD, linear), None);
    assert_eq!(guest.reg(RCX), 77);
    assert_eq!(guest.read(root + index * 8), lower | ACCESSED);
    assert_eq!(guest.attempt(LOAD, 1 << 57), Some((13, 0, 0)));
}

#[test]
fn addresses_that_this_mode_does_not_have_are_a_general_protection_fault() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(0x7fff_ffff_f000, gpa, PRESENT | WRITABLE);
    for linear in [1 << 47, 0xffff_7fff_ffff_fff8, 1 << 63, 0x7fff_ffff_fffc] {
        assert_eq!(guest.attempt(LOAD, linear), Some((13, 0, 0)), "{linear:#x}");
        assert_eq!(guest.attempt(STORE, linear), Some((13, 0, 0)), "{linear:#x}");
    }
    assert_eq!(guest.attempt(JUMP, 1 << 47), Some((13, 0, 0)));
    assert_eq!(guest.attempt(LOAD, 0x7fff_ffff_fff8), None);
}

#[test]
fn an_access_across_a_pages_end_faults_in_the_page_that_is_missing_and_changes_nothing() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE);
    guest.set_reg(RCX, u64::MAX);
    for within in 1..8 {
        let linear = LINEAR + 0x1000 - within;
        assert_eq!(guest.page_fault(LOAD, linear), Some((0, LINEAR + 0x1000)));
        assert_eq!(guest.page_fault(STORE, linear), Some((W, LINEAR + 0x1000)));
        assert_eq!(guest.page_fault(MODIFY, linear), Some((W, LINEAR + 0x1000)));
        assert_eq!(guest.page_fault(LOAD, LINEAR - within), Some((0, LINEAR - within)));
        assert_eq!(guest.read(gpa + 0xff8), 0);
    }
    let next = guest.page();
    guest.map(LINEAR + 0x1000, next, PRESENT);
    let linear = LINEAR + 0xffd;
    assert_eq!(guest.page_fault(STORE, linear), Some((P | W, LINEAR + 0x1000)));
    assert_eq!(guest.read(gpa + 0xff8), 0);
    guest.map(LINEAR + 0x1000, next, PRESENT | WRITABLE);
    guest.set_reg(RCX, 0x0807_0605_0403_0201);
    assert_eq!(guest.page_fault(STORE, linear), None);
    assert_eq!((guest.read(gpa + 0xff8), guest.read(next)), (0x03_0201 << 40, 0x08_0706_0504));
    guest.set_reg(RCX, 0);
    assert_eq!(guest.page_fault(LOAD, linear), None);
    assert_eq!(guest.reg(RCX), 0x0807_0605_0403_0201);
}

#[test]
fn a_fault_amid_a_repeated_move_leaves_what_is_left_to_do() {
    for (rep, size) in
        [(&[0xf3, 0xa4][..], 1), (&[0xf3, 0x66, 0xa5], 2), (&[0xf3, 0xa5], 4), (&[0xf3, 0x48, 0xa5], 8)]
    {
        let mut guest = Guest::new();
        let (from, to) = (guest.page(), guest.page());
        guest.map(LINEAR, from, PRESENT);
        guest.map(UPPER, to, PRESENT | WRITABLE);
        for at in (0..0x1000).step_by(8) {
            guest.write(from + at, at * 0x0101_0101 + 1);
        }
        let code = guest.code(rep);
        let begin = 0x1000 - 100 * size;
        guest.set_reg(RSI, LINEAR + begin - size);
        guest.set_reg(RDI, UPPER + begin);
        guest.set_reg(RCX, 1000);
        assert_eq!(guest.run_at(code), Stop::Halt);
        let frame: Frame = guest.frame(DIRECT + IST_TOP);
        assert_eq!((guest.vector(), frame.code, frame.rip), (Some(14), Some(W), code));
        assert_eq!(guest.engine.cpu().sregs.cr2, UPPER + 0x1000);
        assert_eq!(guest.reg(RCX), 900);
        assert_eq!(guest.reg(RSI), LINEAR + 0x1000 - size);
        assert_eq!(guest.reg(RDI), UPPER + 0x1000);
        let (mut source, mut target) = (vec![0; 100 * size as usize], vec![0; 100 * size as usize]);
        guest.read_bytes(from + begin - size, &mut source);
        guest.read_bytes(to + begin, &mut target);
        assert_eq!(source, target);
        // The next page comes, and it goes on where it was.
        let next = guest.page();
        guest.map(UPPER + 0x1000, next, PRESENT | WRITABLE);
        guest.set_reg(RSP, frame.rsp);
        assert_eq!(guest.run_at(code), Stop::Halt);
        assert_eq!((guest.vector(), guest.engine.cpu().sregs.cr2), (Some(14), LINEAR + 0x1000));
        assert_eq!((guest.reg(RCX), guest.reg(RDI)), (899, UPPER + 0x1000 + size));
    }
}

#[test]
fn a_fault_amid_a_repeated_store_leaves_what_is_left_to_do() {
    for (value, down) in [(0x7777_7777_7777_7777, false), (0x1234, false), (0x55, true)] {
        let mut guest = Guest::new();
        let page = guest.page();
        guest.map(UPPER, page, PRESENT | WRITABLE);
        // std or cld; rep stosq
        let code = guest.code(&[if down { 0xfd } else { 0xfc }, 0xf3, 0x48, 0xab]);
        guest.set_reg(RAX, value);
        guest.set_reg(RCX, 77);
        guest.set_reg(RDI, UPPER + if down { 9 * 8 } else { 0x1000 - 10 * 8 });
        assert_eq!(guest.run_at(code), Stop::Halt);
        assert_eq!(guest.vector(), Some(14));
        assert_eq!(guest.frame(DIRECT + IST_TOP).rip, code + 1);
        let missing = if down { UPPER - 8 } else { UPPER + 0x1000 };
        assert_eq!((guest.reg(RCX), guest.reg(RDI)), (67, missing));
        assert_eq!(guest.engine.cpu().sregs.cr2, missing);
        let begin = if down { 0 } else { 0x1000 - 10 * 8 };
        for at in (0..0x1000).step_by(8) {
            let written = at >= begin && at < begin + 80;
            assert_eq!(guest.read(page + at), if written { value } else { 0 });
        }
    }
}

#[test]
fn stack_instructions_that_fault_leave_the_stack_pointer() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT | WRITABLE);
    for (code, stack, cr2, write) in [
        (&[0x50][..], LINEAR, LINEAR - 8, W),
        (&[0x9c], LINEAR, LINEAR - 8, W),
        (&[0xe8, 0, 0, 0, 0], LINEAR + 4, LINEAR - 4, W),
        (&[0x58], LINEAR + 0x1000, LINEAR + 0x1000, 0),
        (&[0xc3], LINEAR + 0xffc, LINEAR + 0x1000, 0),
        (&[0x9d], LINEAR - 8, LINEAR - 8, 0),
        // pop [rax], with RAX pointing nowhere
        (&[0x8f, 0x00], LINEAR, UPPER, W),
    ] {
        guest.set_reg(RSP, stack);
        assert_eq!(guest.page_fault(code, UPPER), Some((write, cr2)), "{code:02x?}");
    }
}

#[test]
fn exchanges_that_fault_leave_both_sides() {
    let mut guest = Guest::new();
    let gpa = guest.page();
    guest.map(LINEAR, gpa, PRESENT);
    guest.write(gpa, 5);
    guest.set_reg(RBX, 7);
    guest.set_reg(RDX, 9);
    // xchg [rax], rbx; lock xadd [rax], rbx; lock cmpxchg [rax], rbx; lock bts [rax], rdx
    for code in [
        &[0x48, 0x87, 0x18][..],
        &[0xf0, 0x48, 0x0f, 0xc1, 0x18],
        &[0xf0, 0x48, 0x0f, 0xb1, 0x18],
        &[0xf0, 0x48, 0x0f, 0xab, 0x10],
    ] {
        let flags = guest.engine.cpu().flags;
        assert_eq!(guest.page_fault(code, LINEAR), Some((P | W, LINEAR)));
        assert_eq!(guest.frame(DIRECT + IST_TOP).flags & !crate::cpu::RF, flags);
        assert_eq!(guest.read(gpa), 5);
    }
}
