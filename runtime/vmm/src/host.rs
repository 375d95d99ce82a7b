//! What this host is: which kind of KVM, how much memory. Reads `/sys` and `/proc`, nothing else.

use std::fmt;
use std::path::Path;

/// How guest ring 0 runs on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvmKind {
    /// Intel VT-x or AMD-V: the guest kernel runs natively.
    Hardware,
    /// Shadow paging without virtualisation hardware (PVM and its relatives): guest user code runs
    /// natively, guest kernel code is emulated.
    Software,
}

impl KvmKind {
    /// Detects the kind from the loaded KVM vendor modules: built-in ones show in `/sys/module` too.
    #[must_use]
    pub fn detect() -> Self {
        let has = |name: &str| Path::new("/sys/module").join(name).exists();
        if has("kvm_pvm") && !has("kvm_intel") && !has("kvm_amd") { Self::Software } else { Self::Hardware }
    }
}

impl fmt::Display for KvmKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hardware => "hardware KVM",
            Self::Software => "software KVM (guest ring 0 emulated)",
        })
    }
}

/// Physical memory of the host in MiB. Asked of the kernel without a file: a process may have no descriptor left.
#[must_use]
pub fn memory_mib() -> u64 {
    let info = rustix::system::sysinfo();
    (info.totalram * u64::from(info.mem_unit)) >> 20
}

/// Can this process make an `io_uring`, which every microVM's event loop needs?
///
/// # Errors
/// Why not; often the sysctl `kernel.io_uring_disabled` or a seccomp filter.
pub fn io_uring() -> std::io::Result<()> {
    io_uring::IoUring::new(2).map(drop)
}
