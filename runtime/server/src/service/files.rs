//! Files of a running sandbox, streamed: the agent's own program is the tool in the guest, so that any image
//! will do, and the windows of its streams bound what either side holds.

use super::sandbox::{Activity, Sandbox};
use super::{FileProblem, Service, ServiceError};
use crate::conversation::{Event, Input, Output, Process};
use bytes::{Buf as _, Bytes, BytesMut};
use guest_init::{Exited, TOOL_STAT_BYTES};
use serde_json::json;
use std::rc::Rc;
use std::time::Duration;

/// Longest path (Linux's PATH_MAX, with its NUL).
const PATH_MAX_BYTES: usize = 4096;
/// The guest's first word about a file is due by then.
const PATIENCE: Duration = Duration::from_secs(60);
/// Longest listing.
const LISTING_MAX_BYTES: usize = 32 << 20;

/// What lstat says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStat {
    /// Its length.
    pub size_bytes: u64,
    /// Type and permissions, as Linux has them.
    pub mode: u32,
    /// Seconds since 1970.
    pub mtime_s: i64,
}

impl FileStat {
    /// `file`, `directory`, `symlink` or `other`.
    #[must_use]
    pub fn kind(self) -> &'static str {
        match self.mode & 0o170_000 {
            0o100_000 => "file",
            0o040_000 => "directory",
            0o120_000 => "symlink",
            _ => "other",
        }
    }
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Its name; what is not UTF-8 is replaced.
    pub name: String,
    /// What it is.
    pub stat: FileStat,
}

/// A file that is being read.
#[derive(Debug)]
pub struct Reading {
    /// What it was when it was opened.
    pub stat: FileStat,
    first: Bytes,
    output: Output,
    path: String,
    id: Rc<str>,
    _activity: Activity,
}

/// A file that is being written. Dropped before [`Writing::finish`], it stays as far as it came.
#[derive(Debug)]
pub struct Writing {
    input: Input,
    output: Output,
    path: String,
    id: Rc<str>,
    _activity: Activity,
}

impl Service {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn read_file(&self, sandbox: &Rc<Sandbox>, path: &str) -> Result<Reading, ServiceError> {
        let activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.read", json!({ "path": path }))?;
        let Process { mut output, .. } = tool(sandbox, "read", path, false)?;
        let mut head = BytesMut::new();
        let opening = async {
            while head.len() < TOOL_STAT_BYTES {
                match output.next().await.map_err(ServiceError::lost(&sandbox.id))? {
                    Event::Stdout(bytes) => head.extend_from_slice(&bytes),
                    Event::Stderr(_) => {}
                    Event::Exited(exited) => return Err(problem(path, exited)),
                    Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
                }
            }
            Ok(())
        };
        in_time(opening).await?;
        let mut first = head.freeze();
        let stat = take_stat(&mut first);
        let (path, id) = (path.to_owned(), Rc::clone(&sandbox.id));
        Ok(Reading { stat, first, output, path, id, _activity: activity })
    }

    /// Opens or makes a file for writing, with its directories.
    ///
    /// # Errors
    /// If the sandbox does not run, or the path cannot be.
    pub fn write_file(&self, sandbox: &Rc<Sandbox>, path: &str) -> Result<Writing, ServiceError> {
        let activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.written", json!({ "path": path }))?;
        let Process { input, output } = tool(sandbox, "write", path, true)?;
        let (path, id) = (path.to_owned(), Rc::clone(&sandbox.id));
        Ok(Writing { input, output, path, id, _activity: activity })
    }

    /// Lists a directory, by name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn list_files(&self, sandbox: &Rc<Sandbox>, path: &str) -> Result<Vec<DirEntry>, ServiceError> {
        let _activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.listed", json!({ "path": path }))?;
        let Process { mut output, .. } = tool(sandbox, "list", path, false)?;
        let mut listing = BytesMut::new();
        let reading = async {
            loop {
                match output.next().await.map_err(ServiceError::lost(&sandbox.id))? {
                    Event::Stdout(bytes) if listing.len() + bytes.len() <= LISTING_MAX_BYTES => {
                        listing.extend_from_slice(&bytes);
                    }
                    Event::Stdout(_) => {
                        return Err(ServiceError::bad("path", "the directory is too large to list"));
                    }
                    Event::Stderr(_) => {}
                    Event::Exited(exited) if exited.shell_code() == 0 => return Ok(()),
                    Event::Exited(exited) => return Err(problem(path, exited)),
                    Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
                }
            }
        };
        in_time(reading).await?;
        Ok(entries(listing.freeze()))
    }
}

