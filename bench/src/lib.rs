//! Measuring what Peregrine promises: each suite drives the real thing and hands its samples to a
//! [`Recorder`], which both criterion and the report read. May use everything of ours; nothing of ours uses
//! it.

pub mod boot;
pub mod clone;
pub mod density;
pub mod fork;
pub mod guest;
pub mod hibernate;
pub mod http;
pub mod machine;
pub mod missed;
pub mod plot;
pub mod record;
