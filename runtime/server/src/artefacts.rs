//! The guest artefacts of a run: kernel, agent disk and image, found in the cache or built into it.

use peregrine_image::{Error, Progress, Store};
use std::path::PathBuf;

/// The static PID 1, built by this crate's build script.
pub static AGENT_ELF: &[u8] = include_bytes!(env!("PEREGRINE_AGENT_ELF"));

/// What the caller wants in place of the defaults.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The cache directory.
    pub cache: Option<PathBuf>,
    /// A kernel of the caller's own.
    pub kernel: Option<PathBuf>,
    /// An image of the caller's own.
    pub image: Option<PathBuf>,
}

/// Files that exist and were checked.
#[derive(Debug, Clone)]
pub struct Artefacts {
    /// `vmlinux`.
    pub kernel: PathBuf,
    /// Its symbols, where they are known.
    pub system_map: Option<PathBuf>,
    /// The agent's disk.
    pub agent_disk: PathBuf,
    /// The root file system.
    pub image: PathBuf,
    /// Where they, and the templates made from them, are kept.
    pub store: Store,
}

impl Artefacts {
    /// Finds or builds everything. The caller's own files are checked first, before anything is built.
    ///
    /// # Errors
    /// What is wrong with a file, or what could not be built and what to do about it.
    pub fn prepare(wanted: &Wanted, progress: &mut dyn Progress) -> Result<Self, Error> {
        if let Some(kernel) = &wanted.kernel {
            peregrine_image::inspect_kernel(kernel)?;
        }
        if let Some(image) = &wanted.image {
            peregrine_image::inspect_image(image)?;
        }
        let store = match &wanted.cache {
            Some(dir) => Store::at(dir)?,
            None => Store::open()?,
        };
        let (kernel, system_map) = match &wanted.kernel {
            Some(path) => {
                let map = path.with_file_name("System.map");
                (path.clone(), map.exists().then_some(map))
            }
            None => {
                let built = peregrine_image::kernel(&store, progress)?;
                (built.vmlinux, Some(built.system_map))
            }
        };
        let agent_disk = peregrine_image::agent_disk(&store, AGENT_ELF, progress)?;
        let image = match &wanted.image {
            Some(path) => path.clone(),
            None => peregrine_image::default_image(&store, progress)?.path,
        };
        Ok(Self { kernel, system_map, agent_disk, image, store })
    }
}
