//! The writer of one tenant's log. The only code of this room that writes.

use crate::chain::{self, ChainKey, Link};
use crate::checkpoint::{Checkpoint, SigningKey};
use crate::entry::{ENTRY_MAX_BYTES, Entry, GENESIS};
use crate::error::AuditError;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io::{BufRead as _, BufReader, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The event that [`Log::open`] records when it has cut a torn line off; `data.bytes` says how much.
pub const RECOVERED: &str = "log.recovered";

/// Where the chain stood at a checkpoint, `state` on disk: all that is needed to go on from there.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    tenant: String,
    entries: u64,
    bytes: u64,
    head: String,
    digest: String,
    key: String,
}

/// The open log of one tenant.
#[derive(Debug)]
pub struct Log {
    dir: PathBuf,
    file: Arc<File>,
    tenant: String,
    key: ChainKey,
    entries: u64,
    bytes: u64,
    head: String,
    digest: Link,
    /// Entries at the last [`Log::seal`].
    sealed: u64,
    poisoned: bool,
}

impl Log {
    /// Opens `tenant`'s log in `dir`, or begins it. One process at a time may have it open.
    ///
    /// A line torn by a crash is cut off, and that is recorded. Nothing older than the last checkpoint is read:
    /// to verify is [`crate::verify()`]'s.
    ///
    /// # Errors
    /// [`AuditError::Busy`] if another process has it open; [`AuditError::Malformed`] if what is there does not
    /// follow from the last checkpoint.
    pub fn open(dir: &Path, tenant: &str) -> Result<Self, AuditError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(AuditError::file(dir))?;
        let path = dir.join("log.ndjson");
        let mut options = OpenOptions::new();
        let file = options.read(true).append(true).create(true).mode(0o600).open(&path);
        let file = file.map_err(AuditError::file(&path))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(AuditError::Busy(path)),
            Err(TryLockError::Error(source)) => return Err(AuditError::File { path, source }),
        }
        let state = match std::fs::read(dir.join("state")) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map_err(|e| AuditError::malformed(&dir.join("state"), e.to_string()))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => begin(dir, tenant, &file)?,
            Err(e) => return Err(AuditError::file(&dir.join("state"))(e)),
        };
        let mut log = Self::from_state(dir, file, state, tenant)?;
        let torn = log.catch_up(&path)?;
        if torn > 0 {
            log.append("", RECOVERED, json!({ "bytes": torn }))?;
        }
        Ok(log)
    }

    fn from_state(dir: &Path, file: File, state: State, tenant: &str) -> Result<Self, AuditError> {
        let path = dir.join("state");
        if state.tenant != tenant {
            return Err(AuditError::malformed(&path, format!("it is the log of {:?}", state.tenant)));
        }
        let broken = || AuditError::malformed(&path, "its key or digest is not 64 hexadecimal digits");
        let mut digest = Link::default();
        let digits = state.digest.strip_prefix("sha256:").ok_or_else(broken)?;
        hex::decode_to_slice(digits, &mut digest.0).map_err(|_| broken())?;
        Ok(Self {
            dir: dir.to_owned(),
            file: Arc::new(file),
            tenant: state.tenant,
            key: ChainKey::from_hex(&state.key).ok_or_else(broken)?,
            entries: state.entries,
            bytes: state.bytes,
            head: state.head,
            digest,
            sealed: state.entries,
            poisoned: false,
        })
    }

    /// Reads what was appended after the last checkpoint; returns how many bytes of a torn line it cut off.
    fn catch_up(&mut self, path: &Path) -> Result<u64, AuditError> {
        let len = self.file.metadata().map_err(AuditError::file(path))?.len();
        if len < self.bytes {
            let what =
                format!("{len} bytes where the last checkpoint saw {}: the log was truncated", self.bytes);
            return Err(AuditError::malformed(path, what));
        }
        let file = Arc::clone(&self.file);
        let mut reader = BufReader::new(&*file);
        reader.seek(SeekFrom::Start(self.bytes)).map_err(AuditError::file(path))?;
        let mut line = Vec::new();
        loop {
            line.clear();
            reader.read_until(b'\n', &mut line).map_err(AuditError::file(path))?;
            let Some((b'\n', body)) = line.split_last() else { break };
            let entry = Entry::parse(body)
                .filter(|entry| entry.seq == self.entries && entry.prev == self.head)
                .ok_or_else(|| AuditError::malformed(path, format!("entry {} is broken", self.entries)))?;
            if !chain::equal(&entry.mac(&self.tenant, &self.key)?, &entry.hmac) {
                return Err(AuditError::malformed(path, format!("entry {} is forged", self.entries)));
            }
            let hmac = entry.hmac;
            self.advance(body, hmac);
        }
        let torn = line.len() as u64;
        if torn > 0 {
            self.file.set_len(self.bytes).map_err(AuditError::file(path))?;
        }
        Ok(torn)
    }

    fn advance(&mut self, line: &[u8], hmac: String) {
        self.digest.extend(line);
        self.key.ratchet();
        self.entries += 1;
        self.bytes += line.len() as u64 + 1;
        self.head = hmac;
    }

    /// How many entries there are.
    #[must_use]
    pub fn entries(&self) -> u64 {
        self.entries
    }

    /// Appends an entry; when this returns it survives the death of this process. Whoever calls acknowledges
    /// the action only then. `data` must be an object.
    ///
    /// # Errors
    /// The log is as it was, unless it is [`AuditError::Poisoned`]: then no entry can follow.
    pub fn append(&mut self, sandbox_id: &str, event: &str, data: Value) -> Result<Entry, AuditError> {
        if self.poisoned {
            return Err(AuditError::Poisoned);
        }
        let data = match data {
            Value::Object(data) => data,
            other => Map::from_iter([("value".to_owned(), other)]),
        };
        let mut entry = Entry {
            seq: self.entries,
            ts: now(),
            sandbox_id: sandbox_id.to_owned(),
            event: event.to_owned(),
            data,
            prev: self.head.clone(),
            hmac: String::new(),
        };
        entry.hmac = entry.mac(&self.tenant, &self.key)?;
        let mut line = entry.line()?;
        if line.len() >= ENTRY_MAX_BYTES {
            return Err(AuditError::TooLong { bytes: line.len(), limit: ENTRY_MAX_BYTES });
        }
        line.push(b'\n');
        if let Err(source) = (&*self.file).write_all(&line) {
            // Part of the line may be there, and nothing may follow half a line.
            self.poisoned = self.file.set_len(self.bytes).is_err();
            return Err(AuditError::File { path: self.dir.join("log.ndjson"), source });
        }
        self.advance(&line[..line.len() - 1], entry.hmac.clone());
        Ok(entry)
    }

    /// A checkpoint of all entries so far, to be committed by [`Pending::commit`] while others append; `None`
    /// if nothing was appended since the last one.
    ///
    /// # Errors
    /// If it cannot be encoded.
    pub fn seal(&mut self, key: &SigningKey) -> Result<Option<Pending>, AuditError> {
        if self.sealed == self.entries {
            return Ok(None);
        }
        let extent = (self.entries, self.bytes);
        let checkpoint = Checkpoint::sign(key, &self.tenant, extent, &self.head, self.digest, now())?;
        let state = State {
            tenant: self.tenant.clone(),
            entries: self.entries,
            bytes: self.bytes,
            head: self.head.clone(),
            digest: chain::text(&self.digest.0),
            key: self.key.to_hex(),
        };
        self.sealed = self.entries;
        Ok(Some(Pending { dir: self.dir.clone(), file: Arc::clone(&self.file), checkpoint, state }))
    }
}

