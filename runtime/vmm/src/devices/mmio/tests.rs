//! The transport, driven register by register.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;

use super::{Effect, F_EVENT_IDX, F_VERSION_1, State, register as reg, status};
use crate::devices::entropy::{Entropy, MAX_REQUEST_BYTES};
use crate::devices::testing::{BUFFERS, HIGH_MEM, MEM_BYTES, Rig, memory, readable, writable};
use crate::devices::virtqueue::Turn;

const OK: u32 = status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK;

fn entropy() -> Rig<Entropy> {
    Rig::live(Entropy)
}

#[test]
fn a_driver_that_follows_the_specification_goes_live_and_is_served() {
    let mut rig = entropy();
    assert_eq!(rig.read(reg::STATUS), OK);
    let head = rig.queues[0].add(&[writable(BUFFERS, 64)]);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used(), [(head, 64)]);
    assert_ne!(rig.bytes(BUFFERS, 64), [0; 64]);
    assert_eq!(rig.pulses.count(), 1);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 1);
    rig.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn identity_registers_read_as_the_specification_says() {
    let rig = Rig::powered_on(Entropy);
    assert_eq!(rig.read(reg::MAGIC), u32::from_le_bytes(*b"virt"));
    assert_eq!(rig.read(reg::VERSION), 2);
    assert_eq!(rig.read(reg::DEVICE_ID), 4);
    assert_eq!(rig.read(reg::QUEUE_SIZE_MAX), 4);
    assert_eq!(rig.read(reg::QUEUE_READY), 0);
    assert_eq!(rig.read(reg::SHM_LEN_LOW), u32::MAX);
}

#[test]
fn registers_are_only_read_and_written_as_aligned_words() {
    let mut rig = Rig::powered_on(Entropy);
    let mut byte = [7];
    rig.mmio.read(reg::MAGIC, &mut byte);
    assert_eq!(byte, [0]);
    let mut word = [7; 4];
    rig.mmio.read(reg::MAGIC + 2, &mut word);
    assert_eq!(word, [0; 4]);
    assert_eq!(rig.mmio.write(reg::STATUS, &[1]), Effect::None);
    assert_eq!(rig.mmio.write(reg::STATUS, &[1, 0, 0, 0, 0, 0, 0, 0]), Effect::None);
    assert_eq!(rig.read(reg::STATUS), 0);
}

#[test]
fn features_that_were_not_offered_keep_features_ok_off() {
    let mut rig = Rig::powered_on(Entropy);
    rig.negotiate(F_VERSION_1 | 1);
    assert_eq!(rig.read(reg::STATUS) & status::FEATURES_OK, 0);
    rig.go_live();
    assert!(!rig.mmio.is_live());
}

#[test]
fn a_legacy_driver_without_version_1_is_refused() {
    let mut rig = Rig::powered_on(Entropy);
    rig.negotiate(F_EVENT_IDX);
    assert_eq!(rig.read(reg::STATUS) & status::FEATURES_OK, 0);
}

#[test]
fn features_cannot_change_after_features_ok() {
    let mut rig = Rig::powered_on(Entropy);
    rig.negotiate(F_VERSION_1);
    rig.write(reg::DRIVER_FEATURES_SEL, 0);
    rig.write(reg::DRIVER_FEATURES, u32::MAX);
    assert_eq!(rig.mmio.state().driver_features, F_VERSION_1);
}

