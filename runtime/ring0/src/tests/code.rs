//! Code: how it is kept, and noticed to have changed; where the engine stops.

use super::guest::{DIRECT, Guest, RAM_BYTES};
use crate::cpu::{FIXED, IF, RAX, RCX, RDI, RDX, RSI};
use crate::paging::{PRESENT, WRITABLE};
use crate::stop::Stop;

const LINEAR: u64 = 0xffff_c900_0000_0000;
const NOP: u8 = 0x90;
const HLT: u8 = 0xf4;
const STI: u8 = 0xfb;

/// Code for the page at `LINEAR`, whose second page is `LINEAR + 0x1000`.
fn two_pages(guest: &mut Guest) -> [u64; 2] {
    let pages = [guest.page(), guest.page()];
    for (page, gpa) in (0..).zip(pages) {
        guest.map(LINEAR + page * 0x1000, gpa, PRESENT | WRITABLE);
    }
    pages
}

#[test]
fn code_that_was_changed_is_done_as_it_is_now() {
    let mut guest = Guest::new();
    // mov eax, 1
    let at = guest.code(&[0xb8, 1, 0, 0, 0]);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.reg(RAX), 1);
    // mov byte [rcx], 2; then jump there
    let writes = guest.code(&[0xc6, 0x01, 2, 0xff, 0xe2]);
    guest.set_reg(RCX, at + 1);
    guest.set_reg(RDX, at);
    assert_eq!(guest.run_at(writes), Stop::Halt);
    assert_eq!((guest.reg(RAX), guest.rip()), (2, at + 5));
    // Through another address of the page, by REP MOVS and by a locked instruction.
    guest.map(LINEAR, at - DIRECT, PRESENT | WRITABLE);
    let bytes = guest.code(&[0xb8, 3, 0, 0, 0, HLT, NOP, NOP]);
    let copies = guest.code(&[0xf3, 0xa4, 0xff, 0xe2]);
    guest.set_reg(RSI, bytes);
    guest.set_reg(RDI, LINEAR);
    guest.set_reg(RCX, 8);
    assert_eq!(guest.run_at(copies), Stop::Halt);
    assert_eq!(guest.reg(RAX), 3);
    // lock add byte [rcx], 4; jmp rdx
    let adds = guest.code(&[0xf0, 0x80, 0x01, 4, 0xff, 0xe2]);
    guest.set_reg(RCX, LINEAR + 1);
    assert_eq!(guest.run_at(adds), Stop::Halt);
    assert_eq!(guest.reg(RAX), 7);
    // rep stosb of NOPs over it
    let fills = guest.code(&[0xf3, 0xaa, 0xff, 0xe2]);
    guest.set_reg(RAX, u64::from(NOP));
    guest.set_reg(RDI, LINEAR);
    guest.set_reg(RCX, 5);
    assert_eq!(guest.run_at(fills), Stop::Halt);
    assert_eq!(guest.reg(RAX), u64::from(NOP));
}

#[test]
fn a_block_that_changes_itself_is_done_anew_when_it_comes_again() {
    let mut guest = Guest::new();
    // again: inc eax; mov byte [rcx], NOP; dec edx; jnz again
    let at = guest.code(&[0xff, 0xc0, 0xc6, 0x01, NOP, 0xff, 0xca, 0x75, 0xf7]);
    // The second byte of INC EAX and the first: then there is nothing to count.
    guest.set_reg(RAX, 0);
    guest.set_reg(RDX, 1000);
    guest.set_reg(RCX, at + 1);
    guest.write_bytes(at - DIRECT, &[NOP, NOP]);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.reg(RAX), 0);
    assert_eq!(guest.reg(RDX), 0);
}

