//! Hibernation and resume under kills, failing disks, full disks and loss of power, on real KVM: at each
//! moment the sandbox on disk is what it was before or what it is after, whole, and the guest goes on.
#![allow(clippy::unwrap_used)]

mod disk;
mod kill;
mod load;
mod power;

use peregrine_vmm::snapshot::hibernated::{Status, status};
use peregrine_vmm::snapshot::{Claim, SnapshotError, Stored};
use peregrine_vmm::worker::Going;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use tests::kvm_or_skip;
use tests::sandbox::{go, parked, sh, turn};

/// A running sandbox with a place on disk, which has been hibernated once; it has since gone on.
struct Sandbox {
    going: Going,
    pid: u32,
    claim: Claim,
    dir: PathBuf,
}

impl Sandbox {
    /// Generation 1 has the word `one` in a file, the guest has `two` in it.
    fn hibernated_once(template: &Path, dir: &Path) -> Self {
        let parked = parked(template);
        let pid = parked.pid();
        let claim = Claim::take(dir).unwrap();
        let mut sandbox = Self { going: go(parked), pid, claim, dir: dir.to_owned() };
        sandbox.sh("echo one >/tmp/word");
        sandbox.hibernate().unwrap();
        sandbox.sh("echo two >/tmp/word");
        sandbox
    }

    fn sh(&mut self, script: &str) -> String {
        sh(&mut self.going.agent, script)
    }

    fn hibernate(&self) -> Result<(), peregrine_vmm::worker::WorkerError> {
        self.going.worker.hibernate(&self.going.agent, &self.claim).map(drop)
    }

    /// Its generation on disk, which must be whole, and whether the last hibernation was cut off.
    fn on_disk(&self) -> (u64, bool) {
        let newest = self.claim.newest().unwrap().unwrap();
        Stored::open(&newest).and_then(|stored| stored.verify_memory()).unwrap();
        let status = status(&self.dir).unwrap();
        (status.generation.unwrap(), status.interrupted)
    }
}

/// Resumes the sandbox in `dir`, which nobody has claimed, and gives the word in its file.
fn resumed_word(dir: &Path) -> String {
    let claim = Claim::take(dir).unwrap();
    let mut going = go(parked(&claim.newest().unwrap().unwrap()));
    sh(&mut going.agent, "cat /tmp/word")
}

/// Everything in a sandbox's directory.
fn names(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = entries.collect();
    names.sort();
    names
}

#[test]
fn a_sandbox_goes_on_through_its_generations_and_one_lies_on_the_disk() {
    if !kvm_or_skip("a_sandbox_goes_on_through_its_generations_and_one_lies_on_the_disk") {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("box");
    let sandbox = Sandbox::hibernated_once(&template, &dir);
    assert_eq!(names(&dir), ["1", "claim"]);
    sandbox.hibernate().unwrap();
    assert_eq!(sandbox.on_disk(), (2, false));
    drop(sandbox);
    assert_eq!(status(&dir).unwrap(), Status { generation: Some(2), interrupted: false, claimed: false });
    assert_eq!(resumed_word(&dir), "two");
    assert_eq!(names(&dir), ["2", "claim"]);
}

#[test]
fn of_twelve_concurrent_resumes_of_one_sandbox_one_launches_it() {
    if !kvm_or_skip("of_twelve_concurrent_resumes_of_one_sandbox_one_launches_it") {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("box");
    drop(Sandbox::hibernated_once(&template, &dir));
    let begin = Barrier::new(12);
    let resume = || {
        begin.wait();
        let claim = Claim::take(&dir)?;
        let newest = claim.newest()?.unwrap();
        Ok((go(parked(&newest)), claim))
    };
    let resumed: Vec<Result<_, SnapshotError>> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..12).map(|_| scope.spawn(resume)).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let (launched, refused): (Vec<_>, Vec<_>) = resumed.into_iter().partition(Result::is_ok);
    assert_eq!((launched.len(), refused.len()), (1, 11));
    for error in refused.into_iter().filter_map(Result::err) {
        assert!(error.to_string().contains("box is claimed"), "{error}");
    }
    let (mut going, claim) = launched.into_iter().next().unwrap().unwrap();
    assert!(status(&dir).unwrap().claimed);
    assert_eq!(sh(&mut going.agent, "cat /tmp/word"), "one");
    // It ends without a hibernation: its sandbox is as it was, and anybody's.
    drop((going, claim));
    assert_eq!(resumed_word(&dir), "one");
}
