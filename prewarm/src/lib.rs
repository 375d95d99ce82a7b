//! The prewarm pool's room: pure policy, no KVM, no I/O, no clock.
//!
//! Empty until templates exist to be pooled; the workspace keeps its place and its rule (it depends on nothing of
//! ours, and has no unsafe code).
#![forbid(unsafe_code)]
