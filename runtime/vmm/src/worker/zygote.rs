//! A process that workers are forked from.
//!
//! Executing a program costs a new worker much: its pages are mapped and found one by one, and the kernel does some of it
//! without letting anybody else have the processor. What is forked has its pages already. The price is that all workers of
//! a zygote have one address space layout: so it serves [`MOST_WORKERS`] and is replaced, by one that was started
//! [`AHEAD`] of that and has learned what it must meanwhile; and it has no environment that they could leak.

use super::client::pair;
use super::wire::{Request, send};
use super::{Worker, WorkerError};
use rustix::net::{Shutdown, shutdown};
use std::collections::VecDeque;
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How many workers have the same address space layout.
const MOST_WORKERS: u32 = 256;
/// How many of them are still to come when its successor is started, which takes as long as some of them.
const AHEAD: u32 = 32;
/// Templates that are learned from, the latest: their kernels are mostly the same.
const MOST_TEMPLATES: usize = 16;
/// A zygote that is replaced and has not ended by then is killed.
const MOST_PATIENCE: Duration = Duration::from_secs(2);

/// Makes workers. Their zygote is started with the first one, and again when it has ended.
#[derive(Debug)]
pub struct Zygote {
    program: PathBuf,
    arguments: Vec<OsString>,
    processes: Mutex<Processes>,
    /// Templates that each process of it learns from.
    templates: Mutex<VecDeque<PathBuf>>,
}

#[derive(Debug, Default)]
struct Processes {
    present: Option<Process>,
    successor: Option<Process>,
}

#[derive(Debug)]
struct Process {
    control: OwnedFd,
    child: Child,
    workers: u32,
}

impl Drop for Process {
    /// The workers that it was asked for it still makes: it ends when it finds the end of the socket behind them. Those
    /// that are there stay.
    fn drop(&mut self) {
        let _ = shutdown(&self.control, Shutdown::Write);
        let latest = Instant::now() + MOST_PATIENCE;
        while let Ok(None) = self.child.try_wait() {
            if Instant::now() > latest {
                let _ = self.child.kill();
                let _ = self.child.wait();
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Zygote {
    /// `program` with `arguments` must call [`super::serve_zygote`] with its standard input.
    #[must_use]
    pub fn new(program: PathBuf, arguments: Vec<OsString>) -> Self {
        Self { program, arguments, processes: Mutex::default(), templates: Mutex::default() }
    }

    /// Clones of the template in `dir` will be made: what their kernel's code does, workers know from the start.
    pub fn learn(&self, dir: &Path) {
        {
            let mut templates = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
            if templates.iter().any(|known| known == dir) {
                return;
            }
            templates.truncate(MOST_TEMPLATES - 1);
            templates.push_front(dir.to_owned());
        }
        let processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        for process in [&processes.present, &processes.successor].into_iter().flatten() {
            process.learn(dir);
        }
    }

    /// A new worker. That there is none after all is seen at its first answer.
    ///
    /// # Errors
    /// If the zygote cannot be started.
    pub fn worker(&self) -> Result<Worker, WorkerError> {
        let mut processes = self.processes.lock().unwrap_or_else(PoisonError::into_inner);
        let Processes { present, successor } = &mut *processes;
        if successor.is_none() && present.as_ref().is_some_and(|there| there.workers >= MOST_WORKERS - AHEAD)
        {
            // Without one now, there may be one when it is needed.
            *successor = self.start().ok();
        }
        if let Some(there) = present.as_mut().filter(|there| there.workers < MOST_WORKERS)
            && let Ok(worker) = there.hatch()
        {
            return Ok(worker);
        }
        // The old one must be gone before: they are few, and it has little to do.
        drop(present.take());
        if let Some(next) = successor.take()
            && let Ok(worker) = present.insert(next).hatch()
        {
            return Ok(worker);
        }
        Ok(present.insert(self.start()?).hatch()?)
    }

    fn start(&self) -> io::Result<Process> {
        let (control, theirs) = pair()?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env_clear()
            // A terminal's Ctrl-C is for the owner, who decides what becomes of its workers.
            .process_group(0)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        let process = Process { control, child, workers: 0 };
        let templates = self.templates.lock().unwrap_or_else(PoisonError::into_inner);
        templates.iter().for_each(|dir| process.learn(dir));
        Ok(process)
    }
}

impl Process {
    /// One that is gone learns nothing more.
    fn learn(&self, dir: &Path) {
        let _ = send(&self.control, &Request::Learn { dir: dir.to_owned() }, &[]);
    }

    fn hatch(&mut self) -> io::Result<Worker> {
        let (ours, theirs) = pair()?;
        send(&self.control, &Request::Hatch, &[theirs.as_fd()])?;
        self.workers += 1;
        Ok(Worker::hatched(ours))
    }
}
