//! Where instructions come from, and what is said when one is not done.

use super::*;
use crate::assist::{Counters, Reason};

/// `popcnt rax, rbx`.
const POPCNT: [u8; 5] = [0xf3, 0x48, 0x0f, 0xb8, 0xc3];

#[test]
fn an_instruction_without_bytes_is_fetched_through_the_page_tables() {
    for given in [0, 2] {
        let mut m = Machine::new();
        m.map(RIP & !0xfff, 0x30_0000, KERNEL);
        m.write(0x30_0000 + (RIP & 0xfff), &POPCNT);
        m.cpu.regs.rbx = 7;
        assert_eq!(m.run(&POPCNT[..given]).unwrap(), Op::Popcnt);
        assert_eq!((m.cpu.regs.rax, m.cpu.regs.rip), (3, RIP + 5), "{given} bytes given");
    }
}

#[test]
fn a_fetch_crosses_pages_that_are_apart_in_memory() {
    let mut m = Machine::new();
    m.cpu.regs.rip = RIP + 0xffe;
    m.cpu.regs.rbx = 7;
    m.map(RIP, 0x30_0000, KERNEL);
    m.map(RIP + 0x1000, 0x30_8000, KERNEL);
    m.write(0x30_0ffe, &POPCNT[..2]);
    m.write(0x30_8000, &POPCNT[2..]);
    m.run(&[]).unwrap();
    assert_eq!((m.cpu.regs.rax, m.cpu.regs.rip), (3, RIP + 0x1003));
}

#[test]
fn bytes_after_the_instruction_are_not_part_of_it() {
    let mut m = Machine::new();
    m.cpu.regs.rbx = 7;
    let mut bytes = POPCNT.to_vec();
    bytes.extend([0x90; 20]);
    m.run(&bytes).unwrap();
    assert_eq!(m.cpu.regs.rip, RIP + 5);
}

#[test]
fn an_instruction_nobody_does_is_refused_by_name_with_its_bytes() {
    let mut m = Machine::new();
    // addps xmm0, xmm2, and a byte that is not part of it.
    let refused = m.run(&[0x0f, 0x58, 0xc2, 0x90]).unwrap_err();
    assert!(matches!(refused.reason(), Reason::Unknown));
    assert_eq!((refused.rip(), refused.bytes()), (RIP, &[0x0f, 0x58, 0xc2][..]));
    let text = refused.to_string();
    let start = "the guest stopped at 0xffffffff81000000: addps [0f 58 c2]: ";
    assert!(text.starts_with(start) && !text.contains('\n'), "{text}");
    assert_eq!(m.cpu.regs.rip, RIP, "nothing changed");
}

#[test]
fn bytes_that_are_no_instruction_are_refused() {
    let mut m = Machine::new();
    let refused = m.run(&[0x06, 0x90]).unwrap_err();
    assert!(matches!(refused.reason(), Reason::Undecodable), "{refused}");
    // LOCK POPCNT.
    let refused = m.run(&[0xf0, 0xf3, 0x48, 0x0f, 0xb8, 0xc3]).unwrap_err();
    assert!(matches!(refused.reason(), Reason::Undecodable), "{refused}");
}

#[test]
fn an_instruction_cut_off_by_an_unmapped_page_is_refused() {
    let mut m = Machine::new();
    let refused = m.run(&POPCNT[..3]).unwrap_err();
    assert!(matches!(refused.reason(), Reason::TooFewBytes), "{refused}");
}

#[test]
fn ring_3_is_refused() {
    let mut m = Machine::new();
    m.cpu.sregs.cs.selector = 0x33;
    let refused = m.run(&POPCNT).unwrap_err();
    assert!(matches!(refused.reason(), Reason::NotRing0(3)), "{refused}");
}

#[test]
fn code_that_is_not_64_bit_is_refused() {
    let breaks: [fn(&mut FakeCpu); 3] =
        [|cpu| cpu.sregs.cs.l = 0, |cpu| cpu.sregs.efer = 0, |cpu| cpu.sregs.cr0 = 1];
    for break_mode in breaks {
        let mut m = Machine::new();
        break_mode(&mut m.cpu);
        let refused = m.run(&POPCNT).unwrap_err();
        assert!(matches!(refused.reason(), Reason::NotLongMode), "{refused}");
    }
}

#[test]
fn counters_print_what_was_done_in_the_table_s_order() {
    let mut counters = Counters::default();
    assert_eq!(counters.to_string(), "none");
    for op in [Op::Popcnt, Op::Xsave, Op::Popcnt] {
        counters.count(op);
    }
    let mut sum = counters.clone();
    sum.add(&counters);
    assert_eq!(counters.to_string(), "xsave 1, popcnt 2");
    assert_eq!((sum.get(Op::Popcnt), sum.total()), (4, 6));
    assert!(Op::ALL.iter().enumerate().all(|(i, op)| *op as usize == i));
}

#[test]
fn a_completed_instruction_clears_the_resume_flag() {
    let mut m = Machine::new();
    m.cpu.regs.rflags |= 1 << 16;
    m.done(&[0xf3, 0x90]);
    assert_eq!(m.cpu.regs.rflags, 2);
}
