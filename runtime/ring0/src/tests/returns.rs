//! The ways back to ring 3, and the registers that are not general.

use super::guest::{DIRECT, GDT, Guest, IST_TOP, KERNEL_CS, KERNEL_SS, USER_CS, USER_SS};
use crate::alu::ARITHMETIC;
use crate::cpu::{AC, DF, FIXED, IF, NT, R11, RAX, RCX, RDX, RF, RSP, TF, VM};
use crate::stop::Stop;
use kvm_bindings::kvm_segment;

/// iretq
const IRET: &[u8] = &[0x48, 0xcf];
/// sysretq
const SYSRET: &[u8] = &[0x48, 0x0f, 0x07];
const PROGRAM: u64 = 0x0040_1000;
const PROGRAM_STACK: u64 = 0x7fff_1234_5678;
/// The register that says which selectors SYSRET has, as Linux sets it.
const STAR: u64 = 0x0023_0010 << 32;
const ID: u64 = 1 << 21;

impl Guest {
    fn iret(&mut self, words: [u64; 5]) -> Stop {
        let stack = self.stack();
        for (at, word) in (0..).zip(words) {
            self.write(stack - DIRECT + 8 * at, word);
        }
        self.set_reg(RSP, stack);
        let at = self.code(IRET);
        self.run_at(at)
    }
}

#[test]
fn iret_to_a_program_takes_over_all_five_words() {
    let mut guest = Guest::new();
    let flags = ARITHMETIC | DF | IF | ID | AC | NT | RF | TF | 3 << 12;
    let stop = guest.iret([PROGRAM, u64::from(USER_CS), flags, PROGRAM_STACK, u64::from(USER_SS)]);
    assert_eq!(stop, Stop::Ring3);
    let regs = guest.engine.cpu().regs();
    assert_eq!((regs.rip, regs.rsp, regs.rflags), (PROGRAM, PROGRAM_STACK, flags | FIXED));
    let sregs = guest.engine.cpu().sregs;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    assert_eq!(sregs.cs, kvm_segment { selector: USER_CS, type_: 11, l: 1, ..flat });
    assert_eq!(sregs.ss, kvm_segment { selector: USER_SS, type_: 3, db: 1, ..flat });
}

#[test]
fn iret_to_a_program_takes_the_kernels_data_segments_away() {
    let mut guest = Guest::new();
    let kernel =
        kvm_segment { selector: 0x18, type_: 3, present: 1, s: 1, base: 0x5000, ..Default::default() };
    let user = kvm_segment { selector: 0x2b, dpl: 3, ..kernel };
    let sregs = &mut guest.engine.cpu_mut().sregs;
    (sregs.ds, sregs.es, sregs.fs) = (kernel, user, kernel);
    let words = [PROGRAM, u64::from(USER_CS), FIXED, PROGRAM_STACK, u64::from(USER_SS)];
    assert_eq!(guest.iret(words), Stop::Ring3);
    let sregs = guest.engine.cpu().sregs;
    assert_eq!((sregs.ds.selector, sregs.ds.unusable), (0, 1));
    assert_eq!(sregs.es, user);
    // A program's FS base has nothing to do with the selector.
    assert_eq!((sregs.fs.selector, sregs.fs.base), (0, 0x5000));
}

#[test]
fn iret_to_ring_0_goes_on_where_the_frame_says() {
    let mut guest = Guest::new();
    let target = guest.code(&[0x90]);
    let flags = ARITHMETIC | IF | RF;
    for ss in [0, u64::from(KERNEL_SS)] {
        let stop = guest.iret([target, u64::from(KERNEL_CS), flags, 0x1238, ss]);
        assert_eq!(stop, Stop::Halt);
        assert_eq!((guest.rip(), guest.reg(RSP)), (target + 1, 0x1238));
        assert_eq!(guest.engine.cpu().flags & !RF, flags & !RF | FIXED);
        let sregs = guest.engine.cpu().sregs;
        assert_eq!((sregs.cs.selector, u64::from(sregs.ss.selector)), (KERNEL_CS, ss));
        assert_eq!(sregs.ss.unusable, u8::from(ss == 0));
    }
}