#[test]
fn an_instruction_across_pages_is_of_the_pages_that_are_there_now() {
    for split in 1..5 {
        let mut guest = Guest::new();
        let [first, second] = two_pages(&mut guest);
        let code = [0xb8, 0x11, 0x22, 0x33, 0x44, HLT];
        guest.write_bytes(first + 0x1000 - split, &code[..split as usize]);
        guest.write_bytes(second, &code[split as usize..]);
        let at = LINEAR + 0x1000 - split;
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.reg(RAX), guest.rip()), (0x4433_2211, at + 5));
        // Changed in the second page.
        guest.engine.cpu_mut().store(LINEAR + 0x1000 + 4 - split, 1, 0x55).unwrap();
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.reg(RAX), 0x5533_2211);
        // The second page is another, or none.
        let other = guest.page();
        let code = [0xb8, 0x11, 0x66, 0x66, 0x66, HLT];
        guest.write_bytes(other, &code[split as usize..]);
        guest.map(LINEAR + 0x1000, other, PRESENT);
        guest.engine.cpu_mut().tlb.flush();
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.reg(RAX) >> 24, 0x66);
        guest.map(LINEAR + 0x1000, 0, 0);
        guest.engine.cpu_mut().tlb.flush();
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.vector(), guest.engine.cpu().sregs.cr2), (Some(14), LINEAR + 0x1000));
        // The first page is another, with the same second one.
        guest.map(LINEAR + 0x1000, second, PRESENT);
        let other = guest.page();
        guest.write_bytes(other + 0x1000 - split, &[0xb9, 0x11, 0x22, 0x33, 0x44][..split as usize]);
        guest.map(LINEAR, other, PRESENT);
        guest.engine.cpu_mut().tlb.flush();
        guest.set_reg(RCX, 0);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.reg(RCX), 0x5533_2211);
    }
}

#[test]
fn code_behind_another_page_is_of_the_page_that_is_there_now() {
    let mut guest = Guest::new();
    let [first, second] = two_pages(&mut guest);
    guest.write_bytes(first, &[0xb8, 1, 0, 0, 0, HLT]);
    guest.write_bytes(second, &[0xb8, 2, 0, 0, 0, HLT]);
    assert_eq!((guest.run_at(LINEAR), guest.reg(RAX)), (Stop::Halt, 1));
    guest.map(LINEAR, second, PRESENT);
    // invlpg [rcx]; jmp rcx
    let at = guest.code(&[0x0f, 0x01, 0x39, 0xff, 0xe1]);
    guest.set_reg(RCX, LINEAR);
    assert_eq!((guest.run_at(at), guest.reg(RAX)), (Stop::Halt, 2));
    guest.map(LINEAR, first, PRESENT);
    assert_eq!((guest.run_at(at), guest.reg(RAX)), (Stop::Halt, 1));
}

#[test]
fn an_sti_before_a_hlt_is_where_the_engine_halts_wherever_they_are() {
    // At a page's end, at that of the bytes looked at for a block, after as many instructions as a block has.
    for before in [0, 1, 46, 47, 48, 200, 254, 255, 256, 300] {
        let mut guest = Guest::new();
        // 66-prefixed NOPs, so that bytes end before instructions do.
        let mut code = if before > 100 { [0x66, NOP].repeat(before / 2) } else { vec![NOP; before] };
        code.extend(vec![NOP; before - code.len()]);
        code.extend([STI, HLT]);
        let at = guest.code(&code);
        guest.engine.cpu_mut().set_flags(FIXED);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.rip(), guest.engine.cpu().flags), (at + before as u64, FIXED), "{before}");
    }
    for before in [0, 1, 5] {
        let mut guest = Guest::new();
        let [first, second] = two_pages(&mut guest);
        let mut code = vec![NOP; before];
        code.push(STI);
        let at = 0x1000 - code.len() as u64;
        guest.write_bytes(first + at, &code);
        guest.write_bytes(second, &[HLT]);
        assert_eq!(guest.run_at(LINEAR + at), Stop::Halt);
        assert_eq!((guest.rip(), guest.engine.cpu().flags), (LINEAR + 0xfff, FIXED));
        // Anything else behind it, and it is an instruction like others.
        guest.engine.cpu_mut().store(LINEAR + 0x1000, 2, u64::from(HLT) << 8 | u64::from(NOP)).unwrap();
        assert_eq!(guest.run_at(LINEAR + at), Stop::Halt);
        assert_eq!((guest.rip(), guest.engine.cpu().flags), (LINEAR + 0x1001, FIXED | IF));
    }
}

