//! Signed statements about a log. Pure.

use crate::chain::{self, BYTES, Link};
use ed25519_dalek::{Signature, Signer as _};
use serde::{Deserialize, Serialize};
use zeroize::Zeroize as _;

const DOMAIN: &[u8] = b"peregrine.audit.checkpoint.v1\0";

/// What checkpoints are signed with.
#[derive(Clone)]
pub struct SigningKey(ed25519_dalek::SigningKey);

/// What checkpoints are verified with; no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifyingKey(ed25519_dalek::VerifyingKey);

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SigningKey(..)")
    }
}

impl SigningKey {
    /// A new key.
    ///
    /// # Errors
    /// If the kernel has no randomness.
    pub fn random() -> std::io::Result<Self> {
        let mut seed = [0; BYTES];
        chain::random(&mut seed)?;
        let key = ed25519_dalek::SigningKey::from_bytes(&seed);
        seed.zeroize();
        Ok(Self(key))
    }

    /// From 64 hexadecimal digits, white space around them ignored.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut seed = [0; BYTES];
        hex::decode_to_slice(text.trim(), &mut seed).ok()?;
        Some(Self(ed25519_dalek::SigningKey::from_bytes(&seed)))
    }

    /// 64 hexadecimal digits: a secret.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex::encode(self.0.to_bytes())
    }

    /// Its public half.
    #[must_use]
    pub fn verifying_key(&self) -> VerifyingKey {
        VerifyingKey(self.0.verifying_key())
    }
}

impl VerifyingKey {
    /// From 64 hexadecimal digits, white space around them ignored.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; BYTES];
        hex::decode_to_slice(text.trim(), &mut bytes).ok()?;
        ed25519_dalek::VerifyingKey::from_bytes(&bytes).ok().map(Self)
    }

    /// 64 hexadecimal digits.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex::encode(self.0.to_bytes())
    }
}

/// A signed statement: the log had this much, and this in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Whose log.
    pub tenant: String,
    /// How many entries.
    pub entries: u64,
    /// How many bytes of the file.
    pub bytes: u64,
    /// The `hmac` of the last entry.
    pub head: String,
    /// The link digest over all lines.
    pub digest: String,
    /// When it was made.
    pub ts: String,
    /// Ed25519 over all of the above, 128 hexadecimal digits.
    pub signature: String,
}

#[derive(Serialize)]
struct Signed<'a> {
    tenant: &'a str,
    entries: u64,
    bytes: u64,
    head: &'a str,
    digest: &'a str,
    ts: &'a str,
}

impl Checkpoint {
    /// States that `tenant`'s log has so many entries and bytes, this head, and this digest.
    pub(crate) fn sign(
        key: &SigningKey,
        tenant: &str,
        (entries, bytes): (u64, u64),
        head: &str,
        digest: Link,
        ts: String,
    ) -> Result<Self, serde_json::Error> {
        let mut checkpoint = Self {
            tenant: tenant.to_owned(),
            entries,
            bytes,
            head: head.to_owned(),
            digest: chain::text(&digest.0),
            ts,
            signature: String::new(),
        };
        let signature = key.0.sign(&checkpoint.message()?);
        checkpoint.signature = hex::encode(signature.to_bytes());
        Ok(checkpoint)
    }

    fn message(&self) -> Result<Vec<u8>, serde_json::Error> {
        let signed = Signed {
            tenant: &self.tenant,
            entries: self.entries,
            bytes: self.bytes,
            head: &self.head,
            digest: &self.digest,
            ts: &self.ts,
        };
        let canonical = serde_jcs::to_vec(&signed)?;
        let mut message = DOMAIN.to_vec();
        message.extend_from_slice(&(canonical.len() as u64).to_le_bytes());
        message.extend_from_slice(&canonical);
        Ok(message)
    }

    /// Whether `key` signed this.
    #[must_use]
    pub fn is_signed_by(&self, key: &VerifyingKey) -> bool {
        let mut bytes = [0; 64];
        let decoded = hex::decode_to_slice(&self.signature, &mut bytes).is_ok();
        let Ok(message) = self.message() else { return false };
        decoded && key.0.verify_strict(&message, &Signature::from_bytes(&bytes)).is_ok()
    }

    pub(crate) fn line(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut line = serde_jcs::to_vec(self)?;
        line.push(b'\n');
        Ok(line)
    }
}