#[test]
fn iret_that_cannot_be_done_changes_nothing() {
    let user = [PROGRAM, u64::from(USER_CS), FIXED, PROGRAM_STACK, u64::from(USER_SS)];
    let with = |at: usize, word: u64| {
        let mut words = user;
        words[at] = word;
        words
    };
    for (words, code) in [
        (with(0, 1 << 47), 0),
        (with(1, 0x83), 0x80),
        (with(1, 3), 0),
        (with(4, 0x103), 0x100),
        (with(4, 3), 0),
    ] {
        let mut guest = Guest::new();
        assert_eq!(guest.iret(words), Stop::Halt);
        assert_eq!(guest.vector(), Some(13), "{words:x?}");
        let frame = guest.frame(DIRECT + IST_TOP);
        assert_eq!((frame.code, frame.cs), (Some(code), u64::from(KERNEL_CS)));
    }
    // A descriptor that is not all within the limit.
    let mut guest = Guest::new();
    guest.engine.cpu_mut().sregs.gdt.limit = u32::from(USER_CS & !7) as u16 + 6;
    assert_eq!(guest.iret(user), Stop::Halt);
    assert_eq!(guest.vector(), Some(13));
    assert_eq!(guest.frame(DIRECT + IST_TOP).code, Some(u64::from(USER_CS & !3)));
    // Other rings, segments of other kinds, local descriptors, 32-bit programs, single step in ring 0: KVM's.
    let mut guest = Guest::new();
    guest.write(GDT + 0x40, guest.read(GDT + u64::from(USER_CS & !3)) & !(1 << 53) | 1 << 54);
    guest.write(GDT + 0x48, guest.read(GDT + u64::from(USER_CS & !3)) & !(1 << 47));
    let kernel = [PROGRAM, u64::from(KERNEL_CS), FIXED | TF, PROGRAM_STACK, 0];
    let other_stack = [PROGRAM, u64::from(KERNEL_CS), FIXED, PROGRAM_STACK, u64::from(USER_SS)];
    let older = [PROGRAM, u64::from(KERNEL_CS), FIXED | VM, PROGRAM_STACK, 0];
    for words in [
        with(1, 0x30),
        with(1, 0x31),
        with(1, 0x43),
        with(1, 0x4b),
        with(1, 0x37),
        with(1, 0x2b),
        with(4, 0x33),
        with(4, u64::from(KERNEL_SS)),
        with(4, u64::from(KERNEL_SS) | 3),
        with(4, u64::from(USER_SS & !3)),
        kernel,
        other_stack,
        older,
    ] {
        assert_eq!(guest.iret(words), Stop::Foreign, "{words:x?}");
        assert_eq!(guest.engine.cpu().sregs.cs.selector, KERNEL_CS);
        assert_eq!(guest.engine.cpu().regs().rflags, FIXED);
    }
    guest.engine.cpu_mut().set_flags(FIXED | NT);
    assert_eq!(guest.iret(user), Stop::Halt);
    assert_eq!(guest.vector(), Some(13));
}

#[test]
fn sysret_takes_rip_flags_and_flat_segments() {
    let mut guest = Guest::new();
    let at = guest.code(SYSRET);
    guest.set_reg(RCX, PROGRAM);
    guest.set_reg(RSP, PROGRAM_STACK);
    guest.set_reg(R11, !TF);
    assert_eq!(guest.run_at(at), Stop::Foreign, "STAR is not known");
    assert_eq!(guest.rip(), at);
    guest.engine.cpu_mut().star = Some(STAR);
    assert_eq!(guest.run_at(at), Stop::Ring3);
    let regs = guest.engine.cpu().regs();
    assert_eq!((regs.rip, regs.rsp), (PROGRAM, PROGRAM_STACK));
    // All but RF, VM, reserved bits (SDM vol. 2, SYSRET).
    assert_eq!(regs.rflags, 0x003c_7fd7 & !TF | FIXED);
    let sregs = guest.engine.cpu().sregs;
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    assert_eq!(sregs.cs, kvm_segment { selector: 0x33, type_: 11, l: 1, ..flat });
    assert_eq!(sregs.ss, kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat });
}

#[test]
fn sysret_to_where_nothing_can_be_is_a_general_protection_fault_in_ring_0() {
    let mut guest = Guest::new();
    guest.engine.cpu_mut().star = Some(STAR);
    guest.set_reg(RCX, 1 << 47);
    let at = guest.code(SYSRET);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(13));
    assert_eq!(guest.engine.cpu().sregs.cs.selector, KERNEL_CS);
}

