//! Names of images, and what they stand for.

use crate::artefacts::Artefacts;
use peregrine_image::oci::{self, Pull, ReadyImage, Registries};
use peregrine_image::{Error, Silent};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// A root file system, and how its commands run. It is kept with a sandbox: what its name means may change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Image {
    /// As it was named.
    pub name: String,
    /// Its EROFS file.
    pub path: PathBuf,
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// Where its commands begin, if it says.
    pub working_dir: Option<String>,
    /// User and group number, if not root.
    pub user: Option<(u32, u32)>,
}

impl Image {
    fn of(name: &str, image: &ReadyImage) -> Self {
        let user = &image.config.user;
        let env = image.config.env_with(&[], user);
        Self {
            name: name.to_owned(),
            path: image.path.clone(),
            env: env.into_iter().map(|entry| String::from_utf8_lossy(&entry).into_owned()).collect(),
            working_dir: Some(image.config.working_dir.clone()),
            user: (user.uid != 0 || user.gid != 0).then_some((user.uid, user.gid)),
        }
    }

    /// The variables of a command: the image's, less those that `given` sets, then `given`.
    #[must_use]
    pub fn env_with<'a>(&'a self, given: &'a [String]) -> Vec<&'a String> {
        let name = |entry: &'a String| entry.split('=').next();
        let kept = self.env.iter().filter(|entry| given.iter().all(|other| name(other) != name(entry)));
        kept.chain(given).collect()
    }
}

/// The built-in image, if that is what the name stands for. An alias of the configuration stands for another name.
#[must_use]
pub fn built_in(name: &str, aliases: &BTreeMap<String, String>, artefacts: &Artefacts) -> Option<Image> {
    matches!(meant(name, aliases), "default" | "peregrine/default").then(|| Image {
        name: name.to_owned(),
        path: artefacts.image.clone(),
        ..Image::default()
    })
}

/// The image of any other name: the one that is here, or from its registry. Blocks, for a pull for long.
///
/// # Errors
/// Why there is none.
pub fn find_or_pull(
    name: &str,
    aliases: &BTreeMap<String, String>,
    artefacts: &Artefacts,
) -> Result<Image, Error> {
    let registries = Registries::from_env()?;
    let reference = registries.parse(meant(name, aliases))?;
    let ready = oci::resolve(&artefacts.store, &reference, Pull::Missing, &registries, &mut Silent)?;
    Ok(Image::of(name, &ready))
}

fn meant<'a>(name: &'a str, aliases: &'a BTreeMap<String, String>) -> &'a str {
    aliases.get(name).map_or(name, String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_caller_sets_wins_over_the_image() {
        let text = |entries: &[&str]| entries.iter().map(|e| (*e).to_owned()).collect::<Vec<_>>();
        let image = Image { env: text(&["PATH=/bin", "A=1"]), ..Image::default() };
        let given = text(&["A=2", "B="]);
        assert_eq!(image.env_with(&given), ["PATH=/bin", "A=2", "B="]);
    }
}