impl Reading {
    /// The next bytes; `None` at the end of the file.
    ///
    /// # Errors
    /// If it breaks off.
    pub async fn next(&mut self) -> Result<Option<Bytes>, ServiceError> {
        if !self.first.is_empty() {
            return Ok(Some(std::mem::take(&mut self.first)));
        }
        loop {
            match self.output.next().await.map_err(ServiceError::lost(&self.id))? {
                Event::Stdout(bytes) => return Ok(Some(bytes)),
                Event::Stderr(_) => {}
                Event::Exited(exited) if exited.shell_code() == 0 => return Ok(None),
                Event::Exited(exited) => return Err(problem(&self.path, exited)),
                Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
            }
        }
    }
}

impl Writing {
    /// Writes bytes, as fast as the guest takes them. False: the guest takes no more, [`Writing::finish`]
    /// says why.
    ///
    /// # Errors
    /// If the sandbox ends.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<bool, ServiceError> {
        self.input.write(bytes).await.map_err(ServiceError::lost(&self.id))?;
        Ok(!self.input.is_over())
    }

    /// Says that this was all, and waits until the guest has it.
    ///
    /// # Errors
    /// Why it is not all there.
    pub async fn finish(mut self) -> Result<(), ServiceError> {
        self.input.end().map_err(ServiceError::lost(&self.id))?;
        in_time(async {
            loop {
                match self.output.next().await.map_err(ServiceError::lost(&self.id))? {
                    Event::Stdout(_) | Event::Stderr(_) => {}
                    Event::Exited(exited) if exited.shell_code() == 0 => return Ok(()),
                    Event::Exited(exited) => return Err(problem(&self.path, exited)),
                    Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
                }
            }
        })
        .await
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, ServiceError>>) -> Result<T, ServiceError> {
    let result = tokio::time::timeout(PATIENCE, work).await;
    result.unwrap_or(Err(ServiceError::Timeout { what: "the sandbox", limit: PATIENCE }))
}

fn tool(sandbox: &Rc<Sandbox>, verb: &str, path: &str, stdin: bool) -> Result<Process, ServiceError> {
    if path.is_empty() || path.len() >= PATH_MAX_BYTES || path.contains('\0') {
        let why = format!("must be 1 to {} bytes without NUL", PATH_MAX_BYTES - 1);
        return Err(ServiceError::bad("path", why));
    }
    // As a command's working directory.
    let path = if path.starts_with('/') { path.to_owned() } else { format!("/root/{path}") };
    let conversation = sandbox.running()?.conversation;
    conversation.tool(verb, path.as_bytes(), stdin).map_err(ServiceError::exec(&sandbox.id))
}

/// The tool's exit code is the kernel's error number.
fn problem(path: &str, exited: Exited) -> ServiceError {
    const ENOENT: u8 = 2;
    const ENXIO: u8 = 6;
    const ENOTDIR: u8 = 20;
    const EISDIR: u8 = 21;
    const EINVAL: u8 = 22;
    const ENOSPC: u8 = 28;
    let why = match exited.shell_code() {
        ENOSPC => return ServiceError::NoSpace { place: "in the sandbox" },
        ENOENT => FileProblem::Missing,
        EISDIR => FileProblem::Kind("it is a directory"),
        ENOTDIR => FileProblem::Kind("it, or a part of its path, is no directory"),
        EINVAL | ENXIO => FileProblem::Kind("it is no regular file"),
        other => FileProblem::Refused(other),
    };
    ServiceError::File { path: path.to_owned(), why }
}

/// Takes a stat off the front, of which there must be enough.
fn take_stat(bytes: &mut Bytes) -> FileStat {
    FileStat { size_bytes: bytes.get_u64_le(), mode: bytes.get_u32_le(), mtime_s: bytes.get_i64_le() }
}

fn entries(mut listing: Bytes) -> Vec<DirEntry> {
    let mut entries = Vec::new();
    while listing.len() >= TOOL_STAT_BYTES + 2 {
        let stat = take_stat(&mut listing);
        let len = usize::from(listing.get_u16_le()).min(listing.len());
        let name = String::from_utf8_lossy(&listing.split_to(len)).into_owned();
        entries.push(DirEntry { name, stat });
    }
    entries.sort_by(|a, b| a.name.cmp(&b.name));
    entries
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_cut_off_anywhere_is_read_as_far_as_it_goes() {
        let mut listing = Vec::new();
        for (name, mode) in [("b", 0o040_755_u32), ("a", 0o100_644)] {
            listing.extend(5_u64.to_le_bytes());
            listing.extend(mode.to_le_bytes());
            listing.extend(7_i64.to_le_bytes());
            listing.extend((name.len() as u16).to_le_bytes());
            listing.extend(name.bytes());
        }
        let all = entries(listing.clone().into());
        let names: Vec<_> = all.iter().map(|e| (e.name.as_str(), e.stat.kind())).collect();
        assert_eq!(names, [("a", "file"), ("b", "directory")]);
        for cut in 0..listing.len() {
            assert!(entries(listing[..cut].to_vec().into()).len() <= 2);
        }
    }
}
