//! Makes EROFS files with mkfs.erofs. The same tree gives the same bytes.

use std::path::Path;
use std::process::Command;

use crate::error::Error;
use crate::inspect;
use crate::progress::Progress;
use crate::recipe::MKFS_OPTIONS;
use crate::{packages, tool};

/// Writes the tree at `root` as an EROFS image and checks that it can be mounted.
pub(crate) fn make(image: &Path, root: &Path, progress: &mut dyn Progress) -> Result<(), Error> {
    let mkfs = packages::ensure_program("mkfs.erofs", "erofs-utils", progress)?;
    // The tool reads SOURCE_DATE_EPOCH and others; nothing of the caller's environment may show in the image.
    tool::run(Command::new(mkfs).env_clear().args(MKFS_OPTIONS).arg(image).arg(root), |_| {})?;
    inspect::inspect_image(image).map(|_| ())
}

/// What the tool calls itself, for the keys of what it makes.
pub(crate) fn version(progress: &mut dyn Progress) -> Result<String, Error> {
    let mkfs = packages::ensure_program("mkfs.erofs", "erofs-utils", progress)?;
    let (_, text) = tool::ask(Command::new(mkfs).arg("--version"))?;
    Ok(text.lines().next().unwrap_or_default().trim().to_owned())
}
