//! Names of images, and the file systems they stand for.

use crate::artefacts::Artefacts;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A root file system.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Image {
    /// As it was named.
    pub name: String,
    /// Its EROFS file.
    pub path: PathBuf,
}

/// The image of this name, `None` if there is none. An alias of the configuration stands for another name.
#[must_use]
pub fn resolve(name: &str, aliases: &BTreeMap<String, String>, artefacts: &Artefacts) -> Option<Image> {
    let meant = aliases.get(name).map_or(name, String::as_str);
    matches!(meant, "default" | "peregrine/default")
        .then(|| Image { name: name.to_owned(), path: artefacts.image.clone() })
}
