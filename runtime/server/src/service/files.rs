//! Files of a running sandbox, streamed: the agent's own program is the tool in the guest, so that any image
//! will do, and the windows of its streams bound what either side holds. The bytes of a long file go through a bulk
//! stream (see guest-init), of which a socket's buffer bounds what it holds.

use super::ids;
use super::sandbox::{Activity, Sandbox};
use super::{FileProblem, Service, ServiceError};
use crate::conversation::{Event, Input, Output, Process};
use bytes::{Buf as _, Bytes, BytesMut};
use guest_init::{BULK_WORTH_BYTES, Exited, TOOL_STAT_BYTES};
use peregrine_vmm::worker::WorkerError;
use serde_json::json;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;

/// Longest path (Linux's PATH_MAX, with its NUL).
const PATH_MAX_BYTES: usize = 4096;
/// The guest's first word about a file is due by then.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most of a file's bytes that are passed on at once.
const PORTION_BYTES: usize = 64 << 10;
const IRREGULAR: &str = "it is no regular file";
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
    bulk: Option<UnixStream>,
    tool: Tool,
    _activity: Activity,
}

/// A file that is being written. Dropped before [`Writing::finish`], it stays as far as it came.
#[derive(Debug)]
pub struct Writing {
    input: Input,
    bulk: Option<UnixStream>,
    tool: Tool,
    failed: Option<ServiceError>,
    _activity: Activity,
}

/// The tool at work on a file.
#[derive(Debug)]
struct Tool {
    output: Output,
    path: String,
    id: Rc<str>,
    /// It has done it all.
    done: bool,
}

impl Tool {
    fn new(sandbox: &Sandbox, path: &str, output: Output) -> Self {
        Self { output, path: path.to_owned(), id: Rc::clone(&sandbox.id), done: false }
    }

    /// What it writes next; `None` when it has done its work.
    async fn next(&mut self) -> Result<Option<Bytes>, ServiceError> {
        while !self.done {
            match self.output.next().await.map_err(ServiceError::lost(&self.id))? {
                Event::Stdout(bytes) => return Ok(Some(bytes)),
                Event::Stderr(_) => {}
                Event::Exited(exited) if exited.shell_code() == 0 => self.done = true,
                Event::Exited(exited) => return Err(problem(&self.path, exited)),
                Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
            }
        }
        Ok(None)
    }

    /// The first so many bytes that it writes, and those that came with them.
    async fn head(&mut self, len: usize) -> Result<Bytes, ServiceError> {
        let mut head = BytesMut::new();
        in_time(async {
            while head.len() < len {
                head.extend_from_slice(&self.next().await?.ok_or_else(early)?);
            }
            Ok(())
        })
        .await?;
        Ok(head.freeze())
    }

    /// Waits until it has done its work.
    async fn finish(&mut self) -> Result<(), ServiceError> {
        while self.next().await?.is_some() {}
        Ok(())
    }
}

impl Service {
    /// Opens a file for reading.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn read_file(&self, sandbox: &Rc<Sandbox>, path: &str) -> Result<Reading, ServiceError> {
        let _activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.read", json!({ "path": path }))?;
        let (stat, first, bulk, tool) = match get(sandbox, path).await? {
            Some(found) => found,
            None => {
                let mut tool = begin(sandbox, "read", path, None, false)?.0;
                let mut first = tool.head(TOOL_STAT_BYTES).await?;
                (take_stat(&mut first), first, None, tool)
            }
        };
        Ok(Reading { stat, first, bulk, tool, _activity })
    }

    /// Opens or makes a file for writing, with its directories. `size_bytes` is what it will have, if that is known.
    ///
    /// # Errors
    /// If the sandbox does not run, or the path cannot be.
    pub async fn write_file(
        &self,
        sandbox: &Rc<Sandbox>,
        path: &str,
        size_bytes: Option<u64>,
    ) -> Result<Writing, ServiceError> {
        let _activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.written", json!({ "path": path }))?;
        let long = size_bytes.is_none_or(|bytes| bytes >= BULK_WORTH_BYTES);
        let put = if long { put(sandbox, path).await? } else { None };
        let (input, bulk, tool) = match put {
            Some((input, socket, tool)) => (input, Some(socket), tool),
            None => {
                let (tool, input) = begin(sandbox, "write", path, None, true)?;
                (input, None, tool)
            }
        };
        Ok(Writing { input, bulk, tool, failed: None, _activity })
    }

    /// Lists a directory, by name.
    ///
    /// # Errors
    /// What is wrong with it.
    pub async fn list_files(&self, sandbox: &Rc<Sandbox>, path: &str) -> Result<Vec<DirEntry>, ServiceError> {
        let _activity = sandbox.activity();
        self.journal.append(&sandbox.tenant, &sandbox.id, "file.listed", json!({ "path": path }))?;
        let mut tool = begin(sandbox, "list", path, None, false)?.0;
        let mut listing = BytesMut::new();
        in_time(async {
            while let Some(bytes) = tool.next().await? {
                if listing.len() + bytes.len() > LISTING_MAX_BYTES {
                    return Err(ServiceError::bad("path", "the directory is too large to list"));
                }
                listing.extend_from_slice(&bytes);
            }
            Ok(())
        })
        .await?;
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
        while let Some(socket) = &mut self.bulk {
            let mut bytes = BytesMut::with_capacity(PORTION_BYTES);
            tokio::select! {
                biased;
                read = socket.read_buf(&mut bytes) => match read? {
                    0 => self.bulk = None,
                    _ => return Ok(Some(bytes.freeze())),
                },
                // Only why it failed is news: if it has done its work, the end is on its way.
                more = self.tool.next(), if !self.tool.done => drop(more?),
            }
        }
        self.tool.next().await
    }
}