/// A checkpoint that is not yet on disk. Commit them in the order in which they were sealed.
pub struct Pending {
    dir: PathBuf,
    file: Arc<File>,
    checkpoint: Checkpoint,
    state: State,
}

impl Pending {
    /// Makes the log durable as far as the checkpoint goes, then the checkpoint. Blocks for the disk.
    ///
    /// # Errors
    /// A file refused: the entries are still in the log, the next checkpoint covers them.
    pub fn commit(self) -> Result<Checkpoint, AuditError> {
        self.file.sync_data().map_err(AuditError::file(&self.dir.join("log.ndjson")))?;
        let path = self.dir.join("checkpoints.ndjson");
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let written = file.and_then(|mut file| {
            file.write_all(&self.checkpoint.line()?)?;
            file.sync_data()
        });
        written.map_err(AuditError::file(&path))?;
        // Last: the older key is gone for good when its entries are safe.
        replace(&self.dir, "state", &serde_json::to_vec(&self.state)?)?;
        Ok(self.checkpoint)
    }
}

/// The first state of a new log.
fn begin(dir: &Path, tenant: &str, log: &File) -> Result<State, AuditError> {
    let path = dir.join("log.ndjson");
    if log.metadata().map_err(AuditError::file(&path))?.len() > 0 {
        return Err(AuditError::malformed(&dir.join("state"), "it is missing, and the log is not empty"));
    }
    let key = ChainKey::random().map_err(AuditError::file(dir))?.to_hex();
    replace(dir, "initial.key", format!("{key}\n").as_bytes())?;
    let (head, digest) = (GENESIS.to_owned(), chain::text(&Link::default().0));
    let state = State { tenant: tenant.to_owned(), entries: 0, bytes: 0, head, digest, key };
    replace(dir, "state", &serde_json::to_vec(&state)?)?;
    Ok(state)
}

/// Puts a file in place, durably: it is as before or as given, never between.
fn replace(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), AuditError> {
    let (path, temporary) = (dir.join(name), dir.join(format!(".{name}.new")));
    let written = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary);
    let written = written.and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written.map_err(AuditError::file(&temporary))?;
    std::fs::rename(&temporary, &path).map_err(AuditError::file(&path))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(AuditError::file(dir))
}

/// Now, in UTC, to the microsecond.
fn now() -> String {
    let now = jiff::Timestamp::now();
    format!("{now:.6}")
}
