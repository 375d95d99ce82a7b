//! Downloads layers into the cache's `blobs`, several at a time: `<hex>.part` while it grows, `<hex>` when its
//! digest is right. A download that broke off goes on where it stopped, in this process or a later one.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io::{self, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sha2::{Digest as _, Sha256};

use super::http::Failure;
use super::{ATTEMPTS, FIRST_PAUSE, Repository, patience, unique_layers};
use crate::digest::hex;
use crate::error::Error;
use crate::oci::manifest::{Descriptor, Digest, Manifest};
use crate::progress::Progress;

/// Downloads at a time; more would only share the same wire.
const PARALLEL: usize = 4;
const CHUNK_BYTES: usize = 128 * 1024;
const PROGRESS_INTERVAL: Duration = Duration::from_millis(10);

/// Where a blob lies when it is complete.
pub(in crate::oci) fn path(dir: &Path, digest: &Digest) -> PathBuf {
    dir.join(digest.hex())
}

/// What the downloads share.
struct Downloads<'d> {
    repository: &'d Repository,
    dir: &'d Path,
    waiting: Mutex<VecDeque<&'d Descriptor>>,
    done_bytes: AtomicU64,
    stop: AtomicBool,
    first_error: Mutex<Option<Error>>,
}

/// Fetches the layers that `dir` does not have.
pub(in crate::oci) fn download(
    repository: &Repository,
    manifest: &Manifest,
    dir: &Path,
    progress: &mut dyn Progress,
) -> Result<(), Error> {
    let here =
        |layer: &&Descriptor| path(dir, &layer.digest).metadata().is_ok_and(|file| file.len() == layer.size);
    let waiting: VecDeque<_> = unique_layers(manifest).into_iter().filter(|layer| !here(layer)).collect();
    if waiting.is_empty() {
        return Ok(());
    }
    let total: u64 = waiting.iter().map(|layer| layer.size).sum();
    let workers = waiting.len().min(PARALLEL);
    progress.begin("pull layers", Some(total.div_ceil(1 << 20)), "MiB");
    let downloads = Downloads {
        repository,
        dir,
        waiting: Mutex::new(waiting),
        done_bytes: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        first_error: Mutex::new(None),
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(|| downloads.work())).collect();
        while !workers.iter().all(|worker| worker.is_finished()) {
            std::thread::sleep(PROGRESS_INTERVAL);
            progress.advance(downloads.done_bytes.load(Ordering::Relaxed) >> 20);
        }
    });
    let error = downloads.first_error.into_inner().unwrap_or_else(PoisonError::into_inner);
    error.map_or(Ok(()), Err)?;
    progress.advance(total.div_ceil(1 << 20));
    progress.end();
    Ok(())
}