#[test]
fn queue_registers_are_ignored_before_features_ok() {
    let mut rig = Rig::powered_on(Entropy);
    rig.write(reg::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    rig.set_up_queue(0);
    assert_eq!(rig.read(reg::QUEUE_READY), 0);
    assert_eq!(rig.mmio.state().queues[0].desc_table, 0);
}

#[test]
fn queue_registers_are_ignored_after_driver_ok() {
    let mut rig = entropy();
    let before = rig.mmio.state();
    for (offset, value) in [
        (reg::QUEUE_READY, 0),
        (reg::QUEUE_SIZE, 2),
        (reg::QUEUE_DESC_LOW, 0x1000),
        (reg::QUEUE_DRIVER_LOW, 0x1000),
        (reg::QUEUE_DEVICE_HIGH, 1),
    ] {
        rig.write(offset, value);
    }
    assert_eq!(rig.mmio.state(), before);
}

#[test]
fn a_ready_queue_keeps_its_addresses() {
    let mut rig = Rig::powered_on(Entropy);
    rig.negotiate(F_VERSION_1);
    rig.set_up_queue(0);
    let mut wanted = rig.mmio.state();
    rig.write(reg::QUEUE_DESC_LOW, 0x1000);
    rig.write(reg::QUEUE_SIZE, 2);
    assert_eq!(rig.mmio.state(), wanted);
    rig.write(reg::QUEUE_READY, 0);
    wanted.queues[0].ready = false;
    assert_eq!(rig.mmio.state(), wanted, "not even underneath");
}

#[test]
fn a_queue_that_cannot_work_makes_the_device_need_a_reset() {
    for (offset, value) in [
        (reg::QUEUE_DESC_HIGH, 0xffff_ffff),
        (reg::QUEUE_DRIVER_LOW, MEM_BYTES as u32 - 2),
        (reg::QUEUE_DEVICE_LOW, (MEM_BYTES + 0x1000) as u32),
        (reg::QUEUE_DESC_LOW, 0x1001),
        (reg::QUEUE_SIZE, 3),
        (reg::QUEUE_SIZE, 0),
        (reg::QUEUE_SIZE, 8),
        (reg::QUEUE_SIZE, 0x1_0004),
    ] {
        let mut rig = Rig::powered_on(Entropy);
        rig.negotiate(F_VERSION_1);
        rig.set_up_queue(0);
        rig.write(reg::QUEUE_READY, 0);
        rig.write(offset, value);
        rig.write(reg::QUEUE_READY, 1);
        assert_eq!(rig.read(reg::QUEUE_READY), 0, "{offset:#x} = {value:#x}");
        assert_ne!(rig.read(reg::STATUS) & status::NEEDS_RESET, 0, "{offset:#x} = {value:#x}");
        rig.go_live();
        assert!(!rig.mmio.is_live());
        // And a reset does help.
        rig.bring_up(F_VERSION_1);
    }
}

#[test]
fn status_bits_cannot_be_cleared_but_by_a_reset() {
    let mut rig = entropy();
    rig.write(reg::STATUS, status::ACKNOWLEDGE);
    assert_eq!(rig.read(reg::STATUS), OK);
    rig.write(reg::STATUS, 0);
    assert_eq!(rig.read(reg::STATUS), 0);
    let state = State { config_generation: 0, ..rig.mmio.state() };
    assert_eq!(state, Rig::powered_on(Entropy).mmio.state());
}

#[test]
fn the_driver_cannot_set_needs_reset_itself() {
    let mut rig = Rig::powered_on(Entropy);
    rig.write(reg::STATUS, status::ACKNOWLEDGE | status::NEEDS_RESET | 0x30);
    assert_eq!(rig.read(reg::STATUS), status::ACKNOWLEDGE);
}

#[test]
fn an_available_index_that_runs_ahead_makes_the_device_need_a_reset() {
    let mut rig = entropy();
    rig.queues[0].set_available(100);
    rig.notify(0);
    assert_eq!(rig.read(reg::STATUS), OK | status::NEEDS_RESET);
    assert_eq!(rig.read(reg::INTERRUPT_STATUS), 2, "a configuration interrupt tells the driver");
    assert_eq!(rig.pulses.count(), 1);
    assert_eq!(rig.counters.snapshot().faults, 1);
    rig.service(0);
    assert_eq!(rig.counters.snapshot().faults, 1, "a broken device is left alone");
    rig.write(reg::STATUS, 0);
    assert_eq!(rig.read(reg::STATUS), 0);
}

#[test]
fn a_head_outside_the_table_makes_the_device_need_a_reset() {
    let mut rig = entropy();
    rig.queues[0].offer(4);
    rig.notify(0);
    assert_ne!(rig.read(reg::STATUS) & status::NEEDS_RESET, 0);
}

#[test]
fn no_second_pulse_until_the_first_is_acknowledged() {
    let mut rig = entropy();
    for round in 0..3u16 {
        rig.queues[0].set_used_event(round);
        rig.queues[0].add(&[writable(BUFFERS, 8)]);
        rig.notify(0);
    }
    assert_eq!(rig.pulses.count(), 1);
    assert_eq!(rig.counters.snapshot().interrupts_saved, 2);
    rig.write(reg::INTERRUPT_ACK, 1);
    rig.queues[0].set_used_event(3);
    rig.queues[0].add(&[writable(BUFFERS, 8)]);
    rig.notify(0);
    assert_eq!(rig.pulses.count(), 2);
}

#[test]
fn a_driver_that_polls_is_not_interrupted() {
    let mut rig = entropy();
    rig.queues[0].set_used_event(1000);
    rig.queues[0].add(&[writable(BUFFERS, 8)]);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used().len(), 1);
    assert_eq!(rig.pulses.count(), 0);

    // Without VIRTIO_F_EVENT_IDX the flag says it.
    let mut rig = Rig::powered_on(Entropy);
    rig.bring_up(F_VERSION_1);
    let flags = rig.queues[0].avail();
    rig.fill(flags, &1u16.to_le_bytes());
    rig.queues[0].add(&[writable(BUFFERS, 8)]);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used().len(), 1);
    assert_eq!(rig.pulses.count(), 0);
    rig.fill(flags, &0u16.to_le_bytes());
    rig.queues[0].add(&[writable(BUFFERS, 8)]);
    rig.notify(0);
    assert_eq!(rig.pulses.count(), 1);
}

