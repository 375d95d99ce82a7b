//! The XSAVE and FXSAVE families where they fault, are refused, or cross pages; and the forms that
//! this process may not execute itself.

use super::native::{Area, SAFE};
use super::xstate::*;
use super::*;
use crate::assist::Reason;

/// Every instruction of the two families with a memory operand, and its alignment.
const ALL: [(&[u8], u64); 12] = [
    (XSAVE, 64),
    (XSAVE64, 64),
    (XSAVEOPT64, 64),
    (XSAVEC64, 64),
    (XSAVES64, 64),
    (XRSTOR, 64),
    (XRSTOR64, 64),
    (XRSTORS64, 64),
    (FXSAVE, 16),
    (FXSAVE64, 16),
    (FXRSTOR, 16),
    (FXRSTOR64, 16),
];
/// A linear address nothing is mapped at.
const FREE: u64 = 0xffff_9000_0000_0000;

/// A state with every component in use.
fn full() -> Area {
    standard(42, u64::MAX, false)
}

#[test]
fn an_unaligned_area_is_a_general_protection_fault() {
    for (bytes, alignment) in ALL {
        let mut m = machine(&full(), SAFE);
        m.cpu.regs.rsi = DATA + alignment / 2;
        assert_eq!(m.fault(bytes), general_protection(), "{bytes:02x?}");
    }
}

#[test]
fn task_switched_is_device_not_available() {
    for (bytes, _) in ALL.into_iter().chain([(LDMXCSR, 4), (STMXCSR, 4)]) {
        let mut m = machine(&full(), SAFE);
        m.cpu.sregs.cr0 |= CR0_TS;
        assert_eq!(m.fault(bytes), plain(7), "{bytes:02x?}");
    }
}

#[test]
fn the_families_need_their_control_bits() {
    for (bytes, alignment) in ALL.into_iter().chain([(LDMXCSR, 4), (STMXCSR, 4)]) {
        let mut m = machine(&full(), SAFE);
        match alignment {
            64 => m.cpu.sregs.cr4 &= !CR4_OSXSAVE,
            16 => continue,
            _ => m.cpu.sregs.cr4 &= !CR4_OSFXSR,
        }
        assert_eq!(m.fault(bytes), plain(6), "{bytes:02x?}");
    }
}

#[test]
fn an_area_that_ends_in_an_unmapped_page_faults_there_and_changes_nothing() {
    for (bytes, _) in ALL {
        let mut m = machine(&full(), SAFE);
        let area = compacted(7, u64::MAX, u64::MAX, false);
        m.map(FREE, 0x30_0000, KERNEL);
        // The legacy region is in the first page; the header, or the end of FXSAVE's, is not.
        m.write(0x30_0e40, &area.0[..0x1c0]);
        m.cpu.regs.rsi = FREE + 0xe40;
        let image = m.cpu.image.clone();
        let write = if is_save(bytes) { 2 } else { 0 };
        assert_eq!(m.fault(bytes), page_fault(write, FREE + 0x1000), "{bytes:02x?}");
        assert_eq!(m.bytes(0x30_0e40, 0x1c0), area.0[..0x1c0], "{bytes:02x?}");
        assert_eq!(m.cpu.image, image, "{bytes:02x?}");
    }
}

fn is_save(bytes: &[u8]) -> bool {
    [XSAVE, XSAVE64, XSAVEOPT64, XSAVEC64, XSAVES64, FXSAVE, FXSAVE64].contains(&bytes)
}

#[test]
fn a_signal_frame_out_of_reach_is_a_page_fault_the_kernel_can_fix_up() {
    let mut m = machine(&full(), SAFE);
    m.cpu.regs.rsi = 0x7fff_0000_1000;
    assert_eq!(m.fault(XSAVE64), page_fault(2, 0x7fff_0000_1000));
    // Read-only after fork, before its copy is made.
    m.map(0x7fff_0000_1000, 0x30_0000, PRESENT | USER);
    assert_eq!(m.fault(XSAVE64), page_fault(3, 0x7fff_0000_1000));
    m.map(0x7fff_0000_1000, 0x30_0000, KERNEL | USER);
    m.cpu.sregs.cr4 |= CR4_SMAP;
    assert_eq!(m.fault(XSAVE64), page_fault(3, 0x7fff_0000_1000));
    m.cpu.regs.rflags |= RFLAGS_AC;
    m.done(XSAVE64);
}

