//! Guest artefacts: builds, caches and finds the kernel, the default root file system image and the disk that
//! carries PID 1; refuses files that could not be booted. Writes only into its cache, and, as root on Debian,
//! installs missing build tools. Knows nothing of virtual machines.
//!
//! Child processes stay in the caller's process group, so a terminal's Ctrl-C ends a build with the caller;
//! what it leaves is swept by the next one.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod agent_disk;
mod apt;
mod default_image;
mod digest;
mod error;
mod furnish;
mod inspect;
mod kernel;
mod mkfs;
pub mod oci;
mod packages;
mod progress;
mod recipe;
mod rootfs;
mod store;
mod tool;
mod unpack;

pub use agent_disk::{agent_disk, existing_agent_disk};
pub use default_image::{ImageArtifact, default_image, refresh_default_image};
pub use digest::Key;
pub use error::Error;
pub use inspect::{
    IMAGE_HEAD_BYTES, ImageFault, ImageInfo, KernelFault, KernelInfo, Refusal, inspect_image, inspect_kernel,
    parse_image, parse_kernel,
};
pub use kernel::{KernelArtifact, kernel};
pub use packages::ensure_tools;
pub use progress::{Lines, Progress, Silent};
pub use store::{Entry, Kind, Store};