#[test]
fn the_device_asks_for_a_notification_of_the_next_chain_only() {
    let mut rig = entropy();
    for round in 1..=3 {
        rig.queues[0].add(&[writable(BUFFERS, 8)]);
        rig.notify(0);
        assert_eq!(rig.queues[0].avail_event(), round);
    }
}

#[test]
fn a_restored_device_goes_on_where_the_saved_one_stopped() {
    let mut rig = entropy();
    for _ in 0..3 {
        rig.queues[0].add(&[writable(BUFFERS, 8)]);
        rig.notify(0);
    }
    let used = rig.queues[0].take_used();
    assert_eq!(used.len(), 3);
    let head = rig.queues[0].add(&[writable(BUFFERS, 8)]);
    let saved = rig.mmio.state();

    let mut restored = Rig::with_state(saved.clone(), Entropy, Arc::clone(&rig.mem)).unwrap();
    assert_eq!(restored.mmio.state(), saved);
    assert_eq!(restored.read(reg::INTERRUPT_STATUS), 1);
    restored.queues = rig.queues;
    restored.service(0);
    assert_eq!(restored.queues[0].take_used(), [(head, 8)]);
}

#[test]
fn a_saved_state_of_another_device_is_refused() {
    let saved = entropy().mmio.state();
    let refused = |state: State| Rig::with_state(state, Entropy, memory()).err();
    assert_eq!(refused(saved.clone()), None);
    let mut other = saved.clone();
    other.queues.push(other.queues[0]);
    assert!(refused(other).is_some());
    let mut outside = saved.clone();
    outside.queues[0].desc_table = HIGH_MEM + (1 << 20);
    assert!(refused(outside).is_some());
    let unknown = State { driver_features: 1, ..saved };
    assert!(refused(unknown).is_some());
}

#[test]
fn a_request_gets_no_more_randomness_than_the_limit() {
    let mut rig = entropy();
    let head = rig.queues[0].add(&[writable(BUFFERS, 3000), writable(BUFFERS + 4096, 3000)]);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used(), [(head, MAX_REQUEST_BYTES as u32)]);
    assert_eq!(rig.bytes(BUFFERS + 4096 + 1096, 8), [0; 8], "beyond the limit");
}

