//! Kicks: making a vCPU thread leave KVM_RUN. The signal stays blocked outside KVM_RUN and is open inside it
//! (KVM_SET_SIGNAL_MASK), so a kick sent at any moment ends the current or the next KVM_RUN: no race, no
//! poll.

use super::kvm;
use std::io;
use std::os::fd::AsRawFd;

fn signal() -> libc::c_int {
    // The first real-time signal glibc leaves to programs.
    libc::SIGRTMIN()
}

/// A vCPU thread that can be kicked.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kick {
    thread: libc::pthread_t,
}

impl Kick {
    /// Makes the thread's KVM_RUN return EINTR. The caller keeps the thread unjoined while it may kick.
    pub(crate) fn send(self) {
        // SAFETY: `thread` names a thread that its owner has not joined yet (the owner's promise above), and
        // the signal has a handler (installed by `prepare` before this value existed).
        unsafe { libc::pthread_kill(self.thread, signal()) };
    }
}

extern "C" fn ignore(_: libc::c_int) {}

/// Prepares the calling thread to run `vcpu`: all signals blocked, the kick open inside KVM_RUN.
pub(crate) fn prepare(vcpu: &impl AsRawFd) -> io::Result<Kick> {
    // SAFETY: plain libc calls on locals; the handler is async-signal-safe (it does nothing), and `mask` is
    // a fully initialised sigset_t after sigfillset.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = ignore as extern "C" fn(libc::c_int) as usize;
        if libc::sigaction(signal(), &raw const action, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
        let mut mask: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut mask);
        let error = libc::pthread_sigmask(libc::SIG_SETMASK, &raw const mask, std::ptr::null_mut());
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
    }
    let bit = 1_u64 << (signal() - 1);
    kvm::set_signal_mask(vcpu, !bit)?;
    // SAFETY: pthread_self has no preconditions.
    Ok(Kick { thread: unsafe { libc::pthread_self() } })
}

/// Takes a pending kick off the queue, so that the next KVM_RUN runs.
pub(crate) fn consume() {
    let _ = take();
}

/// The same; says whether there was one.
pub(crate) fn take() -> bool {
    let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `set` is initialised by sigemptyset; a null siginfo is allowed.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, signal());
        let mut taken = false;
        while libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) > 0 {
            taken = true;
        }
        taken
    }
}