#[test]
fn an_area_across_frames_that_are_apart_is_whole() {
    for offset in [0xf00, 0xe00, 0xdc0, 0xfc0, 0x800] {
        let load = full();
        let mut m = machine(&load, SAFE);
        m.map(FREE, 0x30_0000, KERNEL);
        m.map(FREE + 0x1000, 0x60_5000, KERNEL);
        let before = noise(3);
        m.write(0x30_0000 + offset, &before.0[..0x1000 - offset as usize]);
        m.write(0x60_5000, &before.0[0x1000 - offset as usize..]);
        m.cpu.regs.rsi = FREE + offset;
        m.done(XSAVE64);
        let mut expected = before.clone();
        native::xsave64(&load, &mut expected, SAFE);
        let mut area = m.bytes(0x30_0000 + offset, 0x1000 - offset as usize);
        area.extend(m.bytes(0x60_5000, offset as usize));
        assert!(area == expected.0, "saved at {offset:#x}");

        // And back: what is in the area becomes the state.
        expected.0[512..576].fill(0);
        put(&mut expected, 512, SAFE & native::xcr0());
        m.write(0x30_0000 + offset, &expected.0[..0x1000 - offset as usize]);
        m.write(0x60_5000, &expected.0[0x1000 - offset as usize..]);
        m.cpu.image = native::initial_image();
        m.done(XRSTOR64);
        same_state(&m.host, &m.cpu.image, &native::state_after(&load).0, "xrstor64").unwrap();
    }
}

#[test]
fn two_tasks_keep_their_registers_over_context_switches() {
    let tasks = [standard(1, u64::MAX, false), standard(2, u64::MAX, true)];
    let tasks = tasks.map(|task| native::state_after(&task));
    let mut m = machine(&tasks[0], SAFE);
    let area = |task: usize| DATA + task as u64 * 0x2000;
    m.write(DATA_GPA + 0x2000, &tasks[1].0);
    for switch in 0..100 {
        let (old, new) = (switch % 2, 1 - switch % 2);
        same_state(&m.host, &m.cpu.image, &tasks[old].0, "a switch").unwrap();
        m.cpu.regs.rsi = area(old);
        m.done(XSAVE64);
        m.cpu.regs.rsi = area(new);
        m.done(XRSTOR64);
    }
}

#[test]
fn components_the_layout_does_not_know_are_refused() {
    let mut m = machine(&full(), SAFE);
    m.cpu.xcr0 |= 1 << 40;
    for bytes in [XSAVE64, XRSTOR64] {
        let refused = m.run(bytes).unwrap_err();
        assert!(matches!(refused.reason(), Reason::Component(bits) if *bits == 1 << 40), "{refused}");
    }
}

#[test]
fn an_image_shorter_than_its_components_is_refused() {
    for len in [0, 575, 600] {
        for bytes in [XSAVE64, XRSTOR64] {
            let mut m = machine(&full(), SAFE);
            m.write(DATA_GPA, &full().0);
            m.cpu.image.truncate(len);
            let refused = m.run(bytes).unwrap_err();
            assert!(matches!(refused.reason(), Reason::ShortImage(have) if *have == len), "{refused}");
        }
    }
}

#[test]
fn supervisor_components_are_refused() {
    for bytes in [XSAVES64, XRSTORS64] {
        let mut m = machine(&full(), SAFE);
        m.cpu.msr = 1 << 11;
        let refused = m.run(bytes).unwrap_err();
        assert!(matches!(refused.reason(), Reason::Component(0x800)), "{refused}");
    }
}

#[test]
fn xsaves_without_supervisor_components_is_xsavec() {
    for components in [0, 1, 2, 7, SAFE] {
        let load = standard(9, components, true);
        let mut m = machine(&load, SAFE);
        let mut expected = noise(5);
        m.write(DATA_GPA, &expected.0);
        m.done(XSAVES64);
        native::xsavec64(&load, &mut expected, SAFE);
        same_bytes(&m.bytes(DATA_GPA, 4096), &expected.0, "xsaves").unwrap();
    }
}

