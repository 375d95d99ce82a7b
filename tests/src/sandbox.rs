//! Sandboxes: guests in worker processes of their own, as in production.

use crate::clone::PATIENCE;
use crate::{artefacts, config, peregrine};
use peregrine::template;
use peregrine_image::Lines;
use peregrine_vmm::agent::{Agent, Command, Identity};
use peregrine_vmm::worker::{Going, Parked, Worker};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

const MEM_MIB: u64 = 128;

/// One test at a time, and the template of all of them, which is made once.
///
/// # Panics
/// If it cannot be made.
pub fn turn() -> (MutexGuard<'static, ()>, PathBuf) {
    static TURN: Mutex<()> = Mutex::new(());
    static TEMPLATE: OnceLock<PathBuf> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let dir = TEMPLATE.get_or_init(|| {
        let progress = &mut Lines::new(std::io::stderr());
        let made = template::prepare(&artefacts().store, &config(1, MEM_MIB), progress);
        made.unwrap_or_else(|e| panic!("{e}")).dir
    });
    (turn, dir.clone())
}

/// A guest restored from the snapshot in `dir`; it stands still.
///
/// # Panics
/// If it cannot be restored.
#[must_use]
pub fn parked(dir: &Path) -> Parked {
    let worker = Worker::spawn(peregrine(), &[OsStr::new("worker")]).unwrap_or_else(|e| panic!("{e}"));
    worker.prepare(dir, &config(1, MEM_MIB).disks).unwrap_or_else(|e| panic!("{}: {e}", dir.display()))
}

/// Lets a guest go as somebody of its own.
///
/// # Panics
/// If it is lost.
#[must_use]
pub fn go(parked: Parked) -> Going {
    let identity = Identity::fresh().unwrap_or_else(|e| panic!("{e}"));
    parked.go(&identity, PATIENCE).unwrap_or_else(|e| panic!("{e}"))
}

/// The standard output of a shell script, without the last line's end; it must succeed.
///
/// # Panics
/// If it does not.
pub fn sh(agent: &mut Agent, script: &str) -> String {
    agent.set_timeout(Some(PATIENCE)).unwrap_or_else(|e| panic!("{e}"));
    let output = agent.output(&Command::new(&["/bin/sh", "-c", script]), b"");
    let output = output.unwrap_or_else(|e| panic!("{script}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.code(), 0, "{script}: {stderr}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}
