//! The cache of built artefacts: `<root>/<kind>/<key>/…`. An entry is complete or absent: it is built in a
//! temporary directory of the same file system, fsync'ed and renamed. Locks are flock(2), so that the kernel
//! drops them however a builder dies. Knows nothing of what the artefacts are.
//!
//! ```text
//! <root>/tmp/gate                    held while a temporary directory is made or swept
//! <root>/tmp/<name>/                 one build; its owner holds <name>.alive, a dead one's is swept
//! <root>/<kind>/<key>.lock           held by the one process that builds <key>
//! <root>/<kind>/<key>/record.json    names, sizes and digests of the files beside it
//! ```

use std::fmt::Display;
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use crate::digest::{self, Key};
use crate::error::Error;
use crate::progress::{Progress, Silent};

#[cfg(test)]
mod tests;

const RECORD: &str = "record.json";
const RECORD_FORMAT: u32 = 1;

/// What an entry of the cache is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A guest kernel: `vmlinux`, `System.map`.
    Kernel,
    /// A root file system: `root.erofs`.
    Image,
    /// The disk that carries our PID 1: `agent.erofs`.
    Agent,
    /// An image by name, made of layers: `root.erofs`, `accounts.json`.
    Oci,
    /// A frozen microVM, ready to be cloned: `memory`, `state`.
    Template,
}

impl Kind {
    /// All of them, in the order of their names.
    pub const ALL: [Self; 5] = [Self::Agent, Self::Image, Self::Kernel, Self::Oci, Self::Template];

    /// The directory's name, and the word for messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Image => "image",
            Self::Agent => "agent",
            Self::Oci => "oci",
            Self::Template => "template",
        }
    }
}

/// One complete entry, as its record describes it.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is.
    pub kind: Kind,
    /// Its name in the cache.
    pub key: Key,
    /// Where its files are.
    pub dir: PathBuf,
    /// Size of all its files.
    pub bytes: u64,
    /// What it was made from: packages with versions, compiler and so on, for people.
    pub made_from: Vec<String>,
}

/// The cache directory.
#[derive(Debug, Clone)]
pub struct Store {
    root: PathBuf,
}

/// Where a build writes. `out` becomes the entry; `scratch` disappears with the build.
#[derive(Debug)]
pub(crate) struct Workplace {
    pub(crate) out: PathBuf,
    pub(crate) scratch: PathBuf,
    dir: PathBuf,
    alive: PathBuf,
    _lock: Lock,
}

/// A flock(2) on a file, given back when dropped. Closing the file would not do: a process that another thread
/// forks has a copy of the descriptor until it calls exec, and with it the lock.
#[derive(Debug)]
struct Lock(File);

