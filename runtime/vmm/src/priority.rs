//! Which threads the host's scheduler prefers: a request must not wait for a guest that computes.

use crate::sys::process::{Scheduling, ThreadId, schedule};
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};
use std::io;
use std::time::Duration;

/// Nice value of whoever answers requests.
const NICE: i32 = -10;
/// Shorter than a guest's: a thread that wakes with a shorter slice than the running one's takes its place at once (Linux 6.12
/// and later, PREEMPT_SHORT). Longer than the work on a request, 0.3 ms: a thread that is at the end of its slice makes room
/// for a guest that is owed more, and is back at the scheduler's next tick, up to 4 ms later.
const SLICE_NS: u64 = 1_000_000;
/// Longer than the slice of everybody else, which Linux 6.18 makes 0.7 to 2.8 ms by the number of processors.
const GUEST_SLICE_NS: u64 = 3_000_000;

const EQUAL: Scheduling = Scheduling { idle: false, nice: 0, slice_ns: 0 };
const FIRST: Scheduling = Scheduling { nice: NICE, slice_ns: SLICE_NS, ..EQUAL };
const GUEST: Scheduling = Scheduling { slice_ns: GUEST_SLICE_NS, ..EQUAL };

/// This thread, and those that it makes from now on, come before guests. Without the right to a nice value below 0 they
/// have the short slice alone.
///
/// # Errors
/// If the kernel refuses both.
pub fn first() -> io::Result<()> {
    match schedule(ThreadId::MINE, FIRST) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            schedule(ThreadId::MINE, Scheduling { nice: 0, ..FIRST })
        }
        result => result,
    }
}

/// This thread, and those that it makes from now on, are as everybody else.
///
/// # Errors
/// If the kernel refuses, as it may for a process that was made nicer than others.
pub fn equal() -> io::Result<()> {
    schedule(ThreadId::MINE, EQUAL)
}

/// This thread, and those that it makes from now on, run a guest: they have their share of a processor, and whoever wakes beside
/// them and has had less than its own comes before them.
///
/// # Errors
/// If the kernel refuses, as it may for a process that was made nicer than others.
pub fn guest() -> io::Result<()> {
    schedule(ThreadId::MINE, GUEST)
}

/// This thread runs a guest that has come first and that nobody waits for now: everybody else on this host comes before it
/// (SCHED_IDLE), until [`come_forward`]. An ordinary thread that wakes beside it would wait for the scheduler's next tick, up
/// to 4 ms, if it has had more than its share lately, which a client that has just sent a request may well have.
///
/// # Errors
/// If it could not come forward again: that takes the right to a nice value below 0. Then nothing is changed.
pub(crate) fn stand_back() -> io::Result<ThreadId> {
    schedule(ThreadId::MINE, FIRST)?;
    schedule(ThreadId::MINE, Scheduling { idle: true, ..EQUAL })?;
    Ok(ThreadId::current())
}

/// A thread that has stood back runs a guest as others do. It must not have ended.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn come_forward(thread: ThreadId) -> io::Result<()> {
    schedule(thread, GUEST)
}

