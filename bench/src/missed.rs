//! Why a goal is missed where it is, and what would close the gap: the report says so beside the figure.
//!
//! A reason here was measured or follows from a figure of the report; it goes when the goal is met.

/// A missed goal's explanation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Miss {
    /// Why it is missed.
    pub reason: &'static str,
    /// What would reach it.
    pub would_close: &'static str,
}

/// The explanation of a promise, by the beginning of its name.
#[must_use]
pub fn of(promise: &str) -> Option<Miss> {
    let found = MISSES.iter().find(|(name, _, _)| promise.starts_with(name));
    found.map(|(_, reason, would_close)| Miss { reason, would_close })
}

/// Promise, reason, what would close it.
const MISSES: &[(&str, &str, &str)] = &[
    (
        "boot to PID 1",
        "every guest-kernel instruction is emulated (the row of emulated instructions), one after the other",
        "fewer of them (kernels/README.md lists where they go), or hardware KVM, which runs them natively",
    ),
    (
        "guest: ",
        "the guest kernel's instructions are emulated: this row's own count of them, times about a microsecond",
        "fewer of them, or hardware KVM, which runs them natively",
    ),
    (
        "create, pool hit",
        "a vCPU thread is woken after the request is decoded, and the guest makes two exits on the way",
        "a vCPU thread that takes the request itself",
    ),
    (
        "create, pool miss",
        "memslots, interrupt controllers, vCPU and its state are made on the path, whose sizes only the template \
         tells; KVM's bookkeeping of a memslot grows with the guest's memory",
        "vCPUs and memslots of common sizes made before the request, over reserved address space",
    ),
    (
        "create over HTTP",
        "two cores are shared by the client, the daemon, the guest that takes its identity (20 ms emulated), the worker \
         that is made in its place (4 ms) and the one that ends (2 ms), and what these do in the kernel is not always \
         preempted: traces show a runnable daemon wait 2 to 3 ms for a vCPU in KVM's emulation or a kernel worker, and 4 ms when the host has taken both",
        "a third core, and a host that is not shared; fewer instructions to take an identity",
    ),
    (
        "live fork, pause",
        "the vCPU's stop and the capture of its state come before fork(2), which copies the page tables of all that \
         the worker has touched",
        "fewer calls to capture a vCPU, and page tables shared instead of copied",
    ),
    (
        "live fork, child",
        "the pause, and then KVM objects of its own: they are bound to the memory map that fork(2) made",
        "a kernel that lets a VM's objects follow a fork; a shorter pause",
    ),
    (
        "fork per further child",
        "each child makes its KVM objects itself, and two cores do that for all of them",
        "more cores; the kernel's own copy of a VM",
    ),
    (
        "snapshot of a running sandbox, pause",
        "as a live fork's pause: the capture of the vCPU and fork(2)",
        "as a live fork's pause",
    ),
    (
        "hibernate",
        "the pause of a live fork, and then five fsyncs follow one another",
        "fewer files: pages and state in one, synchronised once; a faster disk",
    ),
    (
        "resume, hot",
        "the KVM objects are made on the path, and every page that the guest touches is a fault",
        "vCPUs and memslots made before the request, and the recorded write set mapped ahead",
    ),
    (
        "resume, cold disk",
        "pages come from the disk one fault after the other",
        "the recorded working set read ahead at depth (io_uring), as HOST's figures say: 2.5 GB/s instead of 0.08",
    ),
    (
        "memory per idle clone",
        "about 1 MiB is the kernel's for an idle VM; the rest is what a clone writes when it takes its identity, and \
         its process",
        "fewer pages written on the way to the first command; a smaller worker",
    ),
    (
        "sustained create + destroy",
        "a sandbox counts when it has taken its identity, and that is 22,000 emulated guest-kernel instructions",
        "an identity taken with fewer of them, or hardware KVM; processes that wait in the pool take their start off \
         this core only if there is another",
    ),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_promise_hides_behind_anothers_explanation() {
        for (index, (name, _, _)) in MISSES.iter().enumerate() {
            let first = MISSES.iter().position(|(other, _, _)| name.starts_with(other));
            assert_eq!(first, Some(index), "{name}");
        }
        assert!(of("destroy").is_none());
    }
}
