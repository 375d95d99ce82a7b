//! Where a snapshot may be restored: the record, this host's own, and the comparison.

use super::{MemoryDigest, SnapshotError};
use crate::host::KvmKind;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::sync::LazyLock;

/// Version of the state file's contents; another one is refused, never guessed at.
pub const VERSION: u32 = 2;
/// How far a TSC's frequency may be off, in parts per million: KVM's own default (`tsc_tolerance_ppm`). A
/// host's calibration differs by a few from boot to boot.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What must agree between where a snapshot was made and where it is restored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compat {
    /// [`VERSION`].
    pub version: u32,
    /// `hardware` or `software` KVM: the guest kernel was booted for one of them.
    pub kvm: String,
    /// Digest of the CPU's identity and features, as CPUID gives them.
    pub cpu: String,
    /// The CPU's name, for people.
    pub cpu_name: String,
    /// Frequency of the guest's TSC in kHz; 0 if KVM does not say.
    pub tsc_khz: u32,
    /// vCPUs, 1 to 32.
    pub vcpus: u8,
    /// Guest memory in MiB.
    pub mem_mib: u64,
    /// Every disk's size in bytes, in device order.
    pub disks_bytes: Vec<u64>,
    /// The memory image.
    pub memory: MemoryDigest,
    /// The pages over it. An older record has none, and is refused for its version.
    #[serde(default)]
    pub pages: MemoryDigest,
}

impl Compat {
    /// This host's part of the record; the rest is zero. Found out once: CPUID is slow where this host is a
    /// virtual machine itself.
    #[must_use]
    pub fn host() -> Self {
        static HOST: LazyLock<Compat> = LazyLock::new(Compat::detect);
        HOST.clone()
    }

    fn detect() -> Self {
        let kvm = match KvmKind::detect() {
            KvmKind::Hardware => "hardware",
            KvmKind::Software => "software",
        };
        let (cpu, cpu_name) = cpu();
        Self {
            version: VERSION,
            kvm: kvm.to_owned(),
            cpu,
            cpu_name,
            tsc_khz: 0,
            vcpus: 0,
            mem_mib: 0,
            disks_bytes: Vec::new(),
            memory: MemoryDigest::NONE,
            pages: MemoryDigest::NONE,
        }
    }

    /// Refuses what `host` cannot run. The TSC's frequency is compared when a vCPU exists
    /// ([`Compat::check_tsc`]).
    ///
    /// # Errors
    /// [`SnapshotError::Incompatible`] naming the first difference.
    pub fn check(&self, host: &Self) -> Result<(), SnapshotError> {
        let refuse = |what: &str, ours: &str, its: &str| {
            Err(SnapshotError::Incompatible(format!("{what} here is {ours}, it was made with {its}")))
        };
        if self.version != host.version {
            return refuse("the snapshot version", &host.version.to_string(), &self.version.to_string());
        }
        if self.kvm != host.kvm {
            return refuse("the kind of KVM", &host.kvm, &self.kvm);
        }
        if self.cpu != host.cpu {
            return refuse("the CPU", &host.cpu_name, &format!("{} (or other features)", self.cpu_name));
        }
        Ok(())
    }

    /// Refuses other disks than it was made with: the guest has them mounted.
    ///
    /// # Errors
    /// [`SnapshotError::Incompatible`] with both lists of sizes.
    pub fn check_disks(&self, found_bytes: &[u64]) -> Result<(), SnapshotError> {
        if self.disks_bytes == found_bytes {
            return Ok(());
        }
        Err(SnapshotError::Incompatible(format!(
            "the disks have {found_bytes:?} bytes, it was made with {:?}",
            self.disks_bytes
        )))
    }

    /// Refuses a vCPU whose TSC runs at another speed; KVM here cannot scale it.
    ///
    /// # Errors
    /// [`SnapshotError::Incompatible`] with both frequencies.
    pub fn check_tsc(&self, tsc_khz: u32) -> Result<(), SnapshotError> {
        let off = u64::from(self.tsc_khz.abs_diff(tsc_khz)) * 1_000_000;
        if off <= u64::from(self.tsc_khz) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        Err(SnapshotError::Incompatible(format!(
            "the TSC runs at {tsc_khz} kHz, it was made at {} kHz (at most {TSC_TOLERANCE_PPM} ppm apart)",
            self.tsc_khz
        )))
    }
}

/// Digest and name of the CPU: vendor, family, model, stepping and the feature leaves that user space in the
/// guest can see (SDM vol. 2A, CPUID).
fn cpu() -> (String, String) {
    use std::arch::x86_64::__cpuid_count;
    let mut hash = Sha256::new();
    let mut add = |leaf, sub, mask: [u32; 4]| {
        let r = __cpuid_count(leaf, sub);
        for (value, mask) in [r.eax, r.ebx, r.ecx, r.edx].into_iter().zip(mask) {
            hash.update((value & mask).to_le_bytes());
        }
    };
    const ALL: [u32; 4] = [u32::MAX; 4];
    add(0, 0, ALL);
    // EBX of leaf 1 has the APIC id; ECX bit 27 (OSXSAVE) is the operating system's.
    add(1, 0, [u32::MAX, 0, !(1 << 27), u32::MAX]);
    // ECX bit 4 (OSPKE) is the operating system's too.
    add(7, 0, [u32::MAX, u32::MAX, !(1 << 4), u32::MAX]);
    add(7, 1, ALL);
    // The state components there are and the size of all of them, whatever is enabled.
    add(0xd, 0, [u32::MAX, 0, u32::MAX, u32::MAX]);
    add(0x8000_0001, 0, [u32::MAX, 0, u32::MAX, u32::MAX]);
    let digest = hash.finalize().iter().take(16).map(|b| format!("{b:02x}")).collect();
    let name: Vec<u8> = (0x8000_0002..=0x8000_0004)
        .map(|leaf| __cpuid_count(leaf, 0))
        .flat_map(|r| [r.eax, r.ebx, r.ecx, r.edx])
        .flat_map(u32::to_le_bytes)
        .filter(|byte| *byte != 0)
        .collect();
    (digest, String::from_utf8_lossy(&name).trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_difference_is_refused_by_name() {
        let host = Compat::host();
        assert!(host.check(&host).is_ok());
        let refused = |change: fn(&mut Compat)| {
            let mut other = host.clone();
            change(&mut other);
            other.check(&host).unwrap_err().to_string()
        };
        assert!(refused(|c| c.version += 1).contains("snapshot version"));
        assert!(refused(|c| c.kvm.push('x')).contains("kind of KVM"));
        assert!(refused(|c| c.cpu.push('x')).contains("the CPU"));
    }

    #[test]
    fn other_disks_are_refused_with_their_sizes() {
        let made = Compat { disks_bytes: vec![4096, 8192], ..Compat::host() };
        assert!(made.check_disks(&[4096, 8192]).is_ok());
        for other in [&[4096, 4096][..], &[4096], &[8192, 4096], &[]] {
            let text = made.check_disks(other).unwrap_err().to_string();
            assert!(text.contains(&format!("{other:?} bytes")) && text.contains("[4096, 8192]"), "{text}");
        }
    }

    #[test]
    fn a_tsc_may_be_off_by_its_calibration_and_no_more() {
        let made = Compat { tsc_khz: 2_000_000, ..Compat::host() };
        assert!(made.check_tsc(2_000_400).is_ok());
        let text = made.check_tsc(2_001_000).unwrap_err().to_string();
        assert!(text.contains("2001000 kHz"), "{text}");
    }
}
