//! Clones of a template: what every suite of sandboxes stands on, and the suites `create` (pool hit and miss),
//! `destroy` and `exec`.
//!
//! Each sandbox is a worker process of its own, forked from a zygote that has learned the template, as in production; this
//! binary is the zygote too ([`become_worker_if_asked`]).

use crate::boot::{TIMEOUT, config};
use crate::record::{Axis, Promise, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine::template;
use peregrine_image::Lines;
use peregrine_vmm::DiskConfig;
use peregrine_vmm::agent::{Agent, Command, Identity};
use peregrine_vmm::worker::{Going, Parked, Worker, Zygote, monotonic_ns, serve_zygote};
use std::error::Error;
use std::ffi::OsStr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const ZYGOTE: &str = "zygote";
/// How long a clone of the pool-hit row has been parked: long enough to have come to its mailbox.
const PARKED: Duration = Duration::from_millis(100);

/// Why a suite ended early.
pub type Failure = Box<dyn Error>;

/// The first thing in `main`: with the argument `zygote` this process is one, and does not return.
pub fn become_worker_if_asked() {
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new(ZYGOTE))
        && let Ok(control) = std::io::stdin().as_fd().try_clone_to_owned()
    {
        serve_zygote(control)
    }
}

/// A template and what its clones need.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    disks: Vec<DiskConfig>,
    zygote: Zygote,
}

impl Template {
    /// Finds or makes the template of the default image with one vCPU.
    ///
    /// # Errors
    /// Why there is none.
    pub fn prepare(artefacts: &Artefacts, mem_mib: u64) -> Result<Self, Failure> {
        let config = config(artefacts, mem_mib);
        let stored = template::prepare(&artefacts.store, &config, &mut Lines::new(std::io::stderr()))?;
        let zygote = Zygote::new(std::env::current_exe()?, vec![ZYGOTE.into()]);
        zygote.learn(&stored.dir);
        // Its process is there before anything is measured.
        drop(zygote.worker()?);
        Ok(Self { dir: stored.dir, disks: config.disks, zygote })
    }

    /// An empty worker process.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn worker(&self) -> Result<Worker, Failure> {
        Ok(self.zygote.worker()?)
    }

    /// A clone that stands still.
    ///
    /// # Errors
    /// What the worker said.
    pub fn park(&self) -> Result<Parked, Failure> {
        self.restore(self.worker()?, &self.dir)
    }

    /// Has a worker restore the snapshot in `dir` of a clone of this template; it stands still.
    ///
    /// # Errors
    /// What the worker said.
    pub fn restore(&self, worker: Worker, dir: &Path) -> Result<Parked, Failure> {
        Ok(worker.prepare(dir, &self.disks)?)
    }

    /// A running clone that has written so many MiB since its template.
    ///
    /// # Errors
    /// What the worker or the guest said.
    pub fn dirty(&self, mib: u64) -> Result<Going, Failure> {
        let mut going = go(self.park()?)?;
        if mib > 0 {
            // One buffer, written once: a file on tmpfs would take a second for each MiB where ring 0 is emulated.
            run(&mut going.agent, &["dd", "if=/dev/zero", "of=/dev/null", "count=1", &format!("bs={mib}M")])?;
        }
        Ok(going)
    }
}

/// Lets a clone go.
///
/// # Errors
/// What the worker or the guest said.
pub fn go(parked: Parked) -> Result<Going, Failure> {
    Ok(parked.go(&Identity::fresh()?, TIMEOUT)?)
}

/// From one moment of CLOCK_MONOTONIC to another.
///
/// # Errors
/// If the second is not there: a guest that made no exit within a second has no figure, and that is no sample
/// left out.
pub fn between(from_ns: u64, to_ns: u64) -> Result<Duration, Failure> {
    to_ns.checked_sub(from_ns).map(Duration::from_nanos).ok_or_else(|| "the guest made no VM exit".into())
}

pub(crate) fn run(agent: &mut Agent, argv: &[&str]) -> Result<(), Failure> {
    agent.set_timeout(Some(TIMEOUT))?;
    let output = agent.output(&Command::new(argv), b"")?;
    if output.code() == 0 { Ok(()) } else { Err(format!("{argv:?} exited with {}", output.code()).into()) }
}

