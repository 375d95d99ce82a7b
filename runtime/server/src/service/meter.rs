//! What a sandbox uses: time on the monotonic clock, CPU time and memory of its microVM's process.
//!
//! Each second counts once: time while it runs, not while it sleeps; a clock that is set does not matter.

use crate::registry::RunningRow;
use peregrine_vmm::worker::monotonic_ns;
use std::time::{Duration, Instant};

/// What it has used so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// How long it has run.
    pub ran: Duration,
    /// CPU time of its processes.
    pub cpu: Duration,
    /// Most memory one of them had resident.
    pub mem_peak_bytes: u64,
}

/// The meter of one sandbox.
#[derive(Debug)]
pub(super) struct Meter {
    /// Of workers that have gone.
    before: Usage,
    /// Since when the present one runs, and its process.
    running: Option<(Instant, u32)>,
}

impl Meter {
    /// One that has counted `before` already; it stands still.
    #[must_use]
    pub(super) fn new(before: Usage) -> Self {
        Self { before, running: None }
    }

    /// A worker runs from now on.
    pub(super) fn start(&mut self, pid: u32) {
        self.running = Some((Instant::now(), pid));
    }

    /// What the next daemon needs to go on counting while the worker runs.
    pub(super) fn running(&self) -> Option<RunningRow> {
        let (since, _) = self.running?;
        let now_ns = u128::from(monotonic_ns());
        Some(RunningRow {
            since_ns: narrow(now_ns.saturating_sub(since.elapsed().as_nanos())),
            ran_ms: narrow(self.before.ran.as_millis()),
            cpu_ms: narrow(self.before.cpu.as_millis()),
            mem_peak_bytes: self.before.mem_peak_bytes,
        })
    }

    /// The meter of a sandbox that an earlier daemon left running in the process `pid`: the time between the
    /// daemons counts, and what the earlier one had counted does so once.
    #[must_use]
    pub(super) fn taken_over(row: &RunningRow, pid: u32) -> Self {
        let before = Usage {
            ran: Duration::from_millis(row.ran_ms),
            cpu: Duration::from_millis(row.cpu_ms),
            mem_peak_bytes: row.mem_peak_bytes,
        };
        Self { before, running: Some((instant_of(row.since_ns), pid)) }
    }

    /// What it has used up to now.
    #[must_use]
    pub(super) fn read(&self) -> Usage {
        let Some((since, pid)) = self.running else { return self.before };
        let (cpu, mem_peak_bytes) = of_process(pid).unwrap_or_default();
        Usage {
            ran: self.before.ran + since.elapsed(),
            cpu: self.before.cpu + cpu,
            mem_peak_bytes: self.before.mem_peak_bytes.max(mem_peak_bytes),
        }
    }

    /// The worker is about to go: after this nothing is counted.
    pub(super) fn stop(&mut self) -> Usage {
        self.before = self.read();
        self.running = None;
        self.before
    }
}

/// A time on CLOCK_MONOTONIC that another daemon took: the clock is the host's since its start, as its workers are.
pub(super) fn instant_of(ns: u64) -> Instant {
    let now = Instant::now();
    let ago = Duration::from_nanos(monotonic_ns().saturating_sub(ns));
    now.checked_sub(ago).unwrap_or(now)
}

fn narrow(wide: u128) -> u64 {
    u64::try_from(wide).unwrap_or(u64::MAX)
}

/// CPU time, and peak resident memory without the template's shared pages where the kernel tells them apart.
fn of_process(pid: u32) -> Option<(Duration, u64)> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything; utime and stime are fields 14 and 15 (proc_pid_stat(5)).
    let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
    let ticks = fields.get(11)?.parse::<u64>().ok()? + fields.get(12)?.parse::<u64>().ok()?;
    let cpu = Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second());
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let kib = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = kib.trim().trim_end_matches(" kB").parse().ok()?;
    Some((cpu, kib * 1024))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_a_stopped_meter_has_counted_stays_and_a_new_worker_adds_to_it() {
        let before = Usage { ran: Duration::from_secs(5), cpu: Duration::from_secs(2), mem_peak_bytes: 1 };
        let mut meter = Meter::new(before);
        assert_eq!(meter.read(), before);
        meter.start(std::process::id());
        let running = meter.read();
        assert!(running.ran >= before.ran && running.cpu >= before.cpu && running.mem_peak_bytes > 1);
        let stopped = meter.stop();
        assert!(stopped.ran >= running.ran);
        assert_eq!((meter.read(), meter.stop()), (stopped, stopped));
        // The next daemon's goes on with the same second.
        meter.start(std::process::id());
        std::thread::sleep(Duration::from_millis(20));
        let row = meter.running().unwrap();
        let next = Meter::taken_over(&row, std::process::id());
        let (mine, theirs) = (meter.read(), next.read());
        assert!(theirs.ran >= mine.ran.saturating_sub(Duration::from_millis(1)) && theirs.cpu >= before.cpu);
        assert!(theirs.ran < mine.ran + Duration::from_secs(10), "{theirs:?} {mine:?}");
        // A process that is gone costs nothing more.
        meter.start(u32::MAX);
        assert!(meter.read().cpu == stopped.cpu);
    }
}
