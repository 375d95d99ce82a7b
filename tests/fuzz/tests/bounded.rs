//! A bounded number of executions of every fuzz target, the same ones each time.

use fuzz::{TARGETS, drive};

fn bounded(name: &str, count: u64) {
    let target = TARGETS.iter().find(|t| t.name == name);
    drive(target.unwrap_or_else(|| panic!("no target {name}")), 0x7065_7265, 0, count, |_| {});
}

#[test]
fn no_registers_and_page_tables_make_the_doorbell_reach_past_them() {
    bounded("doorbell", 30_000);
}

#[test]
fn no_registers_and_page_tables_make_a_bulk_stream_reach_past_the_program() {
    bounded("bulk", 20_000);
}

#[test]
fn no_guest_makes_the_ring_0_engine_panic_or_reach_past_its_page_tables() {
    bounded("ring0", 10_000);
    bounded("ring0_doorbell", 10_000);
}

#[test]
fn no_instruction_makes_the_assist_panic() {
    bounded("assist", 30_000);
}

#[test]
fn no_driver_breaks_the_block_device() {
    bounded("block", 10_000);
}

#[test]
fn no_driver_breaks_the_socket_device() {
    bounded("vsock", 10_000);
}

#[test]
fn no_driver_breaks_the_entropy_device() {
    bounded("entropy", 10_000);
}

#[test]
fn no_bytes_break_the_wire() {
    bounded("wire", 30_000);
}

#[test]
fn no_file_breaks_the_inspectors() {
    bounded("kernel", 30_000);
    bounded("image", 30_000);
}

#[test]
fn no_name_and_no_manifest_breaks_its_parser() {
    bounded("reference", 30_000);
    bounded("manifest", 30_000);
}

#[test]
fn no_layers_make_an_image_that_cannot_be_mounted() {
    bounded("layer", 3_000);
}
