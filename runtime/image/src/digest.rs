//! SHA-256 of bytes and files, and the keys of the cache. Pure but for `of_file`.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use sha2::{Digest as _, Sha256};

/// Names one artefact: the digest of everything that went into it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(String);

impl Key {
    /// Takes a key as it appears in paths and listings; `None` unless it is 64 lower-case hex digits.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        (text.len() == 64 && text.bytes().all(hex)).then(|| Self(text.to_owned()))
    }

    /// The key of something made from these named inputs.
    #[must_use]
    pub fn of(kind: &str, inputs: &[(&str, &[u8])]) -> Self {
        inputs.iter().fold(Inputs::new(kind), |all, (name, value)| all.with(name, value)).key()
    }

    /// The 64 hex digits.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Enough of the key for a human.
    pub fn short(&self) -> &str {
        &self.0[..12]
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Digests named inputs. Each is length-prefixed, so that no two lists of inputs run together to the same
/// bytes.
#[derive(Debug, Default)]
pub(crate) struct Inputs(Sha256);

impl Inputs {
    pub(crate) fn new(kind: &str) -> Self {
        Self::default().with("kind", kind)
    }

    pub(crate) fn with(mut self, name: &str, value: impl AsRef<[u8]>) -> Self {
        for part in [name.as_bytes(), value.as_ref()] {
            self.0.update((part.len() as u64).to_le_bytes());
            self.0.update(part);
        }
        self
    }

    pub(crate) fn key(self) -> Key {
        Key(hex(&self.0.finalize()))
    }
}

/// SHA-256 of a whole file, as hex.
pub(crate) fn of_file(path: &Path) -> io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; 256 * 1024];
    loop {
        match file.read(&mut chunk)? {
            0 => return Ok(hex(&hasher.finalize())),
            read => hasher.update(&chunk[..read]),
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moving_a_byte_from_one_input_to_the_next_changes_the_key() {
        let one = Inputs::new("k").with("a", "xy").with("b", "z").key();
        let other = Inputs::new("k").with("a", "x").with("b", "yz").key();
        assert_ne!(one, other);
    }

    #[test]
    fn a_path_is_not_a_key() {
        assert!(Key::parse("../../etc").is_none());
        assert!(Key::parse(&"A".repeat(64)).is_none());
        let key = Inputs::new("k").key();
        assert_eq!(Key::parse(key.as_str()), Some(key));
    }

    #[test]
    fn a_file_has_the_digest_that_the_standard_gives_for_abc() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, "abc").unwrap();
        assert_eq!(
            of_file(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }
}
