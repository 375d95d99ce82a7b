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
        // Each has long stretches for one processor, or for the network.
        let mut beside = progress.beside();
        let (kernel, image) = std::thread::scope(|scope| {
            let image = scope.spawn(|| match &wanted.image {
                Some(path) => Ok(path.clone()),
                None => peregrine_image::default_image(&store, beside.as_mut()).map(|image| image.path),
            });
            let kernel = match &wanted.kernel {
                Some(path) => {
                    let map = path.with_file_name("System.map");
                    Ok((path.clone(), map.exists().then_some(map)))
                }
                None => peregrine_image::kernel(&store, progress)
                    .map(|built| (built.vmlinux, Some(built.system_map))),
            };
            let image = image.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (kernel, image)
        });
        let ((kernel, system_map), image) = (kernel?, image?);
        let agent_disk = peregrine_image::agent_disk(&store, AGENT_ELF, progress)?;
        Ok(Self { kernel, system_map, agent_disk, image, store })
    }
}
