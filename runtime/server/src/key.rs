//! API keys: who a request comes from, found out without a database.
//!
//! A key is `isorun_live_<region>_<id>_<mac>`. The id is `<tenant>-<8 hexadecimal digits>`, the MAC is HMAC-SHA256 of region
//! and id under the runner's secret, in 64 hexadecimal digits. What was handed out is not stored; what was
//! revoked is, one id a line. This room touches the two files of its directory and nothing else.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use std::collections::BTreeSet;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use subtle::ConstantTimeEq as _;

const PREFIX: &str = "isorun_live_";
const DOMAIN: &[u8] = b"peregrine.key.v1\0";
/// Bytes of the runner's secret and of a MAC.
const BYTES: usize = 32;
/// Most bytes of a tenant's or a region's name.
pub const NAME_MAX_BYTES: usize = 32;
/// Most bytes of a whole key, for whoever reads one from a stranger.
pub const KEY_MAX_BYTES: usize = PREFIX.len() + 2 * NAME_MAX_BYTES + 9 + 2 + 2 * BYTES;

/// Why keys cannot be made, or read.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// A file refused.
    #[error("{}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The secret's file holds something else.
    #[error("{}: not 64 hexadecimal digits; restore it, or remove it and hand out new keys", .0.display())]
    Secret(PathBuf),
    /// A name that cannot be part of a key.
    #[error("{what} {given:?}: 1 to {NAME_MAX_BYTES} of a-z, 0-9 and '-', a letter first")]
    Name {
        /// `tenant` or `region`.
        what: &'static str,
        /// What was given.
        given: String,
    },
    /// What shall be revoked is neither a key of this runner nor a key's id.
    #[error("{0:?} is neither a key that this runner made nor a key's id (`<tenant>-<8 digits>`)")]
    NotAKey(String),
}

/// A key that was just made: the only time that it is seen whole.
#[derive(Clone, PartialEq, Eq)]
pub struct Minted {
    /// The id: no secret; what `key revoke` takes.
    pub id: String,
    /// The key itself.
    pub key: String,
}

impl std::fmt::Debug for Minted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Minted({})", self.id)
    }
}

/// Whom a key speaks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The tenant: sandboxes, history and audit are its own.
    pub tenant: String,
    /// The key's id.
    pub id: String,
}

/// Makes and checks keys.
pub struct Keys {
    dir: PathBuf,
    secret: [u8; BYTES],
    revoked: BTreeSet<String>,
    /// The list's time and size when it was read.
    read: Option<(SystemTime, u64)>,
}

impl std::fmt::Debug for Keys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Keys({})", self.dir.display())
    }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> KeyError {
    let path = path.to_owned();
    move |source| KeyError::File { path, source }
}

