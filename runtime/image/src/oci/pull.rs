//! One image from a registry into the cache: ask, fetch what is missing, build, name.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::Path;

use super::manifest::Digest;
use super::reference::Reference;
use super::registry::{self, Remote, Repository};
use super::settings::Registries;
use super::source::{Image, Layer};
use super::{ReadyImage, build, catalogue};
use crate::error::Error;
use crate::progress::Progress;
use crate::rootfs::Expected;
use crate::store::Store;

/// Asks the mirrors of its registry, then the registry itself. What the last one says is the error.
pub(super) fn pull(
    store: &Store,
    reference: &Reference,
    registries: &Registries,
    progress: &mut dyn Progress,
) -> Result<ReadyImage, Error> {
    let _lock = catalogue::adding(store)?;
    let mut last = None;
    for repository in Repository::all_for(reference, registries)? {
        if let Some(error) = last.take() {
            progress.message(&format!("{error}; asking the next registry"));
        }
        match pull_from(store, reference, &repository, progress) {
            Ok(image) => return Ok(image),
            // Of these another registry knows no better.
            Err(error @ (Error::Io { .. } | Error::Setting { .. } | Error::Corrupt { .. })) => {
                return Err(error);
            }
            Err(error) => last = Some(error),
        }
    }
    let why = "no registry is known for it".to_owned();
    Err(last.unwrap_or(Error::ImageNotFound { image: reference.familiar(), why }))
}

fn pull_from(
    store: &Store,
    reference: &Reference,
    repository: &Repository,
    progress: &mut dyn Progress,
) -> Result<ReadyImage, Error> {
    progress.begin(&format!("ask for {}", reference.familiar()), None, "");
    let (digest, manifest) = repository.manifest(reference)?;
    progress.end();
    if let Some(here) = catalogue::find(store, reference)?.filter(|here| here.digest == digest.as_str()) {
        return Ok(here);
    }
    let remote = repository.config(digest, manifest)?;
    let dir = catalogue::blobs_dir(store)?;
    registry::download(repository, &remote.manifest, &dir, progress)?;
    let image = image(&remote, &dir);
    let blobs: Vec<Digest> = remote.manifest.layers.iter().map(|layer| layer.digest.clone()).collect();
    let built = build::build(store, &reference.familiar(), &image, progress);
    if let Err(Error::Layer { .. }) = &built {
        // Bytes that are not what they should be must not be found again.
        for digest in &blobs {
            let _ = fs::remove_file(registry::blob_path(&dir, digest));
        }
    }
    let built = built?;
    catalogue::name(store, reference, &image.digest, &built, blobs)?;
    Ok(ReadyImage::of(reference, &image.digest, built))
}

fn image<'r>(remote: &'r Remote, dir: &'r Path) -> Image<'r> {
    let layers = remote.manifest.layers.iter().map(|layer| Layer {
        expected: Expected {
            name: layer.digest.to_string(),
            stored: Some((layer.digest.hex().to_owned(), layer.size)),
            diff_id: None,
        },
        bytes: layer.size,
        open: Box::new(move || -> io::Result<Box<dyn Read + Send>> {
            Ok(Box::new(File::open(registry::blob_path(dir, &layer.digest))?))
        }),
    });
    Image { digest: remote.digest.clone(), config: remote.config.clone(), layers: layers.collect() }
}
