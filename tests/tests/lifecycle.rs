//! What a command sees of its microVM, and what its caller sees of it. One real guest with two vCPUs, booted
//! once, shared by all tests of this file.
#![allow(clippy::unwrap_used)]

use sha2::{Digest, Sha256};
use std::path::PathBuf;
use std::process::Command as HostCommand;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use tests::{Guest, config, kvm_or_skip};

fn guest() -> MutexGuard<'static, Guest> {
    static GUEST: OnceLock<Mutex<Guest>> = OnceLock::new();
    GUEST
        .get_or_init(|| Mutex::new(Guest::boot(&config(2, 512))))
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}

/// The script's standard output, trimmed; it must succeed and say nothing on standard error.
fn said(script: &str) -> String {
    let output = guest().sh(script);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!((output.code(), stderr.as_str()), (0, ""), "{script}");
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[test]
fn exit_codes_are_the_commands_own() {
    if !kvm_or_skip("exit_codes_are_the_commands_own") {
        return;
    }
    assert_eq!(guest().sh("exit 42").code(), 42);
    assert_eq!(guest().run(&["/bin/true"], b"").code(), 0);
    assert_eq!(guest().run(&["no-such-command"], b"").code(), 127);
    assert_eq!(guest().run(&["/no/such/file"], b"").code(), 127);
    assert_eq!(guest().run(&["/etc/passwd"], b"").code(), 126, "not executable");
    assert_eq!(guest().sh("kill -9 $$").code(), 128 + 9);
    assert_eq!(guest().sh("kill -TERM $$").code(), 128 + 15);
}

#[test]
fn stdout_and_stderr_stay_apart_and_in_order() {
    if !kvm_or_skip("stdout_and_stderr_stay_apart_and_in_order") {
        return;
    }
    let output = guest().sh("for i in 1 2 3 4 5; do echo out $i; echo err $i >&2; done");
    let lines = |word: &str| (1..=5).map(|i| format!("{word} {i}\n")).collect::<String>();
    assert_eq!(String::from_utf8_lossy(&output.stdout), lines("out"));
    assert_eq!(String::from_utf8_lossy(&output.stderr), lines("err"));
}

#[test]
fn twenty_megabytes_of_output_arrive_whole() {
    if !kvm_or_skip("twenty_megabytes_of_output_arrive_whole") {
        return;
    }
    let script = "import os\nb = bytes(i * 7 % 251 for i in range(65536))\n\
                  for n in range(320): os.write(1, n.to_bytes(4, 'little') + b[4:])";
    let output = guest().run(&["python3", "-c", script], b"");
    let block: Vec<u8> = (0..65536_usize).map(|i| (i * 7 % 251) as u8).collect();
    let mut wanted = Vec::new();
    for n in 0..320_u32 {
        wanted.extend_from_slice(&n.to_le_bytes());
        wanted.extend_from_slice(&block[4..]);
    }
    assert_eq!(output.code(), 0, "{}", String::from_utf8_lossy(&output.stderr));
    assert_eq!(output.stdout.len(), wanted.len());
    assert_eq!(sha256(&output.stdout), sha256(&wanted));
}

#[test]
fn ten_megabytes_of_stdin_come_back_through_cat() {
    if !kvm_or_skip("ten_megabytes_of_stdin_come_back_through_cat") {
        return;
    }
    let sent: Vec<u8> = (0..10_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let output = guest().run(&["cat"], &sent);
    assert_eq!(output.code(), 0);
    assert_eq!(sha256(&output.stdout), sha256(&sent));
}

#[test]
fn pipelines_background_processes_and_files_work() {
    if !kvm_or_skip("pipelines_background_processes_and_files_work") {
        return;
    }
    assert_eq!(said("seq 1 1000 | grep 7 | sort -rn | head -n 1"), "997");
    assert_eq!(said("(sleep 0.1; echo late) & echo early; wait"), "early\nlate");
    let script =
        "cd /tmp && mkdir -p d && echo one > d/f && echo two >> d/f && mv d/f d/g && cat d/g && rm -r d";
    assert_eq!(said(script), "one\ntwo");
    assert_eq!(said("echo x > /usr/written && cat /usr/written"), "x", "the root is writable");
    assert_eq!(said("mount | grep -c ' /dev/pts '"), "1");
    assert_eq!(
        said("ls -d /dev/shm /dev/null /dev/fd /proc/self /sys/kernel"),
        "/dev/fd\n/dev/null\n/dev/shm\n/proc/self\n/sys/kernel"
    );
}

#[test]
fn a_hundred_short_lived_orphans_leave_no_zombie() {
    if !kvm_or_skip("a_hundred_short_lived_orphans_leave_no_zombie") {
        return;
    }
    // Each inner subshell is orphaned at once: PID 1 must reap it.
    said("i=0; while [ $i -lt 100 ]; do (true & ); i=$((i+1)); done");
    let zombies = "for s in /proc/[0-9]*/stat; do read -r line < $s && echo \"$line\"; done 2>/dev/null | grep -c ') Z' || true";
    assert_eq!(said(&format!("sleep 1; {zombies}")), "0");
}

#[test]
fn a_shell_on_a_pseudo_terminal_has_one() {
    if !kvm_or_skip("a_shell_on_a_pseudo_terminal_has_one") {
        return;
    }
    let mut command = peregrine_vmm::agent::Command::new(&["/bin/sh", "-c", "tty; stty size"]);
    command.terminal = Some((33, 101));
    let output = guest().agent.output(&command, b"").unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout), "/dev/pts/0\r\n33 101\r\n");
}

#[test]
fn two_vcpus_are_two_processors() {
    if !kvm_or_skip("two_vcpus_are_two_processors") {
        return;
    }
    assert_eq!(said("nproc"), "2");
}

/// The guest program of `tests/guest/registers.rs`, built once.
fn registers() -> &'static PathBuf {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| tests::build_registers(env!("CARGO_TARGET_TMPDIR")))
}

/// Puts the registers program into the guest.
fn install_registers() {
    let bytes = std::fs::read(registers()).unwrap();
    let output = guest().run(&["/bin/sh", "-c", "cat > /tmp/registers && chmod +x /tmp/registers"], &bytes);
    assert_eq!(output.code(), 0);
}

#[test]
fn vector_registers_survive_two_thousand_context_switches() {
    if !kvm_or_skip("vector_registers_survive_two_thousand_context_switches") {
        return;
    }
    install_registers();
    let text = said("/tmp/registers switch 2000");
    let numbers: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert!(numbers[0] >= 2000, "{} context switches are too few", numbers[0]);
    assert_eq!(numbers[1], 0, "registers changed across a context switch");
    let assists = guest().vm.assists();
    println!("{} switches, assists: {assists:?}", numbers[0]);
}

#[test]
fn vectorised_work_gives_the_hosts_bytes() {
    if !kvm_or_skip("vectorised_work_gives_the_hosts_bytes") {
        return;
    }
    install_registers();
    let host = HostCommand::new(registers()).arg("work").output().unwrap();
    assert_eq!(said("/tmp/registers work"), String::from_utf8_lossy(&host.stdout).trim());
}
