//! The VMM's one error type. Each variant says what was attempted and, where a person can act, what to do.

use std::path::PathBuf;

/// Why a microVM could not be built or run.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// `/dev/kvm` is absent.
    #[error(
        "/dev/kvm does not exist: this host offers no KVM. Load kvm_intel, kvm_amd or kvm_pvm, or enable (nested) virtualisation; `peregrine doctor` says more"
    )]
    KvmMissing,
    /// `/dev/kvm` exists but may not be opened.
    #[error(
        "no permission to open /dev/kvm: run as root or join its group (`usermod -aG kvm $USER`, then log in again)"
    )]
    KvmPermission,
    /// A KVM call failed.
    #[error("KVM: {what} failed: {source}")]
    Kvm {
        /// The step that failed, in the words of the KVM API.
        what: &'static str,
        /// The error the kernel gave.
        source: kvm_ioctls::Error,
    },
    /// KVM accepted fewer MSRs than were set; a partial set is an error.
    #[error("KVM set only {done} of {wanted} MSRs (the first refused is {index:#x})")]
    MsrsPartial {
        /// MSRs taken.
        done: usize,
        /// MSRs given.
        wanted: usize,
        /// First MSR that was not taken.
        index: u32,
    },
    /// A configuration value is out of its range.
    #[error("{field} is {value}, but must be {limit}")]
    OutOfRange {
        /// The field as users know it.
        field: &'static str,
        /// What was given.
        value: u64,
        /// The permitted range in words.
        limit: String,
    },
    /// A file the VM needs cannot be opened.
    #[error("cannot open {what} {path}: {source}")]
    Open {
        /// What the file is for.
        what: &'static str,
        /// Where it was looked for.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The kernel cannot be loaded into guest memory.
    #[error("cannot load kernel {path}: {reason}")]
    Kernel {
        /// The kernel file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Guest memory could not be mapped or written.
    #[error("guest memory: {0}")]
    Memory(String),
    /// The kernel command line does not fit.
    #[error("kernel command line is {len} bytes, the limit is {limit}")]
    CommandLineTooLong {
        /// Its length in bytes.
        len: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// The devices or their event loop could not be started.
    #[error("devices: {0}")]
    Devices(#[from] crate::devices::DeviceError),
    /// A snapshot was refused, or could not be written.
    #[error(transparent)]
    Snapshot(#[from] crate::snapshot::SnapshotError),
    /// The microVM has stopped, so it cannot be paused.
    #[error("the microVM has stopped")]
    Stopped,
    /// The microVM is restored and waits to be told who it is; it has no state of its own yet.
    #[error("the microVM was not let go yet; let it go before it is forked or saved")]
    NotGoing,
    /// The conversation with the agent cannot be saved.
    #[error("the agent's connection: {0}")]
    Agent(String),
    /// A thread or signal could not be set up.
    #[error("{what}: {source}")]
    Os {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl VmmError {
    pub(crate) fn kvm(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self::Kvm { what, source }
    }
}
