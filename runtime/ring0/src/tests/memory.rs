//! Memory: translations and their end, large copies, the doorbell.

use super::guest::{CR4, DIRECT, Guest};
use crate::BULK_PORT;
use crate::cpu::{RAX, RCX, RDI, RDX, RSI};
use crate::paging::{CR0_WP, PRESENT, WRITABLE};
use crate::stop::Stop;

const LOWER: u64 = 0x7f12_3456_7000;
const UPPER: u64 = 0xffff_c900_1234_5000;
const GLOBAL: u64 = 1 << 8;
const CR4_PGE: u64 = 1 << 7;

impl Guest {
    /// What a load finds, by MOV RCX, [RAX].
    fn load(&mut self, linear: u64) -> u64 {
        let at = self.code(&[0x48, 0x8b, 0x08]);
        self.set_reg(RAX, linear);
        assert_eq!(self.run_at(at), Stop::Halt);
        assert_eq!(self.vector(), None);
        self.reg(RCX)
    }
}

/// How a kernel ends translations, with the address in RAX, and the addresses for which it does.
fn ends(guest: &mut Guest, how: u32, linear: u64) {
    let cr3 = guest.engine.cpu().sregs.cr3;
    let code: &[u8] = match how {
        // invlpg [rax]
        0 => &[0x0f, 0x01, 0x38],
        // mov cr3, rcx
        1 => &[0x0f, 0x22, 0xd9],
        // mov cr4, rdx; mov cr4, rsi
        _ => &[0x0f, 0x22, 0xe2, 0x0f, 0x22, 0xe6],
    };
    let at = guest.code(code);
    guest.set_reg(RAX, linear);
    guest.set_reg(RCX, cr3 | 1 << 63);
    guest.set_reg(RDX, CR4 & !CR4_PGE);
    guest.set_reg(RSI, CR4);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!((guest.engine.cpu().sregs.cr3, guest.engine.cpu().sregs.cr4), (cr3, CR4));
}

#[test]
fn a_translation_ends_when_the_kernel_says_so() {
    for linear in [LOWER, UPPER] {
        for rights in [PRESENT | WRITABLE, PRESENT | WRITABLE | GLOBAL] {
            for how in 0..3 {
                let mut guest = Guest::new();
                let (old, new) = (guest.page(), guest.page());
                guest.write(old, 1);
                guest.write(new, 2);
                guest.map(linear, old, rights);
                assert_eq!(guest.load(linear), 1);
                guest.engine.cpu_mut().store(linear + 8, 8, 3).unwrap();
                guest.map(linear, new, rights);
                ends(&mut guest, how, linear);
                // Global ones of the kernel's outlive a new CR3; they may.
                if how == 1 && rights & GLOBAL != 0 {
                    continue;
                }
                assert_eq!(guest.load(linear), 2, "{linear:#x} {rights:#x} {how}");
                guest.engine.cpu_mut().store(linear + 8, 8, 4).unwrap();
                assert_eq!((guest.read(old + 8), guest.read(new + 8)), (3, 4));
            }
        }
    }
}

#[test]
fn a_new_root_from_outside_ends_translations() {
    let mut guest = Guest::new();
    let (old, new) = (guest.page(), guest.page());
    guest.write(old, 1);
    guest.write(new, 2);
    let root = guest.page();
    for index in 256..512 {
        guest.write(root + index * 8, guest.read(super::guest::ROOT + index * 8));
    }
    for linear in [LOWER, UPPER] {
        guest.map(linear, old, PRESENT | WRITABLE);
        assert_eq!(guest.load(linear), 1);
    }
    guest.map(UPPER, new, PRESENT | WRITABLE);
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr3 = root;
    // The kernel's half, as it was when the root was made.
    let index = (UPPER >> 39 & 511) * 8;
    guest.write(root + index, guest.read(super::guest::ROOT + index));
    guest.engine.cpu_mut().set_sregs(&sregs);
    assert_eq!(guest.load(UPPER), 2);
    assert!(guest.engine.cpu_mut().locate(LOWER).is_none());
    assert_eq!(guest.engine.cpu_mut().locate(UPPER + 5), Some(new as usize + 5));
}

#[test]
fn new_rules_from_outside_are_those_of_global_translations_too() {
    let mut guest = Guest::new();
    let page = guest.page();
    guest.map(UPPER, page, PRESENT | GLOBAL);
    let mut sregs = guest.engine.cpu().sregs;
    sregs.cr0 &= !CR0_WP;
    guest.engine.cpu_mut().set_sregs(&sregs);
    guest.engine.cpu_mut().store(UPPER, 8, 1).unwrap();
    sregs.cr0 |= CR0_WP;
    guest.engine.cpu_mut().set_sregs(&sregs);
    guest.engine.cpu_mut().store(UPPER, 8, 2).unwrap_err();
    assert_eq!(guest.read(page), 1);
}

