//! Snapshots: everything of a paused microVM that is not its memory or its disks, and the record of where it
//! may be restored.
//!
//! ```text
//! <directory>/memory   the guest's RAM: its ranges one after the other, page-aligned, holes where it is zero
//! <directory>/pages    pages that take the place of the image's, one after the other; where they belong is in
//!                      the state. A template has none; another snapshot's `memory` is its template's, linked
//! <directory>/state    fixed header, compatibility record (JSON), state (postcard); see [`format`]
//! ```
//!
//! A template is a snapshot with a name; restoring one maps `memory` privately, so that all its clones share
//! its pages until they write, and the runs of `pages` over it. What does not fit this host is refused by [`Compat::check`] before a VM
//! exists.
//!
//! May touch: these files. Must not: KVM (`vcpu_state` and `vm` do), threads.

pub mod compat;
pub mod format;
pub mod hibernated;
mod memory_digest;
mod save;

pub use compat::Compat;
pub use hibernated::Claim;
pub use memory_digest::{MemoryDigest, digest_memory};
pub use save::{place_image, save_pages};

use crate::devices::mmio::State as DeviceState;
use crate::memory::GuestMemory;
use crate::vcpu_state::VcpuSnapshot;
use kvm_bindings::{kvm_clock_data, kvm_irqchip};
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Name of the memory image in a snapshot's directory.
pub const MEMORY_FILE: &str = "memory";
/// Name of the file of pages that are not the image's.
pub const PAGES_FILE: &str = "pages";
/// Name of the state file in a snapshot's directory.
pub const STATE_FILE: &str = "state";

/// Why a snapshot was refused or could not be written.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// A file could not be read or written.
    #[error("snapshot file {path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The state file is not one, is cut short or was changed.
    #[error("snapshot state {path} is not usable: {reason}")]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// It was made on another kind of host or by another version.
    #[error("this snapshot does not fit this host: {0}")]
    Incompatible(String),
    /// The sandbox is somebody's: see [`Claim`].
    #[error("{dir} is claimed: the sandbox runs, or is being resumed or hibernated; stop it first")]
    Claimed {
        /// The sandbox's directory.
        dir: PathBuf,
    },
}

impl SnapshotError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }

    /// Is the disk full, or the quota used up? Then it can be tried again when there is space.
    #[must_use]
    pub fn is_no_space(&self) -> bool {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        matches!(self, Self::Io { source, .. } if matches!(source.kind(), StorageFull | QuotaExceeded))
    }
}

/// The machine's state at one moment: every field is plain data, saved whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, by index.
    pub vcpus: Vec<VcpuSnapshot>,
    /// Master PIC, slave PIC, I/O APIC.
    pub irqchips: Vec<kvm_irqchip>,
    /// The VM's clock (kvm-clock goes on from here).
    pub clock: kvm_clock_data,
    /// The devices, in bus order.
    pub devices: Vec<DeviceState>,
    /// The host's end of the agent's connection.
    pub agent: AgentState,
    /// The guest stands at its gate: it looks into the mailbox first.
    pub at_gate: bool,
    /// Which pages of the memory image the snapshot's other pages take the place of: in the order in which they lie
    /// in their file, ascending, apart from each other.
    pub runs: Vec<Run>,
}

/// Pages of a memory image that lie together, in numbers of 4 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Run {
    /// The first.
    pub first: u64,
    /// How many, at least one.
    pub pages: u64,
}

impl Run {
    /// The page behind the last.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.pages)
    }
}

/// Where the host's conversation with the agent stands.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentState {
    /// The number its next command gets.
    pub next_stream: u32,
    /// Commands that have not ended.
    pub streams: Vec<u32>,
    /// Bytes from the guest that are not a whole frame yet.
    pub unread: Vec<u8>,
}

/// A snapshot: where it fits, and the machine's state.
#[derive(Debug, Clone)]
pub struct Snapshot {
    /// Where it fits.
    pub compat: Compat,
    /// The state.
    pub machine: MachineState,
}

/// A snapshot on disk, its state read and found whole and fitting, its memory file open.
#[derive(Debug)]
pub struct Stored {
    /// What it holds.
    pub snapshot: Snapshot,
    /// The memory image, open for reading.
    pub memory: Arc<File>,
    /// The pages that take the place of the image's, if there are any.
    pub pages: Option<Arc<File>>,
    /// Where it lies.
    pub dir: PathBuf,
}

/// fsync, which works on directories opened for reading too.
fn sync(path: &Path) -> Result<(), SnapshotError> {
    File::open(path).and_then(|file| file.sync_all()).map_err(SnapshotError::io(path))
}

