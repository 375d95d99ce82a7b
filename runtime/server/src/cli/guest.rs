//! Which guest: the options that `run` and `template build` share. They choose the template.

use super::CliError;
use clap::Args;
use peregrine::artefacts::{Artefacts, Wanted};
use peregrine_image::Progress;
use peregrine_vmm::{DiskConfig, VmConfig};
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// Root file system: a path to an EROFS image [default: the built-in Debian image]
    #[arg(long, value_name = "PATH")]
    image: Option<PathBuf>,
    /// Guest kernel: a path to an uncompressed vmlinux [default: built from Debian's source]
    #[arg(long, value_name = "PATH")]
    kernel: Option<PathBuf>,
    /// Virtual CPUs, 1 to 32
    #[arg(long, default_value_t = 1, value_name = "N")]
    vcpus: u32,
    /// Guest memory in MiB, 64 to what the host has
    #[arg(long = "mem", default_value_t = 256, value_name = "MIB")]
    mem_mib: u64,
    /// More kernel parameters
    #[arg(long, default_value = "", value_name = "PARAMETERS", hide_default_value = true)]
    kernel_parameters: String,
}

impl GuestArgs {
    /// Checks what needs no artefacts, then finds or builds them.
    pub(crate) fn prepare(
        &self,
        cache: Option<PathBuf>,
        progress: &mut dyn Progress,
    ) -> Result<Artefacts, CliError> {
        peregrine_vmm::vm::check_size(self.vcpus, self.mem_mib)?;
        peregrine_vmm::vm::open_kvm()?;
        let wanted = Wanted { cache, kernel: self.kernel.clone(), image: self.image.clone() };
        Ok(Artefacts::prepare(&wanted, progress)?)
    }

    pub(crate) fn config(&self, artefacts: &Artefacts) -> VmConfig {
        let disk = |path: &PathBuf| DiskConfig { path: path.clone(), read_only: true };
        VmConfig {
            kernel: artefacts.kernel.clone(),
            vcpus: self.vcpus,
            mem_mib: self.mem_mib,
            disks: vec![disk(&artefacts.agent_disk), disk(&artefacts.image)],
            kernel_parameters: self.kernel_parameters.clone(),
            verbose: false,
            profile: None,
        }
    }
}
