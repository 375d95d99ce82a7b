//! The suites `hibernate` and `resume`: of a running guest that has written so many MiB since its template.

use crate::clone::{Failure, Template, between, go, row};
use crate::fork::{goals, template};
use crate::record::{Axis, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine_vmm::snapshot::{MEMORY_FILE, STATE_FILE};
use peregrine_vmm::worker::{Going, monotonic_ns};
use rustix::fs::{Advice, fadvise};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A directory for snapshots on the disk that holds the cache; it goes when this is dropped.
#[derive(Debug)]
pub struct Home {
    path: PathBuf,
    next: u32,
}

impl Home {
    /// Makes it.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn make(artefacts: &Artefacts) -> Result<Self, Failure> {
        let path = artefacts.store.root().join(format!("bench-{}", std::process::id()));
        std::fs::create_dir_all(&path)?;
        Ok(Self { path, next: 0 })
    }

    fn fresh(&mut self) -> PathBuf {
        self.next += 1;
        self.path.join(self.next.to_string())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}

/// One snapshot of a running guest.
#[derive(Debug)]
pub struct Hibernated {
    /// Where it lies.
    pub dir: PathBuf,
    /// The guest stood still.
    pub pause: Duration,
    /// Until it was durable.
    pub durable: Duration,
}

/// Snapshots a running guest once, which goes on.
///
/// # Errors
/// What the worker said.
pub fn once(going: &Going, home: &mut Home) -> Result<Hibernated, Failure> {
    let dir = home.fresh();
    let begun = monotonic_ns();
    let saved = going.worker.snapshot(&going.agent, &dir)?;
    let durable = between(begun, monotonic_ns())?;
    Ok(Hibernated { dir, pause: between(saved.decoded_ns, saved.resumed_ns)?, durable })
}

/// Restores the snapshot in `dir` with an empty worker process, until the guest's first VM exit.
///
/// # Errors
/// What the worker or the guest said.
pub fn resume(template: &Template, dir: &Path) -> Result<Duration, Failure> {
    let parked = template.restore(template.worker()?, dir)?;
    let begun = parked.decoded_ns();
    between(begun, go(parked)?.first_exit_ns)
}

/// Drops the snapshot's files from the page cache. They have been fsync'ed and nobody has them mapped.
///
/// # Errors
/// If a file cannot be opened.
pub fn chill(dir: &Path) -> Result<(), Failure> {
    for name in [MEMORY_FILE, STATE_FILE] {
        fadvise(File::open(dir.join(name))?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// `hibernate` and `resume`.
///
/// # Errors
/// The first cycle that failed.
pub fn hibernate(artefacts: &Artefacts, samples: u32, dirty_mib: &[u64]) -> Result<Vec<Recorder>, Failure> {
    let mut home = Home::make(artefacts)?;
    let mut all = Vec::new();
    for &mib in dirty_mib {
        let (template, variant) = template(artefacts, mib)?;
        let going = template.dirty(mib)?;
        let milli =
            |name: &str, definition: &str, goals| row(name, definition, goals, &variant, Unit::Milliseconds);
        let mut pause = milli(
            "snapshot of a running sandbox, pause",
            "request decoded, vCPU running -> vCPU told to go on",
            goals(mib, (0.5, 3.0)),
        );
        let mut durable = milli(
            "hibernate",
            "owner's call -> snapshot durable on disk (fsync of files and directories)",
            goals(mib, (10.0, 30.0)),
        );
        let mut hot = milli(
            "resume, hot",
            "request decoded by an empty worker process, snapshot in the page cache -> first VM exit",
            goals(mib, (1.0, 4.0)),
        );
        let mut cold = milli(
            "resume, cold disk",
            "the same, the snapshot's files dropped from the page cache before (the disk's own cache is not)",
            goals(mib, (12.0, 40.0)),
        );
        for n in 0..samples {
            if n % 20 == 0 {
                eprintln!("hibernate, {variant}: {n} of {samples}");
            }
            let snapshot = once(&going, &mut home)?;
            pause.duration(snapshot.pause);
            durable.duration(snapshot.durable);
            hot.duration(resume(&template, &snapshot.dir)?);
            chill(&snapshot.dir)?;
            cold.duration(resume(&template, &snapshot.dir)?);
            std::fs::remove_dir_all(&snapshot.dir)?;
        }
        all.extend([pause, durable, hot, cold].map(|row| row.on(Axis::DirtyMib, mib)));
    }
    Ok(all)
}
