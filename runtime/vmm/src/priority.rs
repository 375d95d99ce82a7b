//! Which threads the host's scheduler prefers: a request must not wait for a guest that computes.

use crate::sys::process::{Scheduling, ThreadId, schedule};
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

/// Who waits for this thread's processor is let in now: the scheduler would look at what has changed at its next tick; and
/// sched_yield(2) lets in nobody who has just had its share, which whoever woke this thread has.
pub(crate) fn let_in() {
    // The kernel's timers make some 50 us of it.
    std::thread::sleep(Duration::from_nanos(1));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::process::scheduling;

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
