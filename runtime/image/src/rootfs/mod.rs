//! A root file system put together without a file system: layers of tar become a tree in memory whose file
//! contents lie in the image file already, and the tree becomes EROFS around them. No entry of a layer is ever
//! a path of the host: names, links, owners and devices are data.
//!
//! ```text
//! layer bytes -> tar (framing, limits) -> tree (merge: whiteouts, links) -> erofs (metadata behind the contents)
//!                          `-> contents, straight into the image file, block by block
//! ```

mod erofs;
mod tar;
mod tree;
mod unpack;

pub(crate) use tar::{TarError, TarStream};
pub(crate) use unpack::{Builder, Expected, Limits};

/// Covers what decides the bytes of an image beside its layers: changes with every change of them.
pub(crate) const FORMAT: &str = "erofs/1";
