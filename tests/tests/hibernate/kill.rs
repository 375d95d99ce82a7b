//! Kills in the middle of a hibernation.

use super::{Sandbox, names, resumed_word};
use peregrine_vmm::snapshot::Claim;
use peregrine_vmm::snapshot::hibernated::{Status, status};
use peregrine_vmm::worker::WorkerError;
use std::collections::BTreeMap;
use std::time::Duration;
use tests::sandbox::turn;
use tests::{Strace, faults_or_skip, kill};

/// Places in a hibernation's own process: a system call's name and the how manyeth of it. Of the many of a kind
/// the first, one between and the last.
fn steps(sandbox: &Sandbox) -> Vec<(String, usize)> {
    let threads = tasks(sandbox.pid);
    let strace = Strace::attach(sandbox.pid, &["trace=all"]);
    sandbox.hibernate().unwrap();
    let mut calls: BTreeMap<String, BTreeMap<u32, usize>> = BTreeMap::new();
    for (pid, text) in strace.detach() {
        if let Some((name, _)) = text.split_once('(').filter(|(name, _)| !name.contains(' ')) {
            *calls.entry(name.to_owned()).or_default().entry(pid).or_insert(0) += 1;
        }
    }
    let mut steps = Vec::new();
    for (name, by_task) in calls {
        let in_worker = by_task.iter().filter(|(pid, _)| threads.contains(pid)).map(|(_, n)| *n).max();
        let Some(count) = by_task.iter().find(|(pid, _)| !threads.contains(pid)).map(|(_, n)| *n) else {
            continue;
        };
        // strace counts in the worker as well, which is to live: there it must not come so far.
        let safe = in_worker.map_or(1, |n| 2 * n + 1);
        let mut of_name = vec![safe, count.div_ceil(2), count];
        of_name.retain(|nth| (safe..=count).contains(nth));
        of_name.dedup();
        steps.extend(of_name.into_iter().map(|nth| (name.clone(), nth)));
    }
    steps.retain(|(name, _)| name != "exit_group");
    steps
}

fn tasks(pid: u32) -> Vec<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    tasks.map(|task| task.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect()
}

#[test]
fn killed_at_any_step_a_hibernation_leaves_the_old_generation_or_the_new_one_whole() {
    if !faults_or_skip(
        "killed_at_any_step_a_hibernation_leaves_the_old_generation_or_the_new_one_whole",
        &["strace"],
    ) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("box");
    let mut sandbox = Sandbox::hibernated_once(&template, &dir);
    let steps = steps(&sandbox);
    let at = |name: &str| steps.iter().filter(|(step, _)| step == name).count();
    assert!(at("fsync") == 3 && at("rename") == 1 && at("mkdir") == 1, "{steps:?}");
    let (mut old, mut new) = (0, 0);
    for (name, nth) in steps {
        let (before, _) = sandbox.on_disk();
        let kill = format!("inject={name}:signal=KILL:when={nth}");
        let strace = Strace::attach(sandbox.pid, &[&kill, &format!("trace={name}")]);
        let result = sandbox.hibernate();
        drop(strace.detach());
        let (after, _) = sandbox.on_disk();
        match result {
            Err(WorkerError::NotSaved) if after == before => old += 1,
            // Killed after the rename, or after the word to the owner.
            Err(WorkerError::NotSaved) | Ok(()) if after == before + 1 => new += 1,
            other => panic!("{name} {nth}: {before}, then {after}: {other:?}"),
        }
        let left = names(&dir);
        assert!(left.iter().all(|name| !name.starts_with('.')), "{name} {nth}: {left:?}");
    }
    println!("killed {old} times with the old generation left, {new} times with the new one");
    assert!(old >= 15 && (1..=8).contains(&new), "{old} {new}");
    assert_eq!(sandbox.sh("cat /tmp/word; echo three >/tmp/word"), "two");
    sandbox.hibernate().unwrap();
    assert!(!sandbox.on_disk().1);
    drop(sandbox);
    assert_eq!(resumed_word(&dir), "three");
}

#[test]
fn a_worker_killed_while_hibernating_leaves_the_generation_before_and_a_status_that_says_so() {
    let name = "a_worker_killed_while_hibernating_leaves_the_generation_before_and_a_status_that_says_so";
    if !faults_or_skip(name, &["strace"]) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("box");
    let sandbox = Sandbox::hibernated_once(&template, &dir);
    // The process that saves stops at its first fsync, for longer than the test.
    let strace = Strace::attach(sandbox.pid, &["trace=fsync", "inject=fsync:delay_enter=600000000:when=1"]);
    let killed = std::thread::scope(|scope| {
        let hibernate = scope.spawn(|| sandbox.hibernate());
        let saver = loop {
            if let Some(partial) = names(&dir).into_iter().find(|name| name.ends_with(".partial")) {
                break partial.split('.').nth(2).unwrap().parse::<u32>().unwrap();
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        assert!(status(&dir).unwrap().claimed && !status(&dir).unwrap().interrupted);
        for pid in [sandbox.pid, saver] {
            kill("KILL", pid);
        }
        // A process that is killed while its tracer holds it may stay in its stop until the tracer has gone.
        drop(strace);
        hibernate.join().unwrap()
    });
    // It may be gone before it could say that its guest goes on.
    assert!(matches!(killed, Err(WorkerError::NotSaved | WorkerError::Io(_))), "{killed:?}");
    assert_eq!(sandbox.on_disk(), (1, true));
    // The owner lets go of what it lost; whoever asks next is told, and resumes what there is.
    drop(sandbox);
    assert_eq!(status(&dir).unwrap(), Status { generation: Some(1), interrupted: true, claimed: false });
    assert_eq!(
        status(&dir).unwrap().to_string(),
        "hibernated, generation 1; a later hibernation was interrupted"
    );
    assert_eq!(resumed_word(&dir), "one");
    assert_eq!(names(&dir), ["1", "claim", "interrupted"]);
    assert!(Claim::take(&dir).is_ok());
}