#[test]
fn xrstors_takes_the_compacted_format_only() {
    let mut m = machine(&full(), SAFE);
    m.write(DATA_GPA, &standard(5, SAFE, true).0);
    assert_eq!(m.fault(XRSTORS64), general_protection());
    let source = compacted(5, u64::MAX, 0x45, true);
    m.write(DATA_GPA, &source.0);
    m.done(XRSTORS64);
    let expected = native::xrstor64(&full(), &source, SAFE).unwrap();
    m.cpu.image[6..24].copy_from_slice(&expected.0[6..24]);
    same_state(&m.host, &m.cpu.image, &expected.0, "xrstors").unwrap();
}

#[test]
fn compacted_components_follow_each_other_aligned_where_the_processor_says() {
    let mut m = Machine::new();
    m.host = intel();
    m.cpu.xcr0 = 0x602e7;
    m.cpu.image = vec![0; 11008];
    m.cpu.image[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    let all: u64 = 0x60204;
    m.cpu.image[512..520].copy_from_slice(&all.to_le_bytes());
    for (at, value) in [(576, 0x22), (2688, 0x99), (2752, 0x17), (2816, 0x18), (11007, 0x81)] {
        m.cpu.image[at] = value;
    }
    m.cpu.regs.rsi = DATA;
    m.cpu.regs.rax = all;
    m.done(XSAVEC64);
    // AVX at 576, PKRU right after it at 832, AMX at the next multiples of 64.
    for (at, value) in [(576, 0x22), (832, 0x99), (896, 0x17), (960, 0x18), (960 + 8191, 0x81)] {
        assert_eq!(m.bytes(DATA_GPA + at, 1), [value], "byte {at}");
    }
    let saved = m.cpu.image.clone();
    m.cpu.image[576..].fill(0);
    m.done(XRSTOR64);
    assert!(m.cpu.image == saved);
}

#[test]
fn an_xsave_of_avx_alone_writes_mxcsr_and_its_own_bits() {
    let mut m = machine(&full(), 4);
    m.write(DATA_GPA, &[0xee; 4096]);
    m.done(XSAVE64);
    let area = m.bytes(DATA_GPA, 4096);
    assert_eq!(area[..24], [0xee; 24]);
    assert_eq!(area[24..32], m.cpu.image[24..32]);
    assert_eq!(area[32..512], [0xee; 480]);
    assert_eq!(area[512], 0xee | 4);
}

#[test]
fn what_kvm_left_in_a_component_not_in_use_is_not_saved() {
    let mut m = machine(&full(), SAFE);
    m.cpu.image[512..520].fill(0);
    m.done(XSAVE64);
    let area = m.bytes(DATA_GPA, 4096);
    let mut initial = native::initial_image();
    initial[24..28].copy_from_slice(&area[24..28]);
    assert_eq!(area[..416], initial[..416]);
    assert!(area[576..2000].iter().all(|byte| *byte == 0));
}

#[test]
fn ldmxcsr_and_stmxcsr_move_mxcsr() {
    let mut m = machine(&standard(3, 0, true), 0);
    m.write(DATA_GPA, &0x1fbfu32.to_le_bytes());
    m.done(LDMXCSR);
    assert_eq!(m.cpu.image[24..28], 0x1fbfu32.to_le_bytes());
    assert_eq!(m.cpu.image[512] & 2, 2, "SSE is in use");
    assert_eq!(m.cpu.commits, 1);
    m.write(DATA_GPA, &[0xee; 8]);
    m.done(STMXCSR);
    assert_eq!(m.bytes(DATA_GPA, 8), [0xbf, 0x1f, 0, 0, 0xee, 0xee, 0xee, 0xee]);
}

#[test]
fn mxcsr_bits_the_processor_does_not_have_fault() {
    let mut m = machine(&full(), SAFE);
    m.write(DATA_GPA, &0x8000_1f80u32.to_le_bytes());
    assert_eq!(m.fault(LDMXCSR), general_protection());
    // A processor without a mask of its own has no DAZ.
    m.cpu.image[28..32].fill(0);
    m.write(DATA_GPA, &0x1fc0u32.to_le_bytes());
    assert_eq!(m.fault(LDMXCSR), general_protection());
}
