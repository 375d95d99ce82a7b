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
        "guest: ",
        "KVM emulates the guest kernel's instructions there: this row's own count of them, times about a microsecond",
        "the variant as shipped, in which the VMM runs them; or hardware KVM, which runs them natively",
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
        "about 1 MiB is the kernel's for an idle VM; the rest is what a clone writes when it takes its identity, and its \
         process",
        "fewer pages written on the way to the first command; a smaller worker",
    ),
    (
        "sustained create + destroy",
        "a worker is made and ended for each: as many a second are built and destroyed without being let go (the next row)",
        "workers that are used again; KVM objects that cost less to make and to end",
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
