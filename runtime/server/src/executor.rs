//! The one place that knows which runtime the daemon runs on: tokio-uring, one thread, sockets on its tokio
//! half. What blocks (workers' control sockets, files of the host) goes to a small pool of threads.

use peregrine_vmm::priority;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use std::future::Future;
use std::io;
use std::time::Duration;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinHandle;

/// Ring entries for file work; a submission waits for a free one.
const RING_ENTRIES: u32 = 64;

/// Runs `main` to its end on this thread.
///
/// # Errors
/// If the kernel refuses the ring or the runtime.
pub fn run<F: Future>(main: F) -> io::Result<F::Output> {
    let mut uring = tokio_uring::uring_builder();
    uring.setup_cqsize(RING_ENTRIES * 4);
    let mut builder = tokio_uring::builder();
    builder.entries(RING_ENTRIES).uring_builder(&uring);
    Ok(tokio_uring::Runtime::new(&builder)?.block_on(main))
}

/// Starts a task beside the present one, on the same thread.
pub fn spawn<F: Future + 'static>(task: F) -> JoinHandle<F::Output>
where
    F::Output: 'static,
{
    tokio::task::spawn_local(task)
}

/// Does `work` where it may block.
///
/// # Panics
/// If `work` does.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Waits this long, to the microsecond: the runtime's own timers have milliseconds.
///
/// # Errors
/// If there is no descriptor left for it.
pub async fn nap(time: Duration) -> io::Result<()> {
    let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
    let once = Timespec::default();
    // None at all would be for ever (timerfd_create(2)).
    let it_value = Timespec::try_from(time.max(Duration::from_nanos(1))).map_err(io::Error::other)?;
    timerfd_settime(&timer, TimerfdTimerFlags::empty(), &Itimerspec { it_interval: once, it_value })?;
    // Unsound for a value that gives another descriptor each time; an owned one is always the same, and open.
    #[allow(deprecated)]
    let timer = AsyncFd::with_interest(timer, Interest::READABLE)?;
    timer.readable().await.map(drop)
}

/// Gives this thread, and those that it makes, priority over guests.
pub fn come_first() {
    if let Err(error) = priority::first() {
        tracing::info!(%error, "requests have no priority over guests");
    }
}

/// As [`blocking`], for what nobody's request waits for: requests come first.
///
/// # Panics
/// If `work` does.
pub async fn in_the_background<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    blocking(move || {
        let _ = priority::equal();
        let value = work();
        let _ = priority::first();
        value
    })
    .await
}

/// As [`blocking`], and nobody waits.
pub fn blocking_detached(work: impl FnOnce() + Send + 'static) {
    drop(tokio::task::spawn_blocking(work));
}
