//! Cheap checks of the two files a microVM is started from, whoever made them: a wrong one must be
//! refused with a reason before any VM exists. The parsers are pure; this file opens and reads, never writes.

mod elf;
mod erofs;

use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;

pub use elf::{KernelFault, KernelInfo, parse_kernel};
pub use erofs::{IMAGE_HEAD_BYTES, ImageFault, ImageInfo, parse_image};

use crate::error::Error;

/// Checks a root file system image: a regular file, an EROFS superblock with a right checksum, and as long as
/// that says.
pub fn inspect_image(path: &Path) -> Result<ImageInfo, Error> {
    let bad = |fault| Error::BadImage { path: path.to_owned(), fault };
    let (mut file, length_bytes) = match open_regular(path) {
        Ok(opened) => opened,
        Err(refusal) => return Err(bad(refusal.into())),
    };
    let mut head = Vec::new();
    file.by_ref()
        .take(IMAGE_HEAD_BYTES as u64)
        .read_to_end(&mut head)
        .map_err(|error| bad(Refusal::from(error).into()))?;
    parse_image(&head, length_bytes).map_err(bad)
}

/// Checks a guest kernel: a regular file, a 64-bit x86-64 ELF executable, and all of it there.
pub fn inspect_kernel(path: &Path) -> Result<KernelInfo, Error> {
    let bad = |fault| Error::BadKernel { path: path.to_owned(), fault };
    match open_regular(path) {
        Ok((file, _)) => parse_kernel(&object::ReadCache::new(file)).map_err(bad),
        Err(refusal) => Err(bad(refusal.into())),
    }
}

/// Why a path could not even be read as a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is nothing at this path.
    #[error("there is no such file")]
    Missing,
    /// A directory, device, pipe or socket.
    #[error("it is not a regular file")]
    NotRegular,
    /// The operating system refused.
    #[error("it cannot be read: {0}")]
    Unreadable(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::NotFound => Self::Missing,
            _ => Self::Unreadable(error),
        }
    }
}

/// Opens a regular file and says how long it is. Looks before it opens: opening a FIFO would hang.
fn open_regular(path: &Path) -> Result<(File, u64), Refusal> {
    if !path.metadata()?.is_file() {
        return Err(Refusal::NotRegular);
    }
    let file = File::open(path)?;
    let length_bytes = file.metadata()?.len();
    Ok((file, length_bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_file_a_directory_and_a_fifo_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("missing");
        let fifo = dir.path().join("fifo");
        assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
        let cases = [
            (missing.as_path(), "no such file"),
            (dir.path(), "not a regular file"),
            (&fifo, "not a regular file"),
        ];
        for (path, reason) in cases {
            for error in [inspect_image(path).unwrap_err(), inspect_kernel(path).unwrap_err()] {
                let text = error.to_string();
                assert!(text.contains(reason) && text.contains(&path.display().to_string()), "{text}");
            }
        }
    }
}
