//! From an image's parts to an entry of the cache: its layers as one EROFS file, its accounts beside it. The
//! key covers the layers' contents and the working directory, so that the same layers, however compressed and
//! wherever they came from, are one image and one template.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::accounts::{self, Accounts};
use super::config::ImageConfig;
use super::manifest::{ConfigFile, Process};
use super::source::Image;
use crate::digest::{Inputs, Key};
use crate::error::Error;
use crate::inspect;
use crate::progress::Progress;
use crate::rootfs::{self, Builder, Limits};
use crate::store::{Kind, Store, Workplace};

pub(super) const FILE: &str = "root.erofs";
const ACCOUNTS_FILE: &str = "accounts.json";

/// A built image: its key, its file, its configuration.
pub(super) struct Built {
    pub(super) key: Key,
    pub(super) path: PathBuf,
    pub(super) config: ImageConfig,
}

/// Builds the image called `name` for messages, unless the cache has it.
pub(super) fn build(
    store: &Store,
    name: &str,
    image: &Image<'_>,
    progress: &mut dyn Progress,
) -> Result<Built, Error> {
    let bad = |why: String| Error::BadContent { image: name.to_owned(), why };
    let config = ConfigFile::parse(&image.config, image.layers.len()).map_err(bad)?;
    let process = config.config.clone().unwrap_or_default();
    let working_dir = working_dir(&process);
    let diff_ids: Vec<&str> = config.rootfs.diff_ids.iter().map(|id| id.hex()).collect();
    let inputs = Inputs::new("oci").with("format", rootfs::FORMAT).with("working directory", &working_dir);
    let key = diff_ids.iter().fold(inputs, |inputs, id| inputs.with("layer", id)).key();
    let dir = store.get_or_build(Kind::Oci, &key, progress, check, |place, progress| {
        unpack(image, &diff_ids, &working_dir, place, progress)?;
        Ok::<_, Error>(vec![format!("{name} ({})", image.digest), format!("{} layers", image.layers.len())])
    })?;
    let accounts = read_accounts(&dir)?;
    let user = accounts.user(process.user.as_deref().unwrap_or("")).map_err(bad)?;
    Ok(Built { key, path: dir.join(FILE), config: ImageConfig::new(process, working_dir, user) })
}

/// Whom `text` means in the image that lies at `dir`.
pub(super) fn user(dir: &Path, text: &str) -> Result<Result<accounts::User, String>, Error> {
    Ok(read_accounts(dir)?.user(text))
}

pub(super) fn check(dir: &Path) -> Result<(), Error> {
    inspect::inspect_image(&dir.join(FILE)).map(drop)
}

/// Absolute, as container runtimes take it.
fn working_dir(process: &Process) -> String {
    match process.working_dir.as_deref() {
        None | Some("") => "/".to_owned(),
        Some(dir) if dir.starts_with('/') => dir.to_owned(),
        Some(dir) => format!("/{dir}"),
    }
}

fn unpack(
    image: &Image<'_>,
    diff_ids: &[&str],
    working_dir: &str,
    place: &Workplace,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let path = place.out.join(FILE);
    let mut builder = Builder::create(&path, Limits::default())?;
    let total: u64 = image.layers.iter().map(|layer| layer.bytes).sum();
    progress.begin("unpack layers", Some(total.div_ceil(1 << 20)), "MiB");
    let mut done = 0;
    for (layer, diff_id) in image.layers.iter().zip(diff_ids) {
        let mut expected = layer.expected.clone();
        expected.diff_id = Some((*diff_id).to_owned());
        let stored = (layer.open)().map_err(|error| Error::Layer {
            layer: expected.name.clone(),
            reason: format!("it cannot be read: {error}"),
        })?;
        builder.layer(stored, &expected)?;
        done += layer.bytes;
        progress.advance(done >> 20);
    }
    progress.end();
    // One that a file of the image is in the way of is the command's error, not the image's.
    let _ = builder.ensure_directory(working_dir.as_bytes());
    let accounts = accounts(&mut builder).map_err(Error::io("read accounts from", &path))?;
    let json = place.out.join(ACCOUNTS_FILE);
    let text = serde_json::to_vec(&accounts).map_err(io::Error::from).map_err(Error::io("encode", &json))?;
    fs::write(&json, text).map_err(Error::io("write", &json))?;
    builder.finish()?;
    inspect::inspect_image(&path).map(drop)
}

fn accounts(builder: &mut Builder) -> io::Result<Accounts> {
    let mut text = |path: &[u8]| builder.read(path, accounts::MOST_BYTES).map(Option::unwrap_or_default);
    Ok(Accounts::parse(&text(b"etc/passwd")?, &text(b"etc/group")?))
}

fn read_accounts(dir: &Path) -> Result<Accounts, Error> {
    let path = dir.join(ACCOUNTS_FILE);
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Corrupt {
        file: path,
        dir: dir.to_owned(),
        reason: error.to_string(),
    })
}

/// Builds an image from bare layers, for tests and fuzzing: no manifest, no digests to compare.
///
/// # Errors
/// What is wrong with a layer.
#[doc(hidden)]
pub fn build_layers(
    path: &Path,
    layers: &[&[u8]],
    most_bytes: u64,
    most_entries: usize,
) -> Result<(), Error> {
    let limits = Limits {
        bytes: most_bytes,
        entries: most_entries,
        ratio_from_bytes: most_bytes / 4,
        ..Limits::default()
    };
    let mut builder = Builder::create(path, limits)?;
    for (number, layer) in layers.iter().enumerate() {
        let expected = rootfs::Expected { name: number.to_string(), ..rootfs::Expected::default() };
        builder.layer(io::Cursor::new(layer).by_ref(), &expected)?;
    }
    builder.finish()
}
