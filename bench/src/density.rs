//! The suites `density` (memory of idle clones) and `sustained` (clones made and ended, one after the other).

use crate::clone::{Failure, Template, go, row};
use crate::record::{Axis, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine_vmm::worker::{Going, monotonic_ns};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use std::path::Path;
use std::time::Duration;

/// Idle clones are looked at when they have been so for this long.
const REST: Duration = Duration::from_secs(2);

/// `density`: memory of so many clones that have been adopted and idle, everything included.
///
/// # Errors
/// The first clone that failed.
pub fn density(artefacts: &Artefacts, counts: &[u32]) -> Result<Vec<Recorder>, Failure> {
    let template = Template::prepare(artefacts, 256)?;
    // One before, so that what all share is there already.
    let first = go(template.park()?)?;
    let mut all = Vec::new();
    for &count in counts {
        eprintln!("density, {count} clones");
        let used = each_kib(&template, count)?;
        let mut each = row(
            "memory per idle clone",
            "(MemAvailable before - after) / N, N adopted clones of a 256 MiB template idle",
            Some((2.0, 2.0)),
            &format!("N = {count}, MiB"),
            Unit::Mebibytes,
        )
        .on(Axis::Clones, count.into());
        each.count(used);
        all.push(each);
    }
    all.push(idle(&first)?);
    Ok(all)
}

/// What an idle clone's kernel does all the same.
fn idle(clone: &Going) -> Result<Recorder, Failure> {
    let mut emulated = row(
        "idle clone, emulated",
        "guest instructions that are emulated for an idle clone, in ten seconds",
        None,
        "256 MiB",
        Unit::Thousands,
    );
    let count = || clone.worker.stats().map(|stats| stats.emulated_instructions);
    for _ in 0..3 {
        let before = count()?;
        std::thread::sleep(Duration::from_secs(10));
        if let (Some(before), Some(after)) = (before, count()?) {
            emulated.count(after - before);
        }
    }
    Ok(emulated)
}

/// What each of `count` idle clones takes of the host's memory, in KiB. They end; one must be there before, so
/// that what all share is not theirs.
///
/// # Errors
/// The first clone that failed.
pub fn each_kib(template: &Template, count: u32) -> Result<u64, Failure> {
    let before = available_kib()?;
    let mut clones: Vec<Going> = Vec::new();
    for _ in 0..count {
        clones.push(go(template.park()?)?);
    }
    std::thread::sleep(REST);
    let used = before.saturating_sub(available_kib()?);
    drop(clones);
    // What they held is given back by their ends.
    std::thread::sleep(REST);
    Ok(used / u64::from(count))
}

fn available_kib() -> Result<u64, Failure> {
    let text = std::fs::read_to_string(Path::new("/proc/meminfo"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:")).ok_or("no MemAvailable")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// `sustained`: on one core, how many sandboxes a second can be made and ended, one after the other.
///
/// # Errors
/// The first clone that failed.
pub fn sustained(artefacts: &Artefacts, seconds: u32) -> Result<Vec<Recorder>, Failure> {
    let template = Template::prepare(artefacts, 128)?;
    let _pinned = OneCore::pin()?;
    let per_second = |name: &str, definition: &str, goal| {
        row(name, definition, goal, "one core, 128 MiB", Unit::PerSecond)
    };
    let mut served = per_second(
        "sustained create + destroy",
        "worker spawned, restored, let go, adopted, ended and reaped; one after the other, everything on one core",
        Some((1000.0, 1000.0)),
    );
    let mut refilled = per_second(
        "sustained build + destroy",
        "the same without being let go: what a pool's refill costs",
        None,
    );
    for _ in 0..seconds {
        served.rate(in_a_second(|| go(template.park()?).map(drop))?);
        refilled.rate(in_a_second(|| template.park().map(drop))?);
    }
    Ok(vec![served, refilled])
}

/// How often `work` is done in a second.
fn in_a_second(mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    let (begun, mut count) = (monotonic_ns(), 0.0);
    loop {
        work()?;
        count += 1.0;
        let ns = monotonic_ns() - begun;
        if ns >= 1_000_000_000 {
            return Ok(count * 1e9 / ns as f64);
        }
    }
}

/// This thread, and the processes that it starts, on one core until it is dropped.
struct OneCore {
    before: CpuSet,
}

impl OneCore {
    fn pin() -> Result<Self, Failure> {
        let before = sched_getaffinity(None)?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)).ok_or("no CPU")?;
        let mut one = CpuSet::new();
        one.set(first);
        sched_setaffinity(None, &one)?;
        Ok(Self { before })
    }
}

impl Drop for OneCore {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.before);
    }
}