/// The threads of a process that wait for a processor wait for the caller's. A thread that wakes while all processors are
/// busy is queued behind one of them; if that is in the host's kernel and does not let go of it (kernels that do not preempt
/// themselves: until it is done), another one that has become idle takes the thread over at the scheduler's next tick, up to
/// 4 ms later. For who waits for the process and is about to leave its processor to it. Threads that run come here too.
///
/// # Errors
/// If the process has ended, or is another user's.
pub fn bring(pid: u32) -> io::Result<()> {
    let here = sched_getcpu();
    for thread in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let name = thread?.file_name();
        let thread = name.to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw);
        match thread.map_or(Ok(()), |thread| bring_thread(thread, here)) {
            // It has ended meanwhile.
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn bring_thread(thread: Pid, here: usize) -> rustix::io::Result<()> {
    let before = sched_getaffinity(Some(thread))?;
    if before.is_set(here) {
        let mut only = CpuSet::new();
        only.set(here);
        sched_setaffinity(Some(thread), &only)?;
        sched_setaffinity(Some(thread), &before)?;
    }
    Ok(())
}

/// How long a guest whose creator is about to be told stands still: that takes 0.1 to 0.2 ms.
const LETS_IN: Duration = Duration::from_micros(300);

/// Who waits for this thread's processor is let in now, and who is woken by them: the scheduler would look at what has changed
/// at its next tick; sched_yield(2) lets in nobody who has just had its share, which whoever woke this thread has; and whoever
/// stands back is owed the more for it: what it was owed before is multiplied as its weight shrinks.
pub(crate) fn let_in() {
    std::thread::sleep(LETS_IN);
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::process::scheduling;
    use std::process::{Child, Command};

    /// A process that computes until it is dropped.
    struct Busy(Child);

    impl Busy {
        fn start() -> Self {
            Self(Command::new("sh").args(["-c", "while :; do :; done"]).spawn().unwrap())
        }

        /// Where it runs or waits (proc_pid_stat(5), `processor`).
        fn processor(&self) -> usize {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(36).unwrap().parse().unwrap()
        }
    }

    impl Drop for Busy {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_process_that_runs_elsewhere_is_brought_here() {
        let all = sched_getaffinity(None).unwrap();
        let mut two = (0..CpuSet::MAX_CPU).filter(|cpu| all.is_set(*cpu));
        let (Some(mine), Some(theirs)) = (two.next(), two.next()) else { return };
        let only = |cpu| {
            let mut only = CpuSet::new();
            only.set(cpu);
            only
        };
        let busy = Busy::start();
        let pid = Pid::from_child(&busy.0);
        sched_setaffinity(None, &only(mine)).unwrap();
        // It may be taken back at once.
        let came = (0..100).any(|_| {
            sched_setaffinity(Some(pid), &only(theirs)).unwrap();
            sched_setaffinity(Some(pid), &all).unwrap();
            bring(busy.0.id()).unwrap();
            busy.processor() == mine
        });
        sched_setaffinity(None, &all).unwrap();
        assert!(came);
        assert_eq!(sched_getaffinity(Some(pid)).unwrap(), all, "and may go where it could before");
        assert!(bring(u32::MAX).is_err());
    }

    #[test]
    fn a_thread_comes_first_stands_back_and_comes_forward() {
        let before = scheduling().unwrap();
        let (first, back, guest, equal) = std::thread::spawn(|| {
            first().unwrap();
            let first = scheduling().unwrap();
            let back = stand_back().map(|me| (me, scheduling().unwrap()));
            match &back {
                Ok((me, _)) => come_forward(*me).unwrap(),
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
                    assert_eq!(scheduling().unwrap(), first);
                    guest().unwrap();
                }
            }
            let guest = scheduling().unwrap();
            equal().unwrap();
            (first, back.ok(), guest, scheduling().unwrap())
        })
        .join()
        .unwrap();
        // Kernels before 6.12 know no slices and say 0.
        let slices = if before.slice_ns == 0 { [0; 2] } else { [SLICE_NS, GUEST_SLICE_NS] };
        assert_eq!([first.slice_ns, guest.slice_ns], slices, "{first:?} {guest:?}");
        assert!(
            slices[1] == 0 || before.slice_ns < guest.slice_ns,
            "{before:?}: guests are like everybody else"
        );
        assert!(first.nice <= 0, "{first:?}");
        assert_eq!(back.is_some(), first.nice < 0, "who may come first may stand back");
        assert!(back.is_none_or(|(_, back)| back.idle), "{back:?}");
        assert_eq!(guest, Scheduling { slice_ns: guest.slice_ns, ..EQUAL });
        assert_eq!(equal, Scheduling { nice: 0, ..before });
        assert_eq!(scheduling().unwrap(), before, "another thread's");
    }
}
