//! Tests of the engine as a whole.
//!
//! | file | what |
//! |---|---|
//! | `differential.rs` | random instructions, done by the engine and by this machine's processor |
//! | `instructions.rs`, `operands.rs`, `undefined.rs` | those instructions, and which of their flags are nobody's business |
//! | `native.rs` | this machine's processor; the unsafe code |
//! | `faults.rs`, `exceptions.rs`, `returns.rs` | what ring 0 is about |
//! | `book.rs` | code that was decoded for another engine |
//! | `code.rs`, `memory.rs` | what is kept of code and translations, and for how long |
//! | `fuel.rs` | how long a run may be |
//! | `shadow.rs`, `kvm.rs` | page tables as a kernel changes them, and what KVM believes of them |
//! | `touches.rs` | the same one by one |
//! | `guest.rs` | a guest small enough to have all of it in one's head |

mod book;
mod code;
mod differential;
mod exceptions;
mod faults;
mod fuel;
mod guest;
mod instructions;
mod kvm;
mod memory;
mod native;
mod operands;
mod random;
mod returns;
mod shadow;
mod touches;
mod undefined;
