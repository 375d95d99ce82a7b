//! What the tests of the whole stand on: one Linux microVM that a test binary boots once and shares, its
//! clones, sandboxes in workers, faults of system calls, bare kernels of a few bytes for what Linux cannot be asked to do, and the built `peregrine`
//! command.

pub mod bare;
mod clone;
pub mod daemon;
pub mod oci;
pub mod registry;
pub mod sandbox;
mod strace;

pub use clone::{Clone, PATIENCE};
pub use strace::{Strace, kill};

use guest_init::ToHost;
use peregrine::artefacts::{Artefacts, Wanted};
use peregrine_image::Lines;
use peregrine_vmm::agent::{Agent, Boot, Command, Grants, Output};
use peregrine_vmm::{DiskConfig, MicroVm, VmConfig};
use std::ops::ControlFlow;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// Longer than any boot, however loaded the machine is.
pub const BOOT_TIMEOUT: Duration = Duration::from_secs(300);

/// Is there a KVM to test on? Without one the calling test must return, and this says so where people see it.
/// With `PEREGRINE_REQUIRE_KVM` set (CI does) a test that would skip fails.
#[must_use]
pub fn kvm_or_skip(test: &str) -> bool {
    match peregrine_vmm::vm::open_kvm() {
        Ok(_) => true,
        Err(e) => {
            assert!(
                std::env::var_os("PEREGRINE_REQUIRE_KVM").is_none(),
                "{test} needs KVM, and PEREGRINE_REQUIRE_KVM forbids skipping it: {e}"
            );
            eprintln!("SKIPPED {test}: {e}");
            false
        }
    }
}

/// Can faults be injected here: is there a KVM, are we root, are the tools in the PATH? Else as
/// [`kvm_or_skip`].
#[must_use]
pub fn faults_or_skip(test: &str, tools: &[&str]) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let found = |tool: &&str| std::env::split_paths(&path).any(|dir| dir.join(tool).exists());
    let root = std::fs::metadata("/proc/self").is_ok_and(|process| process.uid() == 0);
    let missing: Vec<_> = tools.iter().filter(|tool| !found(tool)).copied().collect();
    if root && missing.is_empty() {
        return kvm_or_skip(test);
    }
    let why =
        format!("{test} needs root{}", missing.iter().map(|tool| format!(", {tool}")).collect::<String>());
    assert!(std::env::var_os("PEREGRINE_REQUIRE_KVM").is_none(), "{why}; PEREGRINE_REQUIRE_KVM is set");
    eprintln!("SKIPPED {why}");
    false
}

/// The kernel, agent disk and default image, built once for all tests. `PEREGRINE_TEST_KERNEL` names another
/// `vmlinux` to test, such as one with a patch under work.
///
/// # Panics
/// If they cannot be built.
pub fn artefacts() -> &'static Artefacts {
    static ARTEFACTS: OnceLock<Artefacts> = OnceLock::new();
    ARTEFACTS.get_or_init(|| {
        let kernel = std::env::var_os("PEREGRINE_TEST_KERNEL").map(PathBuf::from);
        Artefacts::prepare(&Wanted { kernel, ..Wanted::default() }, &mut Lines::new(std::io::stderr()))
            .unwrap_or_else(|e| panic!("artefacts: {e}"))
    })
}

/// A configuration of the default image with `vcpus` and `mem_mib`.
#[must_use]
pub fn config(vcpus: u32, mem_mib: u64) -> VmConfig {
    let a = artefacts();
    let disk = |path: &PathBuf| DiskConfig { path: path.clone(), read_only: true };
    VmConfig {
        kernel: a.kernel.clone(),
        vcpus,
        mem_mib,
        disks: vec![disk(&a.agent_disk), disk(&a.image)],
        kernel_parameters: String::new(),
        verbose: false,
        profile: None,
    }
}

/// A booted guest and its agent.
pub struct Guest {
    /// The microVM.
    pub vm: MicroVm,
    /// Its agent.
    pub agent: Agent,
    /// What PID 1 said of its start.
    pub boot: Boot,
}

impl Guest {
    /// Boots `config` up to an adopted agent.
    ///
    /// # Panics
    /// If it does not come up; with the console's text.
    #[must_use]
    pub fn boot(config: &VmConfig) -> Self {
        let vm =
            MicroVm::boot(config.check().unwrap_or_else(|e| panic!("{e}"))).unwrap_or_else(|e| panic!("{e}"));
        let (agent, boot) = vm.connect_agent(BOOT_TIMEOUT).unwrap_or_else(|e| {
            panic!("{e}; stop reason {:?}; console:\n{}", vm.stop_reason(), vm.console_text())
        });
        Self { vm, agent, boot }
    }

