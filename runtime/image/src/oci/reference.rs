//! What people call an image, as Docker users expect: `python:3.12`, `ghcr.io/x/y@sha256:…`,
//! `localhost:5000/z`. Grammar: the distribution project's `reference` package. Pure.

use std::fmt;

use super::manifest::Digest;
use crate::error::Error;

/// The registry of a name that has none.
pub const DOCKER_HUB: &str = "docker.io";
const NAME_MAX_BYTES: usize = 255;
const TAG_MAX_BYTES: usize = 128;

/// The name of an image, complete: registry, repository, and a tag or a digest.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Reference {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

impl Reference {
    /// Parses a name; what has no registry is of Docker Hub.
    ///
    /// # Errors
    /// [`Error::Reference`], which says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, Error> {
        Self::parse_with(text, DOCKER_HUB)
    }

    /// Parses a name; what has no registry is of `default_registry`.
    ///
    /// # Errors
    /// [`Error::Reference`], which says what is wrong with it.
    pub fn parse_with(text: &str, default_registry: &str) -> Result<Self, Error> {
        parse(text, default_registry).map_err(|why| Error::Reference { given: text.to_owned(), why })
    }

    /// Host name, and port if it has one.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The path within the registry.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, if it is named by one.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// `sha256:…`, if it is named by one.
    pub fn digest(&self) -> Option<&str> {
        self.digest.as_ref().map(Digest::as_str)
    }

    /// The name as people write it: without what goes without saying.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let Some(short) = full.strip_prefix("docker.io/") else { return full };
        short.strip_prefix("library/").unwrap_or(short).to_owned()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        match (&self.digest, &self.tag) {
            (Some(digest), _) => write!(f, "@{digest}"),
            (None, tag) => write!(f, ":{}", tag.as_deref().unwrap_or("latest")),
        }
    }
}

fn parse(text: &str, default_registry: &str) -> Result<Reference, &'static str> {
    if text.is_empty() {
        return Err("it is empty");
    }
    let (rest, digest) = match text.split_once('@') {
        Some((rest, digest)) => {
            (rest, Some(Digest::parse(digest).ok_or("its digest is not sha256: and 64 hex digits")?))
        }
        None => (text, None),
    };
    // A colon before the last slash is a port's.
    let (name, tag) = match rest.rfind(':').filter(|&colon| !rest[colon..].contains('/')) {
        Some(colon) => (&rest[..colon], Some(&rest[colon + 1..])),
        None => (rest, None),
    };
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err(
            "its tag may have letters, digits, '_', '.' and '-', 128 at most, and begins with none of the last two",
        );
    }
    let is_host =
        |part: &str| part.contains(['.', ':']) || part == "localhost" || part.contains(char::is_uppercase);
    let (registry, path) = match name.split_once('/') {
        Some((first, path)) if is_host(first) => (first, path),
        _ => (default_registry, name),
    };
    let registry = if registry == "index.docker.io" { DOCKER_HUB } else { registry };
    if !is_registry(registry) {
        return Err("its registry is no host name with or without a port");
    }
    if path.len() == 64 && digest.is_none() && path.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("64 hex digits are a digest, not a name");
    }
    if !path.split('/').all(is_component) || name.len() > NAME_MAX_BYTES {
        return Err(
            "a name has lower-case letters and digits, between them single '.', '_', '-', '/' or '__' or more '-', 255 at most",
        );
    }
    let official = registry == DOCKER_HUB && !path.contains('/');
    let repository = if official { format!("library/{path}") } else { path.to_owned() };
    let tag = match (&digest, tag) {
        (_, Some(tag)) => Some(tag.to_owned()),
        (None, None) => Some("latest".to_owned()),
        (Some(_), None) => None,
    };
    Ok(Reference { registry: registry.to_owned(), repository, tag, digest })
}

fn is_tag(tag: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let mut bytes = tag.bytes();
    tag.len() <= TAG_MAX_BYTES
        && bytes.next().is_some_and(word)
        && bytes.all(|b| word(b) || b == b'.' || b == b'-')
}

fn is_registry(registry: &str) -> bool {
    let (host, port) = match registry.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (registry, None),
    };
    let name = |host: &str| {
        host.split('.').all(|label| {
            let inside = label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            inside && !label.is_empty() && !label.starts_with('-') && !label.ends_with('-')
        })
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_right = address.map_or_else(|| name(host), |ip| ip.parse::<std::net::Ipv6Addr>().is_ok());
    host_is_right
        && port.is_none_or(|port| port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Runs of letters and digits, between them `.`, `_`, `__` or any number of `-`.
fn is_component(component: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = component.as_bytes();
    if !bytes.first().is_some_and(alphanumeric) || !bytes.last().is_some_and(alphanumeric) {
        return false;
    }
    bytes
        .split(alphanumeric)
        .all(|between| matches!(between, b"" | b"." | b"_" | b"__") || between.iter().all(|&b| b == b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn names_mean_what_docker_users_expect() {
        let digest = format!("ghcr.io/x/y@sha256:{HEX}");
        for (given, full) in [
            ("python", "docker.io/library/python:latest"),
            ("python:3.12", "docker.io/library/python:3.12"),
            ("me/app", "docker.io/me/app:latest"),
            ("docker.io/python", "docker.io/library/python:latest"),
            ("index.docker.io/python", "docker.io/library/python:latest"),
            ("localhost/app", "localhost/app:latest"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("127.0.0.1:5000/a/b/c", "127.0.0.1:5000/a/b/c:latest"),
            ("[::1]:5000/app", "[::1]:5000/app:latest"),
            ("a__b/c-----d.e_f", "docker.io/a__b/c-----d.e_f:latest"),
            (&digest, &digest),
            (&format!("ghcr.io/x/y:tag@sha256:{HEX}"), &digest),
        ] {
            assert_eq!(Reference::parse(given).unwrap().to_string(), full, "{given}");
        }
        assert_eq!(Reference::parse("docker.io/library/python:3").unwrap().familiar(), "python:3");
        assert_eq!(
            Reference::parse_with("node", "127.0.0.1:5000").unwrap().to_string(),
            "127.0.0.1:5000/node:latest"
        );
    }

    #[test]
    fn what_is_no_name_is_refused_with_the_reason() {
        let long = "a/".repeat(200) + "b";
        for given in [
            "",
            ":tag",
            "/x",
            "x/",
            "x//y",
            "UPPER",
            "x:",
            "x:-a",
            "x:a/b:c:",
            "a b",
            "x@sha256:12",
            "x@md5:0",
            "-x",
            "x-",
            "x..y",
            "x/../y",
            "../etc",
            "ho st:5000/x",
            "host.:99999/x",
            "h.x:port/y",
            "x\0y",
            "é",
            &long,
            HEX,
            "[::zz]:1/x",
        ] {
            let error = Reference::parse(given).unwrap_err();
            assert!(matches!(error, Error::Reference { .. }), "{given}: {error}");
        }
    }
}
