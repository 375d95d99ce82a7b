//! `peregrine run` as a user has it: the built command, its streams, its signals and its exit code.
#![allow(clippy::unwrap_used)]

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tests::{BOOT_TIMEOUT, Guest, artefacts, bare, config, kvm_or_skip, microvm_threads, peregrine};

/// One microVM at a time: two at once only make each other slow.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    // Build first, so that no test's patience is spent on it.
    artefacts();
    peregrine();
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

fn start(args: &[&str]) -> Child {
    Command::new(peregrine())
        .arg("run")
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

fn run(args: &[&str]) -> Output {
    start(args).wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[test]
fn the_main_job_prints_its_sum_and_exits_0() {
    if !kvm_or_skip("the_main_job_prints_its_sum_and_exits_0") {
        return;
    }
    let _turn = turn();
    let output = run(&["--timing", "--", "python3", "-c", "print(sum(range(10**7)))"]);
    assert_eq!(text(&output.stdout), "49999995000000\n", "{}", text(&output.stderr));
    assert_eq!(output.status.code(), Some(0));
    for stage in ["guest entered", "first VM exit", "agent ready", "first byte", "exit", "doorbell calls"] {
        assert!(text(&output.stderr).contains(stage), "{}", text(&output.stderr));
    }
}

#[test]
fn streams_environment_and_exit_code_pass_through() {
    if !kvm_or_skip("streams_environment_and_exit_code_pass_through") {
        return;
    }
    let _turn = turn();
    let script = "read line; echo \"$line $GREETING $PWD\"; echo problem >&2; exit 42";
    let mut child = start(&["-e", "GREETING=good day", "--cwd", "/tmp", "--json", "--", "sh", "-c", script]);
    child.stdin.take().unwrap().write_all(b"hello\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(text(&output.stdout), "hello good day /tmp\n");
    let stderr = text(&output.stderr);
    assert!(stderr.starts_with("problem\n"), "{stderr}");
    assert!(stderr.contains("\"exit_code\":42"), "{stderr}");
    assert_eq!(output.status.code(), Some(42));
}

#[test]
fn a_guest_profile_is_stacks_that_begin_where_the_kernel_is_entered() {
    if !kvm_or_skip("a_guest_profile_is_stacks_that_begin_where_the_kernel_is_entered") {
        return;
    }
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let graph = dir.path().join("guest.svg");
    // The stack of an idle CPU is the one that begins with the kernel's start, so it must be idle for a while.
    let script = "sleep 1; cat /usr/bin/bash";
    let output = run(&["--profile-guest", graph.to_str().unwrap(), "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let svg = std::fs::read_to_string(&graph).unwrap();
    let idle = ["common_startup_64", "start_kernel", "default_idle_call", "default_idle"];
    for frame in idle.into_iter().chain(["entry_SYSCALL_64_after_hwframe", "do_syscall_64"]) {
        assert!(svg.contains(&format!("<title>{frame} (")), "no {frame} in the flame graph");
    }
}

/// Waits until the command has said `ready`, then sends it SIGINT, `times` times.
fn interrupt(mut child: Child, times: u32) -> Output {
    use std::io::Read as _;
    let mut ready = [0; 6];
    child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
    assert_eq!(&ready, b"ready\n");
    for _ in 0..times {
        Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        std::thread::sleep(Duration::from_millis(300));
    }
    child.wait_with_output().unwrap()
}

#[test]
fn ctrl_c_reaches_the_command() {
    if !kvm_or_skip("ctrl_c_reaches_the_command") {
        return;
    }
    let _turn = turn();
    let script = "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.1; done";
    let output = interrupt(start(&["--", "sh", "-c", script]), 1);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("caught\n", Some(7)));
}

#[test]
fn a_second_ctrl_c_ends_the_microvm() {
    if !kvm_or_skip("a_second_ctrl_c_ends_the_microvm") {
        return;
    }
    let _turn = turn();
    let script = "trap '' INT; echo ready; while :; do sleep 1; done";
    let output = interrupt(start(&["--", "sh", "-c", script]), 2);
    assert_eq!(output.status.code(), Some(130), "{}", text(&output.stderr));
    assert_eq!(output.status.signal(), None);
}

#[test]
fn a_dead_guest_is_one_line_and_exit_code_125() {
    if !kvm_or_skip("a_dead_guest_is_one_line_and_exit_code_125") {
        return;
    }
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let kernel = dir.path().join("vmlinux");
    for (code, reason) in [
        (bare::TRIPLE_FAULT, "triple fault at RIP 0x"),
        (bare::RESET, "reset itself"),
        (&bare::print_and_reset("Kernel panic - not syncing: no luck\n"), "panic: no luck"),
    ] {
        std::fs::write(&kernel, bare::elf(code)).unwrap();
        let output = run(&["--kernel", kernel.to_str().unwrap(), "--", "true"]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{stderr}");
        // Beside the progress of the template that there will not be.
        let said: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("template: ")).collect();
        assert!(said.len() == 1 && said[0].contains(reason), "{stderr}");
        let output = run(&["--boot", "--kernel", kernel.to_str().unwrap(), "--", "true"]);
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(125), "{stderr}");
        assert!(stderr.lines().count() == 1 && stderr.contains(reason), "{stderr}");
    }
}

#[test]
fn a_linux_whose_pid_1_ends_is_a_panic_that_says_so() {
    if !kvm_or_skip("a_linux_whose_pid_1_ends_is_a_panic_that_says_so") {
        return;
    }
    let _turn = turn();
    let store = peregrine_image::Store::open().unwrap();
    let agent = bare::elf(bare::EXIT_3);
    let disk = peregrine_image::agent_disk(&store, &agent, &mut peregrine_image::Silent).unwrap();
    let mut config = config(1, 128);
    config.disks[0].path = disk;
    let vm = peregrine_vmm::MicroVm::boot(config.check().unwrap()).unwrap();
    let reason = vm.wait(BOOT_TIMEOUT).unwrap().to_string();
    assert!(reason.contains("Attempted to kill init"), "{reason}");
}

#[test]
fn a_guest_that_is_dropped_leaves_nothing_running() {
    if !kvm_or_skip("a_guest_that_is_dropped_leaves_nothing_running") {
        return;
    }
    let _turn = turn();
    let guest = Guest::boot(&config(1, 128));
    assert!(microvm_threads() >= 2);
    drop(guest);
    assert_eq!(microvm_threads(), 0);
}