impl Stored {
    /// Opens a snapshot's directory and refuses it if this host cannot run it.
    ///
    /// # Errors
    /// What is wrong with it, before a VM exists.
    pub fn open(dir: &Path) -> Result<Self, SnapshotError> {
        let path = dir.join(STATE_FILE);
        let bytes = std::fs::read(&path).map_err(SnapshotError::io(&path))?;
        let corrupt = |reason: String| SnapshotError::Corrupt { path: path.clone(), reason };
        let parts = format::parse(&bytes).map_err(|e| corrupt(e.to_string()))?;
        // First the record alone: a snapshot of another version is refused for that, not for what it looks
        // like.
        let compat = parts.compat().map_err(|e| corrupt(e.to_string()))?;
        compat.check(&Compat::host())?;
        let machine = parts.machine().map_err(|e| corrupt(e.to_string()))?;
        if machine.vcpus.len() != usize::from(compat.vcpus) {
            return Err(corrupt(format!("{} vCPU states, not {}", machine.vcpus.len(), compat.vcpus)));
        }
        let memory_path = dir.join(MEMORY_FILE);
        let memory = Arc::new(File::open(&memory_path).map_err(SnapshotError::io(&memory_path))?);
        let bytes = memory.metadata().map_err(SnapshotError::io(&memory_path))?.len();
        if bytes != compat.mem_mib << 20 {
            let reason = format!("its memory image has {bytes} bytes, not {}", compat.mem_mib << 20);
            return Err(corrupt(reason));
        }
        let pages = open_pages(dir, &machine.runs)?;
        Ok(Self { snapshot: Snapshot { compat, machine }, memory, pages, dir: dir.to_owned() })
    }

    /// Reads the whole memory image, and the pages over it, and compares them with their digests: once per
    /// process is enough, 10 GB/s from the page cache.
    ///
    /// # Errors
    /// [`SnapshotError::Corrupt`] naming the file.
    pub fn verify_memory(&self) -> Result<(), SnapshotError> {
        let compat = &self.snapshot.compat;
        self.verify(&self.memory, MEMORY_FILE, "memory image", compat.memory)?;
        let pages = self.pages.as_ref();
        pages.map_or(Ok(()), |pages| self.verify(pages, PAGES_FILE, "file of pages", compat.pages))
    }

    fn verify(&self, file: &File, name: &str, what: &str, wanted: MemoryDigest) -> Result<(), SnapshotError> {
        let path = self.dir.join(name);
        let found = digest_memory(file).map_err(SnapshotError::io(&path))?;
        if found == wanted {
            return Ok(());
        }
        Err(SnapshotError::Corrupt { path, reason: format!("its {what} is {found}, recorded is {wanted}") })
    }
}

/// The file of pages, if the state says that there is one.
fn open_pages(dir: &Path, runs: &[Run]) -> Result<Option<Arc<File>>, SnapshotError> {
    if runs.is_empty() {
        return Ok(None);
    }
    let path = dir.join(PAGES_FILE);
    let file = File::open(&path).map_err(SnapshotError::io(&path))?;
    let found = file.metadata().map_err(SnapshotError::io(&path))?.len();
    let pages = runs.iter().fold(0_u64, |sum, run| sum.saturating_add(run.pages));
    let wanted = pages.saturating_mul(4096);
    if found != wanted {
        let reason = format!("its file of pages has {found} bytes, not {wanted}");
        return Err(SnapshotError::Corrupt { path, reason });
    }
    Ok(Some(Arc::new(file)))
}

impl Snapshot {
    /// Makes `dir` a snapshot on disk, durable when this returns: written beside it under a temporary name,
    /// fsync'ed, renamed, and the rename fsync'ed too. `mem` must be a private mapping of `base`, which the record
    /// describes, with the state's runs over it, and stand still.
    ///
    /// # Errors
    /// [`SnapshotError::Io`]; nothing is left of it then.
    pub fn save(mut self, mem: &GuestMemory, base: &File, dir: &Path) -> Result<(), SnapshotError> {
        let parent = dir.parent().unwrap_or(Path::new("."));
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let partial = parent.join(format!(".{name}.{}.partial", std::process::id()));
        let published = self
            .write_all(mem, base, &partial)
            .and_then(|()| std::fs::rename(&partial, dir).map_err(SnapshotError::io(dir)));
        // Whether a rename whose fsync failed is on the disk nobody knows, and the next fsync may say it is.
        let (done, left) = match published {
            Ok(()) => (sync(parent), dir),
            Err(error) => (Err(error), &*partial),
        };
        if done.is_err() {
            // The failure is what counts.
            let _ = std::fs::remove_dir_all(left);
        }
        done
    }

    fn write_all(&mut self, mem: &GuestMemory, base: &File, dir: &Path) -> Result<(), SnapshotError> {
        std::fs::create_dir(dir).map_err(SnapshotError::io(dir))?;
        let path = dir.join(MEMORY_FILE);
        place_image(base, &path).map_err(SnapshotError::io(&path))?;
        let path = dir.join(PAGES_FILE);
        let create = File::options().read(true).write(true).create_new(true).open(&path);
        let pages = create.map_err(SnapshotError::io(&path))?;
        self.machine.runs = save_pages(mem, &self.machine.runs, &pages).map_err(SnapshotError::io(&path))?;
        self.compat.pages = digest_memory(&pages).map_err(SnapshotError::io(&path))?;
        pages.sync_all().map_err(SnapshotError::io(&path))?;
        self.write_state(dir)?;
        sync(&dir.join(STATE_FILE))?;
        sync(dir)
    }

    /// Writes the state file into `dir`; the memory image is there already. Nothing is fsync'ed here: whoever
    /// publishes the directory does that.
    ///
    /// # Errors
    /// [`SnapshotError::Io`].
    pub fn write_state(&self, dir: &Path) -> Result<(), SnapshotError> {
        let path = dir.join(STATE_FILE);
        let bytes = format::encode(self)
            .map_err(|e| SnapshotError::Corrupt { path: path.clone(), reason: e.to_string() })?;
        std::fs::write(&path, bytes).map_err(SnapshotError::io(&path))
    }
}
