//! Live forks of a running guest, on real KVM: what children share with their parent, and what they must not.
#![allow(clippy::unwrap_used)]

use peregrine_vmm::agent::Command;
use peregrine_vmm::worker::Going;
use std::time::Duration;
use tests::sandbox::{go, parked, sh, turn};
use tests::{PATIENCE, kvm_or_skip};

#[test]
fn children_have_the_parents_memory_files_and_processes_and_then_each_its_own() {
    if !kvm_or_skip("children_have_the_parents_memory_files_and_processes_and_then_each_its_own") {
        return;
    }
    let (_turn, dir) = turn();
    let mut parent = go(parked(&dir));
    // A process of the parent that counts on in each child.
    let ticks = "mkfifo /tmp/p; while :; do read -t 0.5 <>/tmp/p; echo tick; done >/tmp/ticks 2>&1 &";
    sh(&mut parent.agent, &format!("echo shared >/tmp/f; bash -c '{ticks}'"));
    let fork = parent.worker.fork(&parent.agent, 2).unwrap();
    assert!(fork.decoded_ns <= fork.stopped_ns && fork.stopped_ns <= fork.resumed_ns);
    let mut children: Vec<Going> = fork.children.into_iter().map(go).collect();
    assert_eq!(children.len(), 2);
    // The parent goes on, and what it writes now is its own.
    sh(&mut parent.agent, "echo parent >/tmp/f");
    for (index, child) in children.iter_mut().enumerate() {
        assert_eq!(sh(&mut child.agent, "cat /tmp/f"), "shared");
        sh(&mut child.agent, &format!("echo child {index} >/tmp/f"));
    }
    assert_eq!(sh(&mut parent.agent, "cat /tmp/f"), "parent");
    let mut said = Vec::new();
    for (index, child) in children.iter_mut().enumerate() {
        let script = "cat /tmp/f; hostname; cat /proc/sys/kernel/random/uuid; a=$(wc -l </tmp/ticks); \
                      while test $(wc -l </tmp/ticks) -eq $a; do sleep 0.2; done; echo ticking";
        let text = sh(&mut child.agent, script);
        let lines: Vec<String> = text.lines().map(str::to_owned).collect();
        assert_eq!(lines[0], format!("child {index}"));
        assert_eq!(lines[3], "ticking", "{text}");
        said.push((lines[1].clone(), lines[2].clone()));
    }
    said.sort();
    said.dedup_by(|a, b| a.0 == b.0 || a.1 == b.1);
    assert_eq!(said.len(), 2, "host names and random bytes differ: {said:?}");
}

#[test]
fn a_snapshot_of_a_running_guest_is_restored_twice_and_after_its_end() {
    if !kvm_or_skip("a_snapshot_of_a_running_guest_is_restored_twice_and_after_its_end") {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let mut going = go(parked(&template));
    let script = "head -c 3000000 /dev/urandom >/tmp/data; mkfifo /tmp/p; \
                  bash -c 'read line </tmp/p; echo got $line >/tmp/got' >/dev/null 2>&1 & sha256sum </tmp/data";
    let digest = sh(&mut going.agent, script);
    // Each cycle hibernates what the last one resumed.
    for cycle in 0..3 {
        let dir = home.path().join(format!("cycle{cycle}"));
        let saved = going.worker.snapshot(&going.agent, &dir).unwrap();
        assert!(saved.decoded_ns <= saved.resumed_ns);
        // It went on, and what it did then is not in the snapshot.
        sh(&mut going.agent, "echo later >/tmp/later");
        drop(going);
        going = go(parked(&dir));
        assert_eq!(sh(&mut going.agent, "sha256sum </tmp/data; ls /tmp/later 2>/dev/null || true"), digest);
    }
    let last = home.path().join("cycle2");
    let mut twin = go(parked(&last));
    // The process that waited through it all still waits, in both, each for its own word.
    for (index, guest) in [&mut going, &mut twin].into_iter().enumerate() {
        let script =
            format!("echo word {index} >/tmp/p; while ! test -s /tmp/got; do sleep 0.1; done; cat /tmp/got");
        assert_eq!(sh(&mut guest.agent, &script), format!("got word {index}"));
    }
    let refused = going.worker.snapshot(&going.agent, &last).unwrap_err().to_string();
    assert!(refused.contains("cycle2"), "{refused}");
    assert_eq!(sh(&mut going.agent, "echo alive"), "alive");
    let left: Vec<_> = std::fs::read_dir(home.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 3, "no partial snapshot stays: {left:?}");
}

#[test]
fn a_fork_of_a_fork_and_its_parent_go_on_when_the_first_is_gone() {
    if !kvm_or_skip("a_fork_of_a_fork_and_its_parent_go_on_when_the_first_is_gone") {
        return;
    }
    let (_turn, dir) = turn();
    let mut first = go(parked(&dir));
    sh(&mut first.agent, "echo 1 >/tmp/generation");
    let mut second = go(first.worker.fork(&first.agent, 1).unwrap().children.pop().unwrap());
    sh(&mut second.agent, "echo 2 >>/tmp/generation");
    let mut third = go(second.worker.fork(&second.agent, 1).unwrap().children.pop().unwrap());
    drop(first);
    assert_eq!(sh(&mut third.agent, "echo 3 >>/tmp/generation; tr '\\n' ' ' </tmp/generation"), "1 2 3");
    assert_eq!(sh(&mut second.agent, "tr '\\n' ' ' </tmp/generation"), "1 2");
}

#[test]
fn a_command_that_runs_during_a_fork_ends_in_the_parent_as_if_nothing_had_been() {
    if !kvm_or_skip("a_command_that_runs_during_a_fork_ends_in_the_parent_as_if_nothing_had_been") {
        return;
    }
    let (_turn, dir) = turn();
    let mut parent = go(parked(&dir));
    parent.agent.set_timeout(Some(PATIENCE)).unwrap();
    // Output is under way, in the guest's buffers, the host's socket and the reader's.
    let stream = parent.agent.exec(&Command::new(&["/bin/sh", "-c", "seq 1 40000"])).unwrap();
    std::thread::sleep(Duration::from_millis(700));
    let child = parent.worker.fork(&parent.agent, 1).unwrap().children.pop().unwrap();
    let mut text = Vec::new();
    let code = tests::drain(&mut parent.agent, stream, &mut text);
    let expected: String = (1..=40_000).map(|n| format!("{n}\n")).collect();
    assert_eq!((code, String::from_utf8(text).unwrap() == expected), (0, true));
    // The child inherits the same command, whose output nobody reads; it serves others all the same.
    assert_eq!(sh(&mut go(child).agent, "echo here"), "here");
}
