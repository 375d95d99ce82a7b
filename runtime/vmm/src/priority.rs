//! Which threads the host's scheduler prefers: a request must not wait for a guest that computes.

use crate::sys::process::{Scheduling, schedule};
use std::io;
use std::time::Duration;

/// Nice value of whoever answers requests.
const NICE: i32 = -10;
/// The least that Linux takes. A thread that wakes with a shorter slice than the running one's takes its place at once
/// (Linux 6.12 and later, PREEMPT_SHORT); without it, it waits for the end of that slice, 3 ms and more.
const SLICE_NS: u64 = 100_000;
/// Longer than the slice of everybody else, which Linux 6.18 makes 0.7 to 2.8 ms by the number of processors.
const GUEST_SLICE_NS: u64 = 3_000_000;

/// This thread, and those that it makes from now on, come before guests. Without the right to a nice value below 0 they
/// have the short slice alone.
///
/// # Errors
/// If the kernel refuses both.
pub fn first() -> io::Result<()> {
    match schedule(Scheduling { nice: NICE, slice_ns: SLICE_NS }) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            schedule(Scheduling { nice: 0, slice_ns: SLICE_NS })
        }
        result => result,
    }
}

/// This thread, and those that it makes from now on, are as everybody else.
///
/// # Errors
/// If the kernel refuses, as it may for a process that was made nicer than others.
pub fn equal() -> io::Result<()> {
    schedule(Scheduling { nice: 0, slice_ns: 0 })
}

/// This thread, and those that it makes from now on, run a guest: they have their share of a processor, and whoever wakes beside
/// them and has had less than its own comes before them.
///
/// # Errors
/// If the kernel refuses, as it may for a process that was made nicer than others.
pub fn guest() -> io::Result<()> {
    schedule(Scheduling { nice: 0, slice_ns: GUEST_SLICE_NS })
}

/// This thread runs a guest that has come first and does not any more: who waits for its processor is let in now. The
/// scheduler would look at what has changed at its next tick, which is up to 4 ms later; and sched_yield(2) lets in nobody who
/// has just had its share, which whoever woke this thread has.
///
/// # Errors
/// As [`guest`].
pub fn give_way() -> io::Result<()> {
    guest()?;
    // The kernel's timers make some 50 us of it.
    std::thread::sleep(Duration::from_nanos(1));
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::sys::process::scheduling;

    #[test]
    fn a_thread_comes_first_and_goes_back() {
        let before = scheduling().unwrap();
        let (first, guest, back) = std::thread::spawn(|| {
            first().unwrap();
            let first = scheduling().unwrap();
            give_way().unwrap();
            let guest = scheduling().unwrap();
            equal().unwrap();
            (first, guest, scheduling().unwrap())
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
        assert_eq!(back, Scheduling { nice: 0, ..before });
        assert_eq!(scheduling().unwrap(), before, "another thread's");
    }
}
