//! What becomes of guests that die in ways Linux cannot be asked to: real microVMs of a few bytes of code.
#![allow(clippy::unwrap_used)]

use peregrine_vmm::{MicroVm, StopReason, VmConfig};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tests::{bare, kvm_or_skip, microvm_threads};

fn config(kernel: &Path) -> VmConfig {
    VmConfig {
        kernel: kernel.to_owned(),
        vcpus: 1,
        mem_mib: 64,
        disks: Vec::new(),
        kernel_parameters: String::new(),
        verbose: false,
        profile: None,
    }
}

/// Boots `code` and waits for its end.
fn end_of(code: &[u8]) -> StopReason {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    std::fs::write(&kernel, bare::elf(code)).unwrap();
    let vm = MicroVm::boot(config(&kernel).check().unwrap()).unwrap();
    vm.wait(Duration::from_secs(30)).expect("the guest ends by itself")
}

/// One microVM at a time, so that counts of threads and descriptors are one test's own.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_triple_fault_is_named_with_its_rip() {
    if kvm_or_skip("a_triple_fault_is_named_with_its_rip") {
        let reason = end_of(bare::TRIPLE_FAULT);
        assert!(matches!(reason, StopReason::TripleFault { .. }), "{reason}");
        assert!(reason.to_string().contains("RIP 0x"), "{reason}");
    }
}

#[test]
fn an_unknown_instruction_is_named_with_rip_and_bytes() {
    if kvm_or_skip("an_unknown_instruction_is_named_with_rip_and_bytes") {
        let reason = end_of(bare::UNKNOWN_INSTRUCTION);
        match &reason {
            StopReason::Emulation(text) => {
                assert!(text.contains(&format!("{:#x}", bare::ENTRY)), "{text}");
                assert!(text.contains("c5 fc 58 c0"), "{text}");
                assert!(!text.contains('\n'), "{text}");
            }
            // Hardware KVM executes the instruction natively and, with AVX off, faults without an IDT.
            StopReason::TripleFault { .. } => {}
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_reset_without_a_panic_is_a_reset() {
    if kvm_or_skip("a_reset_without_a_panic_is_a_reset") {
        assert_eq!(end_of(bare::RESET), StopReason::Reset);
    }
}

#[test]
fn a_panic_is_named_with_the_kernels_own_words() {
    if kvm_or_skip("a_panic_is_named_with_the_kernels_own_words") {
        let code = bare::print_and_reset("Kernel panic - not syncing: out of cheese\r\n");
        assert_eq!(end_of(&code), StopReason::Panic("out of cheese".to_owned()));
    }
}

#[test]
fn a_guest_that_never_ends_is_ended_and_leaves_no_thread_and_no_descriptor() {
    if !kvm_or_skip("a_guest_that_never_ends_is_ended_and_leaves_no_thread_and_no_descriptor") {
        return;
    }
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    // jmp to itself
    std::fs::write(&kernel, bare::elf(&[0xeb, 0xfe])).unwrap();
    let boot = || MicroVm::boot(config(&kernel).check().unwrap()).unwrap();
    // A first one pays for what a process keeps for ever (signal handlers, allocator arenas).
    drop(boot());
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    let vm = boot();
    assert_eq!(vm.wait(Duration::from_millis(100)), None);
    assert!(microvm_threads() >= 2 && descriptors() > before);
    drop(vm);
    assert_eq!(microvm_threads(), 0);
    assert_eq!(descriptors(), before);
}