#[test]
fn swapgs_exchanges_and_accesses_follow() {
    let mut guest = Guest::new();
    let (ours, theirs) = (guest.page(), guest.page());
    guest.write(ours + 0x10, 1);
    guest.write(theirs + 0x10, 2);
    guest.engine.cpu_mut().sregs.gs.base = DIRECT + ours;
    guest.engine.cpu_mut().kernel_gs = DIRECT + theirs;
    guest.engine.cpu_mut().sregs.fs.base = DIRECT + ours + 8;
    // mov rax, gs:[0x10]; swapgs; mov rcx, gs:[0x10]; mov rdx, fs:[8]
    let at = guest.code(&[
        0x65, 0x48, 0x8b, 0x04, 0x25, 0x10, 0, 0, 0, 0x0f, 0x01, 0xf8, 0x65, 0x48, 0x8b, 0x0c, 0x25, 0x10, 0,
        0, 0, 0x64, 0x48, 0x8b, 0x14, 0x25, 8, 0, 0, 0,
    ]);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!((guest.reg(RAX), guest.reg(RCX), guest.reg(RDX)), (1, 2, 1));
    let cpu = guest.engine.cpu();
    assert_eq!((cpu.sregs.gs.base, cpu.kernel_gs), (DIRECT + theirs, DIRECT + ours));
}

#[test]
fn bases_of_segments_are_read_and_written_as_registers() {
    let mut guest = Guest::new();
    // wrmsr; xor eax, eax; xor edx, edx; rdmsr
    let at = guest.code(&[0x0f, 0x30, 0x31, 0xc0, 0x31, 0xd2, 0x0f, 0x32]);
    for (number, value) in [(0xc000_0100_u64, 0x7123_4567_89ab_u64), (0xc000_0101, DIRECT), (0xc000_0102, 5)]
    {
        guest.set_reg(RAX, value | 0xdead << 32);
        guest.set_reg(RDX, value >> 32 | 0xdead << 32);
        guest.set_reg(RCX, number | 0xdead << 32);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.reg(RAX), guest.reg(RDX)), (value & 0xffff_ffff, value >> 32));
    }
    let cpu = guest.engine.cpu();
    assert_eq!((cpu.sregs.fs.base, cpu.sregs.gs.base, cpu.kernel_gs), (0x7123_4567_89ab, DIRECT, 5));
    // What cannot be an address, and other registers, are KVM's; a new STAR has to be asked for.
    guest.engine.cpu_mut().star = Some(STAR);
    for (number, high) in [(0xc000_0100, 1 << 15), (0xc000_0082, 0), (0xc000_0081, 0)] {
        guest.set_reg(RCX, number);
        guest.set_reg(RDX, high);
        assert_eq!(guest.run_at(at), Stop::Foreign);
        assert_eq!(guest.rip(), at);
    }
    assert_eq!(guest.engine.cpu().star, None);
    assert_eq!(guest.run_at(at + 6), Stop::Foreign);
    assert_eq!(guest.engine.cpu().sregs.fs.base, 0x7123_4567_89ab);
}

#[test]
fn the_instructions_for_bases_do_what_their_registers_do() {
    let mut guest = Guest::new();
    // wrfsbase rax; wrgsbase ecx; rdfsbase rcx; rdgsbase eax
    let at = guest.code(&[
        0xf3, 0x48, 0x0f, 0xae, 0xd0, 0xf3, 0x0f, 0xae, 0xd9, 0xf3, 0x48, 0x0f, 0xae, 0xc1, 0xf3, 0x0f, 0xae,
        0xc8,
    ]);
    guest.set_reg(RAX, DIRECT | 1);
    guest.set_reg(RCX, u64::MAX);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(6), "CR4 does not allow them");
    guest.engine.cpu_mut().sregs.cr4 |= 1 << 16;
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), None);
    assert_eq!((guest.reg(RCX), guest.reg(RAX)), (DIRECT | 1, 0xffff_ffff));
    let cpu = guest.engine.cpu();
    assert_eq!((cpu.sregs.fs.base, cpu.sregs.gs.base), (DIRECT | 1, 0xffff_ffff));
    guest.set_reg(RAX, 1 << 47);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(13));
}

