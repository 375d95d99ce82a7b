//! The suites of what templates are for: `create` (pool hit and miss), `destroy`, `exec`, `fork`,
//! `hibernate` and `resume`, and `density`.
//!
//! Each sandbox is a worker process of its own, as in production; this binary is the worker too
//! ([`become_worker_if_asked`]).

use crate::boot::{TIMEOUT, config};
use crate::record::{Promise, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine::template;
use peregrine_image::Lines;
use peregrine_vmm::DiskConfig;
use peregrine_vmm::agent::{Agent, Command, Identity};
use peregrine_vmm::worker::{Going, Parked, Worker, monotonic_ns, serve};
use std::error::Error;
use std::ffi::OsStr;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

const WORKER: &str = "worker";
/// How long a clone of the pool-hit row has been parked: long enough to have come to its mailbox.
const PARKED: Duration = Duration::from_millis(5);

type Failure = Box<dyn Error>;

/// The first thing in `main`: with the argument `worker` this process is one, and does not return.
pub fn become_worker_if_asked() {
    if std::env::args_os().nth(1).as_deref() == Some(OsStr::new(WORKER))
        && let Ok(control) = std::io::stdin().as_fd().try_clone_to_owned()
    {
        serve(control)
    }
}

/// A template and what its clones need.
#[derive(Debug)]
pub struct Template {
    dir: PathBuf,
    disks: Vec<DiskConfig>,
    program: PathBuf,
}

impl Template {
    /// Finds or makes the template of the default image with one vCPU.
    ///
    /// # Errors
    /// Why there is none.
    pub fn prepare(artefacts: &Artefacts, mem_mib: u64) -> Result<Self, Failure> {
        let config = config(artefacts, mem_mib);
        let stored = template::prepare(&artefacts.store, &config, &mut Lines::new(std::io::stderr()))?;
        Ok(Self { dir: stored.dir, disks: config.disks, program: std::env::current_exe()? })
    }

    fn worker(&self) -> Result<Worker, Failure> {
        Ok(Worker::spawn(&self.program, &[OsStr::new(WORKER)])?)
    }

    /// A clone that stands still.
    ///
    /// # Errors
    /// What the worker said.
    pub fn park(&self) -> Result<Parked, Failure> {
        Ok(self.worker()?.prepare(&self.dir, &self.disks)?)
    }
}

/// Lets a clone go.
///
/// # Errors
/// What the worker or the guest said.
pub fn go(parked: Parked) -> Result<Going, Failure> {
    Ok(parked.go(&Identity::fresh()?, TIMEOUT)?)
}

fn between(from_ns: u64, to_ns: u64) -> Result<Duration, Failure> {
    // A guest that made no exit within a second has no figure; that is an error, not a sample left out.
    to_ns.checked_sub(from_ns).map(Duration::from_nanos).ok_or_else(|| "the guest made no VM exit".into())
}

fn run(agent: &mut Agent, argv: &[&str]) -> Result<(), Failure> {
    agent.set_timeout(Some(TIMEOUT))?;
    let output = agent.output(&Command::new(argv), b"")?;
    if output.code() == 0 { Ok(()) } else { Err(format!("{argv:?} exited with {}", output.code()).into()) }
}

fn row(name: &str, definition: &str, goals: Option<(f64, f64)>, variant: &str, unit: Unit) -> Recorder {
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
            "request decoded by a worker parked for 5 ms -> the restored guest has read its new identity and says so (VM exit)",
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
            "guest instructions that KVM emulated for it",
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
        all.extend([hit, miss, adopted, emulated, gone]);
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
        "guest instructions that KVM emulated for it",
        None,
        variant,
        Unit::Thousands,
    );
    for _ in 0..samples {
        let parked = template.park()?;
        let begun = monotonic_ns();
        let mut going = go(parked)?;
        run(&mut going.agent, &["/bin/true"])?;
        time.duration(between(begun, monotonic_ns())?);
        if let Some(count) = going.worker.stats()?.emulated_instructions {
            emulated.count(count);
        }
    }
    Ok(vec![time, emulated])
}

