//! A daemon on a host that fails it: no descriptors, no processes, interrupted calls, a microVM that stands still, a
//! clock that is set.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use tests::daemon::Daemon;
use tests::oci::debian_tools;
use tests::{Strace, faults_or_skip, kvm_or_skip};

const CONFIG: &str = "[image_aliases]\n\"node:22-slim\" = \"default\"\n[defaults]\nmem_mib = 128\n";

/// Runs a program of `tests/conformance` to its end; what it says.
fn run(daemon: &Daemon, program: &str, arguments: &[&str]) -> String {
    let output = daemon.node(program, arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {stdout}\n{stderr}");
    stdout.trim().to_owned()
}

/// The daemon, and the process that its workers are forked from.
fn both(daemon: &Daemon) -> [u32; 2] {
    let zygotes = daemon.processes("zygote");
    assert_eq!(zygotes.len(), 1, "{zygotes:?}");
    [daemon.pid(), zygotes[0]]
}

#[test]
fn a_host_that_has_nothing_left_to_give_is_named_and_survived() {
    if !faults_or_skip("a_host_that_has_nothing_left_to_give_is_named_and_survived", &["strace", "prlimit"]) {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    let canary = run(&daemon, "exhausted.mjs", &["canary"]);
    run(&daemon, "exhausted.mjs", &["files", &canary]);

    let clones = "clone,clone3,fork,vfork";
    let filter = [&*format!("trace={clones}"), &*format!("inject={clones}:error=EAGAIN")];
    let none = both(&daemon).map(|pid| Strace::attach(pid, &filter));
    run(&daemon, "exhausted.mjs", &["threads", &canary]);
    let [_, seen] = none.map(Strace::detach);
    assert!(seen.iter().any(|(_, call)| call.contains("EAGAIN")), "{seen:?}");
    run(&daemon, "exhausted.mjs", &["well", &canary]);

    // Every other one of them; workers are traced too, which takes more of them than stand ready. The daemon's HTTP
    // library does not expect an interrupted recvfrom, which Linux has only for calls that wait.
    let calls = "recvmsg,sendmsg,accept4,epoll_wait";
    let of_workers = "recvmsg,sendmsg,recvfrom,sendto,poll,ppoll";
    let [daemon_pid, zygote] = both(&daemon);
    let interrupted = [(daemon_pid, calls), (zygote, of_workers)].map(|(pid, calls)| {
        let filter = [&*format!("trace={calls}"), &*format!("inject={calls}:error=EINTR:when=1+2")];
        Strace::attach(pid, &filter)
    });
    run(&daemon, "exhausted.mjs", &["well", &canary, "8"]);
    let seen = interrupted.map(Strace::detach).concat();
    let was_interrupted = |name: &str, flag: &str| {
        seen.iter().any(|(_, call)| call.starts_with(name) && call.contains(flag) && call.contains("EINTR"))
    };
    assert!(was_interrupted("recvmsg", "MSG_CMSG_CLOEXEC"), "a request to a worker: {seen:?}");
    assert!(was_interrupted("sendmsg", "MSG_DONTWAIT"), "a guest's bytes: {seen:?}");
    // What was refused is not in it half.
    daemon.end_and_verify();
}

#[test]
fn a_microvm_that_stands_still_hangs_nobody() {
    if !kvm_or_skip("a_microvm_that_stands_still_hangs_nobody") {
        return;
    }
    let pool = "[[pools]]\nimage = \"default\"\nmem_mib = 128\nmin = 1\nmax = 1\n";
    let daemon = Daemon::start(&format!("{CONFIG}{pool}[limits]\nwatchdog_s = 6\n"));
    run(&daemon, "stuck.mjs", &["all"]);
    run(&daemon, "stuck.mjs", &["late"]);
    run(&daemon, "stuck.mjs", &["pooled"]);
    let left = run(&daemon, "stuck.mjs", &["leave"]);
    let (at, pid) = left.split_once(' ').unwrap();
    let daemon = Daemon::start_in(daemon.crash(), &["--dev"]);
    run(&daemon, "stuck.mjs", &["adopted", at, pid]);
    daemon.end_and_verify();
}

/// The clock of the day as a file says; the monotonic one stays the host's.
const FAKE_CLOCK: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

#[test]
fn each_second_is_billed_once_over_a_clock_that_is_set_sleep_and_a_killed_daemon() {
    if !kvm_or_skip("each_second_is_billed_once_over_a_clock_that_is_set_sleep_and_a_killed_daemon") {
        return;
    }
    debian_tools(&["faketime"]);
    let home = tempfile::tempdir().unwrap();
    let clock = home.path().join("clock");
    std::fs::write(&clock, "+0").unwrap();
    std::fs::write(home.path().join("config.toml"), CONFIG).unwrap();
    let yes = Path::new("1");
    let variables = [
        ("LD_PRELOAD", Path::new(FAKE_CLOCK)),
        ("FAKETIME_TIMESTAMP_FILE", &clock),
        ("FAKETIME_NO_CACHE", yes),
        ("FAKETIME_DONT_FAKE_MONOTONIC", yes),
    ];
    let daemon = Daemon::start_in_with(home, &["--dev"], &variables);
    let said = run(&daemon, "metering.mjs", &["first"]);
    let (id, not_ms) = said.split_once(' ').unwrap();
    let daemon = Daemon::start_in(daemon.crash(), &["--dev"]);
    run(&daemon, "metering.mjs", &["last", id, not_ms]);
    daemon.end_and_verify();
}
