//! Workers: one that is to end stands still until it does; one that is forked from a zygote knows what that has learned.
#![allow(clippy::unwrap_used)]

use peregrine_vmm::agent::{Command, Identity};
use peregrine_vmm::arch::cmdline::gives_ring0;
use peregrine_vmm::host::KvmKind;
use peregrine_vmm::worker::{Going, Parked, Worker, WorkerError, Zygote};
use std::fs;
use std::path::Path;
use std::thread::sleep;
use std::time::Duration;
use tests::daemon::Daemon;
use tests::sandbox::{go, parked, sh, turn};
use tests::{config, kvm_or_skip, peregrine};

const LOOK: Duration = Duration::from_millis(20);
/// Far longer than anything here takes.
const PATIENCE_LOOKS: u32 = 3_000;

/// sched(7).
const SCHED_IDLE: i32 = 5;

/// Looks until it is so.
fn becomes(what: &str, mut so: impl FnMut() -> bool) {
    assert!(
        (0..PATIENCE_LOOKS).any(|_| so() || {
            sleep(LOOK);
            false
        }),
        "{what}"
    );
}

/// Nice value and scheduling policy of a worker's vCPU threads (proc(5), `stat`, fields 19 and 41).
fn scheduling(pid: u32) -> Vec<(i32, i32)> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let stats = tasks.map(|task| fs::read_to_string(task.unwrap().path().join("stat")).unwrap());
    let vcpu = |stat: String| {
        let (name, fields) = stat.rsplit_once(')')?;
        let fields: Vec<_> = fields.split_whitespace().map(|field| field.parse().unwrap_or(0)).collect();
        name.contains("(vcpu").then(|| (fields[16], fields[38]))
    };
    stats.filter_map(vcpu).collect()
}

/// A parked worker whose vCPU stands at the guest's mailbox, and will come first.
fn waiting(dir: &Path) -> (Parked, u32) {
    let parked = parked(dir);
    let pid = parked.pid();
    becomes("its vCPU waits, and will come first", || scheduling(pid) == [(-10, 0)]);
    (parked, pid)
}

/// Processor time that a process has used, in clock ticks.
fn ticks(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    fields[11..13].iter().map(|field| field.parse::<u64>().unwrap()).sum()
}

#[test]
fn a_guest_that_was_halted_computes_no_more_and_goes_with_its_owner() {
    if !kvm_or_skip("a_guest_that_was_halted_computes_no_more_and_goes_with_its_owner") {
        return;
    }
    let (_turn, dir) = turn();
    let parked = parked(&dir);
    let pid = parked.pid();
    let Going { worker, mut agent, .. } = go(parked);
    sh(&mut agent, "while :; do :; done >/dev/null 2>&1 &");
    let before = ticks(pid);
    becomes("it computes", || ticks(pid) > before + 20);
    worker.halt();
    let mut last = ticks(pid);
    let mut still = 0;
    becomes("it stands still", || {
        still = if ticks(pid) == last { still + 1 } else { 0 };
        last = ticks(pid);
        still > 10
    });
    drop(worker);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn what_was_destroyed_is_gone_though_the_daemon_dies_with_the_word() {
    if !kvm_or_skip("what_was_destroyed_is_gone_though_the_daemon_dies_with_the_word") {
        return;
    }
    // Whoever was not destroyed would wait so long for the next daemon.
    let daemon = Daemon::start("[defaults]\nimage = \"default\"\nmem_mib = 128\n[limits]\norphan_s = 120\n");
    let output = daemon.node("bury.mjs", &[]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    becomes("all workers are gone", || daemon.workers().is_empty());
}

/// The status of each zygote among this process's children.
fn zygotes() -> Vec<String> {
    let mine = std::process::id().to_string();
    let all = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    let status = |pid: String| fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let ours =
        |status: &String| field(status, "Name:") == Some("zygote") && field(status, "PPid:") == Some(&*mine);
    all.map(status).filter(ours).collect()
}

fn field<'s>(status: &'s str, name: &str) -> Option<&'s str> {
    status.lines().find_map(|line| line.strip_prefix(name))?.split_whitespace().next()
}

