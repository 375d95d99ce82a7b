//! A hibernated sandbox: the generations that its hibernations left, and who may go on with it.
//!
//! ```text
//! <dir>/<n>/                 generation n, a snapshot: complete or absent; the highest number counts
//! <dir>/.<n>.<pid>.partial/  a generation being written, or one that never will be
//! <dir>/interrupted          the last hibernation was cut off; the sandbox is as its newest generation has it
//! <dir>/claim                flock(2), held by who resumes, runs or hibernates the sandbox
//!
//!             claim              hibernate: n + 1 is durable, n goes
//!   at rest ----------> claimed -------------------------------------> at rest
//!      ^                   |
//!      '-------------------'  the claim is dropped, or its process ends however: at rest, as n has it
//! ```
//!
//! May touch: its directory. Must not: start anything; two owners meet at the lock, not here.

use super::{SnapshotError, sync};
use std::fs::{self, File, TryLockError};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

const CLAIM_FILE: &str = "claim";
const INTERRUPTED_FILE: &str = "interrupted";

/// How a sandbox stands on disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Its newest generation; none before its first hibernation has ended.
    pub generation: Option<u64>,
    /// The last hibernation was cut off: the sandbox is as `generation` has it.
    pub interrupted: bool,
    /// Somebody resumes it, runs it or hibernates it.
    pub claimed: bool,
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.claimed, self.generation) {
            (true, Some(n)) => write!(f, "claimed, generation {n}")?,
            (true, None) => write!(f, "claimed, never hibernated")?,
            (false, Some(n)) => write!(f, "hibernated, generation {n}")?,
            (false, None) => write!(f, "never hibernated")?,
        }
        f.write_str(if self.interrupted { "; a later hibernation was interrupted" } else { "" })
    }
}

/// Looks at the sandbox in `dir`; changes nothing.
///
/// # Errors
/// If the directory cannot be read.
pub fn status(dir: &Path) -> Result<Status, SnapshotError> {
    // While somebody looks nobody claims: the look itself is a lock for a moment.
    let _gate = gate(dir)?;
    let path = dir.join(CLAIM_FILE);
    let claimed = match File::open(&path).map(|file| file.try_lock_shared()) {
        Ok(Ok(())) => false,
        Err(error) if error.kind() == io::ErrorKind::NotFound => false,
        Ok(Err(TryLockError::WouldBlock)) => true,
        Ok(Err(TryLockError::Error(error))) | Err(error) => return Err(SnapshotError::io(&path)(error)),
    };
    let left = Left::in_dir(dir)?;
    // One that is under way is its claimer's.
    let interrupted = dir.join(INTERRUPTED_FILE).exists() || !(claimed || left.partial.is_empty());
    Ok(Status { generation: left.generations.last().copied(), interrupted, claimed })
}

/// The right to resume, run and hibernate one sandbox, until it is dropped or its process ends.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    lock: File,
}

impl Claim {
    /// Claims the sandbox in `dir`, which is made if there is none (its parent must exist). What a hibernation
    /// that was cut off left is removed, and so are generations that are not the newest.
    ///
    /// # Errors
    /// [`SnapshotError::Claimed`] if somebody has it.
    pub fn take(dir: &Path) -> Result<Self, SnapshotError> {
        match fs::create_dir(dir) {
            // Durable before anything in it can be.
            Ok(()) => sync(parent(dir))?,
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(SnapshotError::io(dir)(error)),
        }
        let _gate = gate(dir)?;
        let path = dir.join(CLAIM_FILE);
        let options = File::options().write(true).create(true).truncate(false).open(&path);
        let lock = options.map_err(SnapshotError::io(&path))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(SnapshotError::Claimed { dir: dir.to_owned() }),
            Err(TryLockError::Error(error)) => return Err(SnapshotError::io(&path)(error)),
        }
        let claim = Self { dir: dir.to_owned(), lock };
        claim.sweep()?;
        Ok(claim)
    }

    /// The snapshot to resume from; none before the first hibernation.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn newest(&self) -> Result<Option<PathBuf>, SnapshotError> {
        Ok(Left::in_dir(&self.dir)?.generations.last().map(|n| self.dir.join(n.to_string())))
    }

    /// Where the next generation goes.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn next(&self) -> Result<PathBuf, SnapshotError> {
        let newest = Left::in_dir(&self.dir)?.generations.last().map_or(0, |n| *n);
        Ok(self.dir.join((newest + 1).to_string()))
    }

    /// The next generation is durable: those before it go, and so does the word of an interruption.
    pub(crate) fn saved(&self) {
        let _ = fs::remove_file(self.dir.join(INTERRUPTED_FILE));
        // What cannot be removed now is at the next claim.
        let _ = self.sweep();
    }

    /// Removes what does not count and says so where that was a hibernation.
    pub(crate) fn sweep(&self) -> Result<(), SnapshotError> {
        let left = Left::in_dir(&self.dir)?;
        let interrupted = !left.partial.is_empty();
        let older = left.generations.iter().rev().skip(1).map(|n| self.dir.join(n.to_string()));
        for path in left.partial.into_iter().chain(older) {
            fs::remove_dir_all(&path).map_err(SnapshotError::io(&path))?;
        }
        if interrupted {
            // Last: on a full disk there is room for it only now.
            let note = self.dir.join(INTERRUPTED_FILE);
            fs::write(&note, b"").map_err(SnapshotError::io(&note))?;
        }
        Ok(())
    }
}

