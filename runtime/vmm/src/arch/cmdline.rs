//! The kernel command line: one group of parameters per reason.

use super::layout::COMMAND_LINE_MAX;
use crate::VmmError;
use crate::doorbell;
use crate::host::KvmKind;

/// Parameters that hold on every host.
const ALWAYS: &[&str] = &[
    // The agent's disk is the root; PID 1 builds the sandbox's own root from the image's disk.
    "root=/dev/vda rootfstype=erofs ro init=/init",
    // No serial driver: the early console's port writes land in the VMM's ring, panics included.
    "earlyprintk=serial,0x3f8,115200,keep",
    // A dead guest must say so at once: panic -> reset through the keyboard controller port, which the VMM
    // sees.
    "panic=-1 reboot=k",
    // The VMM gives TSC and clock; probing and cross-checking them is work for nothing.
    "tsc=reliable",
    // KVM's APIC timer counts a 1 GHz bus (APIC_BUS_CYCLE_NS = 1): no calibration loop, no PIT.
    "lapic_timer_hz=1000000000",
    // The default grows with memory, and is filled from the random generator entry by entry.
    "thash_entries=1024",
    // No device has an address limit, so no bounce buffers above 4 GiB of memory.
    "swiotlb=noforce",
    // The VMM hands over fresh anonymous memory: zero already.
    "zeroed_ram",
];

/// Parameters for hosts whose KVM emulates guest ring 0.
const SOFTWARE_KVM: &[&str] = &[
    // `syscall` arrives there as a fault in ring 3 at the entry point; our first kernel patch routes it, a
    // later one by half of the instructions.
    "syscall_by_fault=short",
    // The TSC is the host's own there and cannot be offset: a restored guest's clock would make up for all
    // the time since its template was frozen, second by second. kvm-clock goes on where it stood.
    "clocksource=kvm-clock",
    // KVM wakes all waiters for a host page on each restore; templates are in the page cache, so nobody
    // waits.
    "no-kvmapf",
    // A tick, and what it wakes, is 5 ms there: one each 50 ms while a CPU is busy. Each 100 ms would save 5 to 8 % of
    // what programs cost, but two that yield to each other then take twice as many instructions for a switch.
    "tick_stretch=5",
    // Huge pages: a fault costs 2 ms whatever its size. The agent switches them on.
    "peregrine.thp=1",
    // The agent in SCHED_BATCH: a command and the agent take fewer turns for the same output.
    "peregrine.batch=1",
    // A fault on a file costs 2,000 instructions and more: read and map files in large windows, and copy the
    // data segments of programs in windows too (KiB).
    "file_around=512,128 cow_around=128",
    // 64 KiB through a pipe: one copy in and one out, not sixteen.
    "pipe_runs=16",
    // 64 KiB for the guest: 3 packets, not 17.
    "vsock_rx=32",
    // Load averages of the scheduler: each 32 ms, not at each event.
    "pelt_step=32000",
    // Write-protecting the kernel's own text splits mappings, a million instructions at boot. The sandbox's
    // wall is the VM, not the guest kernel.
    "rodata=off",
];

/// CPU features a guest kernel must not use where ring 0 is emulated (CPUID is not virtualised there, so the
/// command line says it), by number as in Linux 6.12's cpufeatures.h: a name is compared with 700 others.
/// Instructions the emulator lacks or that only the assist could do, string extensions that make `rep movsb`
/// the copy of choice (one emulated turn a *byte*), and the XSAVE forms beyond the plain one. Not `fsgsbase`:
/// without it processes lose their FS base.
const WITHOUT: &[(&str, u16)] = &[
    ("popcnt", 4 * 32 + 23),
    ("movbe", 4 * 32 + 22),
    ("cx16", 4 * 32 + 13),
    ("pcid", 4 * 32 + 17),
    ("rdtscp", 32 + 27),
    ("smap", 9 * 32 + 20),
    ("erms", 9 * 32 + 9),
    ("invpcid", 9 * 32 + 10),
    ("xsaveopt", 10 * 32),
    ("xsavec", 10 * 32 + 1),
    ("xsaves", 10 * 32 + 3),
    ("rdpid", 16 * 32 + 22),
    ("fsrm", 18 * 32 + 4),
];

/// With this word the guest kernel says when ring 3 has trapped into it, and the VMM runs ring 0.
const RING0: &str = "ring0_doorbell";
/// The user's word against it.
const NO_RING0: &str = "ring0_doorbell=off";

/// Whether the VMM runs such a guest's ring 0 itself: where KVM would emulate it, and for one vCPU.
#[must_use]
pub fn gives_ring0(kind: KvmKind, vcpus: u8, extra: &str) -> bool {
    kind == KvmKind::Software && vcpus == 1 && !extra.split_whitespace().any(|word| word == NO_RING0)
}

/// Builds the command line. `verbose` lets the kernel's boot messages reach the console ring.
///
/// # Errors
/// [`VmmError::CommandLineTooLong`] over 2,048 bytes.
pub fn build(
    kind: KvmKind,
    verbose: bool,
    vcpus: u8,
    devices: &str,
    extra: &str,
) -> Result<String, VmmError> {
    // A silent boot begins with the first word: what is printed before it is parsed is formatted in vain.
    let mut words = vec![if verbose { "ignore_loglevel" } else { "silent_boot" }];
    words.extend(ALWAYS);
    let numbers: Vec<String> = WITHOUT.iter().map(|(_, number)| number.to_string()).collect();
    let clear = format!("clearcpuid={}", numbers.join(","));
    let doorbell = format!("bulk_memory={:#x}", doorbell::PORT);
    if kind == KvmKind::Software {
        words.extend(SOFTWARE_KVM);
        words.push(&clear);
        // The first of these words counts for the kernel, so one of the user's takes the place of ours.
        if !extra.split_whitespace().any(|word| word.starts_with("bulk_memory=")) {
            words.push(&doorbell);
        }
    }
    if gives_ring0(kind, vcpus, extra) {
        words.push(RING0);
    }
    words.extend([devices, extra]);
    words.retain(|w| !w.is_empty());
    let line = words.join(" ");
    if line.len() + 1 > COMMAND_LINE_MAX {
        return Err(VmmError::CommandLineTooLong { len: line.len(), limit: COMMAND_LINE_MAX - 1 });
    }
    Ok(line)
}

/// All parameters that are the same for every guest of this build on this host: part of what a template is
/// made from.
#[must_use]
pub fn fixed() -> String {
    // Only devices and the caller's own make a line too long.
    build(KvmKind::detect(), false, 1, "", "").unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_kvm_keeps_every_cpu_feature() {
        let hardware = build(KvmKind::Hardware, false, 1, "", "").unwrap();
        let software = build(KvmKind::Software, false, 1, "", "").unwrap();
        for word in
            ["clearcpuid", "syscall_by_fault", "bulk_memory", "clocksource", "tick_stretch", "rodata=off"]
        {
            assert!(!hardware.contains(word) && software.contains(word), "{word}");
        }
        assert!(software.contains("clearcpuid=151,150,141,"), "{software}");
        let off = build(KvmKind::Software, false, 1, "", "bulk_memory=0").unwrap();
        assert_eq!(off.matches("bulk_memory=").count(), 1, "{off}");
    }

    #[test]
    fn an_overlong_line_is_refused_with_the_limit() {
        let error = build(KvmKind::Hardware, false, 1, "", &"x".repeat(4096)).unwrap_err();
        assert!(error.to_string().contains("2047"), "{error}");
    }
}
