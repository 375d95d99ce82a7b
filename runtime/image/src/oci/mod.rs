//! Images by name: from a registry or a local source into the cache, as one EROFS file each, and found there
//! again.
//!
//! [`resolve`] is the one call that a caller needs:
//!
//! ```text
//! resolve(&Store, &Reference, Pull, &Registries, &mut dyn Progress) -> Result<ReadyImage, Error>
//! ```
//!
//! It blocks while it downloads and builds, which happens once per image; after that it is a look at two files.
//! [`Error::ImageNotFound`] is HTTP's 404, [`Error::ImageRefused`] 401 or 403, [`Error::Registry`] 502,
//! [`Error::Reference`] 400; each names the image.

mod accounts;
mod build;
mod catalogue;
mod config;
mod manifest;
mod pull;
mod reference;
mod registry;
mod settings;
mod source;

use std::path::{Path, PathBuf};

pub use accounts::User;
#[doc(hidden)]
pub use build::build_layers;
pub use catalogue::{Collected, ListedImage, collect_garbage, list, remove};
pub use config::ImageConfig;
#[doc(hidden)]
pub use manifest::parse_documents;
pub use reference::{DOCKER_HUB, Reference};
pub use settings::Registries;

use crate::digest::Key;
use crate::error::Error;
use crate::progress::Progress;
use crate::store::Store;
use source::Source;

/// An image in the cache, ready to be a guest's root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadyImage {
    /// What it was asked for by.
    pub reference: Reference,
    /// `sha256:…` of its manifest (of its configuration, if it came without one).
    pub digest: String,
    /// The EROFS file.
    pub path: PathBuf,
    /// Its name in the cache: a digest of its layers.
    pub key: Key,
    /// How its commands run.
    pub config: ImageConfig,
}

impl ReadyImage {
    fn of(reference: &Reference, digest: &impl ToString, built: build::Built) -> Self {
        let build::Built { path, key, config } = built;
        Self { reference: reference.clone(), digest: digest.to_string(), path, key, config }
    }

    /// Whom `text` (`USER`, `USER:GROUP`, names or numbers) means in this image.
    ///
    /// # Errors
    /// [`Error::BadContent`] if the image has no such account.
    pub fn user(&self, text: &str) -> Result<User, Error> {
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        build::user(dir, text)?.map_err(|why| Error::BadContent { image: self.reference.familiar(), why })
    }
}

/// When to ask the registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Pull {
    /// If the image is not here.
    #[default]
    Missing,
    /// Each time: what a tag means may have changed.
    Always,
    /// Not at all.
    Never,
}

/// The image of this name: the one that is here, or from its registry.
///
/// # Errors
/// See the module.
pub fn resolve(
    store: &Store,
    reference: &Reference,
    pull: Pull,
    registries: &Registries,
    progress: &mut dyn Progress,
) -> Result<ReadyImage, Error> {
    if pull != Pull::Always
        && let Some(image) = find(store, reference)?
    {
        return Ok(image);
    }
    if pull == Pull::Never {
        let why = "it is not here, and is not to be pulled".to_owned();
        return Err(Error::ImageNotFound { image: reference.familiar(), why });
    }
    pull::pull(store, reference, registries, progress)
}

/// The image of this name, if it is here.
///
/// # Errors
/// If the cache cannot be read.
pub fn find(store: &Store, reference: &Reference) -> Result<Option<ReadyImage>, Error> {
    catalogue::find(store, reference)
}

/// Takes an image from an OCI layout directory, an archive of one, or an archive of `docker save`; `:TAG`
/// behind the path chooses one of several.
///
/// # Errors
/// What is wrong with the source.
pub fn import(
    store: &Store,
    source: &str,
    reference: &Reference,
    progress: &mut dyn Progress,
) -> Result<ReadyImage, Error> {
    let (path, tag) = match source.rsplit_once(':') {
        Some((path, tag)) if !Path::new(source).exists() => (path, Some(tag)),
        _ => (source, None),
    };
    let _lock = catalogue::adding(store)?;
    let opened = Source::open(Path::new(path))?;
    let bad = |why: String| Error::BadSource { source_name: source.to_owned(), why };
    let image = opened.image(tag).map_err(bad)?;
    let built = build::build(store, &reference.familiar(), &image, progress)?;
    catalogue::name(store, reference, &image.digest, &built, Vec::new())?;
    Ok(ReadyImage::of(reference, &image.digest, built))
}