impl Drop for Lock {
    fn drop(&mut self) {
        // Where it fails, the last copy's end gives it back.
        let _ = self.0.unlock();
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    format: u32,
    files: Vec<RecordedFile>,
    made_from: Vec<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct RecordedFile {
    name: String,
    bytes: u64,
    /// Absent where the file has a digest of its own, made for its size: a memory image of gigabytes, mostly
    /// holes.
    sha256: Option<String>,
}

impl Store {
    /// The user's cache: `$PEREGRINE_CACHE`, else `$XDG_CACHE_HOME/peregrine`, else `$HOME/.cache/peregrine`.
    pub fn open() -> Result<Self, Error> {
        // The XDG base directory specification says to ignore relative and empty values.
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let root = std::env::var_os("PEREGRINE_CACHE")
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
            .or_else(|| absolute("XDG_CACHE_HOME").map(|dir| dir.join("peregrine")))
            .or_else(|| absolute("HOME").map(|dir| dir.join(".cache/peregrine")))
            .ok_or(Error::NoCacheDir)?;
        Self::at(&root)
    }

    /// A cache at `root`, made if absent.
    pub fn at(root: &Path) -> Result<Self, Error> {
        fs::create_dir_all(root).map_err(Error::io("create the cache", root))?;
        // Absolute, because build tools run elsewhere and messages should be paths to copy.
        let root = root.canonicalize().map_err(Error::io("resolve the cache", root))?;
        Ok(Self { root })
    }

    /// The cache directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// All complete entries of a kind, damaged ones left out, by key.
    pub fn entries(&self, kind: Kind) -> Result<Vec<Entry>, Error> {
        let sound = |key| self.entry(kind, key).ok().flatten();
        Ok(self.keys(kind)?.iter().filter_map(sound).collect())
    }

    /// The keys of all entries of a kind, damaged ones too, in order.
    pub fn keys(&self, kind: Kind) -> Result<Vec<Key>, Error> {
        let names = names_in(&self.root.join(kind.name()))?;
        Ok(names.iter().filter_map(|name| name.to_str().and_then(Key::parse)).collect())
    }

    /// One entry, as its record describes it; `None` if there is none, `Error::Corrupt` if it is damaged.
    pub fn entry(&self, kind: Kind, key: &Key) -> Result<Option<Entry>, Error> {
        let Some(record) = self.record(kind, key)? else { return Ok(None) };
        let bytes = record.files.iter().map(|file| file.bytes).sum();
        let dir = self.entry_dir(kind, key);
        Ok(Some(Entry { kind, key: key.clone(), dir, bytes, made_from: record.made_from }))
    }

    /// Notes that an entry is used now. A cache that cannot be written to is no reason to fail.
    pub fn note_use(&self, kind: Kind, key: &Key) {
        let record = File::open(self.entry_dir(kind, key).join(RECORD));
        let _ = record.and_then(|record| record.set_modified(SystemTime::now()));
    }

    /// When an entry was made or used last; `None` if there is no record of it.
    pub fn last_use(&self, kind: Kind, key: &Key) -> Option<SystemTime> {
        self.entry_dir(kind, key).join(RECORD).metadata().and_then(|record| record.modified()).ok()
    }

    /// What an entry takes of the disk: the blocks of its files, whose holes take none.
    pub fn disk_bytes(&self, kind: Kind, key: &Key) -> Result<u64, Error> {
        let dir = self.entry_dir(kind, key);
        let blocks = |name| dir.join(name).symlink_metadata().map_or(0, |file| file.blocks());
        // In units of 512 bytes, whatever the file system's are (stat(2)).
        Ok(names_in(&dir)?.iter().map(blocks).sum::<u64>() * 512)
    }

    /// Reads every byte of an entry and compares with its record; `false` where there is no such entry.
    pub fn verify(&self, kind: Kind, key: &Key) -> Result<bool, Error> {
        let Some(record) = self.record(kind, key)? else { return Ok(false) };
        let dir = self.entry_dir(kind, key);
        for recorded in &record.files {
            let file = dir.join(&recorded.name);
            let sha256 = digest::of_file(&file).map_err(Error::io("read", &file))?;
            if let Some(wanted) = recorded.sha256.as_ref().filter(|wanted| **wanted != sha256) {
                let reason = format!("its SHA-256 is {sha256}, recorded is {wanted}");
                return Err(Error::Corrupt { file, dir, reason });
            }
        }
        Ok(true)
    }

    /// Deletes an entry, complete or not; `false` where there is none. Whoever has its files open keeps them.
    pub fn remove(&self, kind: Kind, key: &Key) -> Result<bool, Error> {
        let dir = self.entry_dir(kind, key);
        let _lock = self.lock(kind, key, &mut Silent)?;
        let existed = dir.exists();
        if existed {
            self.discard(&dir)?;
        }
        Ok(existed)
    }

    /// The directory of a complete entry whose files have the recorded sizes; `None` if there is none.
    /// A damaged one is `Error::Corrupt`.
    pub(crate) fn lookup(&self, kind: Kind, key: &Key) -> Result<Option<PathBuf>, Error> {
        Ok(self.record(kind, key)?.map(|_| self.entry_dir(kind, key)))
    }

    /// The entry, built by `build` if there is none or if it is damaged. `check` is the caller's cheap test
    /// of an existing entry; `build` fills `Workplace::out` and returns what it was made from.
    pub(crate) fn get_or_build<E: From<Error> + Display>(
        &self,
        kind: Kind,
        key: &Key,
        progress: &mut dyn Progress,
        check: impl Fn(&Path) -> Result<(), E>,
        build: impl FnOnce(&Workplace, &mut dyn Progress) -> Result<Vec<String>, E>,
    ) -> Result<PathBuf, E> {
        let sound = || -> Result<Option<PathBuf>, E> {
            let dir = self.lookup(kind, key)?;
            dir.as_deref().map_or(Ok(()), &check)?;
            Ok(dir)
        };
        if let Ok(Some(dir)) = sound() {
            return Ok(dir);
        }
        let _lock = self.lock(kind, key, progress)?;
        // Another process may have built it while this one waited.
        match sound() {
            Ok(Some(dir)) => return Ok(dir),
            Ok(None) => {}
            Err(error) => {
                progress.message(&format!("building this {} again: {error}", kind.name()));
                self.discard(&self.entry_dir(kind, key))?;
            }
        }
        let place = self.workplace(kind)?;
        let made_from = build(&place, progress)?;
        write_record(&place.out, kind, made_from)?;
        Ok(self.publish(&place.out, kind, key)?)
    }

    /// The template of this key, made by `build` (into the directory it is given) if there is none, or if
    /// `check` refuses the one there is.
    ///
    /// # Errors
    /// What `build` said, or what is wrong with the cache.
    pub fn template<E: From<Error> + Display>(
        &self,
        key: &Key,
        progress: &mut dyn Progress,
        check: impl Fn(&Path) -> Result<(), E>,
        build: impl FnOnce(&Path, &mut dyn Progress) -> Result<Vec<String>, E>,
    ) -> Result<PathBuf, E> {
        self.get_or_build(Kind::Template, key, progress, check, |place, progress| build(&place.out, progress))
    }

    /// A directory of our own for a build, after sweeping those of builders that died.
    pub(crate) fn workplace(&self, kind: Kind) -> Result<Workplace, Error> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let tmp = self.root.join("tmp");
        create_dir(&tmp)?;
        let _gate = locked(&tmp.join("gate"))?;
        sweep(&tmp)?;

        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{}-{}-{count}", kind.name(), std::process::id());
        let (dir, alive) = (tmp.join(&name), tmp.join(format!("{name}.alive")));
        let lock = locked(&alive)?;
        let (out, scratch) = (dir.join("out"), dir.join("scratch"));
        create_dir(&out)?;
        create_dir(&scratch)?;
        Ok(Workplace { out, scratch, dir, alive, _lock: lock })
    }

    /// Makes `out` the entry. The order is the promise: contents, then directory, then name, then the name's
    /// directory, each on disk before the next, so that no crash leaves a name with missing contents.
    fn publish(&self, out: &Path, kind: Kind, key: &Key) -> Result<PathBuf, Error> {
        for name in names_in(out)? {
            sync(&out.join(name))?;
        }
        sync(out)?;
        let dir = self.entry_dir(kind, key);
        fs::rename(out, &dir).map_err(Error::io("move the finished build to", &dir))?;
        sync(&self.root.join(kind.name()))?;
        Ok(dir)
    }

    /// The record of an entry whose files all have their recorded size; `None` where there is no entry.
    fn record(&self, kind: Kind, key: &Key) -> Result<Option<Record>, Error> {
        let dir = self.entry_dir(kind, key);
        let path = dir.join(RECORD);
        let corrupt =
            |file: &Path, reason: String| Error::Corrupt { file: file.to_owned(), dir: dir.clone(), reason };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !dir.exists() => return Ok(None),
            Err(error) => return Err(corrupt(&path, error.to_string())),
        };
        let record: Record =
            serde_json::from_slice(&text).map_err(|error| corrupt(&path, error.to_string()))?;
        if record.format != RECORD_FORMAT {
            return Err(corrupt(&path, format!("unknown format {}", record.format)));
        }
        for recorded in &record.files {
            let file = dir.join(&recorded.name);
            match fs::symlink_metadata(&file) {
                Ok(found) if found.len() == recorded.bytes => {}
                Ok(found) => {
                    let reason = format!("it has {} bytes, recorded are {}", found.len(), recorded.bytes);
                    return Err(corrupt(&file, reason));
                }
                Err(error) => return Err(corrupt(&file, error.to_string())),
            }
        }
        Ok(Some(record))
    }

