//! Exceptions: the way through the IDT, what lies on the stack then, and what comes of those that meet another.

use super::guest::{DIRECT, Frame, GDT, Guest, IDT, IST_TOP, KERNEL_CS, KERNEL_SS, TSS, USER_CS};
use crate::alu::{ARITHMETIC, CF, ZF};
use crate::cpu::{AC, DF, FIXED, IF, NT, RAX, RCX, RDX, RF, RSP, TF};
use crate::paging::{PRESENT, WRITABLE};
use crate::stop::Stop;

/// ud2
const UNDEFINED: &[u8] = &[0x0f, 0x0b];
/// int3
const BREAKPOINT: &[u8] = &[0xcc];
/// mov rcx, [rax]
const LOAD: &[u8] = &[0x48, 0x8b, 0x08];
const NOWHERE: u64 = 0xffff_c900_dead_b000;
const INTERRUPT_GATE: u64 = 14;
const TRAP_GATE: u64 = 15;

fn frame_of(rip: u64, rsp: u64, flags: u64, code: Option<u64>) -> Frame {
    Frame { code, rip, cs: u64::from(KERNEL_CS), flags, rsp, ss: u64::from(KERNEL_SS) }
}

#[test]
fn an_exceptions_frame_is_aligned_and_holds_what_was() {
    for misaligned in 0..16 {
        let mut guest = Guest::new();
        guest.gate(6, INTERRUPT_GATE, 0);
        guest.gate(14, INTERRUPT_GATE, 0);
        let stack = guest.stack() + misaligned;
        for (code, vector, error) in [(UNDEFINED, 6, None), (LOAD, 14, Some(0))] {
            let flags = FIXED | IF | ARITHMETIC | DF | AC;
            guest.engine.cpu_mut().set_flags(flags);
            guest.set_reg(RSP, stack);
            guest.set_reg(RAX, NOWHERE);
            let at = guest.code(code);
            assert_eq!(guest.run_at(at), Stop::Halt);
            assert_eq!(guest.vector(), Some(vector));
            let top = stack & !15;
            let words = if error.is_some() { 6 } else { 5 };
            assert_eq!(guest.reg(RSP), top - 8 * words);
            assert_eq!(guest.frame(top), frame_of(at, stack, flags | RF, error));
            assert_eq!(guest.engine.cpu().flags, flags & !IF);
            assert_eq!(guest.engine.cpu().sregs.ss.selector, KERNEL_SS);
        }
    }
}

#[test]
fn interrupt_gates_clear_if_and_trap_gates_do_not_and_both_clear_nt() {
    let mut guest = Guest::new();
    for (gate, kept) in [(INTERRUPT_GATE, FIXED), (TRAP_GATE, FIXED | IF)] {
        guest.gate(6, gate, 1);
        guest.engine.cpu_mut().set_flags(FIXED | IF | NT | RF);
        let at = guest.code(UNDEFINED);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.engine.cpu().flags, kept);
        assert_eq!(guest.frame(DIRECT + IST_TOP).flags, FIXED | IF | NT | RF);
    }
}

#[test]
fn each_stack_of_the_task_state_segment_is_found() {
    for ist in 1..8 {
        let mut guest = Guest::new();
        let stack = guest.stack();
        guest.write_bytes(TSS + 0x24 + 8 * (ist - 1), &(stack + 4).to_le_bytes());
        guest.gate(6, INTERRUPT_GATE, ist);
        guest.set_reg(RSP, 0x1234);
        let at = guest.code(UNDEFINED);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.reg(RSP), stack - 40);
        assert_eq!(guest.frame(stack), frame_of(at, 0x1234, FIXED | RF, None));
    }
}

#[test]
fn a_breakpoint_returns_behind_itself_and_without_rf() {
    let mut guest = Guest::new();
    let at = guest.code(BREAKPOINT);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(3));
    assert_eq!(guest.frame(DIRECT + IST_TOP), frame_of(at + 1, 0, FIXED, None));
}

