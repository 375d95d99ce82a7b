//! What a sandbox uses: time on the monotonic clock, CPU time and memory of its microVM's process.
//!
//! Each second counts once: time while it runs, not while it sleeps; a clock that is set does not matter.

use crate::registry::RunningRow;
use peregrine_vmm::worker::monotonic_ns;
use std::cell::Cell;
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
    running: Option<Running>,
    /// The process of the last worker, and the CPU time that was counted of it.
    last: Option<(u32, Duration)>,
}

/// The present worker.
#[derive(Debug)]
struct Running {
    since: Instant,
    pid: u32,
    /// CPU time and memory when its process was last looked at: what it has used stays used when it is gone.
    seen: Cell<(Duration, u64)>,
    /// CPU time of it that is counted already: its end had been announced and did not come.
    counted: Duration,
}

impl Meter {
    /// One that has counted `before` already; it stands still.
    #[must_use]
    pub(super) fn new(before: Usage) -> Self {
        Self { before, running: None, last: None }
    }

    /// A worker runs from now on.
    pub(super) fn start(&mut self, pid: u32) {
        self.start_at(Instant::now(), pid);
    }

    fn start_at(&mut self, now: Instant, pid: u32) {
        // Of one that ran until now nothing is lost.
        self.stop_at(now);
        let counted =
            self.last.filter(|(last, _)| *last == pid).map(|(_, counted)| counted).unwrap_or_default();
        self.running = Some(Running { since: now, pid, seen: Cell::default(), counted });
    }

    /// What the next daemon needs to go on counting while the worker runs.
    pub(super) fn running(&self) -> Option<RunningRow> {
        let Running { since, counted, .. } = self.running.as_ref()?;
        let now_ns = u128::from(monotonic_ns());
        Some(RunningRow {
            since_ns: narrow(now_ns.saturating_sub(since.elapsed().as_nanos())),
            ran_ms: narrow(self.before.ran.as_millis()),
            cpu_ms: narrow(self.before.cpu.saturating_sub(*counted).as_millis()),
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
        let since = instant_of(row.since_ns);
        let running = Running { since, pid, seen: Cell::default(), counted: Duration::ZERO };
        Self { running: Some(running), ..Self::new(before) }
    }

    /// What it has used up to now.
    #[must_use]
    pub(super) fn read(&self) -> Usage {
        self.read_at(Instant::now())
    }

    fn read_at(&self, now: Instant) -> Usage {
        let Some(Running { since, pid, seen, counted }) = &self.running else { return self.before };
        if let Some((cpu, mem_peak_bytes)) = of_process(*pid) {
            // A number that went to another process must not take anything back.
            seen.set((cpu.max(seen.get().0), mem_peak_bytes.max(seen.get().1)));
        }
        let (cpu, mem_peak_bytes) = seen.get();
        Usage {
            ran: self.before.ran + now.saturating_duration_since(*since),
            cpu: self.before.cpu + cpu.saturating_sub(*counted),
            mem_peak_bytes: self.before.mem_peak_bytes.max(mem_peak_bytes),
        }
    }

    /// The worker is about to go: after this nothing is counted.
    pub(super) fn stop(&mut self) -> Usage {
        self.stop_at(Instant::now())
    }

    fn stop_at(&mut self, now: Instant) -> Usage {
        self.before = self.read_at(now);
        self.last = self.running.take().map(|running| (running.pid, running.seen.get().0)).or(self.last);
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
    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::select;

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
        let gone = meter.stop();
        meter.start(u32::MAX);
        assert_eq!(meter.read().cpu, gone.cpu);
    }

    #[test]
    fn what_a_worker_had_used_when_it_was_last_looked_at_is_not_lost_with_it() {
        let mut child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let mut meter = Meter::new(Usage::default());
        meter.start(child.id());
        let seen = meter.read();
        assert!(seen.mem_peak_bytes > 0);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(meter.read().mem_peak_bytes, seen.mem_peak_bytes);
        assert_eq!(meter.stop().mem_peak_bytes, seen.mem_peak_bytes);
    }

    #[test]
    fn a_worker_whose_end_was_announced_and_did_not_come_is_not_counted_twice() {
        let cpu = || of_process(std::process::id()).unwrap().0;
        while cpu() < Duration::from_millis(50) {}
        let mut meter = Meter::new(Usage::default());
        meter.start(std::process::id());
        let stopped = meter.stop();
        assert!(stopped.cpu >= Duration::from_millis(50));
        meter.start(std::process::id());
        let again = meter.read();
        assert!(again.cpu <= cpu(), "{again:?}");
        // Nor by the next daemon, to which its process has used all that it ever did.
        let next = Meter::taken_over(&meter.running().unwrap(), std::process::id()).read();
        assert!(next.cpu >= stopped.cpu && next.cpu <= cpu(), "{next:?}");
    }

    /// What may come to a meter, each after so many milliseconds.
    #[derive(Debug, Clone, Copy)]
    enum Step {
        Start,
        Stop,
        Read,
        Note,
        /// The daemon is killed: the next one has the row as it was noted last.
        Crash,
    }

    proptest! {
        #[test]
        fn each_millisecond_is_counted_once_whatever_comes(
            steps in vec((0u64..100_000, select(vec![Step::Start, Step::Stop, Step::Read, Step::Note, Step::Crash])), 0..40)
        ) {
            let (mut meter, mut now) = (Meter::new(Usage::default()), Instant::now());
            let (mut ran, mut running, mut noted) = (Duration::ZERO, false, Duration::ZERO);
            for (later_ms, step) in steps {
                let later = Duration::from_millis(later_ms);
                now += later;
                ran += if running { later } else { Duration::ZERO };
                match step {
                    Step::Start => { meter.start_at(now, u32::MAX); running = true; }
                    Step::Stop => { meter.stop_at(now); running = false; }
                    Step::Read => {}
                    Step::Note => noted = meter.read_at(now).ran,
                    Step::Crash => {
                        meter = Meter::new(Usage { ran: noted, ..Usage::default() });
                        // In the customer's favour.
                        prop_assert!(noted <= ran);
                        (ran, running) = (noted, false);
                    }
                }
                prop_assert_eq!(meter.read_at(now).ran, ran);
                // A clock that stands still, or is looked at late, takes nothing back.
                let earlier = meter.read_at(now - later.min(Duration::from_millis(1))).ran;
                prop_assert!(earlier <= ran);
            }
        }
    }
}
