//! Work that is hard on the guest kernel, with digests that must be the host's: on software KVM the kernel's
//! copies, faults and context switches go ways of our own. `PEREGRINE_STRESS` makes it longer (its default is
//! 1), and `PEREGRINE_STRESS_PARAMETERS` adds kernel parameters, such as those that switch the levers off.
#![allow(clippy::unwrap_used)]

use peregrine_vmm::VmConfig;
use std::process::Command;
use tests::{Guest, config, kvm_or_skip, program};

fn scale() -> String {
    std::env::var("PEREGRINE_STRESS").unwrap_or_else(|_| "1".to_owned())
}

fn guest(vcpus: u32, mem_mib: u64) -> Guest {
    let kernel_parameters = std::env::var("PEREGRINE_STRESS_PARAMETERS").unwrap_or_default();
    Guest::boot(&VmConfig { kernel_parameters, ..config(vcpus, mem_mib) })
}

/// What the host makes of these parts.
fn on_the_host(parts: &[&str]) -> String {
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new(program("stress")).arg(scale()).arg(dir.path()).args(parts).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What the guest makes of them, with files in `dir`.
fn in_the_guest(guest: &mut Guest, dir: &str, parts: &[&str]) -> String {
    let (scale, mut lines) = (scale(), String::new());
    for part in parts {
        let begun = std::time::Instant::now();
        let output = guest.run(&["/tmp/stress", &scale, dir, part], b"");
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.code(), 0, "{part}: {said}\n{}", guest.vm.console_text());
        println!("{} in {dir}: {} ms", part, begun.elapsed().as_millis());
        lines += &String::from_utf8(output.stdout).unwrap();
    }
    lines
}

/// The kernel has nothing to complain of: no warning, no bug, no stall.
fn assert_quiet(guest: &mut Guest) {
    let log = guest.sh("dmesg 2>/dev/null || timeout 2 cat /dev/kmsg; true");
    let text = String::from_utf8_lossy(&log.stdout).into_owned() + &guest.vm.console_text();
    for word in ["BUG", "WARNING", "Oops", "Bad page", "stall", "lockup", "corrupt"] {
        assert!(!text.contains(word), "{text}");
    }
}

#[test]
fn a_small_guest_under_memory_pressure_gives_the_hosts_digests() {
    if !kvm_or_skip("a_small_guest_under_memory_pressure_gives_the_hosts_digests") {
        return;
    }
    let parts = ["forks", "maps", "signals", "pipes", "threads", "files", "pressure"];
    let mut guest = guest(1, 96);
    guest.install(&program("stress"));
    assert_eq!(in_the_guest(&mut guest, "/root", &parts), on_the_host(&parts));
    // Once more, on another file system and with the first file system's pages to reclaim.
    let again = ["files", "forks"];
    assert_eq!(in_the_guest(&mut guest, "/tmp", &again), on_the_host(&again));
    let lines = in_the_guest(&mut guest, "/tmp", &["out-of-memory", "maps"]);
    assert!(lines.ends_with(&on_the_host(&["maps"])), "{lines}");
    assert_quiet(&mut guest);
}

#[test]
fn a_guest_of_two_vcpus_gives_the_hosts_digests() {
    if !kvm_or_skip("a_guest_of_two_vcpus_gives_the_hosts_digests") {
        return;
    }
    let mut guest = guest(2, 256);
    guest.install(&program("stress"));
    let parts = ["forks", "maps", "signals", "pipes", "threads", "files"];
    assert_eq!(in_the_guest(&mut guest, "/tmp", &parts), on_the_host(&parts));
    assert_quiet(&mut guest);
}

#[test]
fn with_the_levers_off_no_doorbell_rings() {
    if !kvm_or_skip("with_the_levers_off_no_doorbell_rings") {
        return;
    }
    let off = "bulk_memory=0 file_around=0,0 cow_around=0";
    let mut guest = Guest::boot(&VmConfig { kernel_parameters: off.to_owned(), ..config(1, 96) });
    assert_eq!(guest.sh("cat /usr/bin/bash | wc -c > /tmp/x; cat /tmp/x").code(), 0);
    assert_eq!(guest.vm.doorbell().calls, 0, "doorbell exits");
}
