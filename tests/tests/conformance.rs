//! `peregrine serve` from outside, on real microVMs: the published client, unmodified, through every method of
//! it and as an MCP server; what it does not use; every error; a crash; the status page; clients that are slow, idle or large.
#![allow(clippy::unwrap_used)]

use std::process::Command;
use tests::daemon::Daemon;
use tests::oci::debian_tools;
use tests::{kvm_or_skip, peregrine};

const CONFIG: &str = "[image_aliases]\n\"node:22-slim\" = \"default\"\n[defaults]\nmem_mib = 128\n";
/// Most memory that the daemon may ever have, whatever it passes on.
const MOST_BYTES: u64 = 64 << 20;

/// Runs a program of `tests/conformance` to its end, and shows what it says.
fn run(daemon: &Daemon, program: &str, arguments: &[&str]) -> String {
    let output = daemon.node(program, arguments);
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program}: {stdout}\n{stderr}");
    eprint!("{stdout}");
    stdout.into_owned()
}

#[test]
fn the_published_client_and_plain_http_do_what_they_promise() {
    if !kvm_or_skip("the_published_client_and_plain_http_do_what_they_promise") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    for program in ["client.mjs", "streams.mjs", "proxy.mjs", "mcp.mjs"] {
        run(&daemon, program, &[]);
    }
    assert!(daemon.peak_bytes() < MOST_BYTES, "{} bytes", daemon.peak_bytes());
}

#[test]
fn every_error_of_the_document_can_be_provoked_and_keys_and_tenants_are_kept_apart() {
    if !kvm_or_skip("every_error_of_the_document_can_be_provoked_and_keys_and_tenants_are_kept_apart") {
        return;
    }
    let limits = "[limits]\nsandboxes = 3\nrequests_per_s = 200\nrequest_burst = 400\nwatchdog_s = 15\n";
    let daemon = Daemon::start(&format!("{CONFIG}{limits}"));
    run(&daemon, "errors.mjs", &[]);
}

#[test]
fn without_patience_a_killed_daemon_leaves_no_worker_and_the_next_one_knows_what_slept() {
    if !kvm_or_skip("without_patience_a_killed_daemon_leaves_no_worker_and_the_next_one_knows_what_slept") {
        return;
    }
    let daemon = Daemon::start(&format!("{CONFIG}[limits]\norphan_s = 0\n"));
    let said = run(&daemon, "crash.mjs", &["before"]);
    // Two daemons must not serve one state directory.
    let mut second = Command::new(peregrine());
    let second = second.arg("--state").arg(daemon.state()).args(["serve", "--listen", "127.0.0.1:0"]);
    let second = second.output().unwrap();
    assert_eq!(second.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&second.stderr).contains("another peregrine"), "{second:?}");
    let workers = daemon.workers();
    assert!(!workers.is_empty());
    let state = daemon.crash();
    for worker in workers {
        // They notice that their owner is gone.
        while std::path::Path::new(&format!("/proc/{worker}/exe")).exists() {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }
    let daemon = Daemon::start_in(state, &["--dev"]);
    run(&daemon, "crash.mjs", &["after", said.trim()]);
    daemon.end_and_verify();
}

#[test]
fn a_killed_daemons_sandboxes_run_on_and_what_was_followed_goes_on_with_the_next_one() {
    if !kvm_or_skip("a_killed_daemons_sandboxes_run_on_and_what_was_followed_goes_on_with_the_next_one") {
        return;
    }
    let daemon = Daemon::start(&format!("on_stop = \"keep\"\n{CONFIG}[limits]\norphan_s = 120\n"));
    run(&daemon, "adopt.mjs", &["before"]);
    let daemon = Daemon::start_in(daemon.crash(), &["--dev"]);
    run(&daemon, "adopt.mjs", &["after"]);
    let daemon = Daemon::start_in(daemon.end(), &["--dev"]);
    run(&daemon, "adopt.mjs", &["later"]);
    let left: Vec<_> = std::fs::read_dir(daemon.state().join("workers")).unwrap().flatten().collect();
    assert!(left.is_empty(), "{left:?}");
    daemon.end_and_verify();
}

#[test]
fn the_status_page_shows_in_a_browser_what_goes_on() {
    if !kvm_or_skip("the_status_page_shows_in_a_browser_what_goes_on") {
        return;
    }
    debian_tools(&["chromium"]);
    let pool = "[[pools]]\nimage = \"default\"\nmem_mib = 128\nmin = 1\nmax = 2\n";
    let daemon = Daemon::start(&format!("{CONFIG}{pool}"));
    run(&daemon, "page.mjs", &[]);
}

#[test]
fn killed_in_the_middle_of_a_verb_a_daemon_leaves_the_old_state_or_the_new_one() {
    if !kvm_or_skip("killed_in_the_middle_of_a_verb_a_daemon_leaves_the_old_state_or_the_new_one") {
        return;
    }
    let mut daemon = Daemon::start(&format!("{CONFIG}[limits]\norphan_s = 120\n"));
    for verb in ["create", "fork", "snapshot", "hibernate", "resume", "destroy"] {
        // Before it is done, while it is, and about when it is acknowledged.
        for ms in ["1", "4", "9", "16"] {
            run(&daemon, "kill.mjs", &["kill", verb, ms]);
            daemon = Daemon::start_in(daemon.crash(), &["--dev"]);
            run(&daemon, "kill.mjs", &["check"]);
        }
    }
    for dir in ["workers", "hibernated", "snapshots", "streams"] {
        let left = std::fs::read_dir(daemon.state().join(dir));
        let left: Vec<_> = left.into_iter().flatten().flatten().collect();
        assert!(left.is_empty(), "{dir}: {left:?}");
    }
    daemon.end_and_verify();
}

#[test]
fn slow_clients_are_cut_and_ten_thousand_idle_ones_are_not() {
    if !kvm_or_skip("slow_clients_are_cut_and_ten_thousand_idle_ones_are_not") {
        return;
    }
    let daemon = Daemon::start(&format!("{CONFIG}[limits]\nhead_s = 3\nbody_s = 5\n"));
    run(&daemon, "load.mjs", &["connections"]);
    // 10 KiB each, and what the daemon takes anyway.
    assert!(daemon.peak_bytes() < 10_000 * 10_240 + MOST_BYTES, "{} bytes", daemon.peak_bytes());
}

#[test]
fn files_do_not_pass_through_the_daemons_memory() {
    if !kvm_or_skip("files_do_not_pass_through_the_daemons_memory") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    run(&daemon, "load.mjs", &["file"]);
    assert!(daemon.peak_bytes() < MOST_BYTES, "{} bytes", daemon.peak_bytes());
}
