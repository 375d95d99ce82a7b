//! The images that have names: `<cache>/names/<digest of the name>.json`, each leading to an entry of the
//! cache. Names change hands by rename; whoever collects garbage waits for those who add (`<cache>/names/lock`).

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::config::ImageConfig;
use super::manifest::Digest;
use super::reference::Reference;
use super::{ReadyImage, build};
use crate::digest::{Inputs, Key};
use crate::error::Error;
use crate::store::{Kind, Store};

const FORMAT: u32 = 1;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Named {
    format: u32,
    pub(super) reference: String,
    pub(super) digest: Digest,
    pub(super) key: String,
    pub(super) config: ImageConfig,
    /// Blobs that it was made from, as far as they are kept.
    pub(super) blobs: Vec<Digest>,
}

/// An image with a name, for listings.
#[derive(Debug, Clone, Serialize)]
pub struct ListedImage {
    /// Its complete name.
    pub reference: String,
    /// The manifest's digest.
    pub digest: String,
    /// The cache's.
    pub key: String,
    /// Where its file is.
    pub path: PathBuf,
    /// What it takes of the disk.
    pub disk_bytes: u64,
    /// How its commands run.
    pub config: ImageConfig,
    /// When its name was given or used last.
    #[serde(skip)]
    pub last_use: Option<SystemTime>,
    /// Whether its file is there.
    pub present: bool,
}

/// What [`collect_garbage`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Collected {
    /// Images without a name.
    pub images: u64,
    /// Blobs of no image, and downloads that were broken off.
    pub blobs: u64,
    /// Disk space.
    pub bytes: u64,
}

fn dir(store: &Store) -> Result<PathBuf, Error> {
    let dir = store.root().join("names");
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    Ok(dir)
}

pub(super) fn blobs_dir(store: &Store) -> Result<PathBuf, Error> {
    let dir = store.root().join("blobs");
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    Ok(dir)
}

fn path(store: &Store, reference: &str) -> Result<PathBuf, Error> {
    Ok(dir(store)?.join(format!("{}.json", Inputs::new("name").with("reference", reference).key().short())))
}

/// Held while images are added: nothing they need is removed meanwhile.
pub(super) fn adding(store: &Store) -> Result<File, Error> {
    let path = dir(store)?.join("lock");
    let lock = open_lock(&path)?;
    lock.lock_shared().map_err(Error::io("lock", &path))?;
    Ok(lock)
}

/// Held while garbage is collected.
fn collecting(store: &Store) -> Result<File, Error> {
    let path = dir(store)?.join("lock");
    let lock = open_lock(&path)?;
    lock.lock().map_err(Error::io("lock", &path))?;
    Ok(lock)
}

fn open_lock(path: &Path) -> Result<File, Error> {
    File::options().create(true).truncate(false).write(true).open(path).map_err(Error::io("open", path))
}

/// Gives an image its name, taking it from another.
pub(super) fn name(
    store: &Store,
    reference: &Reference,
    digest: &Digest,
    built: &build::Built,
    blobs: Vec<Digest>,
) -> Result<(), Error> {
    let named = Named {
        format: FORMAT,
        reference: reference.to_string(),
        digest: digest.clone(),
        key: built.key.to_string(),
        config: built.config.clone(),
        blobs,
    };
    let path = path(store, &named.reference)?;
    let new = path.with_extension(format!("new-{}-{:?}", std::process::id(), std::thread::current().id()));
    let text = serde_json::to_vec_pretty(&named).map_err(io::Error::from);
    let written = text.and_then(|text| {
        fs::write(&new, text)?;
        File::open(&new)?.sync_all()
    });
    written.map_err(Error::io("write", &new))?;
    fs::rename(&new, &path).map_err(Error::io("replace", &path))
}