impl Keys {
    /// The keys of the runner whose files are in `dir`; its secret is made if there is none.
    ///
    /// # Errors
    /// If a file cannot be read or written, or holds something else.
    pub fn open(dir: &Path) -> Result<Self, KeyError> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(file(dir))?;
        let path = dir.join("secret");
        if !path.exists() {
            make_secret(dir, &path).map_err(file(&path))?;
        }
        let text = std::fs::read_to_string(&path).map_err(file(&path))?;
        let mut secret = [0; BYTES];
        hex::decode_to_slice(text.trim(), &mut secret).map_err(|_| KeyError::Secret(path))?;
        let mut keys = Self { dir: dir.to_owned(), secret, revoked: BTreeSet::new(), read: None };
        keys.refresh()?;
        Ok(keys)
    }

    /// Makes a key for `tenant`.
    ///
    /// # Errors
    /// [`KeyError::Name`] for a name that cannot be part of one.
    pub fn mint(&self, tenant: &str, region: &str) -> Result<Minted, KeyError> {
        for (what, given) in [("tenant", tenant), ("region", region)] {
            if !is_name(given) {
                return Err(KeyError::Name { what, given: given.to_owned() });
            }
        }
        let mut number = [0; 4];
        random(&mut number).map_err(file(Path::new("getrandom")))?;
        let id = format!("{tenant}-{}", hex::encode(number));
        let key = format!("{PREFIX}{region}_{id}_{}", hex::encode(self.mac(region, &id)));
        Ok(Minted { id, key })
    }

    /// Whom `key` speaks for; `None` if this runner did not make it, or it was revoked. How long this takes tells
    /// nothing of how much of the MAC was right.
    #[must_use]
    pub fn check(&self, key: &str) -> Option<Caller> {
        let caller = self.verify(key)?;
        (!self.revoked.contains(&caller.id)).then_some(caller)
    }

    fn verify(&self, key: &str) -> Option<Caller> {
        if key.len() > KEY_MAX_BYTES {
            return None;
        }
        let mut parts = key.strip_prefix(PREFIX)?.split('_');
        let (region, id, mac) = (parts.next()?, parts.next()?, parts.next()?);
        let mut given = [0; BYTES];
        hex::decode_to_slice(mac, &mut given).ok()?;
        let tenant = tenant_of(id).filter(|_| parts.next().is_none())?;
        let right: bool = self.mac(region, id).ct_eq(&given).into();
        // hex::decode takes capitals too; a key has one spelling.
        let one_spelling = !mac.bytes().any(|b| b.is_ascii_uppercase());
        (right && one_spelling).then(|| Caller { tenant: tenant.to_owned(), id: id.to_owned() })
    }

    /// Revokes a key, given whole or by its id, for good; durable when this returns. A running server sees it at
    /// its next [`Keys::refresh`].
    ///
    /// # Errors
    /// [`KeyError::NotAKey`], or if the list cannot be written.
    pub fn revoke(&mut self, key_or_id: &str) -> Result<String, KeyError> {
        let id = self.verify(key_or_id).map(|caller| caller.id);
        let id = id.or_else(|| tenant_of(key_or_id).map(|_| key_or_id.to_owned()));
        let id = id.ok_or_else(|| KeyError::NotAKey(key_or_id.to_owned()))?;
        let path = self.dir.join("revoked");
        let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(&path);
        let written = opened.and_then(|mut list| {
            // A line that a crash cut short must not swallow this one.
            list.write_all(format!("\n{id}\n").as_bytes())?;
            list.sync_all()
        });
        written.and_then(|()| File::open(&self.dir)?.sync_all()).map_err(file(&path))?;
        self.refresh()?;
        Ok(id)
    }

    /// Reads the list of revoked keys again if it has changed.
    ///
    /// # Errors
    /// If it cannot be read; the old list stays.
    pub fn refresh(&mut self) -> Result<(), KeyError> {
        let path = self.dir.join("revoked");
        let found = match std::fs::metadata(&path) {
            Ok(found) => found,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(file(&path)(e)),
        };
        let stamp = (found.modified().map_err(file(&path))?, found.len());
        if self.read != Some(stamp) {
            let text = std::fs::read_to_string(&path).map_err(file(&path))?;
            self.revoked = text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect();
            self.read = Some(stamp);
        }
        Ok(())
    }

    fn mac(&self, region: &str, id: &str) -> [u8; BYTES] {
        // A shorter key is padded with zeros to the block (RFC 2104, section 2).
        let mut block = [0; 64];
        block[..BYTES].copy_from_slice(&self.secret);
        let mut mac = Hmac::<Sha256>::new((&block).into());
        mac.update(DOMAIN);
        for part in [region, id] {
            mac.update(&(part.len() as u64).to_le_bytes());
            mac.update(part.as_bytes());
        }
        mac.finalize().into_bytes().into()
    }
}

/// Whether this can be a tenant's or a region's name.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    text.len() <= NAME_MAX_BYTES
        && text.bytes().next().is_some_and(|b| b.is_ascii_lowercase())
        && text.bytes().all(plain)
}

/// The tenant in a key's id, if it is one.
fn tenant_of(id: &str) -> Option<&str> {
    let (tenant, number) = id.rsplit_once('-')?;
    let hexadecimal = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    (is_name(tenant) && number.len() == 8 && number.bytes().all(hexadecimal)).then_some(tenant)
}

fn random(out: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(out)
}

