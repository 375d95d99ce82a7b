//! Which guest: the options that `run` and `template build` share. They choose the template.

use super::CliError;
use clap::{Args, ValueEnum};
use peregrine::artefacts::{Artefacts, Wanted};
use peregrine_image::oci::{self, Pull, ReadyImage, Registries};
use peregrine_image::{Progress, Store};
use peregrine_vmm::{DiskConfig, VmConfig};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct GuestArgs {
    /// Root file system: the name of an image, as `python:3.12`, which is pulled if it is not here; or an EROFS
    /// file, if it begins with `/` or `.` or ends in `.erofs` [default: the built-in Debian image]
    #[arg(long, value_name = "NAME|PATH")]
    image: Option<OsString>,
    /// When to ask the registry for the image of --image
    #[arg(long, value_enum, default_value_t = PullWhen::Missing, value_name = "WHEN")]
    pull: PullWhen,
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

/// As `docker run --pull`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PullWhen {
    /// If it is not here
    Missing,
    /// Each time: what a tag means may have changed
    Always,
    /// Not at all
    Never,
}

impl From<PullWhen> for Pull {
    fn from(when: PullWhen) -> Self {
        match when {
            PullWhen::Missing => Self::Missing,
            PullWhen::Always => Self::Always,
            PullWhen::Never => Self::Never,
        }
    }
}

/// What a guest is made from, found or built.
pub(crate) struct Prepared {
    pub(crate) artefacts: Artefacts,
    /// The image, if it has a name and so a configuration.
    pub(crate) image: Option<ReadyImage>,
}

impl GuestArgs {
    /// Checks what needs no artefacts, then finds or builds them.
    pub(crate) fn prepare(
        &self,
        cache: Option<PathBuf>,
        progress: &mut dyn Progress,
    ) -> Result<Prepared, CliError> {
        peregrine_vmm::vm::check_size(self.vcpus, self.mem_mib)?;
        peregrine_vmm::vm::open_kvm()?;
        let named = self.image.as_ref().filter(|image| !is_path(image));
        let image = named.map(|name| self.resolve(name, cache.as_deref(), progress)).transpose()?;
        let path = image.as_ref().map(|image| image.path.clone());
        let path = path.or_else(|| self.image.as_ref().map(PathBuf::from));
        let wanted = Wanted { cache, kernel: self.kernel.clone(), image: path };
        Ok(Prepared { artefacts: Artefacts::prepare(&wanted, progress)?, image })
    }

    fn resolve(
        &self,
        name: &OsStr,
        cache: Option<&Path>,
        progress: &mut dyn Progress,
    ) -> Result<ReadyImage, CliError> {
        let registries = Registries::from_env()?;
        let reference = registries.parse(&name.to_string_lossy())?;
        let store = cache.map_or_else(Store::open, Store::at)?;
        Ok(oci::resolve(&store, &reference, self.pull.into(), &registries, progress)?)
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

/// Image names have none of these, so what is meant does not depend on what lies in the working directory.
fn is_path(image: &OsStr) -> bool {
    let bytes = image.as_bytes();
    bytes.starts_with(b"/") || bytes.starts_with(b".") || bytes.ends_with(b".erofs")
}