    /// Takes the build lock of a key, saying so if that means to wait.
    fn lock(&self, kind: Kind, key: &Key, progress: &mut dyn Progress) -> Result<Lock, Error> {
        let dir = self.root.join(kind.name());
        create_dir(&dir)?;
        let path = dir.join(format!("{key}.lock"));
        let file = open_lock(&path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                progress
                    .message(&format!("another process is building this {}; waiting for it", kind.name()));
                file.lock().map_err(Error::io("lock", &path))?;
            }
            Err(TryLockError::Error(error)) => return Err(Error::io("lock", &path)(error)),
        }
        Ok(Lock(file))
    }

    /// Removes an entry so that a crash in the middle leaves no half of it under its name.
    fn discard(&self, dir: &Path) -> Result<(), Error> {
        let place = self.workplace(Kind::Image)?;
        let target = place.scratch.join("discarded");
        fs::rename(dir, &target).map_err(Error::io("remove", dir))
        // The workplace's end deletes it.
    }

    fn entry_dir(&self, kind: Kind, key: &Key) -> PathBuf {
        self.root.join(kind.name()).join(key.as_str())
    }
}

impl Drop for Workplace {
    fn drop(&mut self) {
        // Best effort: what stays is swept by the next build, because the lock goes with us.
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_file(&self.alive);
    }
}

