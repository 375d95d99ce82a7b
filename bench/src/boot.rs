//! The `boot` suite: from nothing to the exit of the first command, without any snapshot.

use crate::record::{Promise, Recorder, Unit};
use peregrine::artefacts::{Artefacts, Wanted};
use peregrine_image::Lines;
use peregrine_vmm::agent::Command;
use peregrine_vmm::{DiskConfig, MicroVm, VmConfig};
use std::error::Error;
use std::time::Duration;

/// Longer than any boot.
pub const TIMEOUT: Duration = Duration::from_secs(300);

/// The stages of one boot, each since the VM's build began.
#[derive(Debug, Clone, Copy)]
pub struct Boot {
    /// VM, memory and devices built, kernel loaded.
    pub built: Duration,
    /// The boot processor entered the kernel.
    pub kernel_entry: Duration,
    /// First instruction of PID 1.
    pub pid1: Duration,
    /// `/bin/true` exited.
    pub first_exit: Duration,
    /// Guest instructions that were emulated until the agent was ready, where KVM counts them.
    pub emulated: Option<u64>,
}

/// The default image with one vCPU.
#[must_use]
pub fn config(artefacts: &Artefacts, mem_mib: u64) -> VmConfig {
    let disk = |path: &std::path::PathBuf| DiskConfig { path: path.clone(), read_only: true };
    VmConfig {
        kernel: artefacts.kernel.clone(),
        vcpus: 1,
        mem_mib,
        disks: vec![disk(&artefacts.agent_disk), disk(&artefacts.image)],
        kernel_parameters: String::new(),
        verbose: false,
        profile: None,
    }
}

/// Boots the default image once with one vCPU and runs `/bin/true` in it.
///
/// # Errors
/// Whatever kept the guest from coming up.
pub fn once(artefacts: &Artefacts, mem_mib: u64) -> Result<Boot, Box<dyn Error>> {
    let config = config(artefacts, mem_mib);
    let vm = MicroVm::boot(config.check()?)?;
    let stages = vm.stages();
    let (mut agent, boot) = vm.connect_agent(TIMEOUT)?;
    let emulated = vm.emulated_instructions();
    let output = agent.output(&Command::new(&["/bin/true"]), b"")?;
    let first_exit = stages.start.elapsed();
    if output.code() != 0 {
        return Err(format!("/bin/true exited with {}", output.code()).into());
    }
    let entered = vm.stages().entered.unwrap_or(stages.built);
    Ok(Boot {
        built: stages.built - stages.start,
        kernel_entry: entered - stages.start,
        pid1: boot.pid1().saturating_duration_since(stages.start),
        first_exit,
        emulated,
    })
}

/// Kernel and image, built if they are missing.
///
/// # Errors
/// What could not be built.
pub fn artefacts() -> Result<Artefacts, peregrine_image::Error> {
    let kernel = std::env::var_os("PEREGRINE_TEST_KERNEL").map(std::path::PathBuf::from);
    Artefacts::prepare(&Wanted { kernel, ..Wanted::default() }, &mut Lines::new(std::io::stderr()))
}

fn stage(name: &str, definition: &str, goal_p50: Option<f64>) -> Promise {
    Promise { name: name.to_owned(), definition: definition.to_owned(), goal_p50, goal_p999: None }
}

/// Boots `samples` times with each memory size and gives the rows' recorders.
///
/// # Errors
/// The first boot that failed.
pub fn suite(artefacts: &Artefacts, samples: u32, mem_mib: &[u64]) -> Result<Vec<Recorder>, Box<dyn Error>> {
    let mut all = Vec::new();
    for &mib in mem_mib {
        let goal = if mib <= 256 { Some(4000.0) } else { Some(6000.0) };
        let promises = [
            stage("boot: VM start", "VM build begins -> VM, devices and kernel in place", None),
            stage("boot: kernel entry", "VM build begins -> first KVM_RUN of the boot processor", None),
            stage("boot to PID 1", "VM build begins -> first instruction of PID 1, no snapshot", goal),
            stage("boot: first exec", "VM build begins -> exit of the first command (/bin/true)", None),
        ];
        let mut rows = promises.map(|p| Recorder::new(p, format!("{mib} MiB"), Unit::Milliseconds));
        let counted = stage(
            "boot: emulated instructions",
            "guest instructions that were emulated until the agent was ready",
            None,
        );
        let mut instructions = Recorder::new(counted, format!("{mib} MiB"), Unit::Thousands);
        for n in 0..samples {
            eprintln!("boot {mib} MiB: {} of {samples}", n + 1);
            let boot = once(artefacts, mib)?;
            let times = [boot.built, boot.kernel_entry, boot.pid1, boot.first_exit];
            rows.iter_mut().zip(times).for_each(|(row, time)| row.duration(time));
            if let Some(count) = boot.emulated {
                instructions.count(count);
            }
        }
        all.extend(rows);
        all.push(instructions);
    }
    Ok(all)
}