impl Downloads<'_> {
    fn work(&self) {
        while !self.stop.load(Ordering::Relaxed) {
            let next = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).pop_front();
            let Some(layer) = next else { return };
            if let Err(error) = self.layer(layer) {
                self.stop.store(true, Ordering::Relaxed);
                self.first_error.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            }
        }
    }

    fn layer(&self, layer: &Descriptor) -> Result<(), Error> {
        let lock_path = self.dir.join(format!("{}.lock", layer.digest.hex()));
        let lock = File::options().create(true).truncate(false).write(true).open(&lock_path);
        let lock = lock.map_err(Error::io("open", &lock_path))?;
        // Another process may be at it; what it fetches need not be fetched again.
        lock.lock().map_err(Error::io("lock", &lock_path))?;
        let complete = path(self.dir, &layer.digest);
        if complete.metadata().is_ok_and(|file| file.len() == layer.size) {
            self.done_bytes.fetch_add(layer.size, Ordering::Relaxed);
            return Ok(());
        }
        let part_path = complete.with_extension("part");
        let mut part = Part::open(&part_path, layer.size).map_err(Error::io("open", &part_path))?;
        self.done_bytes.fetch_add(part.bytes, Ordering::Relaxed);
        let mut begun_before = part.bytes > 0;
        loop {
            self.fill(layer, &mut part)?;
            if part.bytes < layer.size {
                // Another worker has failed; what there is stays for the next time.
                return Ok(());
            }
            let found = hex(&part.hasher.clone().finalize());
            if found == layer.digest.hex() {
                break;
            }
            if !begun_before {
                let _ = fs::remove_file(&part_path);
                return Err(self
                    .repository
                    .broken(format!("sends layer {} with SHA-256 {found}", layer.digest)));
            }
            // What an earlier download left may be to blame.
            begun_before = false;
            self.done_bytes.fetch_sub(part.bytes, Ordering::Relaxed);
            part.restart().map_err(Error::io("empty", &part_path))?;
        }
        fs::rename(&part_path, &complete).map_err(Error::io("complete", &complete))?;
        let _ = fs::remove_file(&lock_path);
        Ok(())
    }

    /// Asks until the part is as long as the layer. An attempt that brought something does not count.
    fn fill(&self, layer: &Descriptor, part: &mut Part) -> Result<(), Error> {
        let (mut failures, mut pause) = (0, FIRST_PAUSE);
        while part.bytes < layer.size && !self.stop.load(Ordering::Relaxed) {
            let before = part.bytes;
            let Err(failure) = self.attempt(layer, part) else { continue };
            if part.bytes > before {
                (failures, pause) = (0, FIRST_PAUSE);
            }
            failures += 1;
            if failures >= ATTEMPTS || !failure.may_pass() {
                return Err(self.repository.error(failure));
            }
            std::thread::sleep(patience(&failure, pause).map_err(|failure| self.repository.error(failure))?);
            pause *= 2;
        }
        Ok(())
    }

    fn attempt(&self, layer: &Descriptor, part: &mut Part) -> Result<(), Failure> {
        let url = format!("{}/blobs/{}", self.repository.url, layer.digest);
        let range = format!("bytes={}-", part.bytes);
        let headers: &[(&str, &str)] = if part.bytes > 0 { &[("range", &range)] } else { &[] };
        let answer = self.repository.get(&url, headers)?;
        let local = |error: io::Error| Failure::Wrong(format!("cannot write its layer: {error}"));
        if part.bytes > 0 && answer.status.as_u16() != 206 {
            // It sends everything again.
            self.done_bytes.fetch_sub(part.bytes, Ordering::Relaxed);
            part.restart().map_err(local)?;
        } else if part.bytes > 0 {
            let right = format!("bytes {}-", part.bytes);
            if !answer.header("content-range").is_some_and(|range| range.starts_with(&right)) {
                return Err(Failure::Wrong("it sends another part of a layer than was asked for".to_owned()));
            }
        }
        let mut body = answer.body.into_reader();
        let mut chunk = vec![0; CHUNK_BYTES];
        while part.bytes < layer.size && !self.stop.load(Ordering::Relaxed) {
            let most = usize::try_from(layer.size - part.bytes).unwrap_or(usize::MAX).min(chunk.len());
            match body.read(&mut chunk[..most]) {
                Ok(0) => return Err(Failure::Broken(format!("layer {} ends too early", layer.digest))),
                Ok(read) => {
                    part.append(&chunk[..read]).map_err(local)?;
                    self.done_bytes.fetch_add(read as u64, Ordering::Relaxed);
                }
                Err(error) => {
                    return Err(Failure::Broken(format!("layer {} breaks off: {error}", layer.digest)));
                }
            }
        }
        Ok(())
    }
}

/// A blob that is not complete: its file and the digest of what there is.
struct Part {
    file: File,
    hasher: Sha256,
    bytes: u64,
}

impl Part {
    /// Goes on with what an earlier download left.
    fn open(path: &Path, most_bytes: u64) -> io::Result<Self> {
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        let mut part = Self { file, hasher: Sha256::new(), bytes: 0 };
        if part.file.metadata()?.len() > most_bytes {
            part.restart()?;
        }
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match part.file.read(&mut chunk)? {
                0 => return Ok(part),
                read => {
                    part.hasher.update(&chunk[..read]);
                    part.bytes += read as u64;
                }
            }
        }
    }

    fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        (self.hasher, self.bytes) = (Sha256::new(), 0);
        Ok(())
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(())
    }
}
