//! Templates: a guest booted once, warmed up and frozen, of which every later sandbox is a clone.
//!
//! ```text
//! boot -> adopt -> warm-up commands -> idle -> freeze: <cache>/template/<key>/{memory, state, inputs.json}
//! ```
//!
//! The key covers every input that matters; a template that this host or this build cannot use is made again,
//! never loaded.

mod catalogue;
pub mod maker;

pub use catalogue::{Listed, list, named};

use catalogue::Inputs;
use peregrine_image::{Key, Kind, Progress, Store};
use peregrine_vmm::agent::{Agent, AgentError, Command};
use peregrine_vmm::snapshot::{Compat, MEMORY_FILE, SnapshotError, Stored};
use peregrine_vmm::{MicroVm, VmConfig, VmmError};
use std::fmt::Write as _;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Run once before the freeze, so that what they need lies in the guest's memory: the loader, the C library,
/// the shell, and the interpreters that the image has. One that the image lacks costs nothing later.
const WARM_UP: &[&[&str]] = &[&["/bin/sh", "-c", ":"], &["python3", "-c", "pass"], &["node", "-e", "0"]];
/// A warm-up command that takes longer is given up, and the template with it.
const WARM_UP_TIMEOUT: Duration = Duration::from_secs(120);
/// The guest has come to rest when it executed fewer kernel instructions than this in [`IDLE_LOOK`].
const IDLE_INSTRUCTIONS: u64 = 2_000;
const IDLE_LOOK: Duration = Duration::from_millis(100);
/// A guest that never rests is frozen after this all the same.
const IDLE_PATIENCE: Duration = Duration::from_secs(3);
/// How long a guest at rest may take to its freeze point.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(10);
/// Bumped when the way templates are made changes.
const RECIPE: &str = "8";

