//! The one error type of this room. Each text says what is wrong and, where the reader can do something,
//! what.

use std::path::{Path, PathBuf};

use crate::inspect::{ImageFault, KernelFault};

/// Why an artefact could not be built, found or accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Neither variable that could name a cache directory is set.
    #[error("no place for the cache: set PEREGRINE_CACHE to a directory (HOME and XDG_CACHE_HOME are unset)")]
    NoCacheDir,
    /// The operating system refused a file operation.
    #[error("cannot {doing} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb phrase.
        doing: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A cached artefact is not what was put there.
    #[error("{} is corrupt: {reason}; delete {} and it is built again", file.display(), dir.display())]
    Corrupt {
        /// The damaged file.
        file: PathBuf,
        /// The cache entry to delete.
        dir: PathBuf,
        /// What does not match.
        reason: String,
    },
    /// A root file system image that cannot be booted.
    #[error("image {}: {fault}", path.display())]
    BadImage {
        /// The file as the user named it.
        path: PathBuf,
        /// What is wrong with it.
        fault: ImageFault,
    },
    /// A kernel that cannot be booted.
    #[error("kernel {}: {fault}", path.display())]
    BadKernel {
        /// The file as the user named it.
        path: PathBuf,
        /// What is wrong with it.
        fault: KernelFault,
    },
    /// A program that a build needs cannot be started.
    #[error("cannot run {program}: {source}")]
    ToolUnusable {
        /// The program.
        program: String,
        /// Why it did not start.
        source: std::io::Error,
    },
    /// A program that a build needs failed.
    #[error("{program} failed ({status}){}", indented(output))]
    ToolFailed {
        /// The program, and what it was doing.
        program: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        output: String,
    },
    /// Debian packages are missing and this process may not install them.
    #[error("missing packages: {}; install them with: {command}", packages.join(" "))]
    PackagesMissing {
        /// The missing ones.
        packages: Vec<String>,
        /// What root should run.
        command: String,
    },
    /// There is no dpkg or apt here.
    #[error(
        "this is not a Debian system ({program} not found), so {wanted} cannot be had from packages; {instead}"
    )]
    NotDebian {
        /// The program that was looked for.
        program: &'static str,
        /// What was wanted.
        wanted: String,
        /// What the user can do instead.
        instead: &'static str,
    },
    /// A package holds something that must not be unpacked.
    #[error("package {package}: entry {entry:?} {reason}")]
    Unpack {
        /// File name of the package.
        package: String,
        /// Path of the entry in it.
        entry: String,
        /// Why it was refused.
        reason: String,
    },
    /// A text that is no name of an image.
    #[error("image name {given:?}: {why}")]
    Reference {
        /// As it was given.
        given: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// An image that is neither here nor in its registry.
    #[error("image {image}: {why}")]
    ImageNotFound {
        /// The image.
        image: String,
        /// Where it was looked for.
        why: String,
    },
    /// A registry that does not give the image to this user.
    #[error("image {image}: {why}")]
    ImageRefused {
        /// The image.
        image: String,
        /// 401 or 403.
        status: u16,
        /// What the registry said, and what to do.
        why: String,
    },
    /// A registry that cannot be reached or does not do what registries do.
    #[error("image {image}: {why}")]
    Registry {
        /// The image.
        image: String,
        /// What went wrong, with which registry.
        why: String,
    },
    /// A setting that cannot be read.
    #[error("{name}: {why}")]
    Setting {
        /// The variable or file.
        name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A directory or archive that no image can be taken from.
    #[error("{source_name}: {why}")]
    BadSource {
        /// As it was given.
        source_name: String,
        /// What is wrong with it.
        why: String,
    },
    /// A manifest or configuration that cannot be used.
    #[error("image {image}: {why}")]
    BadContent {
        /// The image.
        image: String,
        /// What is wrong with it.
        why: String,
    },
    /// A layer that is not what it should be or holds what none may.
    #[error("layer {layer}: {reason}")]
    Layer {
        /// Its digest or file name.
        layer: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A tool succeeded but did not deliver.
    #[error("{program} succeeded but {missing}")]
    Incomplete {
        /// The tool.
        program: String,
        /// What was expected of it.
        missing: String,
    },
}

impl Error {
    /// For `map_err`: the failed operation and the path it was on.
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { doing, path: path.to_owned(), source }
    }
}

/// The output of a failed tool under its error line, set off so that it reads as quoted.
fn indented(output: &str) -> String {
    output.lines().filter(|line| !line.is_empty()).flat_map(|line| ["\n    ", line]).collect()
}