/// `fork`: of a running guest that has written so many MiB since its template, into one child and into eight.
///
/// # Errors
/// The first fork that failed.
pub fn fork(artefacts: &Artefacts, samples: u32, dirty_mib: &[u64]) -> Result<Vec<Recorder>, Failure> {
    const MANY: usize = 8;
    let template = Template::prepare(artefacts, 256)?;
    let mut all = Vec::new();
    for &mib in dirty_mib {
        let mut parent = go(template.park()?)?;
        run(&mut parent.agent, &["/bin/sh", "-c", &format!("head -c {mib}M /dev/zero >/tmp/dirty")])?;
        let variant = format!("{mib} MiB dirty");
        let (pause_goal, child_goal) = ((0.5, 3.0), (1.0, 5.0));
        let goals = |goals| (mib <= 16).then_some(goals);
        let milli = Unit::Milliseconds;
        let mut pause = row(
            "live fork, pause",
            "request decoded, vCPU running -> vCPU told to go on",
            goals(pause_goal),
            &variant,
            milli,
        );
        let mut child = row(
            "live fork, child",
            "owner's call -> first VM exit made by the child",
            goals(child_goal),
            &variant,
            milli,
        );
        let mut further = row(
            "fork per further child",
            "(eight children ready - one child ready) / 7, owner's clock",
            goals((0.4, 2.0)),
            &variant,
            milli,
        );
        for n in 0..samples {
            if n % 100 == 0 {
                eprintln!("fork, {variant}: {n} of {samples}");
            }
            let begun = monotonic_ns();
            let mut fork = parent.worker.fork(&parent.agent, 1)?;
            let one = between(begun, monotonic_ns())?;
            pause.duration(between(fork.decoded_ns, fork.resumed_ns)?);
            let only = fork.children.pop().ok_or("no child")?;
            child.duration(between(begun, go(only)?.first_exit_ns)?);
            if n % 10 == 0 {
                let begun = monotonic_ns();
                let fork = parent.worker.fork(&parent.agent, MANY)?;
                let all_ready = between(begun, monotonic_ns())?;
                further.duration(all_ready.saturating_sub(one) / (MANY as u32 - 1));
                drop(fork);
            }
        }
        all.extend([pause, child, further]);
    }
    Ok(all)
}

/// `hibernate` and `resume`: of a running guest that has written so many MiB since its template.
///
/// # Errors
/// The first cycle that failed.
pub fn hibernate(artefacts: &Artefacts, samples: u32, dirty_mib: &[u64]) -> Result<Vec<Recorder>, Failure> {
    let template = Template::prepare(artefacts, 256)?;
    let home = artefacts.store.root().join(format!("bench-{}", std::process::id()));
    std::fs::create_dir(&home)?;
    let mut all = Vec::new();
    for &mib in dirty_mib {
        let mut going = go(template.park()?)?;
        run(&mut going.agent, &["/bin/sh", "-c", &format!("head -c {mib}M /dev/zero >/tmp/dirty")])?;
        let variant = format!("{mib} MiB dirty");
        let goals = |goals| (mib <= 16).then_some(goals);
        let milli = Unit::Milliseconds;
        let mut pause = row(
            "snapshot of a running sandbox, pause",
            "request decoded, vCPU running -> vCPU told to go on",
            goals((0.5, 3.0)),
            &variant,
            milli,
        );
        let mut durable = row(
            "hibernate",
            "owner's call -> snapshot durable on disk (fsync of files and directories)",
            goals((10.0, 30.0)),
            &variant,
            milli,
        );
        let mut resume = row(
            "resume, hot",
            "request decoded by an empty worker process, snapshot in the page cache -> first VM exit",
            goals((1.0, 4.0)),
            &variant,
            milli,
        );
        for n in 0..samples {
            let dir = home.join(format!("{mib}-{n}"));
            let begun = monotonic_ns();
            let saved = going.worker.snapshot(&going.agent, &dir)?;
            durable.duration(between(begun, monotonic_ns())?);
            pause.duration(between(saved.decoded_ns, saved.resumed_ns)?);
            let parked = template.worker()?.prepare(&dir, &template.disks)?;
            let begun = parked.decoded_ns();
            resume.duration(between(begun, go(parked)?.first_exit_ns)?);
            std::fs::remove_dir_all(&dir)?;
        }
        all.extend([pause, durable, resume]);
    }
    std::fs::remove_dir_all(&home)?;
    Ok(all)
}

/// `density`: memory of `count` clones that have been adopted and idle, everything included.
///
/// # Errors
/// The first clone that failed.
pub fn density(artefacts: &Artefacts, count: u32) -> Result<Vec<Recorder>, Failure> {
    let template = Template::prepare(artefacts, 256)?;
    // One before, so that what all share is there already.
    let first = go(template.park()?)?;
    let before = available_kib()?;
    let clones = (0..count).map(|_| go(template.park()?)).collect::<Result<Vec<_>, _>>()?;
    std::thread::sleep(Duration::from_secs(2));
    let used = before.saturating_sub(available_kib()?);
    drop(clones);
    drop(first);
    let mut each = row(
        "memory per idle clone",
        "(MemAvailable before - after) / N, N adopted clones of a 256 MiB template idle",
        Some((2.0, 2.0)),
        &format!("N = {count}, MiB"),
        Unit::Mebibytes,
    );
    each.count(used / u64::from(count));
    Ok(vec![each])
}

fn available_kib() -> Result<u64, Failure> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}