/// Why there is no template.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The cache failed.
    #[error(transparent)]
    Store(#[from] peregrine_image::Error),
    /// The guest could not be booted or captured.
    #[error(transparent)]
    Vmm(#[from] VmmError),
    /// What there is cannot be used.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The guest did not come up or broke off.
    #[error("while making the template: {why}")]
    Guest {
        /// The microVM's own reason if it has one, else the agent's.
        why: String,
    },
    /// Said by the process that was to make it.
    #[error("{0}")]
    Maker(String),
    /// Nothing is called so.
    #[error("template {name:?}: {problem}")]
    Name {
        /// What was given.
        name: String,
        /// Why that is no name.
        problem: &'static str,
    },
    /// A file cannot be looked at.
    #[error("cannot read {path}: {source}")]
    Input {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Names the template of a configuration: kernel, agent, image, vCPUs, memory, parameters, CPU, and how it is
/// made.
///
/// # Errors
/// If a file cannot be looked at.
pub fn key(config: &VmConfig) -> Result<Key, TemplateError> {
    let mut files = String::new();
    for path in std::iter::once(&config.kernel).chain(config.disks.iter().map(|disk| &disk.path)) {
        let input = |source| TemplateError::Input { path: path.clone(), source };
        let m = path.metadata().map_err(input)?;
        // A file is the same while these are: reading 100 MB each time would take longer than a restore.
        let _ = write!(files, "{} {} {} {}.{} ", m.dev(), m.ino(), m.size(), m.mtime(), m.mtime_nsec());
    }
    let compat = Compat::host();
    let host = format!("{} {} {}", compat.version, compat.kvm, compat.cpu);
    let size = format!("{} vCPUs, {} MiB", config.vcpus, config.mem_mib);
    let warm_up = format!("{WARM_UP:?}");
    let parameters = peregrine_vmm::arch::cmdline::fixed();
    let inputs: &[(&str, &[u8])] = &[
        ("recipe", RECIPE.as_bytes()),
        ("build", env!("CARGO_PKG_VERSION").as_bytes()),
        ("files", files.as_bytes()),
        ("size", size.as_bytes()),
        ("parameters", config.kernel_parameters.as_bytes()),
        ("built-in parameters", parameters.as_bytes()),
        ("host", host.as_bytes()),
        ("warm-up", warm_up.as_bytes()),
    ];
    Ok(Key::of("template", inputs))
}

/// The template of this configuration, checked and open: from the cache, or else made now, which takes as
/// long as a boot.
///
/// # Errors
/// Why not.
pub fn prepare(
    store: &Store,
    config: &VmConfig,
    progress: &mut dyn Progress,
) -> Result<Stored, TemplateError> {
    let key = key(config)?;
    let check = |dir: &Path| -> Result<(), TemplateError> { Ok(Stored::open(dir)?.verify_memory()?) };
    let dir = store.template(&key, progress, check, |out, progress| make(config, out, progress))?;
    store.note_use(Kind::Template, &key);
    Ok(Stored::open(&dir)?)
}

/// A clone of the template of this configuration; it stands still. What only a vCPU can tell, the TSC's
/// frequency, is compared here: a template that does not fit in that is made again too, once.
///
/// # Errors
/// Why not.
pub fn restore(
    store: &Store,
    config: &VmConfig,
    progress: &mut dyn Progress,
) -> Result<MicroVm, TemplateError> {
    let clone =
        |template: &Stored| MicroVm::restore(template, config.open_disks()?, &peregrine_vmm::vm::open_kvm()?);
    match clone(&prepare(store, config, progress)?) {
        Err(VmmError::Snapshot(SnapshotError::Incompatible(why))) => {
            progress.message(&format!("building this template again: {why}"));
            store.remove(Kind::Template, &key(config)?)?;
            Ok(clone(&prepare(store, config, progress)?)?)
        }
        result => Ok(result?),
    }
}

fn make(config: &VmConfig, out: &Path, progress: &mut dyn Progress) -> Result<Vec<String>, TemplateError> {
    let steps = 2 + WARM_UP.len() as u64;
    progress.begin("template: boot, warm up, freeze", Some(steps), "steps");
    let path = out.join(MEMORY_FILE);
    let create = File::options().read(true).write(true).create_new(true).open(&path);
    let image = Arc::new(create.map_err(|source| TemplateError::Input { path, source })?);
    let vm = MicroVm::boot_into(config.check()?, &image)?;
    let guest = |vm: &MicroVm, error: AgentError| TemplateError::Guest {
        why: vm.stop_reason().map_or_else(|| error.to_string(), |reason| reason.to_string()),
    };
    let (mut agent, _) = vm.connect_agent(WARM_UP_TIMEOUT).map_err(|e| guest(&vm, e))?;
    progress.advance(1);
    agent.set_timeout(Some(WARM_UP_TIMEOUT)).map_err(|e| guest(&vm, e))?;
    for (done, command) in WARM_UP.iter().enumerate() {
        warm_up(&mut agent, command).map_err(|e| guest(&vm, e))?;
        progress.advance(2 + done as u64);
    }
    agent.set_timeout(None).map_err(|e| guest(&vm, e))?;
    rest(&vm);
    vm.freeze_point(&agent, FREEZE_TIMEOUT).map_err(|e| guest(&vm, e))?;
    vm.freeze(&agent, &image, out)?;
    let inputs = Inputs::of(config);
    inputs.write(out)?;
    progress.advance(steps);
    progress.end();
    Ok(inputs.made_from())
}

fn warm_up(agent: &mut Agent, argv: &[&str]) -> Result<(), AgentError> {
    // Whether the image has the command and what it says is its own business.
    agent.output(&Command::new(argv), b"").map(drop)
}

/// Waits until the guest's kernel has no more to do: what it still does after the freeze, every clone does
/// again.
fn rest(vm: &MicroVm) {
    let begun = Instant::now();
    let mut before = vm.emulated_instructions().unwrap_or(0);
    while begun.elapsed() < IDLE_PATIENCE {
        thread::sleep(IDLE_LOOK);
        let now = vm.emulated_instructions().unwrap_or(0);
        if now.saturating_sub(before) < IDLE_INSTRUCTIONS {
            return;
        }
        before = now;
    }
}