/// Two processes may do this at once: the first link wins, and both read that one.
fn make_secret(dir: &Path, path: &Path) -> io::Result<()> {
    let mut secret = [0; BYTES];
    random(&mut secret)?;
    let temporary = dir.join(format!(".secret.{}", std::process::id()));
    let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
    out.write_all(hex::encode(secret).as_bytes())?;
    out.sync_all()?;
    let linked = std::fs::hard_link(&temporary, path);
    std::fs::remove_file(&temporary)?;
    match linked {
        Err(e) if e.kind() != io::ErrorKind::AlreadyExists => Err(e),
        _ => File::open(dir)?.sync_all(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys() -> (tempfile::TempDir, Keys) {
        let dir = tempfile::tempdir().unwrap();
        let keys = Keys::open(dir.path()).unwrap();
        (dir, keys)
    }

    #[test]
    fn a_key_speaks_for_the_tenant_that_it_was_made_for_after_a_restart_too() {
        let (dir, keys) = keys();
        let minted = keys.mint("acme-corp", "eu-1").unwrap();
        assert!(minted.key.starts_with("isorun_live_eu-1_acme-corp-"));
        assert!(minted.key.len() <= KEY_MAX_BYTES);
        let caller = Caller { tenant: "acme-corp".to_owned(), id: minted.id };
        assert_eq!(keys.check(&minted.key), Some(caller.clone()));
        assert_eq!(Keys::open(dir.path()).unwrap().check(&minted.key), Some(caller));
    }

    #[test]
    fn another_runners_key_is_no_key() {
        let ((_a, ours), (_b, theirs)) = (keys(), keys());
        assert_eq!(ours.check(&theirs.mint("acme", "local").unwrap().key), None);
    }

    #[test]
    fn a_revoked_key_is_refused_by_a_running_server_and_others_are_not() {
        let (dir, mut server) = keys();
        let (gone, kept) = (server.mint("acme", "local").unwrap(), server.mint("acme", "local").unwrap());
        let mut command = Keys::open(dir.path()).unwrap();
        assert_eq!(command.revoke(&gone.key).unwrap(), gone.id);
        server.refresh().unwrap();
        assert_eq!(server.check(&gone.key), None);
        assert!(server.check(&kept.key).is_some());
        assert_eq!(command.revoke(&kept.id).unwrap(), kept.id);
        server.refresh().unwrap();
        assert_eq!(server.check(&kept.key), None);
        assert!(matches!(command.revoke("acme"), Err(KeyError::NotAKey(_))));
    }

    #[test]
    fn names_that_would_make_a_key_ambiguous_are_refused() {
        let (_dir, keys) = keys();
        for name in ["", "a_b", "A", "1a", "-a", "ä", "a".repeat(33).as_str()] {
            assert!(matches!(keys.mint(name, "local"), Err(KeyError::Name { .. })), "{name}");
            assert!(matches!(keys.mint("acme", name), Err(KeyError::Name { .. })), "{name}");
        }
    }

    #[test]
    fn a_damaged_secret_is_an_error_and_not_a_new_secret() {
        let (dir, _keys) = keys();
        std::fs::write(dir.path().join("secret"), "00").unwrap();
        assert!(matches!(Keys::open(dir.path()), Err(KeyError::Secret(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn every_changed_truncated_or_lengthened_key_is_refused(
            at in any::<prop::sample::Index>(), byte in any::<char>(), keep in any::<prop::sample::Index>(), tail in ".{1,4}"
        ) {
            let (_dir, keys) = keys();
            let key = keys.mint("acme", "local").unwrap().key;
            let at = at.index(key.len());
            let mut changed: Vec<char> = key.chars().collect();
            changed[at] = byte;
            let changed: String = changed.into_iter().collect();
            prop_assume!(changed != key);
            prop_assert_eq!(keys.check(&changed), None);
            prop_assert_eq!(keys.check(&key[..keep.index(key.len())]), None);
            let longer = format!("{key}{tail}");
            prop_assert_eq!(keys.check(&longer), None);
        }

        #[test]
        fn arbitrary_text_is_no_key(text in "(isorun_live_)?.{0,80}") {
            let (_dir, keys) = keys();
            prop_assert_eq!(keys.check(&text), None);
        }
    }
}
