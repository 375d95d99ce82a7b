//! What the `peregrine` command, its tests and its benches share: the guest artefacts and the agent that is
//! built into the binary.

pub mod artefacts;