/// Memory of its own that the zygote has, in KiB.
fn zygote_kib() -> u64 {
    zygotes().first().and_then(|status| field(status, "RssAnon:")?.parse().ok()).unwrap_or(0)
}

#[test]
fn workers_that_were_asked_of_a_zygote_are_made_though_it_is_replaced() {
    if !kvm_or_skip("workers_that_were_asked_of_a_zygote_are_made_though_it_is_replaced") {
        return;
    }
    let (_turn, _) = turn();
    let zygote = Zygote::new(peregrine().to_owned(), vec!["zygote".into()]);
    // More than one zygote makes, and asked for faster than it makes them.
    let mut workers: Vec<Worker> = (0..250).map(|_| zygote.worker().unwrap()).collect();
    becomes("the next one is started ahead", || zygotes().len() == 2);
    workers.extend((250..280).map(|_| zygote.worker().unwrap()));
    assert_eq!(zygotes().len(), 1);
    for (number, worker) in workers.iter().enumerate() {
        // It has no guest, and says so.
        let answer = worker.stats();
        assert!(matches!(answer, Err(WorkerError::Refused(_))), "{number}: {answer:?}");
    }
}

#[test]
fn a_guest_that_stood_back_for_its_creators_answer_has_its_share_again() {
    if !kvm_or_skip("a_guest_that_stood_back_for_its_creators_answer_has_its_share_again") {
        return;
    }
    let (_turn, dir) = turn();
    let (parked, pid) = waiting(&dir);
    // Nobody asks its worker anything after that; its guest has made many an exit when it answers.
    let mut going = go(parked);
    sh(&mut going.agent, "true");
    becomes("its vCPU is as others (SCHED_OTHER)", || scheduling(pid) == [(0, 0)]);
}

#[test]
fn a_guest_that_stands_back_comes_forward_for_whoever_has_something_for_it() {
    if !kvm_or_skip("a_guest_that_stands_back_comes_forward_for_whoever_has_something_for_it") {
        return;
    }
    let (_turn, dir) = turn();
    // Standing still it says nothing itself, and its worker, which was asked for that, waits no longer to bring it forward.
    // A host that is slow lets it come so far that it has something to say.
    let standing_back = || {
        let (parked, pid) = waiting(&dir);
        let going = parked.begin(&Identity::fresh().unwrap()).unwrap();
        going.worker.halt();
        let stands_back = (0..50).any(|_| {
            sleep(LOOK);
            matches!(scheduling(pid)[..], [(_, SCHED_IDLE)])
        });
        stands_back.then_some((pid, going))
    };
    let (pid, mut going) = (0..5).find_map(|_| standing_back()).unwrap();
    let command = Command::new(&["true"]);
    going.agent.exec(&command).unwrap();
    becomes("it is as others", || scheduling(pid) == [(0, 0)]);
}

#[test]
fn a_worker_whose_zygote_has_learned_does_what_others_do() {
    if !kvm_or_skip("a_worker_whose_zygote_has_learned_does_what_others_do") {
        return;
    }
    let (_turn, dir) = turn();
    let zygote = Zygote::new(peregrine().to_owned(), vec!["zygote".into()]);
    let worker = zygote.worker().unwrap();
    assert!(worker.stats().is_err(), "it has no guest, and its zygote is there");
    let before = zygote_kib();
    // What cannot be read and what is no list is nothing.
    let wrong = tempfile::tempdir().unwrap();
    fs::write(wrong.path().join("code"), [0xff; 100]).unwrap();
    zygote.learn(wrong.path());
    zygote.learn(Path::new("/nowhere"));
    zygote.learn(&dir);
    if gives_ring0(KvmKind::detect(), 1, "") {
        becomes("the zygote knows a kernel's code", || zygote_kib() > before + 1024);
    }
    let parked = zygote.worker().unwrap().prepare(&dir, &config(1, 128).disks).unwrap();
    let mut going = go(parked);
    assert_eq!(sh(&mut going.agent, "echo $((6 * 7)); cat /proc/sys/kernel/hostname | wc -l"), "42\n1");
}
