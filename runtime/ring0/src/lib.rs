//! Runs a guest's ring 0, where KVM would emulate it an instruction a microsecond.
//!
//! On software KVM (no VT-x, no AMD-V) ring 3 runs on the processor and ring 0 in KVM's instruction emulator. This
//! engine takes ring 0 over: instructions are decoded once, kept as functions with their operands, and reach memory
//! through a cache of translations over the guest's own page tables. What it does not know, and interrupts, sleep,
//! devices and ring 3, stay KVM's: [`Engine::run`] stops and says why.
//!
//! May touch: one guest's RAM, and its own state. Must not: make a system call, know KVM's file descriptors, panic
//! on anything that a guest can do.
//!
//! | file | what |
//! |---|---|
//! | `engine.rs` | the loop: blocks of decoded code, and what ends them |
//! | `decode.rs`, `op.rs` | from bytes to functions |
//! | `book.rs` | code decoded ahead, for many engines |
//! | `cpu.rs` | registers, operands, loads and stores |
//! | `exec/` | what instructions do |
//! | `alu.rs` | results and flags |
//! | `tlb.rs`, `paging.rs` | linear addresses |
//! | `shadow.rs` | what KVM has made of the guest's page tables, and how it is told of changes |
//! | `ram.rs` | the guest's memory; the unsafe code |

mod alu;
mod book;
mod cpu;
mod decode;
mod engine;
mod exec;
mod op;
mod paging;
mod ram;
mod shadow;
mod stop;
#[cfg(test)]
mod tests;
mod tlb;

pub use book::{Code, CodeBook};
pub use cpu::Cpu;
pub use engine::Engine;
pub use ram::Ram;
pub use shadow::Touch;
pub use stop::Stop;
pub use tlb::Access;

/// Where a kernel writes when ring 3 has trapped into it: the engine's turn.
pub const TRAP_PORT: u8 = 0xf4;
/// Where it writes at the end of `ring0_touch`.
pub const TOUCHED_PORT: u8 = 0xf5;
/// The bulk-memory doorbell's port.
pub const BULK_PORT: u16 = 0x6b0;
