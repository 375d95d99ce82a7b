//! Peregrine's virtual machine monitor: one Linux microVM on KVM.
//!
//! What it is: guest memory, direct 64-bit boot, vCPU threads, virtio-mmio devices on one `io_uring`
//! event loop, and the instruction assist that lets a guest kernel run where KVM emulates ring 0.
//! What it may touch: `/dev/kvm`, the files it is handed, and the guest's own memory. What it must
//! not: find or build kernels and images (`runtime/image`), parse command lines or speak HTTP
//! (`runtime/server`).
//!
//! Unsafe code lives in [`memory`] and [`sys`] (and the event loop's `ring`), nowhere else.

pub mod agent;
pub mod arch;
pub mod assist;
mod assist_state;
pub mod bulk;
mod code_book;
pub mod console;
pub mod devices;
pub mod doorbell;
mod error;
pub mod event_loop;
pub mod host;
pub mod memory;
pub mod priority;
pub mod profile;
mod ring0;
pub mod snapshot;
pub mod stats;
mod sys;
pub mod vcpu;
mod vcpu_state;
pub mod vm;
pub mod worker;

pub use error::VmmError;
pub use vm::{DiskConfig, MicroVm, StopReason, VmConfig};
