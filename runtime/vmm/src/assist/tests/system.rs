//! Traps, SMAP, bases, x87 exceptions, and the instructions that do nothing.

use super::*;

#[test]
fn int3_is_a_trap_with_rip_after_it() {
    let mut m = Machine::new();
    assert_eq!(m.run(&[0xcc]).unwrap(), Op::Int3);
    assert_eq!(m.cpu.injected, [plain(3)]);
    assert_eq!(m.cpu.regs.rip, RIP + 1);
}

#[test]
fn ud2_is_an_undefined_opcode_fault() {
    assert_eq!(Machine::new().fault(&[0x0f, 0x0b]), plain(6));
    // ud1 eax, [eax+0x10]: what compilers trap with; its operand is not accessed.
    assert_eq!(Machine::new().fault(&[0x67, 0x0f, 0xb9, 0x40, 0x10]), plain(6));
}

#[test]
fn stac_and_clac_change_only_ac() {
    let mut m = Machine::new();
    m.cpu.regs.rflags = 0x246;
    m.done(&[0x0f, 0x01, 0xcb]);
    assert_eq!(m.cpu.regs.rflags, 0x246 | RFLAGS_AC);
    m.done(&[0x0f, 0x01, 0xca]);
    assert_eq!(m.cpu.regs.rflags, 0x246);
}

#[test]
fn fences_hints_and_landing_pads_only_move_rip() {
    for bytes in [
        &[0x0f, 0xae, 0xe8][..],
        &[0x0f, 0xae, 0xf0],
        &[0x0f, 0xae, 0xf8],
        &[0x0f, 0x01, 0xe8],
        &[0xf3, 0x90],
        &[0xf3, 0x0f, 0x1e, 0xfa],
        // prefetcht0 [0], prefetchw [0]: hints do not fault.
        &[0x0f, 0x18, 0x0c, 0x25, 0, 0, 0, 0],
        &[0x0f, 0x0d, 0x0c, 0x25, 0, 0, 0, 0],
    ] {
        let mut m = Machine::new();
        let mut regs = m.cpu.regs;
        m.done(bytes);
        regs.rip += bytes.len() as u64;
        assert_eq!(m.cpu.regs, regs);
    }
}

#[test]
fn cache_flushes_fault_on_an_unmapped_line_only() {
    for bytes in [&[0x0f, 0xae, 0x3e][..], &[0x66, 0x0f, 0xae, 0x3e], &[0x66, 0x0f, 0xae, 0x36]] {
        let mut m = Machine::new();
        m.cpu.regs.rsi = DATA;
        m.done(bytes);
        m.cpu.regs.rsi = DATA + DATA_PAGES * 0x1000;
        assert_eq!(m.fault(bytes), page_fault(0, m.cpu.regs.rsi));
    }
}

#[test]
fn rdpid_reads_tsc_aux() {
    let mut m = Machine::new();
    m.cpu.msr = 0xffff_ffff_0000_1001;
    m.cpu.regs.rax = u64::MAX;
    m.done(&[0xf3, 0x0f, 0xc7, 0xf8]);
    assert_eq!(m.cpu.regs.rax, 0x1001);
}

#[test]
fn fs_and_gs_base_are_read_and_written_in_both_widths() {
    let mut m = Machine::new();
    m.cpu.regs.rax = 0xffff_8880_1234_5678;
    m.done(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]);
    m.done(&[0xf3, 0x0f, 0xae, 0xd8]);
    assert_eq!(m.cpu.sregs.fs.base, 0xffff_8880_1234_5678);
    assert_eq!(m.cpu.sregs.gs.base, 0x1234_5678);
    m.cpu.sregs.gs.base = 0xffff_8880_8765_4321;
    m.done(&[0xf3, 0x0f, 0xae, 0xc3]);
    assert_eq!(m.cpu.regs.rbx, 0x1234_5678);
    m.done(&[0xf3, 0x48, 0x0f, 0xae, 0xcb]);
    assert_eq!(m.cpu.regs.rbx, 0xffff_8880_8765_4321);
}

