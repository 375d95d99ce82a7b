//! The audit log, a chain for each tenant: what happened is appended before it is acknowledged, and what cannot
//! be appended is not done.
//!
//! May touch: the audit directory. Never holds output, secrets or a command's arguments.

use super::ServiceError;
use peregrine_audit::{AuditError, Log, SigningKey};
use serde_json::Value;
use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

/// The file of a tenant's entries.
const LOG_FILE: &str = "log.ndjson";

/// Is given a line, and says whether it wants more.
pub(crate) type TakeLine<'t> = dyn FnMut(&[u8]) -> bool + 't;

/// Where events go.
#[derive(Debug)]
pub(crate) struct Journal {
    dir: PathBuf,
    signer: SigningKey,
    logs: RefCell<HashMap<String, Log>>,
}

impl Journal {
    /// The logs in `dir`; the key that signs checkpoints is made if there is none, and its public half lies
    /// beside it.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        let path = dir.join("signer.key");
        let signer = match std::fs::read_to_string(&path) {
            Ok(text) => SigningKey::from_hex(text.trim())
                .ok_or_else(|| io::Error::other("signer.key is not 64 hexadecimal digits"))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let key = SigningKey::random()?;
                write_new(&dir.join("signer.pub"), &key.verifying_key().to_hex())?;
                write_new(&path, &key.to_hex())?;
                File::open(dir)?.sync_all()?;
                key
            }
            Err(error) => return Err(error),
        };
        Ok(Self { dir: dir.to_owned(), signer, logs: RefCell::default() })
    }

    /// Appends an event of a tenant's sandbox.
    ///
    /// # Errors
    /// [`ServiceError::Audit`]: the action must not be done, or acknowledged.
    pub(crate) fn append(
        &self,
        tenant: &str,
        sandbox: &str,
        event: &'static str,
        data: Value,
    ) -> Result<(), ServiceError> {
        let failed = |error: AuditError| {
            tracing::error!(%error, tenant, event, "audit");
            ServiceError::Audit(error.to_string())
        };
        let mut logs = self.logs.borrow_mut();
        let log = match logs.get_mut(tenant) {
            Some(log) => log,
            None => {
                let log = self.open_log(tenant).map_err(failed)?;
                logs.entry(tenant.to_owned()).or_insert(log)
            }
        };
        log.append(sandbox, event, data).map(drop).map_err(failed)
    }

    /// Opens a tenant's log, or begins it, before it is written to: that waits for the disk, and requests for it.
    ///
    /// # Errors
    /// If it cannot be opened.
    pub(crate) fn prepare(&self, tenant: &str) -> Result<(), AuditError> {
        let mut logs = self.logs.borrow_mut();
        if !logs.contains_key(tenant) {
            logs.insert(tenant.to_owned(), self.open_log(tenant)?);
        }
        Ok(())
    }

    fn open_log(&self, tenant: &str) -> Result<Log, AuditError> {
        Log::open(&self.dir.join(tenant), tenant)
    }

    /// Signs what was appended since the last time, and makes it durable: blocks for the disk in the value.
    pub(super) fn seal(&self) -> impl FnOnce() + Send + 'static {
        let mut logs = self.logs.borrow_mut();
        let sealed: Vec<_> = logs.values_mut().map(|log| log.seal(&self.signer)).collect();
        move || {
            for pending in sealed {
                match pending.map(|pending| pending.map(peregrine_audit::Pending::commit)) {
                    Ok(None | Some(Ok(_))) => {}
                    Ok(Some(Err(error))) | Err(error) => tracing::error!(%error, "a checkpoint is missing"),
                }
            }
        }
    }

    /// Reads the entries about a sandbox, a line each, as they are in the log. Blocks in the value.
    pub(crate) fn entries(
        &self,
        tenant: &str,
        sandbox: &str,
    ) -> impl FnOnce(&mut TakeLine<'_>) -> io::Result<()> + Send + use<> {
        let path = self.dir.join(tenant).join(LOG_FILE);
        // Ids are letters and digits: canonical JSON writes them as they are.
        let about = format!("\"sandbox_id\":\"{sandbox}\"");
        move |take| {
            let mut log = BufReader::new(match File::open(path) {
                Ok(log) => log,
                Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
                Err(error) => return Err(error),
            });
            let mut line = Vec::new();
            while log.read_until(b'\n', &mut line)? > 0 {
                let whole = line.ends_with(b"\n");
                let meant = line.windows(about.len()).any(|window| window == about.as_bytes());
                if whole && meant && !take(&line) {
                    break;
                }
                line.clear();
            }
            Ok(())
        }
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
    file.write_all(format!("{text}\n").as_bytes())?;
    file.sync_all()
}