#[test]
fn a_divide_error_is_a_fault_with_nothing_changed() {
    const DIV_RCX: &[u8] = &[0x48, 0xf7, 0xf1];
    const DIV_CL: &[u8] = &[0xf6, 0xf1];
    const IDIV_RCX: &[u8] = &[0x48, 0xf7, 0xf9];
    const IDIV_ECX: &[u8] = &[0xf7, 0xf9];
    const LEAST: u64 = 1 << 63;
    for (code, low, high, by) in [
        (DIV_RCX, 1, 0, 0),
        (DIV_RCX, 0, 2, 2),
        (DIV_CL, 1, 0, 0x100),
        (DIV_CL, 0x200, 0, 2),
        (IDIV_RCX, 1, 0, 0),
        (IDIV_RCX, 0, 1, 2),
        (IDIV_RCX, LEAST, u64::MAX, u64::MAX),
        (IDIV_RCX, 0, LEAST, u64::MAX),
        (IDIV_ECX, 1 << 31, u64::MAX, u64::MAX),
    ] {
        let mut guest = Guest::new();
        guest.set_reg(RAX, low);
        guest.set_reg(RDX, high);
        guest.set_reg(RCX, by);
        guest.engine.cpu_mut().set_flags(FIXED | CF | ZF);
        let before = guest.registers();
        let at = guest.code(code);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.vector(), Some(0), "{code:02x?} of {high:#x}:{low:#x} by {by:#x}");
        assert_eq!(guest.frame(DIRECT + IST_TOP), frame_of(at, 0, FIXED | CF | ZF | RF, None));
        let mut after = guest.registers();
        after[RSP as usize] = before[RSP as usize];
        assert_eq!(after, before);
    }
}

#[test]
fn a_raised_exception_is_one_of_the_instruction_at_rip() {
    let mut guest = Guest::new();
    guest.engine.cpu_mut().rip = 0x1234;
    assert_eq!(guest.engine.raise(14, Some(3), 0x5678), Ok(()));
    assert_eq!(guest.vector(), Some(14));
    assert_eq!(guest.engine.cpu().sregs.cr2, 0x5678);
    assert_eq!(guest.frame(DIRECT + IST_TOP), frame_of(0x1234, 0, FIXED | RF, Some(3)));
}

#[test]
fn an_exception_that_cannot_be_delivered_is_a_double_fault() {
    let mut guest = Guest::new();
    guest.gate(14, INTERRUPT_GATE, 0);
    guest.set_reg(RSP, NOWHERE + 0x800);
    guest.set_reg(RAX, NOWHERE + 0x5000);
    let at = guest.code(LOAD);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(8));
    assert_eq!(guest.frame(DIRECT + IST_TOP), frame_of(at, NOWHERE + 0x800, FIXED | RF, Some(0)));
    // What did not find its stack: how a kernel knows that its stack was full.
    assert_eq!(guest.engine.cpu().sregs.cr2, NOWHERE + 0x7f8);
}

#[test]
fn what_is_met_on_the_way_to_a_harmless_exceptions_handler_is_taken_instead() {
    let mut guest = Guest::new();
    guest.gate(6, INTERRUPT_GATE, 0);
    guest.set_reg(RSP, NOWHERE + 0x800);
    let at = guest.code(UNDEFINED);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(14));
    assert_eq!(guest.engine.cpu().sregs.cr2, NOWHERE + 0x7f8);
    assert_eq!(guest.frame(DIRECT + IST_TOP), frame_of(at, NOWHERE + 0x800, FIXED | RF, Some(2)));
}

/// General protection and its like count as harmless only to a page fault.
#[test]
fn which_pairs_of_exceptions_are_a_double_fault() {
    let contributory = [0, 10, 11, 12, 13];
    for first in 0..32 {
        if first == 8 {
            continue;
        }
        let mut guest = Guest::new();
        // Its gate is none, so that the second is a general protection fault.
        guest.write(IDT + 16 * u64::from(first), 0);
        guest.engine.cpu_mut().rip = 0x1234;
        assert_eq!(guest.engine.raise(first, None, 0), Ok(()));
        let double = first == 14 || contributory.contains(&first);
        assert_eq!(guest.vector(), Some(if double { 8 } else { 13 }), "{first}");
    }
}