#[test]
fn a_base_that_is_not_canonical_or_not_allowed_faults() {
    let mut m = Machine::new();
    m.cpu.regs.rax = 1 << 47;
    assert_eq!(m.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), general_protection());
    m.cpu.sregs.cr4 |= CR4_LA57;
    m.done(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]);
    m.cpu.sregs.cr4 &= !CR4_FSGSBASE;
    assert_eq!(m.fault(&[0xf3, 0x48, 0x0f, 0xae, 0xd0]), plain(6));
}

#[test]
fn xgetbv_reads_xcr0_and_the_components_in_use() {
    let mut m = Machine::new();
    m.cpu.xcr0 = 0x2_0000_0007;
    m.cpu.image[512..520].copy_from_slice(&0x5u64.to_le_bytes());
    for (index, rax, rdx) in [(0, 7, 2), (1, 5, 0)] {
        m.cpu.regs.rcx = index;
        m.done(&[0x0f, 0x01, 0xd0]);
        assert_eq!((m.cpu.regs.rax, m.cpu.regs.rdx), (rax, rdx), "XCR {index}");
    }
    m.cpu.regs.rcx = 2;
    assert_eq!(m.fault(&[0x0f, 0x01, 0xd0]), general_protection());
    m.cpu.sregs.cr4 &= !CR4_OSXSAVE;
    assert_eq!(m.fault(&[0x0f, 0x01, 0xd0]), plain(6));
}

#[test]
fn fwait_takes_a_pending_unmasked_exception_and_no_other() {
    for (fcw, fsw, exception) in [
        (0x37fu16, 0u16, None),
        (0x37f, 0x3f, None),
        (0x37e, 0x3e, None),
        (0x37e, 0x01, Some(plain(16))),
        (0x340, 0x20, Some(plain(16))),
    ] {
        let mut m = Machine::new();
        m.cpu.image[512] |= 1;
        m.cpu.image[0..2].copy_from_slice(&fcw.to_le_bytes());
        m.cpu.image[2..4].copy_from_slice(&fsw.to_le_bytes());
        match exception {
            None => assert_eq!(m.done(&[0x9b]), Op::Wait),
            Some(exception) => assert_eq!(m.fault(&[0x9b]), exception),
        }
    }
}

#[test]
fn fwait_with_mp_and_ts_is_device_not_available() {
    let mut m = Machine::new();
    m.cpu.sregs.cr0 |= CR0_MP | CR0_TS;
    assert_eq!(m.fault(&[0x9b]), plain(7));
    m.cpu.sregs.cr0 &= !CR0_MP;
    m.done(&[0x9b]);
}

#[test]
fn rdtscp_reads_the_guest_s_time_and_cpu_number() {
    let mut m = Machine::new();
    m.cpu.msr = 0xffff_ffff_0000_1001;
    m.cpu.regs.rcx = u64::MAX;
    m.done(&[0x0f, 0x01, 0xf9]);
    assert_eq!((m.cpu.regs.rax, m.cpu.regs.rdx), (0x89ab_cdef, 0x0123_4567));
    assert_eq!(m.cpu.regs.rcx, 0x1001);
}

#[test]
fn wrpkru_sets_what_rdpkru_reads_and_the_walk_obeys() {
    let mut m = Machine::new();
    m.host = intel();
    m.cpu.sregs.cr4 |= CR4_PKE;
    m.cpu.regs.rax = 0xdead_0000_5555_5554;
    m.cpu.regs.rdx = 0xdead_0000_0000_0000;
    m.done(&[0x0f, 0x01, 0xef]);
    assert_eq!((m.cpu.commits, m.cpu.image[513] & 2), (1, 2));
    m.cpu.regs.rdx = 1;
    m.done(&[0x0f, 0x01, 0xee]);
    assert_eq!((m.cpu.regs.rax, m.cpu.regs.rdx), (0x5555_5554, 0));
}

#[test]
fn protection_key_instructions_check_their_registers() {
    let mut m = Machine::new();
    m.host = intel();
    assert_eq!(m.fault(&[0x0f, 0x01, 0xee]), plain(6));
    assert_eq!(m.fault(&[0x0f, 0x01, 0xef]), plain(6));
    m.cpu.sregs.cr4 |= CR4_PKE;
    m.cpu.regs.rdx = 1;
    assert_eq!(m.fault(&[0x0f, 0x01, 0xef]), general_protection());
    m.cpu.regs.rcx = 1;
    assert_eq!(m.fault(&[0x0f, 0x01, 0xee]), general_protection());
}
