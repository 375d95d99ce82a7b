//! Which registries there are and how they are spoken to: from the environment, or as a caller sets it.

use std::collections::BTreeMap;

use super::reference::{DOCKER_HUB, Reference};
use crate::error::Error;

const DEFAULT_REGISTRY: &str = "PEREGRINE_DEFAULT_REGISTRY";
const MIRRORS: &str = "PEREGRINE_REGISTRY_MIRRORS";
const PLAIN_HTTP: &str = "PEREGRINE_HTTP_REGISTRIES";

/// Settings of the registry client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Registries {
    /// The registry of a name that has none (`$PEREGRINE_DEFAULT_REGISTRY`, else Docker Hub).
    pub default: String,
    /// Registries to ask first, in order, by the one they stand for
    /// (`$PEREGRINE_REGISTRY_MIRRORS`: `docker.io=mirror.example ghcr.io=mirror.example:5000 …`).
    pub mirrors: BTreeMap<String, Vec<String>>,
    /// Registries spoken to in plain HTTP, beside those on loopback addresses (`$PEREGRINE_HTTP_REGISTRIES`).
    pub plain_http: Vec<String>,
}

impl Default for Registries {
    fn default() -> Self {
        Self { default: DOCKER_HUB.to_owned(), mirrors: BTreeMap::new(), plain_http: Vec::new() }
    }
}

impl Registries {
    /// As the environment says.
    ///
    /// # Errors
    /// [`Error::Setting`] where it cannot be understood.
    pub fn from_env() -> Result<Self, Error> {
        let text = |name: &str| std::env::var(name).unwrap_or_default();
        Self::from_texts(&text(DEFAULT_REGISTRY), &text(MIRRORS), &text(PLAIN_HTTP))
    }

    fn from_texts(default: &str, mirrors: &str, plain_http: &str) -> Result<Self, Error> {
        let words = |text: &str| -> Vec<String> {
            text.split([' ', ',', '\t', '\n']).filter(|word| !word.is_empty()).map(str::to_owned).collect()
        };
        let registry = |name: &str, host: &str| {
            // What is a registry in a name is one here.
            let whole = Reference::parse(&format!("{host}/x"));
            match whole.is_ok_and(|whole| whole.registry() == host) {
                true => Ok(host.to_owned()),
                false => {
                    let why = format!("{host:?} is no host name with a dot or a port");
                    Err(Error::Setting { name: name.to_owned(), why })
                }
            }
        };
        let mut settings = Self::default();
        if !default.trim().is_empty() {
            settings.default = registry(DEFAULT_REGISTRY, default.trim())?;
        }
        for word in words(mirrors) {
            let (of, mirror) = word.split_once('=').ok_or_else(|| Error::Setting {
                name: MIRRORS.to_owned(),
                why: format!("{word:?} is not REGISTRY=MIRROR"),
            })?;
            let mirror = registry(MIRRORS, mirror)?;
            settings.mirrors.entry(registry(MIRRORS, of)?).or_default().push(mirror);
        }
        for word in words(plain_http) {
            settings.plain_http.push(registry(PLAIN_HTTP, &word)?);
        }
        Ok(settings)
    }

    /// A name as its user wrote it.
    ///
    /// # Errors
    /// [`Error::Reference`].
    pub fn parse(&self, name: &str) -> Result<Reference, Error> {
        Reference::parse_with(name, &self.default)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_default_and_plain_http_are_read_from_the_environments_words() {
        let settings =
            Registries::from_texts("localhost:5000", "docker.io=a.b docker.io=c.d,ghcr.io=a.b", "x.y:80")
                .unwrap();
        assert_eq!(settings.mirrors["docker.io"], ["a.b", "c.d"]);
        assert_eq!(settings.parse("node:22-slim").unwrap().to_string(), "localhost:5000/node:22-slim");
        assert_eq!(settings.plain_http, ["x.y:80"]);
        for (default, mirrors, plain) in
            [("no host", "", ""), ("", "docker.io", ""), ("", "a.b=../x", ""), ("", "", "http://x.y")]
        {
            let error = Registries::from_texts(default, mirrors, plain).unwrap_err();
            assert!(matches!(error, Error::Setting { .. }), "{error}");
        }
    }
}
