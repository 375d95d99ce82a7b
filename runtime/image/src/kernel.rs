//! The guest kernel, built by the repository's `kernels/build.sh`, which this binary carries with it. What is
//! in the kernel is decided there; here are only the key, the call and its progress.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::digest::{Inputs, Key};
use crate::error::Error;
use crate::inspect;
use crate::packages;
use crate::progress::Progress;
use crate::store::{Kind, Store, Workplace};
use crate::tool;

mod embedded {
    //! The table that build.rs writes.
    use super::EmbeddedFile;
    include!(concat!(env!("OUT_DIR"), "/embedded_kernels.rs"));
}

/// One file of `kernels/`, path relative to it.
struct EmbeddedFile {
    path: &'static str,
    executable: bool,
    bytes: &'static [u8],
}

const SCRIPT: &str = "build.sh";
const VMLINUX: &str = "vmlinux";
const SYSTEM_MAP: &str = "System.map";
const SOURCE_VERSION: &str = "source-version";
/// What the script leaves that is kept; its log and lock are not.
const RESULTS: [&str; 4] = [VMLINUX, SYSTEM_MAP, "config", SOURCE_VERSION];

/// A guest kernel in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelArtifact {
    /// The uncompressed ELF file that is booted.
    pub vmlinux: PathBuf,
    /// Its symbols, to name addresses in reports.
    pub system_map: PathBuf,
    /// Its name in the cache, a digest of all that it was made from.
    pub key: Key,
}

/// The guest kernel: from the cache, or else built, in some minutes.
pub fn kernel(store: &Store, progress: &mut dyn Progress) -> Result<KernelArtifact, Error> {
    let compiler = compiler_version(progress)?;
    let key = kernel_key(&compiler);
    let check = |dir: &Path| inspect::inspect_kernel(&dir.join(VMLINUX)).map(|_| ());
    let dir = store.get_or_build(Kind::Kernel, &key, progress, check, |place, progress| {
        let source = build(place, progress, &store.root().join("kernel-build-failed.log"))?;
        Ok(vec![source, format!("gcc {compiler}")])
    })?;
    Ok(KernelArtifact { vmlinux: dir.join(VMLINUX), system_map: dir.join(SYSTEM_MAP), key })
}

/// Over every embedded file, the lock with the source's version among them, and the compiler.
fn kernel_key(compiler: &str) -> Key {
    let inputs = Inputs::new("kernel/1").with("gcc", compiler);
    let with_file = |inputs: Inputs, file: &EmbeddedFile| {
        inputs.with(file.path, file.bytes).with("executable", [u8::from(file.executable)])
    };
    embedded::FILES.iter().fold(inputs, with_file).key()
}

fn compiler_version(progress: &mut dyn Progress) -> Result<String, Error> {
    let gcc = packages::ensure_program("gcc", "gcc", progress)?;
    let mut version = String::new();
    tool::run(Command::new(gcc).arg("-dumpfullversion"), |line| version.push_str(line))?;
    Ok(version)
}

/// Runs the script and returns the version of the source it used. On failure its log is kept as
/// `failure_log`.
fn build(place: &Workplace, progress: &mut dyn Progress, failure_log: &Path) -> Result<String, Error> {
    let (sources, out) = (place.scratch.join("kernels"), place.scratch.join("out"));
    write_out(&sources)?;
    let script = sources.join(SCRIPT);

    let mut needed = Vec::new();
    tool::run(Command::new(&script).arg("--print-deps"), |line| {
        needed.extend(line.split_whitespace().map(str::to_owned));
    })?;
    packages::ensure_tools(&needed.iter().map(String::as_str).collect::<Vec<_>>(), progress)?;

    let jobs = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    let mut phases = Phases { progress, current: None };
    let mut command = Command::new(&script);
    command.arg("--out").arg(&out).args(["--jobs", &jobs]).current_dir(&place.scratch);
    // Large temporary files belong on the cache's file system and go with the build.
    command.env("TMPDIR", &place.scratch);
    tool::run(&mut command, |line| phases.line(line)).map_err(|error| keep_log(error, &out, failure_log))?;
    phases.finish();

    for name in RESULTS {
        let (from, to) = (out.join(name), place.out.join(name));
        fs::rename(&from, &to).map_err(|_| {
            let missing = format!("left no {name}");
            Error::Incomplete { program: SCRIPT.to_owned(), missing }
        })?;
    }
    inspect::inspect_kernel(&place.out.join(VMLINUX))?;
    let version = place.out.join(SOURCE_VERSION);
    fs::read_to_string(&version).map(|text| text.trim().to_owned()).map_err(Error::io("read", &version))
}

