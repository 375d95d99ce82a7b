//! The kernel command line: one group of parameters per reason.

use super::layout::COMMAND_LINE_MAX;
use crate::VmmError;
use crate::host::KvmKind;

/// Parameters that hold on every host.
const ALWAYS: &[&str] = &[
    // The agent's disk is the root; PID 1 builds the sandbox's own root from the image's disk.
    "root=/dev/vda rootfstype=erofs ro init=/init",
    // No serial driver: the early console's port writes land in the VMM's ring, panics included.
    "earlyprintk=serial,0x3f8,115200,keep",
    // A dead guest must say so at once: panic -> reset through the keyboard controller port, which the VMM sees.
    "panic=-1 reboot=k",
    // The VMM gives TSC and clock; probing and cross-checking them is work for nothing.
    "tsc=reliable no_timer_check nokaslr",
    // KVM's APIC timer counts a 1 GHz bus (APIC_BUS_CYCLE_NS = 1): no calibration loop, no PIT.
    "lapic_timer_hz=1000000000",
    // The host's own mitigations stand between guests; inside one guest they only cost.
    "mitigations=off random.trust_cpu=on",
];

/// Parameters for hosts whose KVM emulates guest ring 0.
const SOFTWARE_KVM: &[&str] = &[
    // `syscall` arrives there as a fault in ring 3 at the entry point; our first kernel patch routes it.
    "syscall_by_fault",
    // CPUID is not virtualised there, so the kernel is told what not to use: instructions the emulator lacks
    // (popcnt, clac/stac, invpcid, rdpid, cmpxchg16b), string extensions that make `rep movsb` the copy of
    // choice (one emulated turn a *byte*), and the XSAVE forms beyond the plain one. Not `fsgsbase`: without
    // it processes lose their FS base.
    "clearcpuid=popcnt,smap,erms,fsrm,invpcid,pcid,rdpid,cx16,xsavec noxsaves noxsaveopt",
];

/// Builds the command line. `verbose` lets the kernel's boot messages reach the console ring.
///
/// # Errors
/// [`VmmError::CommandLineTooLong`] over 2,048 bytes.
pub fn build(kind: KvmKind, verbose: bool, devices: &str, extra: &str) -> Result<String, VmmError> {
    let mut words: Vec<&str> = ALWAYS.to_vec();
    words.push(if verbose { "ignore_loglevel" } else { "quiet" });
    if kind == KvmKind::Software {
        words.extend(SOFTWARE_KVM);
    }
    words.extend([devices, extra]);
    words.retain(|w| !w.is_empty());
    let line = words.join(" ");
    if line.len() + 1 > COMMAND_LINE_MAX {
        return Err(VmmError::CommandLineTooLong { len: line.len(), limit: COMMAND_LINE_MAX - 1 });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_kvm_keeps_every_cpu_feature() {
        let hardware = build(KvmKind::Hardware, false, "", "").unwrap();
        let software = build(KvmKind::Software, false, "", "").unwrap();
        assert!(!hardware.contains("clearcpuid") && !hardware.contains("noxsave"));
        assert!(software.contains("clearcpuid=popcnt") && software.contains("noxsaveopt"));
    }

    #[test]
    fn an_overlong_line_is_refused_with_the_limit() {
        let error = build(KvmKind::Hardware, false, "", &"x".repeat(4096)).unwrap_err();
        assert!(error.to_string().contains("2047"), "{error}");
    }
}
