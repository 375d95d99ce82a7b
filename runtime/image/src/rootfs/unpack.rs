//! Layers in, image out: decompresses, digests and bounds a layer while its entries go into the tree and its
//! contents into the image file. Nothing of it counts before [`Builder::finish`], and a layer whose digest or
//! size turns out wrong ends the build.

use std::fs::File;
use std::io::{self, BufRead as _, BufReader, BufWriter, Read, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use sha2::{Digest as _, Sha256};
use tar::EntryType;

use super::erofs::{self, BLOCK_BYTES};
use super::tar::{Member, TarError, TarStream};
use super::tree::{Body, Meta, Tree};
use crate::digest::hex;
use crate::error::Error;

const CHUNK_BYTES: usize = 256 * 1024;
/// Chunks between decompressing and taking apart, which run side by side.
const CHUNKS_AHEAD: usize = 4;
/// A file up to this size lies beside its inode: one read of the disk for both.
const SMALL_BYTES: u64 = 512;
/// All small contents are in memory until the end.
const SMALL_TOTAL_BYTES: u64 = 16 << 20;
/// zstd's window, which is memory: only `--ultra -22` and `--long=27` want more.
const ZSTD_WINDOW_LOG: u32 = 26;

/// What one image may make of its layers.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// Of all layers, decompressed.
    pub(crate) bytes: u64,
    /// Of all layers.
    pub(crate) entries: usize,
    /// Decompressed over compressed bytes of a layer, where the layer is larger than `ratio_from_bytes`.
    pub(crate) ratio: u64,
    /// Until here a layer may be as compressible as it likes: a file of zeros is no attack.
    pub(crate) ratio_from_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { bytes: 32 << 30, entries: 1_000_000, ratio: 200, ratio_from_bytes: 1 << 30 }
    }
}

/// What a layer is said to be; what is `None` is not known and not compared.
#[derive(Debug, Clone, Default)]
pub(crate) struct Expected {
    /// For messages.
    pub(crate) name: String,
    /// SHA-256 of the bytes as they are stored, and how many.
    pub(crate) stored: Option<(String, u64)>,
    /// SHA-256 of the decompressed bytes.
    pub(crate) diff_id: Option<String>,
}

/// An image being built.
#[derive(Debug)]
pub(crate) struct Builder {
    tree: Tree,
    path: PathBuf,
    out: BufWriter<File>,
    /// The next free one of the image file.
    block: u32,
    limits: Limits,
    entries: usize,
    bytes: u64,
    small_bytes: u64,
}

impl Builder {
    /// Begins the image file at `path`.
    pub(crate) fn create(path: &Path, limits: Limits) -> Result<Self, Error> {
        let file = File::options().read(true).write(true).create_new(true).open(path);
        let mut out = BufWriter::with_capacity(1 << 20, file.map_err(Error::io("create", path))?);
        out.write_all(&[0; BLOCK_BYTES as usize]).map_err(Error::io("write", path))?;
        let path = path.to_owned();
        Ok(Self { tree: Tree::new(), path, out, block: 1, limits, entries: 0, bytes: 0, small_bytes: 0 })
    }

    /// The next layer, lowest first: gzip, zstd or plain tar, told by its first bytes.
    pub(crate) fn layer(&mut self, stored: impl Read + Send, expected: &Expected) -> Result<(), Error> {
        let refuse = |reason: String| Error::Layer { layer: expected.name.clone(), reason };
        self.tree.next_layer();
        let limits = self.limits.clone();
        let bytes_left = limits.bytes.saturating_sub(self.bytes);
        let (chunks, incoming) = sync_channel(CHUNKS_AHEAD);
        let (taken, given) = std::thread::scope(|scope| {
            let size = expected.stored.as_ref().map(|(_, bytes)| *bytes);
            let giver = scope.spawn(move || give(stored, size, bytes_left, &limits, &chunks));
            let taken = self.take(Chunks::new(incoming));
            (taken, giver.join())
        });
        let stored = match given {
            Ok(given) => given.map_err(|error| refuse(error.to_string()))?,
            Err(_) => return Err(refuse("the decompressor failed".to_owned())),
        };
        let (diff_id, bytes) = taken.map_err(|error| match error {
            TarError::Io(error) => refuse(error.to_string()),
            TarError::Entry(name, reason) => {
                refuse(format!("entry {:?} {reason}", String::from_utf8_lossy(&name)))
            }
        })?;
        self.bytes += bytes;
        if let Some(wanted) = expected.stored.as_ref().filter(|wanted| **wanted != stored) {
            let ((wanted, wanted_bytes), (found, found_bytes)) = (wanted, stored);
            return Err(refuse(format!(
                "it has {found_bytes} bytes with SHA-256 {found}, the manifest says {wanted_bytes} bytes with {wanted}"
            )));
        }
        match expected.diff_id.as_ref().filter(|wanted| **wanted != diff_id) {
            Some(wanted) => {
                Err(refuse(format!("decompressed its SHA-256 is {diff_id}, the configuration says {wanted}")))
            }
            None => Ok(()),
        }
    }