/// The image of this name, if it is here and whole.
pub(super) fn find(store: &Store, reference: &Reference) -> Result<Option<ReadyImage>, Error> {
    let exact = read(&path(store, &reference.to_string())?)?;
    let named = match (exact, reference.digest()) {
        (Some(named), _) => Some(named),
        // It may have come by a tag of the same repository.
        (None, Some(digest)) => all(store)?.into_iter().find(|named| {
            let same = Reference::parse(&named.reference).is_ok_and(|other| {
                other.registry() == reference.registry() && other.repository() == reference.repository()
            });
            same && named.digest.as_str() == digest
        }),
        (None, None) => None,
    };
    let Some(named) = named else { return Ok(None) };
    let Some(key) = Key::parse(&named.key) else { return Ok(None) };
    let Ok(Some(dir)) = store.lookup(Kind::Oci, &key) else { return Ok(None) };
    if build::check(&dir).is_err() {
        return Ok(None);
    }
    store.note_use(Kind::Oci, &key);
    Ok(Some(ReadyImage {
        reference: reference.clone(),
        digest: named.digest.to_string(),
        path: dir.join(build::FILE),
        key,
        config: named.config,
    }))
}

/// All named images, by name.
///
/// # Errors
/// If the cache cannot be read.
pub fn list(store: &Store) -> Result<Vec<ListedImage>, Error> {
    let mut listed = Vec::new();
    for named in all(store)? {
        let key = Key::parse(&named.key);
        let dir = key.as_ref().and_then(|key| store.lookup(Kind::Oci, key).ok().flatten());
        let disk_bytes = match &key {
            Some(key) if dir.is_some() => store.disk_bytes(Kind::Oci, key)?,
            _ => 0,
        };
        listed.push(ListedImage {
            present: dir.is_some(),
            path: dir.unwrap_or_default().join(build::FILE),
            disk_bytes,
            last_use: key.and_then(|key| store.last_use(Kind::Oci, &key)),
            reference: named.reference,
            digest: named.digest.to_string(),
            key: named.key,
            config: named.config,
        });
    }
    listed.sort_by(|a, b| a.reference.cmp(&b.reference));
    Ok(listed)
}

/// Takes a name away; `false` where there is no such name. [`collect_garbage`] gives the space back.
///
/// # Errors
/// If the cache cannot be written.
pub fn remove(store: &Store, reference: &Reference) -> Result<bool, Error> {
    let path = path(store, &reference.to_string())?;
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(Error::io("remove", &path)(error)),
    }
}

/// Removes images that have no name and blobs of no image. Guests that run keep the files they have open.
///
/// # Errors
/// If the cache cannot be written.
pub fn collect_garbage(store: &Store) -> Result<Collected, Error> {
    let _lock = collecting(store)?;
    let named = all(store)?;
    let mut collected = Collected::default();
    for key in store.keys(Kind::Oci)? {
        if !named.iter().any(|one| one.key == key.as_str()) {
            let bytes = store.disk_bytes(Kind::Oci, &key)?;
            if store.remove(Kind::Oci, &key)? {
                collected.images += 1;
                collected.bytes += bytes;
            }
        }
    }
    let blobs = blobs_dir(store)?;
    for entry in fs::read_dir(&blobs).map_err(Error::io("list", &blobs))? {
        let entry = entry.map_err(Error::io("list", &blobs))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if named.iter().flat_map(|one| &one.blobs).any(|digest| digest.hex() == name) {
            continue;
        }
        let bytes = entry.metadata().map_or(0, |file| file.len());
        if fs::remove_file(entry.path()).is_ok() {
            collected.blobs += 1;
            collected.bytes += bytes;
        }
    }
    Ok(collected)
}

/// All records that can be read.
fn all(store: &Store) -> Result<Vec<Named>, Error> {
    let dir = dir(store)?;
    let mut named = Vec::new();
    for entry in fs::read_dir(&dir).map_err(Error::io("list", &dir))? {
        let path = entry.map_err(Error::io("list", &dir))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            named.extend(read(&path)?);
        }
    }
    Ok(named)
}

/// A record; `None` where there is none or one of another version, which is as good as none.
fn read(path: &Path) -> Result<Option<Named>, Error> {
    match fs::read(path) {
        Ok(text) => Ok(serde_json::from_slice(&text).ok().filter(|named: &Named| named.format == FORMAT)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("read", path)(error)),
    }
}
