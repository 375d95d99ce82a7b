//! Faults at the system-call boundary: strace(1) makes a call of a running process fail, or kills the process
//! at it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// strace, attached to a process, its threads and the children that it forks.
pub struct Strace {
    child: Child,
    log: PathBuf,
    // Holds the log.
    _dir: tempfile::TempDir,
}

/// Far longer than it takes to let go of every thread.
const MOST_OF_A_DETACH: Duration = Duration::from_secs(20);

impl Strace {
    /// Attaches to the process `pid`. `expressions` are those of `-e`, such as `inject=fsync:error=EIO:when=2`;
    /// strace counts calls for each process and each name apart.
    ///
    /// # Panics
    /// If there is no strace, or it does not attach.
    #[must_use]
    pub fn attach(pid: u32, expressions: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let (log, said) = (dir.path().join("log"), dir.path().join("said"));
        let stderr = File::create(&said).unwrap_or_else(|e| panic!("{e}"));
        let mut command = Command::new("strace");
        command.args(["-f", "-p", &pid.to_string(), "-o"]).arg(&log).stderr(Stdio::from(stderr));
        for expression in expressions {
            command.args(["-e", expression]);
        }
        let mut child = command.spawn().unwrap_or_else(|e| panic!("strace, of Debian's package: {e}"));
        let begun = Instant::now();
        while !is_traced(pid) {
            let told = || fs::read_to_string(&said).unwrap_or_default();
            assert!(child.try_wait().is_ok_and(|ended| ended.is_none()), "strace: {}", told());
            assert!(begun.elapsed() < Duration::from_secs(60), "strace does not attach: {}", told());
            std::thread::sleep(Duration::from_millis(2));
        }
        Self { child, log, _dir: dir }
    }

    /// Lets the process go on without it, and gives each call that it saw: who made it, and strace's text.
    ///
    /// # Panics
    /// If strace had ended before.
    #[must_use]
    pub fn detach(mut self) -> Vec<(u32, String)> {
        // At SIGTERM it detaches, which SIGKILL would leave to the kernel in the middle of a stop.
        kill("TERM", self.child.id());
        let begun = Instant::now();
        // Now and then it waits for ever for a process that was just forked, whose threads stand still meanwhile (6.1).
        while matches!(self.child.try_wait(), Ok(None)) && begun.elapsed() < MOST_OF_A_DETACH {
            std::thread::sleep(Duration::from_millis(2));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.seen()
    }

    /// What it has seen so far.
    #[must_use]
    pub fn seen(&self) -> Vec<(u32, String)> {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let call = |line: &str| {
            let (pid, text) = line.split_once(' ')?;
            Some((pid.parse().ok()?, text.trim_start().to_owned()))
        };
        log.lines().filter_map(call).collect()
    }
}

impl Drop for Strace {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends a signal, which must arrive.
///
/// # Panics
/// If there is no such process.
pub fn kill(signal: &str, pid: u32) {
    let status = Command::new("sh").args(["-c", &format!("kill -{signal} {pid}")]).status();
    assert!(status.is_ok_and(|status| status.success()), "kill -{signal} {pid}");
}

/// Has every thread of the process a tracer?
fn is_traced(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    tasks.filter_map(Result::ok).all(|task| {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        status.lines().any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
    })
}