pub(crate) fn row(
    name: &str,
    definition: &str,
    goals: Option<(f64, f64)>,
    variant: &str,
    unit: Unit,
) -> Recorder {
    let promise = Promise {
        name: name.to_owned(),
        definition: definition.to_owned(),
        goal_p50: goals.map(|g| g.0),
        goal_p999: goals.map(|g| g.1),
    };
    Recorder::new(promise, variant, unit)
}

/// `create`: pool hit and pool miss, adoption, and the way to the first command's exit.
///
/// # Errors
/// The first clone that failed.
pub fn create(artefacts: &Artefacts, samples: u32, mem_mib: &[u64]) -> Result<Vec<Recorder>, Failure> {
    let mut all = Vec::new();
    for &mib in mem_mib {
        let template = Template::prepare(artefacts, mib)?;
        let variant = format!("{mib} MiB");
        let milli = Unit::Milliseconds;
        let mut hit = row(
            "create, pool hit",
            "request decoded by a worker parked for 100 ms -> the restored guest has read its new identity and says so (VM exit)",
            Some((0.15, 0.5)),
            &variant,
            milli,
        );
        let mut miss = row(
            "create, pool miss",
            "restore by an empty worker process (request decoded -> its owner knows) + the same as a pool hit, at once",
            Some((0.6, 3.0)),
            &variant,
            milli,
        );
        let mut adopted =
            row("create, adopted", "request sent -> the guest has taken its identity", None, &variant, milli);
        let mut emulated = row(
            "create, adopted, emulated",
            "guest instructions that were emulated for it",
            None,
            &variant,
            Unit::Thousands,
        );
        let mut gone =
            row("destroy", "owner drops a running sandbox -> its process is gone", None, &variant, milli);
        for n in 0..2 * samples {
            if n % 200 == 0 {
                eprintln!("create {mib} MiB: {} of {samples}", n / 2);
            }
            let pooled = n % 2 == 0;
            let worker = template.worker()?;
            let parked = worker.prepare(&template.dir, &template.disks)?;
            let prepared_ns = parked.decoded_ns();
            let ready_ns = monotonic_ns();
            if pooled {
                std::thread::sleep(PARKED);
            }
            let asked_ns = monotonic_ns();
            let going = go(parked)?;
            let first = between(going.decoded_ns, going.first_exit_ns)?;
            if pooled {
                adopted.duration(between(asked_ns, monotonic_ns())?);
                hit.duration(first);
            } else {
                // What a miss adds is the restore; the hand-over between its two requests is the owner's.
                miss.duration(between(prepared_ns, ready_ns)? + first);
            }
            if let Some(count) = going.worker.stats()?.emulated_instructions {
                emulated.count(count);
            }
            let before = monotonic_ns();
            drop(going);
            gone.duration(between(before, monotonic_ns())?);
        }
        let axis = |row: Recorder| row.on(Axis::MemoryMib, mib);
        all.extend([hit, miss, adopted, emulated, gone].map(axis));
    }
    Ok(all)
}

/// `exec`: from the request to the exit of `/bin/true` in a parked clone, and what it cost the guest.
///
/// # Errors
/// The first clone that failed.
pub fn exec(artefacts: &Artefacts, samples: u32) -> Result<Vec<Recorder>, Failure> {
    let template = Template::prepare(artefacts, 256)?;
    let variant = "256 MiB";
    let mut time = row(
        "create -> /bin/true",
        "request sent to a parked worker -> exit code of the first command",
        None,
        variant,
        Unit::Milliseconds,
    );
    let mut emulated = row(
        "create -> /bin/true, emulated",
        "guest instructions that were emulated for it",
        None,
        variant,
        Unit::Thousands,
    );
    for _ in 0..samples {
        let (took, count) = exec_once(&template)?;
        time.duration(took);
        if let Some(count) = count {
            emulated.count(count);
        }
    }
    Ok(vec![time, emulated])
}

/// Runs `/bin/true` in a parked clone: how long it took, and the guest instructions that were emulated, where it
/// counts them.
///
/// # Errors
/// What the worker or the guest said.
pub fn exec_once(template: &Template) -> Result<(Duration, Option<u64>), Failure> {
    let parked = template.park()?;
    let begun = monotonic_ns();
    let mut going = go(parked)?;
    run(&mut going.agent, &["/bin/true"])?;
    let took = between(begun, monotonic_ns())?;
    Ok((took, going.worker.stats()?.emulated_instructions))
}
