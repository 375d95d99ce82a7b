//! Tests of the engine as a whole.
//!
//! | file | what |
//! |---|---|
//! | `differential.rs` | random instructions, done by the engine and by this machine's processor |
//! | `operands.rs`, `instructions.rs`, `undefined.rs` | the instructions, and which of their flags are nobody's business |
//! | `native.rs` | this machine's processor |
//! | `guest.rs` | a guest small enough to have all of it in one's head |

mod differential;
mod faults;
mod guest;
mod instructions;
mod native;
mod operands;
mod random;
mod undefined;