/// Removes what builders that no longer live left in `tmp`. The caller holds the gate.
fn sweep(tmp: &Path) -> Result<(), Error> {
    let names = names_in(tmp)?;
    for name in names.iter().filter_map(|name| name.to_str()) {
        let build = name.strip_suffix(".alive").unwrap_or(name);
        if build == "gate" {
            continue;
        }
        let alive = tmp.join(format!("{build}.alive"));
        let living =
            File::open(&alive).is_ok_and(|file| matches!(file.try_lock(), Err(TryLockError::WouldBlock)));
        if !living {
            let _ = fs::remove_dir_all(tmp.join(build));
            let _ = fs::remove_file(&alive);
        }
    }
    Ok(())
}

fn write_record(out: &Path, kind: Kind, made_from: Vec<String>) -> Result<(), Error> {
    let mut files = Vec::new();
    for name in names_in(out)? {
        let path = out.join(&name);
        let bytes = path.metadata().map_err(Error::io("read", &path))?.len();
        let own_digest = kind == Kind::Template && name == "memory";
        let sha256 = (!own_digest).then(|| digest::of_file(&path)).transpose();
        let sha256 = sha256.map_err(Error::io("read", &path))?;
        files.push(RecordedFile { name: name.to_string_lossy().into_owned(), bytes, sha256 });
    }
    let path = out.join(RECORD);
    let record = Record { format: RECORD_FORMAT, files, made_from };
    let text =
        serde_json::to_vec_pretty(&record).map_err(io::Error::from).map_err(Error::io("encode", &path))?;
    fs::write(&path, text).map_err(Error::io("write", &path))
}

/// Names in `dir`, sorted; none if it does not exist.
fn names_in(dir: &Path) -> Result<Vec<std::ffi::OsString>, Error> {
    let listing = match fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io("list", dir)(error)),
    };
    let names: io::Result<Vec<_>> = listing.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names.map_err(Error::io("list", dir))?;
    names.sort();
    Ok(names)
}

fn create_dir(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir).map_err(Error::io("create", dir))
}

fn open_lock(path: &Path) -> Result<File, Error> {
    File::options().create(true).truncate(false).write(true).open(path).map_err(Error::io("open", path))
}

fn locked(path: &Path) -> Result<Lock, Error> {
    let file = open_lock(path)?;
    file.lock().map_err(Error::io("lock", path))?;
    Ok(Lock(file))
}

/// fsync, which works on directories opened for reading too.
fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(Error::io("write to disk", path))
}