#[test]
fn control_registers_and_selectors_are_read() {
    let mut guest = Guest::new();
    let cpu = guest.engine.cpu_mut();
    cpu.sregs.cr2 = 0x1234;
    (cpu.sregs.ds.selector, cpu.sregs.es.selector) = (1, 2);
    (cpu.sregs.fs.selector, cpu.sregs.gs.selector) = (3, 0xfff4);
    let sregs = cpu.sregs;
    for (number, value) in [(0, sregs.cr0), (2, 0x1234), (3, sregs.cr3), (4, sregs.cr4)] {
        // mov rcx, cr
        let at = guest.code(&[0x0f, 0x20, 0xc1 | number << 3]);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.reg(RCX), value);
    }
    for (number, value) in
        [(0, 2), (1, u64::from(KERNEL_CS)), (2, u64::from(KERNEL_SS)), (3, 1), (4, 3), (5, 0xfff4)]
    {
        // mov ecx, segment; mov dx, segment; mov [rax], segment
        let modrm = number << 3;
        let at = guest.code(&[0x8c, 0xc1 | modrm, 0x66, 0x8c, 0xc2 | modrm, 0x8c, modrm]);
        let page = guest.page();
        guest.write(page, u64::MAX);
        guest.set_reg(RAX, DIRECT + page);
        guest.set_reg(RCX, u64::MAX);
        guest.set_reg(RDX, u64::MAX);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.reg(RCX), guest.reg(RDX)), (value, value | !0xffff));
        assert_eq!(guest.read(page), value | !0xffff);
    }
    // mov cr0, rcx; mov cr8, rcx; mov rcx, cr8; mov cr4, rcx (another bit than PGE); mov ds, ecx
    guest.set_reg(RCX, sregs.cr4 | 1 << 20);
    for code in [
        &[0x0f, 0x22, 0xc1][..],
        &[0x44, 0x0f, 0x22, 0xc1],
        &[0x44, 0x0f, 0x20, 0xc1],
        &[0x0f, 0x22, 0xe1],
        &[0x8e, 0xd9],
    ] {
        let at = guest.code(code);
        assert_eq!(guest.run_at(at), Stop::Foreign);
    }
    // mov cr3, rcx, of a bit that no address has
    guest.set_reg(RCX, sregs.cr3 | 1 << 52);
    let at = guest.code(&[0x0f, 0x22, 0xd9]);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!(guest.engine.cpu().sregs.cr3, sregs.cr3);
}

#[test]
fn the_stack_segment_is_written_and_what_is_no_stack_is_left_to_kvm() {
    let mut guest = Guest::new();
    // mov ss, cx
    let at = guest.code(&[0x66, 0x8e, 0xd1]);
    for (selector, found) in [(u64::from(KERNEL_SS), Stop::Halt), (0, Stop::Halt)] {
        guest.set_reg(RCX, selector | 0xdead << 16);
        assert_eq!(guest.run_at(at), found);
        assert_eq!(guest.vector(), None);
        let ss = guest.engine.cpu().sregs.ss;
        assert_eq!((u64::from(ss.selector), ss.unusable), (selector, u8::from(selector == 0)));
    }
    for selector in [u64::from(USER_SS), u64::from(KERNEL_CS), u64::from(KERNEL_SS) | 1] {
        guest.set_reg(RCX, selector);
        assert_eq!(guest.run_at(at), Stop::Foreign, "{selector:#x}");
        assert_eq!(guest.engine.cpu().sregs.ss.selector, 0);
    }
    // None at all is for ring 0 only with its own number (SDM vol. 2, MOV).
    for (selector, code) in [(0x81, 0x80), (1, 0), (3, 0)] {
        guest.set_reg(RCX, selector);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!((guest.vector(), guest.frame(DIRECT + IST_TOP).code), (Some(13), Some(code)));
    }
}

#[test]
fn flags_of_ring_0_are_pushed_and_popped() {
    let mut guest = Guest::new();
    let stack = guest.stack();
    // popfq; pushfq
    let at = guest.code(&[0x9d, 0x9c]);
    let all = ARITHMETIC | DF | IF | ID | AC | NT | 3 << 12;
    for (popped, before, after) in [
        (all, FIXED, all | FIXED),
        (0, all | FIXED, FIXED),
        // VM, RF and the virtual interrupt flags are not popped; RF goes.
        (VM | RF | 3 << 19 | 1 << 3, FIXED | RF | 1 << 19, FIXED | 1 << 19),
    ] {
        guest.write(stack - DIRECT, popped);
        guest.set_reg(RSP, stack);
        guest.engine.cpu_mut().set_flags(before);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.read(stack - DIRECT), after);
        assert_eq!(guest.engine.cpu().flags, after);
    }
    // pushfq
    let at = guest.code(&[0x9c]);
    guest.set_reg(RSP, stack);
    guest.engine.cpu_mut().set_flags(all | FIXED | RF);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.read(stack - DIRECT - 8), all | FIXED);
    // sti; nop; pushfq; cli
    let at = guest.code(&[0xfb, 0x90, 0x9c, 0xfa]);
    guest.set_reg(RSP, stack);
    guest.engine.cpu_mut().set_flags(FIXED);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.read(stack - DIRECT - 8), FIXED | IF);
    assert_eq!(guest.engine.cpu().flags, FIXED);
}