#[test]
fn randomness_is_never_written_to_read_only_buffers_or_outside_memory() {
    let mut rig = entropy();
    let first = rig.queues[0].add(&[readable(BUFFERS, 64)]);
    let second = rig.queues[0].add(&[writable(MEM_BYTES - 4, 64)]);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used(), [(first, 0), (second, 0)]);
    assert_eq!(rig.bytes(BUFFERS, 64), [0; 64]);
}

#[test]
fn descriptor_loops_end() {
    let mut rig = entropy();
    rig.queues[0].write_descriptor(0, BUFFERS, 8, 3, 1);
    rig.queues[0].write_descriptor(1, BUFFERS, 8, 3, 0);
    rig.queues[0].offer(0);
    rig.notify(0);
    assert_eq!(rig.queues[0].take_used(), [(0, 0)]);
}

/// Registers that change something.
const REGISTERS: &[u64] = &[
    reg::STATUS,
    reg::STATUS,
    reg::QUEUE_READY,
    reg::QUEUE_READY,
    reg::QUEUE_SIZE,
    reg::QUEUE_SEL,
    reg::QUEUE_NOTIFY,
    reg::QUEUE_DESC_LOW,
    reg::QUEUE_DRIVER_LOW,
    reg::QUEUE_DEVICE_LOW,
    reg::DRIVER_FEATURES,
    reg::DRIVER_FEATURES_SEL,
];

/// Mostly words, mostly of values that mean something.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        0u32..16,
        Just(OK),
        Just(OK ^ status::DRIVER_OK),
        (0..MEM_BYTES as u32 / 16).prop_map(|at| at * 16),
        any::<u32>()
    ];
    prop_oneof![8 => word.prop_map(|word| word.to_le_bytes().to_vec()), 1 => proptest::collection::vec(any::<u8>(), 0..9)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_sequence_of_register_accesses_breaks_the_transport(
        accesses in proptest::collection::vec(
            (prop_oneof![0u64..0x120, proptest::sample::select(REGISTERS)], any::<bool>(), value()), 0..200),
        start in 0..3,
    ) {
        let mut rig = Rig::powered_on(Entropy);
        match start {
            0 => {}
            1 => rig.negotiate(F_VERSION_1),
            _ => rig.bring_up(F_VERSION_1 | F_EVENT_IDX),
        }
        for (offset, write, mut data) in accesses {
            if write {
                if let Effect::Notify(queue) = rig.mmio.write(offset, &data) {
                    rig.service(queue);
                }
            } else {
                rig.mmio.read(offset, &mut data);
            }
        }
        let state = rig.mmio.state();
        prop_assert!(state.status & status::DRIVER_OK == 0 || state.status & status::FEATURES_OK != 0);
        // Whatever happened, a reset makes it well again.
        rig.bring_up(F_VERSION_1 | F_EVENT_IDX);
    }

    #[test]
    fn no_content_of_the_rings_breaks_the_transport(
        tables in proptest::collection::vec((0u16..4, any::<u64>(), any::<u32>(), 0u16..8, 0u16..6), 0..8),
        nearby in any::<bool>(),
        heads in proptest::collection::vec(0u16..6, 0..6),
        jump in proptest::option::of(any::<u16>()),
    ) {
        let mut rig = entropy();
        for (index, addr, len, flags, next) in tables {
            let (addr, len) = if nearby { (addr % (MEM_BYTES + 64), len % 8192) } else { (addr, len) };
            // Not into the rings themselves, so that the end can be checked.
            let addr = if (0x10_0000..0x20_0000).contains(&addr) { BUFFERS } else { addr };
            rig.queues[0].write_descriptor(index, addr, len, flags, next);
        }
        for head in heads {
            rig.queues[0].offer(head);
        }
        if let Some(jump) = jump {
            rig.queues[0].set_available(jump);
        }
        rig.notify(0);
        prop_assert_eq!(rig.mmio.service(0), Turn::Idle);
    }
}