/// The workplace goes, and with it the log that a failure speaks of: saves it and says where.
fn keep_log(mut error: Error, out: &Path, failure_log: &Path) -> Error {
    if let Error::ToolFailed { output, .. } = &mut error
        && fs::rename(out.join("build.log"), failure_log).is_ok()
    {
        output.push_str(&format!("\nthe whole log is kept as {}", failure_log.display()));
    }
    error
}

fn write_out(dir: &Path) -> Result<(), Error> {
    for file in embedded::FILES {
        let path = dir.join(file.path);
        let parent = path.parent().unwrap_or(dir);
        fs::create_dir_all(parent).map_err(Error::io("create", parent))?;
        fs::write(&path, file.bytes).map_err(Error::io("write", &path))?;
        let mode = if file.executable { 0o755 } else { 0o644 };
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .map_err(Error::io("set the mode of", &path))?;
    }
    Ok(())
}

/// Turns the script's lines `progress <phase> <done> <total> <unit>` into steps.
struct Phases<'a> {
    progress: &'a mut dyn Progress,
    /// Phase and unit. The script may correct a total on the way, which is no new step.
    current: Option<(String, String)>,
}

impl Phases<'_> {
    fn line(&mut self, line: &str) {
        let Some((phase, done, total, unit)) = parse_progress(line) else { return };
        let step = (phase.to_owned(), unit.to_owned());
        if self.current.as_ref() != Some(&step) {
            self.finish();
            self.progress.begin(&format!("kernel: {phase}"), (total > 0).then_some(total), unit);
            self.current = Some(step);
        }
        self.progress.advance(done);
    }

    fn finish(&mut self) {
        if self.current.take().is_some() {
            self.progress.end();
        }
    }
}

fn parse_progress(line: &str) -> Option<(&str, u64, u64, &str)> {
    let mut words = line.split_whitespace();
    if words.next()? != "progress" {
        return None;
    }
    let (phase, done, total) = (words.next()?, words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    Some((phase, done, total, words.next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Calls(Vec<String>);

    impl Progress for Calls {
        fn begin(&mut self, step: &str, total: Option<u64>, unit: &str) {
            self.0.push(format!("begin {step} {total:?} {unit}"));
        }
        fn advance(&mut self, done: u64) {
            self.0.push(format!("advance {done}"));
        }
        fn message(&mut self, text: &str) {
            self.0.push(text.to_owned());
        }
        fn end(&mut self) {
            self.0.push("end".to_owned());
        }
    }

    #[test]
    fn each_phase_of_the_script_is_one_step_and_other_lines_are_passed_over() {
        let mut calls = Calls::default();
        let mut phases = Phases { progress: &mut calls, current: None };
        for line in [
            "progress fetch 0 130 MiB",
            "chatter",
            "progress fetch 130 130 MiB",
            "progress compile 1 900 objects",
            "progress compile x 900 objects",
            "progress compile 901 901 objects",
            "progress link 0 0",
        ] {
            phases.line(line);
        }
        phases.finish();
        assert_eq!(
            calls.0,
            [
                "begin kernel: fetch Some(130) MiB",
                "advance 0",
                "advance 130",
                "end",
                "begin kernel: compile Some(900) objects",
                "advance 1",
                "advance 901",
                "end",
                "begin kernel: link None ",
                "advance 0",
                "end"
            ]
        );
    }

    #[test]
    fn another_compiler_makes_another_kernel() {
        assert_ne!(kernel_key("12.2.0"), kernel_key("14.2.0"));
    }
}