    /// Makes sure that a directory exists, as container runtimes do for the working directory.
    pub(crate) fn ensure_directory(&mut self, path: &[u8]) -> Result<(), String> {
        self.tree.ensure_directory(path)
    }

    /// The contents of a small regular file of the image; `None` if it has none of that name and size.
    pub(crate) fn read(&mut self, path: &[u8], most_bytes: u64) -> io::Result<Option<Vec<u8>>> {
        match self.tree.lookup(path).map(|node| &node.body) {
            Some(Body::Small(bytes)) => Ok(Some(bytes.to_vec())),
            Some(&Body::File { block, bytes }) if bytes <= most_bytes => {
                self.out.flush()?;
                let mut contents = vec![0; bytes as usize];
                self.out.get_ref().read_exact_at(&mut contents, u64::from(block) * BLOCK_BYTES)?;
                Ok(Some(contents))
            }
            _ => Ok(None),
        }
    }

    /// Writes the tree around the contents.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let written = self.write();
        written.map_err(Error::io("write", &self.path))
    }

    fn write(&mut self) -> io::Result<()> {
        self.out.flush()?;
        let file = self.out.get_ref();
        let written = erofs::write(&self.tree, file, self.block)?;
        for id in written.unreachable {
            if let Body::File { block, bytes } = self.tree.node(id).body {
                forget(file, u64::from(block) * BLOCK_BYTES, bytes.next_multiple_of(BLOCK_BYTES))?;
            }
        }
        file.set_len(u64::from(written.blocks) * BLOCK_BYTES)
    }

    /// Takes a decompressed layer apart; gives its digest and size.
    fn take(&mut self, chunks: Chunks) -> Result<(String, u64), TarError> {
        let mut archive = TarStream::new(chunks);
        while let Some(member) = archive.next_member()? {
            self.entries += 1;
            if self.entries > self.limits.entries {
                let reason = format!("is one too many: an image may have {}", self.limits.entries);
                return Err(TarError::Entry(member.path, reason));
            }
            self.member(member, &mut archive)?;
        }
        Ok(archive.drain()?.finish())
    }

    fn member(&mut self, member: Member, archive: &mut TarStream<Chunks>) -> Result<(), TarError> {
        let refuse = |reason: String| TarError::Entry(member.path.clone(), reason);
        if Tree::is_whiteout(&member.path) {
            return self.tree.whiteout(&member.path).map_err(refuse);
        }
        let body = match member.kind {
            EntryType::Regular => self.contents(member.bytes, archive)?,
            EntryType::Directory => Body::Directory(Default::default()),
            EntryType::Symlink if member.link.is_empty() || member.link.contains(&0) => {
                return Err(refuse("is a symbolic link to nowhere".to_owned()));
            }
            EntryType::Symlink => Body::Symlink(member.link.as_slice().into()),
            EntryType::Link => return self.tree.link(&member.path, &member.link).map_err(refuse),
            EntryType::Char | EntryType::Block => {
                // 12 and 20 bits, as Linux has them.
                if member.major >= 1 << 12 || member.minor >= 1 << 20 {
                    return Err(refuse("is a device whose number cannot be".to_owned()));
                }
                let character = member.kind == EntryType::Char;
                Body::Device { character, major: member.major, minor: member.minor }
            }
            EntryType::Fifo => Body::Fifo,
            other => {
                return Err(refuse(format!(
                    "is of a kind that layers do not have ({:?})",
                    other.as_byte() as char
                )));
            }
        };
        let meta = Meta {
            mode: member.mode,
            uid: member.uid,
            gid: member.gid,
            mtime_s: member.mtime_s,
            xattrs: member.xattrs.into_iter().filter(|xattr| is_kept(&xattr.name)).collect(),
        };
        self.tree.put(&member.path, meta, body).map_err(|reason| TarError::Entry(member.path, reason))
    }

    fn contents(&mut self, bytes: u64, archive: &mut TarStream<Chunks>) -> Result<Body, TarError> {
        if bytes <= SMALL_BYTES && self.small_bytes + bytes <= SMALL_TOTAL_BYTES {
            self.small_bytes += bytes;
            let mut contents = vec![0; bytes as usize];
            archive.read_exact(&mut contents)?;
            return Ok(Body::Small(contents.into()));
        }
        let block = self.block;
        let blocks =
            u32::try_from(bytes.div_ceil(BLOCK_BYTES)).ok().and_then(|blocks| block.checked_add(blocks));
        self.block = blocks.ok_or_else(|| io::Error::other("it has more than 16 TiB"))?;
        io::copy(&mut archive.by_ref().take(bytes), &mut self.out)?;
        let padding = bytes.next_multiple_of(BLOCK_BYTES) - bytes;
        self.out.write_all(&[0; BLOCK_BYTES as usize][..padding as usize])?;
        Ok(Body::File { block, bytes })
    }
}

