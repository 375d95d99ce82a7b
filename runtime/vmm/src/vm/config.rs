//! What a microVM is made from, checked before anything is spent.

use crate::VmmError;
use crate::devices::Disk;
use crate::memory;
use kvm_ioctls::Kvm;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Most vCPUs of one microVM (the guest kernel is built for as many).
pub const MAX_VCPUS: u8 = 32;

/// A disk of the guest, in the order `vda`, `vdb`, ...
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// The file behind it.
    pub path: PathBuf,
    /// Refuse writes, and open the file read-only.
    pub read_only: bool,
}

/// Everything a microVM is made from.
#[derive(Debug, Clone)]
pub struct VmConfig {
    /// The kernel, an uncompressed `vmlinux`.
    pub kernel: PathBuf,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// [`memory::MIN_MIB`] to the host's memory, in MiB.
    pub mem_mib: u64,
    /// The guest's disks.
    pub disks: Vec<DiskConfig>,
    /// More kernel parameters, appended.
    pub kernel_parameters: String,
    /// Copy the guest's console to standard error, and let the kernel be talkative.
    pub verbose: bool,
    /// Sample the guest's instruction pointer this often.
    pub profile: Option<Duration>,
}

impl VmConfig {
    /// Checks every value and opens every file, without creating a VM.
    ///
    /// # Errors
    /// The first thing wrong, naming the field and its limit.
    pub fn check(&self) -> Result<CheckedConfig, VmmError> {
        let vcpus = check_size(self.vcpus, self.mem_mib)?;
        let kernel = open("kernel", &self.kernel, true)?;
        let disks = self.open_disks()?;
        Ok(CheckedConfig { config: self.clone(), vcpus, kernel, disks, kvm: open_kvm()? })
    }

    /// Opens the disks alone: what a restored microVM needs.
    ///
    /// # Errors
    /// [`VmmError::Open`] naming the file.
    pub fn open_disks(&self) -> Result<Vec<Disk>, VmmError> {
        open_disks(&self.disks)
    }
}

/// Opens the files behind disks.
///
/// # Errors
/// [`VmmError::Open`] naming the file.
pub fn open_disks(disks: &[DiskConfig]) -> Result<Vec<Disk>, VmmError> {
    let open = |disk: &DiskConfig| {
        let file = open("disk", &disk.path, disk.read_only)?;
        let id = disk.path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into());
        Ok(Disk { file, read_only: disk.read_only, id })
    };
    disks.iter().map(open).collect()
}

/// A configuration that was checked, with its files open.
pub struct CheckedConfig {
    pub(super) config: VmConfig,
    pub(super) vcpus: u8,
    pub(super) kernel: File,
    pub(super) disks: Vec<Disk>,
    pub(super) kvm: Kvm,
}

fn open(what: &'static str, path: &Path, read_only: bool) -> Result<File, VmmError> {
    File::options().read(true).write(!read_only).open(path).map_err(|source| VmmError::Open {
        what,
        path: path.to_owned(),
        source,
    })
}

/// Checks vCPU count and memory size alone, before anything else is spent; gives the count back.
///
/// # Errors
/// [`VmmError::OutOfRange`] naming the field and its limit.
pub fn check_size(vcpus: u32, mem_mib: u64) -> Result<u8, VmmError> {
    let count = u8::try_from(vcpus).ok().filter(|n| (1..=MAX_VCPUS).contains(n));
    let count = count.ok_or_else(|| VmmError::OutOfRange {
        field: "vcpus",
        value: u64::from(vcpus),
        limit: format!("1 to {MAX_VCPUS}"),
    })?;
    memory::check_size(mem_mib)?;
    Ok(count)
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`VmmError::KvmMissing`], [`VmmError::KvmPermission`], or what KVM said.
pub fn open_kvm() -> Result<Kvm, VmmError> {
    Kvm::new().map_err(|e| match e.errno() {
        libc::ENOENT | libc::ENXIO | libc::ENODEV => VmmError::KvmMissing,
        libc::EACCES | libc::EPERM => VmmError::KvmPermission,
        _ => VmmError::Kvm { what: "open /dev/kvm", source: e },
    })
}

impl CheckedConfig {
    /// Guest memory in MiB.
    pub(super) fn mem_mib(&self) -> u64 {
        self.config.mem_mib
    }
}
