//! What the `peregrine` command, its tests and its benches share: the guest artefacts, the agent that is
//! built into the binary, templates, API keys, and the daemon's rooms.

pub mod api;
pub mod artefacts;
pub mod config;
pub mod conversation;
pub mod executor;
pub mod images;
pub mod key;
pub mod places;
pub mod pool;
pub mod registry;
pub mod serve;
pub mod service;
pub mod template;