    /// Runs a shell script in the guest.
    ///
    /// # Panics
    /// If the guest is lost; with its stop reason.
    pub fn sh(&mut self, script: &str) -> Output {
        self.run(&["/bin/sh", "-c", script], b"")
    }

    /// Puts a file of the host into the guest's `/tmp`, to be run.
    ///
    /// # Panics
    /// If it cannot be read, or the guest does not take it.
    pub fn install(&mut self, program: &Path) -> String {
        let name = program.file_name().unwrap_or_else(|| panic!("{}", program.display())).to_string_lossy();
        let path = format!("/tmp/{name}");
        let bytes = std::fs::read(program).unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        let output = self.run(&["/bin/sh", "-c", &format!("cat > {path} && chmod +x {path}")], &bytes);
        assert_eq!(output.code(), 0, "{}", String::from_utf8_lossy(&output.stderr));
        path
    }

    /// Runs a command in the guest with `stdin`.
    ///
    /// # Panics
    /// If the guest is lost; with its stop reason.
    pub fn run(&mut self, argv: &[&str], stdin: &[u8]) -> Output {
        self.agent.output(&Command::new(argv), stdin).unwrap_or_else(|e| {
            panic!("{e}; stop reason {:?}; console:\n{}", self.vm.stop_reason(), self.vm.console_text())
        })
    }
}

/// Takes all output of a running command, and gives its shell's exit code.
///
/// # Panics
/// If the guest is lost.
pub fn drain(agent: &mut Agent, stream: u32, stdout: &mut Vec<u8>) -> u8 {
    let (writer, mut grants) = (agent.writer(), Grants::new(stream));
    let code = agent.pump(|from, message| {
        match message {
            ToHost::Stdout(bytes) if from == stream => {
                stdout.extend_from_slice(bytes);
                grants.taken(bytes.len(), &writer)?;
            }
            ToHost::Exited(exited) if from == stream => return Ok(ControlFlow::Break(exited.shell_code())),
            _ => {}
        }
        Ok(ControlFlow::Continue(()))
    });
    code.unwrap_or_else(|e| panic!("{e}"))
}

/// A program of `tests/guest`, built once with rustc alone as one static file that runs here and in a guest.
///
/// # Panics
/// If rustc is missing or refuses.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let directory = root.join("../target/guest-programs");
    std::fs::create_dir_all(&directory).unwrap_or_else(|e| panic!("{}: {e}", directory.display()));
    let flags = ["--edition=2024", "-O", "-Ctarget-feature=+crt-static", "-Cstrip=symbols", "-Cpanic=abort"];
    // Another test binary may be running the last one, so a new file takes its place.
    let (program, new) = (directory.join(name), directory.join(format!("{name}.{}", process::id())));
    let source = root.join(format!("guest/{name}.rs"));
    let status = process::Command::new("rustc").args(flags).arg("-o").arg(&new).arg(source).status();
    assert!(status.is_ok_and(|s| s.success()), "rustc does not build {name}");
    std::fs::rename(&new, &program).unwrap_or_else(|e| panic!("{}: {e}", program.display()));
    program
}

/// The release build of the `peregrine` command, built on first use.
///
/// # Panics
/// If it cannot be built.
pub fn peregrine() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut cargo = process::Command::new(env!("CARGO"));
        // What cargo told this test about its package would look changed to build scripts that watch it, and
        // half of the dependencies would be built again.
        let of_package = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
        std::env::vars().filter(|(name, _)| of_package(name)).for_each(|(name, _)| {
            cargo.env_remove(name);
        });
        let output = cargo
            .args(["build", "--release", "--locked", "-p", "peregrine", "--message-format=json"])
            .current_dir(&root)
            .stderr(process::Stdio::inherit())
            .output()
            .unwrap_or_else(|e| panic!("cargo: {e}"));
        assert!(output.status.success(), "cargo build failed");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let path = text
            .lines()
            .filter_map(|l| l.split_once("\"executable\":\"").map(|(_, rest)| rest))
            .filter_map(|rest| rest.split_once('"').map(|(path, _)| path))
            .find(|path| path.ends_with("/peregrine"))
            .unwrap_or_else(|| panic!("cargo named no executable"));
        PathBuf::from(path)
    })
}

/// Threads of this process that belong to microVMs.
///
/// # Panics
/// If `/proc` cannot be read.
#[must_use]
pub fn microvm_threads() -> usize {
    let names = ["vcpu", "vmm-loop", "sampler"];
    let tasks = std::fs::read_dir("/proc/self/task").unwrap_or_else(|e| panic!("{e}"));
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .filter(|comm| names.iter().any(|name| comm.starts_with(name)))
        .count()
}