/// The lock: who holds a copy of it holds the claim.
impl AsFd for Claim {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

/// What lies in a sandbox's directory.
struct Left {
    /// Ascending.
    generations: Vec<u64>,
    partial: Vec<PathBuf>,
}

impl Left {
    fn in_dir(dir: &Path) -> Result<Self, SnapshotError> {
        let mut left = Self { generations: Vec::new(), partial: Vec::new() };
        for entry in fs::read_dir(dir).map_err(SnapshotError::io(dir))? {
            let entry = entry.map_err(SnapshotError::io(dir))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            match name.parse() {
                Ok(n) => left.generations.push(n),
                Err(_) if name.starts_with('.') && name.ends_with(".partial") => {
                    left.partial.push(entry.path());
                }
                Err(_) => {}
            }
        }
        left.generations.sort_unstable();
        Ok(left)
    }
}

/// Who holds this alone may take the claim's lock, even for a look.
fn gate(dir: &Path) -> Result<File, SnapshotError> {
    let gate = File::open(dir).map_err(SnapshotError::io(dir))?;
    gate.lock().map_err(SnapshotError::io(dir))?;
    Ok(gate)
}

fn parent(dir: &Path) -> &Path {
    dir.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn made(dir: &Path, names: &[&str]) {
        for name in names {
            fs::create_dir_all(dir.join(name)).unwrap();
            fs::write(dir.join(name).join("memory"), b"x").unwrap();
        }
    }

    #[test]
    fn the_highest_generation_counts_and_the_next_is_one_more() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("box");
        let claim = Claim::take(&dir).unwrap();
        assert_eq!((claim.newest().unwrap(), claim.next().unwrap()), (None, dir.join("1")));
        made(&dir, &["9", "10"]);
        assert_eq!((claim.newest().unwrap(), claim.next().unwrap()), (Some(dir.join("10")), dir.join("11")));
        drop(claim);
        let claim = Claim::take(&dir).unwrap();
        assert!(!dir.join("9").exists() && dir.join("10").exists());
        drop(claim);
        let status = status(&dir).unwrap();
        assert_eq!(status, Status { generation: Some(10), interrupted: false, claimed: false });
        assert_eq!(status.to_string(), "hibernated, generation 10");
    }

    #[test]
    fn a_hibernation_that_was_cut_off_is_swept_and_said_until_one_ends() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("box");
        made(&dir, &["3", ".4.77.partial"]);
        let cut_off = Status { generation: Some(3), interrupted: true, claimed: false };
        assert_eq!(status(&dir).unwrap(), cut_off);
        let claim = Claim::take(&dir).unwrap();
        assert_eq!(claim.newest().unwrap(), Some(dir.join("3")));
        assert!(!dir.join(".4.77.partial").exists());
        assert_eq!(status(&dir).unwrap(), Status { claimed: true, ..cut_off });
        assert!(status(&dir).unwrap().to_string().ends_with("a later hibernation was interrupted"));
        made(&dir, &["4"]);
        claim.saved();
        drop(claim);
        assert_eq!(status(&dir).unwrap(), Status { generation: Some(4), interrupted: false, claimed: false });
        assert!(!dir.join("3").exists());
    }

    #[test]
    fn a_sandbox_is_claimed_once_however_often_it_is_looked_at() {
        let home = tempfile::tempdir().unwrap();
        let dir = home.path().join("box");
        drop(Claim::take(&dir).unwrap());
        let taken = std::thread::scope(|scope| {
            let looks = scope.spawn(|| (0..2000).all(|_| status(&dir).is_ok()));
            let claims: Vec<_> = (0..12).map(|_| scope.spawn(|| Claim::take(&dir))).collect();
            let claims: Vec<_> = claims.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(looks.join().unwrap());
            claims
        });
        let refused = taken.iter().filter_map(|claim| claim.as_ref().err());
        assert!(refused.clone().all(|error| matches!(error, SnapshotError::Claimed { .. })));
        assert_eq!(refused.count(), 11);
        assert!(status(&dir).unwrap().claimed);
        drop(taken);
        Claim::take(&dir).unwrap();
    }
}