#[test]
fn a_long_copy_is_done_in_turns_and_right() {
    for (rep, size) in [(&[0xf3, 0xa4][..], 1), (&[0xf3, 0x48, 0xa5], 8)] {
        let mut guest = Guest::new();
        let (from, to, bytes) = (0x10_0000, 0x40_0008, 0x28_0000);
        for at in (0..bytes).step_by(8) {
            guest.write(from + at, at.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        }
        let at = guest.code(rep);
        guest.set_reg(RSI, DIRECT + from);
        guest.set_reg(RDI, DIRECT + to);
        guest.set_reg(RCX, bytes / size);
        guest.engine.cpu_mut().rip = at;
        assert_eq!(guest.engine.run(1), Stop::Fuel, "there is a look around");
        assert_eq!(guest.rip(), at);
        assert!(guest.reg(RCX) > 0);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(
            (guest.reg(RCX), guest.reg(RSI), guest.reg(RDI)),
            (0, DIRECT + from + bytes, DIRECT + to + bytes)
        );
        let wrong = (0..bytes).step_by(8).find(|at| guest.read(to + at) != guest.read(from + at));
        assert_eq!(wrong, None);
        assert_eq!((guest.read(to - 8), guest.read(to + bytes)), (0, 0));
    }
}

#[test]
fn a_locked_change_begins_anew_when_somebody_else_was_there() {
    for rights in [false, true] {
        let mut guest = Guest::new();
        let page = guest.page();
        if rights {
            // Looked at, as code is.
            guest.engine.cpu_mut().shadow.mark_code(page as usize);
        }
        guest.write(page, 1);
        let cpu = guest.engine.cpu_mut();
        let place = cpu.place(DIRECT + page, 8).unwrap();
        let others = std::cell::Cell::new(3);
        cpu.flags = 2;
        cpu.modify_place(place, 8, true, |cpu, old| {
            if others.get() > 0 {
                others.set(others.get() - 1);
                cpu.ram.store(page as usize, 8, old + 100);
            }
            assert_eq!(cpu.flags, 2, "flags of a round that did not count");
            cpu.flags = 3;
            old * 2
        });
        assert_eq!(cpu.flags, 3);
        assert_eq!(guest.read(page), 602);
        assert_eq!(guest.engine.cpu().code_stale, rights);
    }
}

/// Rings the doorbell; what it has left to do.
fn ring(guest: &mut Guest, operation: u64, to: u64, from: u64, len: u64) -> u64 {
    let at = guest.code(&[0xef]);
    guest.set_reg(RAX, operation);
    guest.set_reg(RDX, u64::from(BULK_PORT));
    guest.set_reg(RDI, to);
    guest.set_reg(RSI, from);
    guest.set_reg(RCX, len);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!((guest.reg(RDI), guest.reg(RSI)), (to, from));
    guest.reg(RCX)
}

#[test]
fn the_doorbell_copies_and_fills_up_to_what_it_cannot_reach() {
    let mut guest = Guest::new();
    let pages = [guest.page(), guest.page(), guest.page()];
    for (number, gpa) in (0..).zip(pages) {
        // In the guest's address space they are the other way around.
        guest.map(UPPER + (2 - number) * 0x1000, gpa, PRESENT | WRITABLE);
    }
    let source = guest.page();
    for at in (0..0x1000).step_by(8) {
        guest.write(source + at, at + 1);
    }
    assert_eq!(ring(&mut guest, 1, UPPER + 0xff8, DIRECT + source + 8, 24), 0);
    assert_eq!((guest.read(pages[2] + 0xff8), guest.read(pages[1]), guest.read(pages[1] + 8)), (9, 17, 25));
    assert_eq!(guest.read(pages[1] + 16), 0);
    assert_eq!(ring(&mut guest, 2, UPPER + 0x1800, 0x12_34ab, 0x2000), 0x800);
    assert_eq!(guest.read(pages[0] + 0xff8), 0xabab_abab_abab_abab);
    assert_eq!(guest.read(pages[1] + 0x7f8), 0);
    assert_eq!(ring(&mut guest, 1, UPPER - 1, UPPER, 100), 100, "nothing below");
    assert_eq!(ring(&mut guest, 1, UPPER, UPPER + 0x2fff, 100), 99);
    assert_eq!(ring(&mut guest, 3, UPPER, UPPER, 100), 100, "no such operation");
    assert_eq!(ring(&mut guest, 2, UPPER, 0, 0), 0);
    // No more than its other end does: the rest is the caller's.
    assert_eq!(ring(&mut guest, 2, DIRECT + 0x10_0000, 7, 5 << 20), 1 << 20);
    assert_eq!((guest.read(0x4f_fff8), guest.read(0x50_0000)), (0x0707_0707_0707_0707, 0));
}

#[test]
fn the_doorbells_port_is_for_double_words_of_its_own() {
    let mut guest = Guest::new();
    guest.set_reg(RAX, 2);
    guest.set_reg(RCX, 8);
    guest.set_reg(RDI, DIRECT);
    // out dx, eax on another port; out dx, ax
    for (code, port) in [(&[0xef][..], BULK_PORT + 1), (&[0x66, 0xef], BULK_PORT)] {
        let at = guest.code(code);
        guest.set_reg(RDX, u64::from(port));
        assert_eq!(guest.run_at(at), Stop::Foreign);
        assert_eq!((guest.rip(), guest.reg(RCX)), (at, 8));
    }
}

#[test]
fn memory_that_is_not_ram_is_for_kvm() {
    let mut guest = Guest::new();
    guest.map(UPPER, 0xfee0_0000, PRESENT | WRITABLE);
    // mov rcx, [rax]; mov [rax], rcx; add [rax], rcx; jmp rax
    for code in [&[0x48, 0x8b, 0x08][..], &[0x48, 0x89, 0x08], &[0x48, 0x01, 0x08]] {
        let at = guest.code(code);
        guest.set_reg(RAX, UPPER);
        assert_eq!(guest.run_at(at), Stop::Foreign);
        assert_eq!(guest.rip(), at);
    }
    let at = guest.code(&[0xff, 0xe0]);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!(guest.rip(), UPPER);
}

#[test]
fn time_goes_on() {
    let mut guest = Guest::new();
    let at = guest.code(&[0x0f, 0x31]);
    let mut last = 0;
    for _ in 0..3 {
        guest.set_reg(RAX, u64::MAX);
        guest.set_reg(RDX, u64::MAX);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert!(guest.reg(RAX) >> 32 == 0);
        let now = guest.reg(RDX) << 32 | guest.reg(RAX);
        assert!(now > last);
        last = now;
    }
}