#[test]
fn an_exception_on_the_way_to_the_double_faults_handler_ends_the_guest() {
    let mut guest = Guest::new();
    guest.gate(14, INTERRUPT_GATE, 0);
    guest.gate(8, INTERRUPT_GATE, 0);
    guest.set_reg(RSP, NOWHERE + 0x800);
    guest.set_reg(RAX, NOWHERE);
    let at = guest.code(LOAD);
    assert_eq!(guest.run_at(at), Stop::TripleFault);
    assert_eq!(guest.rip(), at);
    let mut guest = Guest::new();
    guest.engine.cpu_mut().sregs.idt.limit = 8 * 16 + 14;
    assert_eq!(guest.engine.raise(13, Some(0), 0), Err(Stop::TripleFault));
}

#[test]
fn a_gate_must_be_present_and_one_of_an_exceptions() {
    for spoil in 0..5 {
        let mut guest = Guest::new();
        // 32-bit code, in the last of the GDT's descriptors.
        guest.write(GDT + 0x70, guest.read(GDT + u64::from(KERNEL_CS)) ^ 3 << 53);
        let low = guest.read(IDT + 6 * 16);
        match spoil {
            0 => guest.write(IDT + 6 * 16, low & !(1 << 47)),
            1 => guest.gate(6, 12, 1),
            // A selector beyond the GDT.
            2 => guest.write(IDT + 6 * 16, low & !0xffff_0000 | 0x80 << 16),
            // Code of another ring, and code of 32 bits.
            3 => guest.write(IDT + 6 * 16, low & !0xffff_0000 | u64::from(USER_CS) << 16),
            _ => guest.write(IDT + 6 * 16, low & !0xffff_0000 | 0x70 << 16),
        }
        let at = guest.code(UNDEFINED);
        assert_eq!(guest.run_at(at), Stop::Halt);
        assert_eq!(guest.vector(), Some(13), "{spoil}");
        let code = [0, 0, 0x80, 0x30, 0x70][spoil];
        assert_eq!(guest.frame(DIRECT + IST_TOP).code, Some(code));
    }
}

/// With a stack of its own a handler that faults at once would go on for ever.
#[test]
fn exceptions_cost_fuel() {
    let mut guest = Guest::new();
    let at = guest.code(UNDEFINED);
    guest.write_bytes(super::guest::HANDLERS + 16 * 6, UNDEFINED);
    assert_eq!(guest.run_at(at), Stop::Fuel);
    let mut guest = Guest::new();
    let handler = NOWHERE;
    let low = guest.read(IDT + 16 * 14) & !(0xffff | 0xffff << 48)
        | handler & 0xffff
        | (handler & 0xffff_0000) << 32;
    guest.write(IDT + 16 * 14, low);
    guest.write(IDT + 16 * 14 + 8, handler >> 32);
    assert_eq!(guest.run_at(NOWHERE), Stop::Fuel);
    assert_eq!(guest.engine.cpu().sregs.cr2, NOWHERE);
}

#[test]
fn single_step_is_for_kvm() {
    let mut guest = Guest::new();
    guest.engine.cpu_mut().set_flags(FIXED | TF);
    let at = guest.code(&[0x90]);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!(guest.rip(), at);
    // popfq with TF on the stack
    guest.engine.cpu_mut().set_flags(FIXED);
    let stack = guest.stack();
    guest.write(stack - DIRECT, FIXED | TF);
    guest.set_reg(RSP, stack);
    let at = guest.code(&[0x9d]);
    assert_eq!(guest.run_at(at), Stop::Foreign);
    assert_eq!((guest.rip(), guest.reg(RSP)), (at, stack));
}

#[test]
fn a_stack_or_a_handler_that_spans_pages_is_no_different() {
    let mut guest = Guest::new();
    guest.gate(6, INTERRUPT_GATE, 0);
    let (low, high) = (guest.page(), guest.page());
    guest.map(NOWHERE, high, PRESENT | WRITABLE);
    guest.map(NOWHERE + 0x1000, low, PRESENT | WRITABLE);
    let stack = NOWHERE + 0x1010;
    guest.set_reg(RSP, stack);
    let at = guest.code(UNDEFINED);
    assert_eq!(guest.run_at(at), Stop::Halt);
    assert_eq!(guest.vector(), Some(6));
    let words = [high + 0xfe8, high + 0xff0, high + 0xff8, low, low + 8].map(|gpa| guest.read(gpa));
    assert_eq!(words, [at, u64::from(KERNEL_CS), FIXED | RF, stack, u64::from(KERNEL_SS)]);
}
