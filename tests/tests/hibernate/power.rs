//! Loss of power: what was acknowledged is there, and what was not is the generation before. XFS says so: shut
//! down without its log, it loses what was not synced (ext4 hides a missing fsync).

use super::disk::{Mount, run};
use super::resumed_word;
use peregrine_vmm::snapshot::hibernated::status;
use peregrine_vmm::snapshot::{Claim, Stored};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};
use tests::sandbox::{go, parked, sh, turn};
use tests::{PATIENCE, Strace, faults_or_skip, kill};

/// The smallest that mkfs.xfs makes.
const DISK_BYTES: u64 = 300 << 20;

/// A disk that can lose its power.
struct Disk {
    image: PathBuf,
    mount: Option<Mount>,
}

impl Disk {
    fn new(home: &Path) -> Self {
        let image = home.join("disk");
        File::create(&image).unwrap().set_len(DISK_BYTES).unwrap();
        run(Command::new("mkfs.xfs").arg("-q").arg(&image));
        let mut disk = Self { image, mount: None };
        disk.mount();
        disk
    }

    fn mount(&mut self) {
        let image = self.image.to_str().unwrap();
        self.mount = Some(Mount::new(&["-o", "loop", image], &self.image.with_extension("mount")));
    }

    fn dir(&self) -> PathBuf {
        self.mount.as_ref().unwrap().at.join("box")
    }

    /// Nothing more reaches the disk, not even what is in its log's buffers.
    fn cut_power(&self) {
        run(Command::new("xfs_io").args(["-x", "-c", "shutdown"]).arg(&self.mount.as_ref().unwrap().at));
    }

    fn restore_power(&mut self) {
        drop(self.mount.take());
        self.mount();
    }

    /// The sandbox's newest generation, which must be whole.
    fn generation(&self) -> u64 {
        let generation = status(&self.dir()).unwrap().generation.unwrap();
        let stored = Stored::open(&self.dir().join(generation.to_string())).unwrap();
        stored.verify_memory().unwrap();
        generation
    }
}

#[test]
fn an_acknowledged_hibernation_survives_the_loss_of_power() {
    if !faults_or_skip("an_acknowledged_hibernation_survives_the_loss_of_power", &["mkfs.xfs", "xfs_io"]) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let mut disk = Disk::new(home.path());
    let mut going = go(parked(&template));
    for generation in 1..=3 {
        sh(&mut going.agent, &format!("echo {generation} >/tmp/word"));
        let claim = Claim::take(&disk.dir()).unwrap();
        going.worker.hibernate(&going.agent, &claim).unwrap();
        disk.cut_power();
        drop(claim);
        disk.restore_power();
        assert_eq!(disk.generation(), generation);
    }
    drop(going);
    assert_eq!(resumed_word(&disk.dir()), "3");
}

#[test]
fn power_lost_before_the_acknowledgement_leaves_the_generation_before_or_the_new_one_whole() {
    let name = "power_lost_before_the_acknowledgement_leaves_the_generation_before_or_the_new_one_whole";
    if !faults_or_skip(name, &["strace", "mkfs.xfs", "xfs_io"]) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let mut disk = Disk::new(home.path());
    let parked = parked(&template);
    let pid = parked.pid();
    let mut going = go(parked);
    let claim = Claim::take(&disk.dir()).unwrap();
    going.worker.hibernate(&going.agent, &claim).unwrap();
    drop(claim);
    let mut generations = vec![1];
    // The process that saves stops when the call has been made, and the power goes.
    for step in
        ["mkdir", "ftruncate", "openat 3", "fsync 1", "fsync 2", "fsync 3", "fsync 4", "rename", "fsync 5"]
    {
        let (call, nth) = step.split_once(' ').unwrap_or((step, "1"));
        let claim = Claim::take(&disk.dir()).unwrap();
        let stop = format!("inject={call}:signal=STOP:when={nth}");
        let strace = Strace::attach(pid, &[&format!("trace={call}"), &stop]);
        let result = std::thread::scope(|scope| {
            let hibernate = scope.spawn(|| going.worker.hibernate(&going.agent, &claim));
            let stopped = |(by, text): &(u32, String)| *by != pid && text.contains("stopped by SIGSTOP");
            let begun = Instant::now();
            let saver = loop {
                if let Some((saver, _)) = strace.seen().into_iter().find(stopped) {
                    break saver;
                }
                if hibernate.is_finished() || begun.elapsed() > PATIENCE {
                    kill("KILL", pid);
                    panic!("{step}: it did not stop: {:?}", strace.seen());
                }
                std::thread::sleep(Duration::from_millis(2));
            };
            disk.cut_power();
            kill("KILL", saver);
            hibernate.join().unwrap()
        });
        drop(strace.detach());
        assert!(result.is_err(), "{step}: acknowledged");
        drop(claim);
        disk.restore_power();
        generations.push(disk.generation());
        drop(Claim::take(&disk.dir()).unwrap());
    }
    // A rename that nobody synced may be on the disk all the same; the synced one is.
    assert!(generations[..8].iter().all(|n| *n == 1), "{generations:?}");
    assert!((1..=2).contains(&generations[8]) && generations[9] == generations[8] + 1, "{generations:?}");
    assert_eq!(sh(&mut going.agent, "echo alive"), "alive");
    going.worker.hibernate(&going.agent, &Claim::take(&disk.dir()).unwrap()).unwrap();
    assert_eq!(disk.generation(), generations[9] + 1);
}
