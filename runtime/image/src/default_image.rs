//! The default root file system, made from Debian packages of the machine's own release.
//!
//! Two keys. The image's own is over its packages with their versions and all that is done to them; finding
//! it takes apt two seconds. So the recipe's key, over what is asked for and of which release, leads by a
//! small file to the image made last: later runs ask nothing. New package versions come with
//! `refresh_default_image`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::apt::{Apt, Choice};
use crate::digest::{Inputs, Key};
use crate::error::Error;
use crate::progress::Progress;
use crate::recipe;
use crate::store::{Kind, Store, Workplace};
use crate::unpack::Staging;
use crate::{furnish, inspect, mkfs};

const FILE: &str = "root.erofs";

/// The texts that decide what an image contains: whoever changes one makes a new image.
const SOURCES: &[&str] = &[
    include_str!("recipe.rs"),
    include_str!("unpack.rs"),
    include_str!("furnish.rs"),
    include_str!("mkfs.rs"),
];

/// A root file system image in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageArtifact {
    /// The EROFS file.
    pub path: PathBuf,
    /// Its name in the cache, a digest of all that it was made from.
    pub key: Key,
}

/// The default image: from the cache, or else built, which downloads some 30 MB.
pub fn default_image(store: &Store, progress: &mut dyn Progress) -> Result<ImageArtifact, Error> {
    let pointer = pointer(store)?;
    if let Some(key) = fs::read_to_string(&pointer).ok().and_then(|text| Key::parse(text.trim())) {
        match store.lookup(Kind::Image, &key) {
            Ok(Some(dir)) if check(&dir).is_ok() => return Ok(artifact(&dir, key)),
            // Damaged or deleted: the build below says so and replaces it.
            _ => {}
        }
    }
    refresh_default_image(store, progress)
}

/// The default image with the newest package versions that apt offers, built unless it is in the cache.
pub fn refresh_default_image(store: &Store, progress: &mut dyn Progress) -> Result<ImageArtifact, Error> {
    let mkfs_version = mkfs::version(progress)?;
    let planning = store.workplace(Kind::Image)?;
    let mut apt = Apt::in_dir(&planning.scratch)?;
    loop {
        let choices = chosen(&mut apt, progress)?;
        let key = image_key(&choices, &mkfs_version);
        let built = store.get_or_build(Kind::Image, &key, progress, check, |place, progress| {
            build(&apt, &choices, place, progress)
        });
        match built {
            Ok(dir) => {
                point(&pointer(store)?, &key)?;
                return Ok(artifact(&dir, key));
            }
            // The machine's lists may be older than the mirror, which then lacks what they name.
            Err(Error::ToolFailed { .. }) if apt.uses_machine_lists() => {
                progress.message("fetching fresh package lists");
                apt.update();
            }
            Err(error) => return Err(error),
        }
    }
}

/// The packages to unpack.
fn chosen(apt: &mut Apt, progress: &mut dyn Progress) -> Result<Vec<Choice>, Error> {
    let mut choices = apt.resolve(recipe::PACKAGES, progress)?;
    choices.retain(|choice| !recipe::NOT_UNPACKED.contains(&choice.name.as_str()));
    Ok(choices)
}

fn build(
    apt: &Apt,
    choices: &[Choice],
    place: &Workplace,
    progress: &mut dyn Progress,
) -> Result<Vec<String>, Error> {
    let debs = apt.download(choices, progress)?;
    let staging = Staging::new(&place.scratch.join("root"))?;
    unpack_all(&debs, choices.len(), &staging, progress)?;
    furnish::furnish(&staging, progress)?;
    progress.begin("write the image", None, "");
    mkfs::make(&place.out.join(FILE), staging.root(), progress)?;
    progress.end();
    Ok(choices.iter().map(Choice::to_string).collect())
}

fn unpack_all(
    debs: &Path,
    expected: usize,
    staging: &Staging,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let listing = fs::read_dir(debs).map_err(Error::io("list", debs))?;
    let mut files: Vec<PathBuf> = listing.filter_map(|entry| Some(entry.ok()?.path())).collect();
    // Always in one order, because later packages win.
    files.sort();
    if files.len() != expected {
        let missing = format!("brought {} packages of {expected}", files.len());
        return Err(Error::Incomplete { program: "apt-get download".to_owned(), missing });
    }
    progress.begin("unpack packages", Some(files.len() as u64), "packages");
    for (done, deb) in files.iter().enumerate() {
        staging.unpack_deb(deb)?;
        progress.advance(done as u64 + 1);
    }
    progress.end();
    Ok(())
}

fn image_key(choices: &[Choice], mkfs_version: &str) -> Key {
    let inputs = SOURCES.iter().fold(Inputs::new("image/1"), |inputs, source| inputs.with("source", source));
    let inputs = inputs.with("mkfs.erofs", mkfs_version);
    choices.iter().fold(inputs, |inputs, choice| inputs.with("package", choice.to_string())).key()
}

/// The file that names the image last made of this recipe for this release.
fn pointer(store: &Store) -> Result<PathBuf, Error> {
    let release = fs::read("/etc/os-release").unwrap_or_default();
    let inputs = SOURCES.iter().fold(Inputs::new("recipe/1"), |inputs, source| inputs.with("source", source));
    let key = inputs.with("release", release).key();
    let dir = store.root().join(Kind::Image.name());
    fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
    Ok(dir.join(format!("default-{}", key.short())))
}

/// Sets the pointer in one step; no fsync, because a lost one costs a look at apt.
fn point(pointer: &Path, key: &Key) -> Result<(), Error> {
    let new = pointer.with_extension(std::process::id().to_string());
    fs::write(&new, format!("{key}\n")).map_err(Error::io("write", &new))?;
    fs::rename(&new, pointer).map_err(Error::io("replace", pointer))
}

fn check(dir: &Path) -> Result<(), Error> {
    inspect::inspect_image(&dir.join(FILE)).map(|_| ())
}

fn artifact(dir: &Path, key: Key) -> ImageArtifact {
    ImageArtifact { path: dir.join(FILE), key }
}
