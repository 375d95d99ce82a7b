//! Tests of the doorbell on the assist's machine of plain data: real page tables, RAM with a hole.
#![allow(clippy::unwrap_used)]

use super::*;
use crate::assist::tests::{CR0_WP, DATA, DATA_GPA, DATA_PAGES, HOLE, KERNEL, Machine, PRESENT, USER, cases};
use proptest::prelude::*;
use vm_memory::Bytes as _;

const USER_PAGE: u64 = 0x7000_0000_0000;

/// Rings with these registers; gives back RCX.
fn ring_with(machine: &mut Machine, operation: u32, to: u64, from: u64, len: u64) -> u64 {
    let mut counters = Counters::default();
    let regs = &mut machine.cpu.regs;
    (regs.rdi, regs.rsi, regs.rcx) = (to, from, len);
    let before = machine.cpu.regs;
    ring(&mut machine.cpu, &machine.host, &machine.mem, operation, &mut counters);
    let after = machine.cpu.regs;
    assert_eq!(kvm_bindings::kvm_regs { rcx: before.rcx, ..after }, before, "only RCX changes");
    assert_eq!(counters.calls, 1);
    assert!(machine.cpu.injected.is_empty());
    after.rcx
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * 31 % 251) as u8).collect()
}

#[test]
fn a_copy_crosses_pages_on_both_sides() {
    let mut m = Machine::new();
    let bytes = pattern(9000);
    m.write(DATA_GPA + 100, &bytes);
    assert_eq!(ring_with(&mut m, COPY, DATA + 4 * 4096 + 7, DATA + 100, 9000), 0);
    assert_eq!(m.bytes(DATA_GPA + 4 * 4096 + 7, 9000), bytes);
}

#[test]
fn a_fill_uses_the_low_byte_alone() {
    let mut m = Machine::new();
    assert_eq!(ring_with(&mut m, FILL, DATA + 5, 0xffff_ff5a, 5000), 0);
    assert_eq!(m.bytes(DATA_GPA + 5, 5000), vec![0x5a; 5000]);
    assert_eq!(m.bytes(DATA_GPA + 4, 1), [0]);
    assert_eq!(m.bytes(DATA_GPA + 5005, 1), [0]);
}

#[test]
fn work_stops_at_the_first_page_that_is_not_mapped() {
    let mut m = Machine::new();
    let end = DATA + DATA_PAGES * 4096;
    assert_eq!(ring_with(&mut m, FILL, end - 100, 1, 300), 200);
    assert_eq!(ring_with(&mut m, COPY, DATA, end - 100, 300), 200);
    assert_eq!(ring_with(&mut m, FILL, end, 1, 300), 300);
}

#[test]
fn a_write_to_a_read_only_page_stops_and_changes_nothing() {
    let mut m = Machine::new();
    m.cpu.sregs.cr0 |= CR0_WP;
    m.map(USER_PAGE, DATA_GPA, PRESENT | USER);
    m.write(DATA_GPA, b"before");
    assert_eq!(ring_with(&mut m, FILL, USER_PAGE, 9, 6), 6, "copy-on-write pages take the ordinary fault");
    assert_eq!(m.bytes(DATA_GPA, 6), b"before");
    assert_eq!(ring_with(&mut m, COPY, DATA + 4096, USER_PAGE, 6), 0, "reading it is fine");
    assert_eq!(m.bytes(DATA_GPA + 4096, 6), b"before");
}

#[test]
fn one_call_does_at_most_its_share() {
    let mut m = Machine::with_ram(&[(0, 16 << 20)]);
    for i in 0..6 {
        m.map_at(0xffff_9000_0000_0000 + (i << 21), (4 << 20) + ((i % 2) << 21), KERNEL, 2);
    }
    let left = ring_with(&mut m, FILL, 0xffff_9000_0000_0000, 3, 10 << 20);
    assert_eq!(left, (10 << 20) - MAX_BYTES);
    assert_eq!(ring_with(&mut m, FILL, 0xffff_9000_0000_0000, 3, u64::MAX), u64::MAX - MAX_BYTES);
}

#[test]
fn a_mapping_outside_ram_stops_the_work() {
    let mut m = Machine::new();
    m.map(0xffff_9000_0000_0000, HOLE, KERNEL);
    assert_eq!(ring_with(&mut m, FILL, 0xffff_9000_0000_0000, 1, 10), 10);
    assert_eq!(ring_with(&mut m, COPY, DATA, 0xffff_9000_0000_0000, 10), 10);
}

#[test]
fn an_unknown_operation_and_a_wild_address_do_nothing() {
    let mut m = Machine::new();
    assert_eq!(ring_with(&mut m, 7, DATA, DATA + 4096, 10), 10);
    assert_eq!(ring_with(&mut m, FILL, 0x0000_8000_0000_0000, 1, 10), 10, "not canonical");
    assert_eq!(ring_with(&mut m, FILL, u64::MAX - 3, 1, 10), 10);
}

proptest! {
    #![proptest_config(cases(3000))]

    /// Whatever the registers hold, the answer comes, RCX never grows, and bytes that the page tables do not
    /// map stay as they were.
    #[test]
    fn no_registers_reach_past_the_page_tables(
        operation in 0_u32..4,
        to in prop_oneof![Just(DATA), (0..DATA_PAGES * 4096).prop_map(|o| DATA + o), any::<u64>()],
        from in prop_oneof![Just(DATA), (0..DATA_PAGES * 4096).prop_map(|o| DATA + o), any::<u64>()],
        len in prop_oneof![0_u64..40_000, any::<u64>()],
    ) {
        let mut m = Machine::new();
        let outside = DATA_GPA + DATA_PAGES * 4096;
        m.write(outside, &[0xee; 4096]);
        m.write(DATA_GPA - 4096, &[0xee; 4096]);
        let left = ring_with(&mut m, operation, to, from, len);
        prop_assert!(left <= len);
        prop_assert!(len - left <= MAX_BYTES);
        prop_assert_eq!(m.bytes(outside, 4096), vec![0xee; 4096]);
        prop_assert_eq!(m.bytes(DATA_GPA - 4096, 4096), vec![0xee; 4096]);
    }
}

#[test]
fn tables_that_another_vcpu_changes_meanwhile_neither_hold_a_call_up_nor_let_it_out() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let mut m = Machine::new();
    let entry = m.entry(DATA, 1);
    let outside = DATA_GPA + DATA_PAGES * 4096;
    let mem = m.mem.clone();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Marks taken away, and pages taken away and given back, as fast as a vCPU can.
            let at = |i: u64| GuestAddress(entry + i % DATA_PAGES * 8);
            for i in (0_u64..).take_while(|_| !done.load(Ordering::Relaxed)) {
                let value = if i % 7 == 0 { 0 } else { (DATA_GPA + i % DATA_PAGES * 4096) | KERNEL };
                mem.store(value, at(i), Ordering::SeqCst).unwrap();
            }
        });
        for i in 0..3000_u32 {
            let left = ring_with(&mut m, 1 + i % 2, DATA + 8, DATA + 4 * 4096, 3 * 4096);
            assert!(left <= 3 * 4096);
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(m.bytes(outside, 4096), vec![0; 4096]);
}