/// What EROFS stores, less what would tell the guest's overlay file system something.
fn is_kept(name: &[u8]) -> bool {
    !name.starts_with(b"trusted.overlay.") && !name.contains(&0) && erofs::xattr_index(name).is_some()
}

/// Zeros a range, as a hole where the file system has them: what a later layer hid must not stay readable.
fn forget(file: &File, at: u64, bytes: u64) -> io::Result<()> {
    use rustix::fs::{FallocateFlags, fallocate};
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    if bytes == 0 || fallocate(file, flags, at, bytes).is_ok() {
        return Ok(());
    }
    let zeros = vec![0; CHUNK_BYTES];
    let mut done = 0;
    while done < bytes {
        let part = (bytes - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..part as usize], at + done)?;
        done += part;
    }
    Ok(())
}

/// Decompresses and hands on; gives the digest and size of what it read.
fn give(
    stored: impl Read,
    size: Option<u64>,
    bytes_left: u64,
    limits: &Limits,
    chunks: &SyncSender<Vec<u8>>,
) -> io::Result<(String, u64)> {
    let mut stored = BufReader::with_capacity(CHUNK_BYTES, Digested::new(stored, size));
    let start = stored.fill_buf()?;
    let magic = [0, 1, 2, 3].map(|at| start.get(at).copied().unwrap_or(0));
    let mut total = 0_u64;
    // Whether all of it was wanted.
    let mut pass = |decoder: &mut dyn Read, read: &dyn Fn() -> u64| -> io::Result<bool> {
        loop {
            let mut chunk = vec![0; CHUNK_BYTES];
            let filled = fill(decoder, &mut chunk)?;
            total += filled as u64;
            if total > bytes_left {
                return Err(io::Error::other(format!(
                    "an image may have {} bytes decompressed, this has more",
                    limits.bytes
                )));
            }
            if total > limits.ratio_from_bytes && total / limits.ratio > read() {
                let ratio = limits.ratio;
                return Err(io::Error::other(format!("it grows more than {ratio}-fold when decompressed")));
            }
            chunk.truncate(filled);
            if filled == 0 {
                return Ok(true);
            }
            // Whoever stopped listening has the reason.
            if chunks.send(chunk).is_err() {
                return Ok(false);
            }
        }
    };
    let counter = std::sync::Arc::clone(&stored.get_ref().bytes);
    let read = move || counter.load(std::sync::atomic::Ordering::Relaxed);
    let all = match magic {
        [0x1f, 0x8b, ..] => pass(&mut flate2::bufread::MultiGzDecoder::new(&mut stored), &read)?,
        // A frame, or one of those to be skipped, which eStargz and others put first.
        [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => {
            let mut decoder = zstd::Decoder::with_buffer(&mut stored)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG)?;
            pass(&mut decoder, &read)?
        }
        _ => pass(&mut stored, &read)?,
    };
    if all {
        io::copy(&mut stored, &mut io::sink())?;
    }
    Ok(stored.into_inner().finish())
}

/// Reads until the buffer is full or the stream ends.
fn fill(reader: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match reader.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Digests and counts what is read, and no more than it should be.
struct Digested<R> {
    inner: R,
    hasher: Sha256,
    bytes: std::sync::Arc<std::sync::atomic::AtomicU64>,
    most_bytes: u64,
}

impl<R: Read> Digested<R> {
    fn new(inner: R, size: Option<u64>) -> Self {
        Self { inner, hasher: Sha256::new(), bytes: Default::default(), most_bytes: size.unwrap_or(u64::MAX) }
    }

    fn finish(self) -> (String, u64) {
        (hex(&self.hasher.finalize()), self.bytes.load(std::sync::atomic::Ordering::Relaxed))
    }
}

impl<R: Read> Read for Digested<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        let before = self.bytes.fetch_add(read as u64, std::sync::atomic::Ordering::Relaxed);
        if before + read as u64 > self.most_bytes {
            return Err(io::Error::other(format!(
                "it has more than the {} bytes that the manifest says",
                self.most_bytes
            )));
        }
        Ok(read)
    }
}

/// The other end of [`give`].
struct Chunks {
    incoming: Receiver<Vec<u8>>,
    chunk: Vec<u8>,
    at: usize,
    hasher: Sha256,
    bytes: u64,
}

impl Chunks {
    fn new(incoming: Receiver<Vec<u8>>) -> Self {
        Self { incoming, chunk: Vec::new(), at: 0, hasher: Sha256::new(), bytes: 0 }
    }

    fn finish(self) -> (String, u64) {
        (hex(&self.hasher.finalize()), self.bytes)
    }
}

impl Read for Chunks {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.chunk.len() {
            // The giver is gone: the end, or an error that it tells itself.
            let Ok(chunk) = self.incoming.recv() else { return Ok(0) };
            self.hasher.update(&chunk);
            self.bytes += chunk.len() as u64;
            (self.chunk, self.at) = (chunk, 0);
        }
        let part = (self.chunk.len() - self.at).min(buffer.len());
        buffer[..part].copy_from_slice(&self.chunk[self.at..self.at + part]);
        self.at += part;
        Ok(part)
    }
}
