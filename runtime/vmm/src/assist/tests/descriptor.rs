//! LAR, LSL, VERR, VERW against a GDT and an LDT in memory.

use super::*;

const ZF: u64 = 1 << 6;
const LSL: &[u8] = &[0x48, 0x0f, 0x03, 0xc3];
const LAR: &[u8] = &[0x0f, 0x02, 0xc3];
const VERR: &[u8] = &[0x0f, 0x00, 0xe3];
const VERW: &[u8] = &[0x0f, 0x00, 0xeb];

/// Index in the GDT and descriptor: flat code, flat data, code that cannot be read, data that cannot be
/// written, the CPU number's segment (limit 0x1005, ring 3), conforming code, busy TSS, call gate, interrupt
/// gate.
const GDT: [(u64, u64); 9] = [
    (2, 0x00af_9b00_0000_ffff),
    (3, 0x00cf_9300_0000_ffff),
    (4, 0x00af_9900_0000_ffff),
    (5, 0x00cf_9100_0000_ffff),
    (6, 0x0040_f500_0000_1005),
    (7, 0x00af_9e00_0000_ffff),
    (8, 0x0000_8b00_0000_0067),
    (9, 0x0000_8c00_0010_0000),
    (10, 0x0000_8e00_0010_0000),
];

fn machine() -> Machine {
    let mut m = Machine::new();
    m.cpu.sregs.gdt.base = DATA;
    m.cpu.sregs.gdt.limit = 0x57;
    for (index, descriptor) in GDT {
        m.write_u64(DATA_GPA + index * 8, descriptor);
    }
    m.cpu.sregs.ldt.base = DATA + 0x1000;
    m.cpu.sregs.ldt.limit = 7;
    m.write_u64(DATA_GPA + 0x1000, 0x0000_f200_0000_1234);
    m
}

/// RAX, which was all ones, if ZF is set after it.
fn ask(bytes: &[u8], selector: u64) -> Option<u64> {
    let mut m = machine();
    m.cpu.regs.rax = u64::MAX;
    m.cpu.regs.rbx = selector | 0xffff_0000;
    m.cpu.regs.rflags = 0x893;
    m.done(bytes);
    assert_eq!(m.cpu.regs.rflags & !ZF, 0x893, "only ZF changes");
    if m.cpu.regs.rflags & ZF == 0 {
        assert_eq!(m.cpu.regs.rax, u64::MAX, "no answer, no change");
        return None;
    }
    Some(m.cpu.regs.rax)
}

#[test]
fn lsl_gives_the_limit_in_bytes() {
    assert_eq!(ask(LSL, 0x10), Some(0xffff_ffff));
    assert_eq!(ask(LSL, 0x33), Some(0x1005), "the CPU number");
    assert_eq!(ask(LSL, 0x40), Some(0x67));
    assert_eq!(ask(LSL, 0x04), Some(0x1234), "from the LDT");
}

#[test]
fn lar_gives_the_rights() {
    assert_eq!(ask(LAR, 0x10), Some(0x00a0_9b00));
    assert_eq!(ask(LAR, 0x48), Some(0x8c00), "a call gate");
    assert_eq!(ask(LSL, 0x48), None, "a call gate has no limit");
    assert_eq!(ask(LAR, 0x50), None, "an interrupt gate");
}

#[test]
fn selectors_that_select_nothing_have_no_answer() {
    for selector in [0, 3, 0x58, 0x0c, 0xfff8] {
        for bytes in [LSL, LAR, VERR, VERW] {
            assert_eq!(ask(bytes, selector), None, "{bytes:02x?} of {selector:#x}");
        }
    }
}

#[test]
fn a_descriptor_partly_beyond_its_table_has_no_answer() {
    let mut m = machine();
    m.cpu.sregs.ldt.limit = 6;
    m.cpu.regs.rbx = 4;
    m.done(LSL);
    assert_eq!(m.cpu.regs.rflags & ZF, 0);
}

#[test]
fn a_requested_privilege_below_the_segment_s_has_no_answer() {
    assert_eq!(ask(LSL, 0x1b), None);
    assert!(ask(LSL, 0x3b).is_some(), "conforming code is for everyone");
}

#[test]
fn verr_and_verw_tell_readable_and_writable() {
    for (selector, readable, writable) in [
        (0x10, true, false),
        (0x18, true, true),
        (0x20, false, false),
        (0x28, true, false),
        (0x33, true, false),
        (0x07, true, true),
        (0x40, false, false),
    ] {
        assert_eq!(ask(VERR, selector).is_some(), readable, "VERR {selector:#x}");
        assert_eq!(ask(VERW, selector).is_some(), writable, "VERW {selector:#x}");
    }
}

#[test]
fn verw_reads_its_selector_from_memory() {
    let mut m = machine();
    m.cpu.regs.rsi = DATA + 0x2000;
    m.write(DATA_GPA + 0x2000, &[0x18, 0, 0xff, 0xff]);
    m.done(&[0x0f, 0x00, 0x2e]);
    assert_eq!(m.cpu.regs.rflags & ZF, ZF);
}