impl Writing {
    /// Writes bytes, as fast as the guest takes them. False: the guest takes no more, [`Writing::finish`]
    /// says why.
    ///
    /// # Errors
    /// If the sandbox ends.
    pub async fn write(&mut self, mut bytes: &[u8]) -> Result<bool, ServiceError> {
        let Some(socket) = &mut self.bulk else {
            self.input.write(bytes).await.map_err(ServiceError::lost(&self.tool.id))?;
            return Ok(!self.input.is_over());
        };
        while !bytes.is_empty() && self.failed.is_none() {
            tokio::select! {
                biased;
                more = self.tool.next() => match more {
                    Ok(Some(_)) => {}
                    Ok(None) => self.failed = Some(early()),
                    Err(error) => self.failed = Some(error),
                },
                written = socket.write(bytes) => match written {
                    Ok(len) => bytes = &bytes[len..],
                    // Its worker has let go of it: the tool's word, or the sandbox's end, is on its way.
                    Err(_) => self.failed = Some(in_time(self.tool.finish()).await.err().unwrap_or_else(early)),
                },
            }
        }
        Ok(self.failed.is_none())
    }

    /// Says that this was all, and waits until the guest has it.
    ///
    /// # Errors
    /// Why it is not all there.
    pub async fn finish(mut self) -> Result<(), ServiceError> {
        if let Some(error) = self.failed {
            return Err(error);
        }
        match &mut self.bulk {
            // If it is broken, the tool says why.
            Some(socket) => drop(socket.shutdown().await),
            None => self.input.end().map_err(ServiceError::lost(&self.tool.id))?,
        }
        in_time(self.tool.finish()).await
    }
}

fn early() -> ServiceError {
    ServiceError::Internal("the file tool ended too early".to_owned())
}

/// Opens a file for reading, through a bulk stream if it is long. `None`: there cannot be one.
async fn get(
    sandbox: &Rc<Sandbox>,
    path: &str,
) -> Result<Option<(FileStat, Bytes, Option<UnixStream>, Tool)>, ServiceError> {
    let number = ids::random_u64()?;
    let mut tool = begin(sandbox, "get", path, Some(number), false)?.0;
    let mut first = match tool.head(TOOL_STAT_BYTES + 1).await {
        // Or the agent is from before there were bulk streams, and does not know the verb.
        Err(ServiceError::File { why: FileProblem::Kind(IRREGULAR), .. }) => return Ok(None),
        head => head?,
    };
    let stat = take_stat(&mut first);
    if first.get_u8() == 0 {
        return Ok(Some((stat, first, None, tool)));
    }
    let socket = attach(sandbox, number).await?;
    Ok(socket.map(|socket| (stat, first, Some(socket), tool)))
}

/// Opens a file for writing through a bulk stream. `None`: there cannot be one.
async fn put(sandbox: &Rc<Sandbox>, path: &str) -> Result<Option<(Input, UnixStream, Tool)>, ServiceError> {
    let number = ids::random_u64()?;
    let (mut tool, input) = begin(sandbox, "put", path, Some(number), true)?;
    match tool.head(1).await {
        Ok(first) if first.first() == Some(&1) => {}
        // As in [`get`].
        Ok(_) | Err(ServiceError::File { why: FileProblem::Kind(IRREGULAR), .. }) => return Ok(None),
        Err(error) => return Err(error),
    }
    Ok(attach(sandbox, number).await?.map(|socket| (input, socket, tool)))
}

/// A new bulk stream of this number: its other end. `None` if there are too many.
async fn attach(sandbox: &Sandbox, number: u64) -> Result<Option<UnixStream>, ServiceError> {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair()?;
    ours.set_nonblocking(true)?;
    let running = sandbox.running()?;
    match running.with_worker(move |worker| worker.attach_bulk(number, &theirs)).await {
        Ok(()) => Ok(Some(UnixStream::from_std(ours)?)),
        Err(WorkerError::Refused(why)) => {
            tracing::info!(why, id = %sandbox.id, "no bulk stream for a file");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, ServiceError>>) -> Result<T, ServiceError> {
    let result = tokio::time::timeout(PATIENCE, work).await;
    result.unwrap_or(Err(ServiceError::Timeout { what: "the sandbox", limit: PATIENCE }))
}

/// Has the tool begin.
fn begin(
    sandbox: &Rc<Sandbox>,
    verb: &str,
    path: &str,
    bulk: Option<u64>,
    stdin: bool,
) -> Result<(Tool, Input), ServiceError> {
    if path.is_empty() || path.len() >= PATH_MAX_BYTES || path.contains('\0') {
        let why = format!("must be 1 to {} bytes without NUL", PATH_MAX_BYTES - 1);
        return Err(ServiceError::bad("path", why));
    }
    // As a command's working directory.
    let full = if path.starts_with('/') { path.to_owned() } else { format!("/root/{path}") };
    let number = bulk.map(|number| number.to_string());
    let arguments: Vec<&[u8]> =
        [full.as_bytes()].into_iter().chain(number.as_deref().map(str::as_bytes)).collect();
    let conversation = sandbox.running()?.conversation;
    let started = conversation.tool(verb, &arguments, stdin).map_err(ServiceError::exec(&sandbox.id));
    let Process { input, output } = started?;
    Ok((Tool::new(sandbox, path, output), input))
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
        EINVAL | ENXIO => FileProblem::Kind(IRREGULAR),
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