#[test]
fn code_beyond_what_is_kept_is_decoded_anew() {
    let mut guest = Guest::new();
    let ram = RAM_BYTES as usize - 0x10_0000;
    guest.write_bytes(0x10_0000, &vec![NOP; ram - 1]);
    guest.write_bytes(RAM_BYTES - 1, &[HLT]);
    for round in 0..2 {
        // Each byte is an instruction.
        guest.engine.cpu_mut().rip = DIRECT + 0x10_0000;
        let before = guest.engine.instructions();
        assert_eq!(guest.engine.run(u64::MAX >> 1), Stop::Halt, "round {round}");
        assert_eq!(guest.rip(), DIRECT + RAM_BYTES - 1);
        assert_eq!(guest.engine.instructions() - before, ram as u64 - 1);
        let shadow = &guest.engine.cpu().shadow;
        assert!(
            !shadow.is_code(0x10_0000) && shadow.is_code(RAM_BYTES as usize - 1),
            "the first is forgotten"
        );
    }
}

#[test]
fn the_engine_stops_when_its_fuel_is_used_and_goes_on_from_there() {
    let mut guest = Guest::new();
    // again: inc rax; jmp again
    let at = guest.code(&[0x48, 0xff, 0xc0, 0xeb, 0xfb]);
    guest.engine.cpu_mut().rip = at;
    for fuel in [1, 2, 3, 1000] {
        let before = guest.engine.instructions();
        assert_eq!(guest.engine.run(fuel), Stop::Fuel);
        let done = guest.engine.instructions() - before;
        assert!(done >= fuel && done < fuel + 2);
        assert_eq!(guest.reg(RAX), guest.engine.instructions() / 2);
    }
    assert_eq!(guest.engine.run(0), Stop::Fuel);
}

#[test]
fn what_the_engine_does_not_know_is_left_as_it_was_found() {
    let mut guest = Guest::new();
    // A block's beginning is done, then: cpuid; lgdt [rax]; vmovd; in al, dx; out dx, al; lock with an operand that
    // has none; mov eax, [ecx]; enter; push ax; jumps and calls of other segments; cmpccxadd; a code that is none
    for code in [
        &[0x0f, 0xa2][..],
        &[0x0f, 0x01, 0x10],
        &[0xc5, 0xf9, 0x6e, 0xc0],
        &[0xec],
        &[0xee],
        &[0xf0, 0x90, 0x90, 0x90],
        &[0x67, 0x8b, 0x01],
        &[0xc8, 0, 0, 0],
        &[0x66, 0x50],
        &[0xff, 0x28],
        &[0x48, 0xff, 0x28],
        &[0xff, 0x18],
        &[0xc4, 0xe2, 0xf9, 0xe0, 0x08],
        &[0x0f, 0xff, 0xff],
    ] {
        let mut bytes = vec![0x48, 0xff, 0xc3];
        bytes.extend(code);
        bytes.extend([NOP; 15]);
        let at = guest.code(&bytes);
        guest.set_reg(3, 41);
        let before = (guest.registers(), guest.engine.instructions());
        assert_eq!(guest.run_at(at), Stop::Foreign, "{code:02x?}");
        assert_eq!(guest.rip(), at + 3);
        assert_eq!(guest.reg(3), 42);
        guest.set_reg(3, 41);
        assert_eq!((guest.registers(), guest.engine.instructions()), (before.0, before.1 + 1));
    }
}

#[test]
fn the_word_that_a_trap_has_come_is_nothing_to_the_engine() {
    let mut guest = Guest::new();
    // out TRAP_PORT, al; out another, al
    let at = guest.code(&[0xe6, crate::TRAP_PORT, 0xe6, crate::TOUCHED_PORT]);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!(guest.rip(), at + 2);
}
