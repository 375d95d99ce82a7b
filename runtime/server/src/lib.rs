//! What the `peregrine` command, its tests and its benches share: the guest artefacts, the agent that is
//! built into the binary, templates and API keys.

pub mod artefacts;
pub mod key;
pub mod template;
