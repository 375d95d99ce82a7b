//! Guest code that is known ahead: the file in which a template lists what its guest's kernel has run, and this
//! process's book of it (`peregrine-ring0`), which a zygote fills before workers are forked from it.
//!
//! May touch: a snapshot's directory. Must not: be needed; without it, a guest's first steps take longer.

use crate::snapshot::SnapshotError;
use peregrine_ring0::{Code, CodeBook};
use std::fs::File;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

/// Name of the file in a snapshot's directory; postcard, a list of addresses and bytes.
const CODE_FILE: &str = "code";
/// Longest such file: four times what a kernel that has run a shell, python and node fills. A guest has a say in it, so what it
/// can cost is bounded.
const MOST_FILE_BYTES: usize = 2 << 20;

static BOOK: LazyLock<Mutex<Arc<CodeBook>>> = LazyLock::new(Mutex::default);

fn lock() -> MutexGuard<'static, Arc<CodeBook>> {
    BOOK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What this process knows.
pub(crate) fn book() -> Arc<CodeBook> {
    Arc::clone(&lock())
}

/// Adds what the snapshot in `dir` lists.
pub(crate) fn learn(dir: &Path) -> io::Result<()> {
    let code = read(dir)?;
    match Arc::get_mut(&mut lock()) {
        Some(book) => book.learn(&code),
        // An engine has it: this is no zygote.
        None => return Err(io::ErrorKind::ResourceBusy.into()),
    }
    Ok(())
}

/// What the snapshot in `dir` lists; one without a list lists nothing.
fn read(dir: &Path) -> io::Result<Vec<Code>> {
    let mut bytes = Vec::new();
    match File::open(dir.join(CODE_FILE)) {
        Ok(file) => file.take(MOST_FILE_BYTES as u64).read_to_end(&mut bytes)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let listed: Vec<(u64, Vec<u8>)> = postcard::from_bytes(&bytes).map_err(io::Error::other)?;
    Ok(listed.into_iter().map(|(rip, bytes)| Code { rip, bytes }).collect())
}

/// Lists `code` in the snapshot that is made in `dir`, if it is not too much.
pub(crate) fn write(dir: &Path, code: Vec<Code>) -> Result<(), SnapshotError> {
    let path = dir.join(CODE_FILE);
    let list: Vec<_> = code.into_iter().map(|Code { rip, bytes }| (rip, bytes)).collect();
    let bytes = postcard::to_stdvec(&list).map_err(io::Error::other);
    let bytes = bytes.map_err(SnapshotError::io(&path))?;
    if bytes.len() > MOST_FILE_BYTES {
        return Ok(());
    }
    std::fs::write(&path, bytes).map_err(SnapshotError::io(&path))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_as_it_was_written_and_no_other_is() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(read(dir.path()).unwrap(), []);
        let code: Vec<_> =
            (0..1000).map(|n| Code { rip: n << 40, bytes: vec![n as u8; n as usize % 50] }).collect();
        write(dir.path(), code.clone()).unwrap();
        assert_eq!(read(dir.path()).unwrap(), code);
        let path = dir.path().join(CODE_FILE);
        let bytes = std::fs::read(&path).unwrap();
        for len in [0, 1, bytes.len() / 2, bytes.len() - 1] {
            std::fs::write(&path, &bytes[..len]).unwrap();
            assert!(read(dir.path()).is_err(), "{len} bytes of it");
        }
        std::fs::write(&path, [0xff; 64]).unwrap();
        assert!(read(dir.path()).is_err());
        std::fs::remove_file(&path).unwrap();
        write(dir.path(), vec![Code { rip: 0, bytes: vec![0; MOST_FILE_BYTES] }]).unwrap();
        assert_eq!(read(dir.path()).unwrap(), [], "too long");
    }
}
