//! What the `peregrine` command, its tests and its benches share: the guest artefacts, the agent that is
//! built into the binary, and templates.

pub mod artefacts;
pub mod template;
