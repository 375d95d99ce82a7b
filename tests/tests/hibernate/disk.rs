//! Disks that fail and disks that are full.

use super::{Sandbox, names, resumed_word};
use peregrine_vmm::worker::WorkerError;
use std::path::{Path, PathBuf};
use std::process::Command;
use tests::sandbox::turn;
use tests::{Strace, faults_or_skip};

#[test]
fn an_fsync_that_fails_fails_the_hibernation_once_and_the_guest_goes_on() {
    if !faults_or_skip("an_fsync_that_fails_fails_the_hibernation_once_and_the_guest_goes_on", &["strace"]) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let dir = home.path().join("box");
    let mut sandbox = Sandbox::hibernated_once(&template, &dir);
    // Of the memory image, the state file, their directory, and the directory that names it.
    for nth in 1..=4 {
        let fail = format!("inject=fsync:error=EIO:when={nth}");
        let strace = Strace::attach(sandbox.pid, &["trace=fsync,fdatasync,rename,openat", &fail]);
        let error = sandbox.hibernate().unwrap_err();
        let calls = strace.detach();
        assert!(matches!(&error, WorkerError::Refused(why) if why.contains("Input/output error")), "{error}");
        // After the failure nothing is synced: a second fsync of the same file would say that all is well.
        let synced: Vec<_> = calls.iter().filter(|(_, text)| text.starts_with("fsync(")).collect();
        assert_eq!(synced.len(), nth, "{calls:?}");
        assert!(synced[nth - 1].1.contains("EIO"), "{calls:?}");
        assert_eq!((sandbox.on_disk(), names(&dir)), ((1, false), vec!["1".to_owned(), "claim".to_owned()]));
        assert_eq!(sandbox.sh("cat /tmp/word"), "two");
    }
    sandbox.hibernate().unwrap();
    drop(sandbox);
    assert_eq!(resumed_word(&dir), "two");
}

/// A mounted file system, unmounted when dropped.
pub(crate) struct Mount {
    pub(crate) at: PathBuf,
}

impl Mount {
    pub(crate) fn new(arguments: &[&str], at: &Path) -> Self {
        std::fs::create_dir_all(at).unwrap();
        run(Command::new("mount").args(arguments).arg(at));
        Self { at: at.to_owned() }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.at).status();
    }
}

pub(crate) fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn a_full_disk_fails_the_hibernation_by_name_leaves_nothing_and_the_next_one_is_complete() {
    if !faults_or_skip(
        "a_full_disk_fails_the_hibernation_by_name_leaves_nothing_and_the_next_one_is_complete",
        &["mount", "umount"],
    ) {
        return;
    }
    let (_turn, template) = turn();
    let home = tempfile::tempdir().unwrap();
    let mount = Mount::new(&["-t", "tmpfs", "-o", "size=600m", "none"], &home.path().join("small"));
    let resize = |mib: u64| {
        run(Command::new("mount").args(["-o", &format!("remount,size={mib}m")]).arg(&mount.at));
    };
    let dir = mount.at.join("box");
    let mut sandbox = Sandbox::hibernated_once(&template, &dir);
    let generation_mib = used_kib(&mount.at).div_ceil(1024);
    // No room at all, for the memory image in part, and for all but the end of it.
    for spare_mib in [0, generation_mib / 2, generation_mib - 1] {
        resize(generation_mib + spare_mib);
        let error = sandbox.hibernate().unwrap_err();
        assert!(matches!(error, WorkerError::NoSpace(_)), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("No space left on device") && text.contains("free some"), "{text}");
        assert_eq!((sandbox.on_disk(), names(&dir)), ((1, false), vec!["1".to_owned(), "claim".to_owned()]));
        assert_eq!(sandbox.sh("cat /tmp/word"), "two");
    }
    resize(600);
    sandbox.hibernate().unwrap();
    assert_eq!(sandbox.on_disk(), (2, false));
    drop(sandbox);
    assert_eq!(resumed_word(&dir), "two");
}

fn used_kib(at: &Path) -> u64 {
    let output = Command::new("df").args(["--output=used", "-k"]).arg(at).output().unwrap();
    String::from_utf8(output.stdout).unwrap().lines().last().unwrap().trim().parse().unwrap()
}
