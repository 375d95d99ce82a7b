//! Keys and digests of the chain. Pure.

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;
use zeroize::{Zeroize as _, ZeroizeOnDrop};

/// Bytes of every key and digest here.
pub(crate) const BYTES: usize = 32;

const ENTRY_DOMAIN: &[u8] = b"peregrine.audit.entry.v1\0";
const MAC_DOMAIN: &[u8] = b"peregrine.audit.mac.v1\0";
const RATCHET_DOMAIN: &[u8] = b"peregrine.audit.ratchet.v1\0";
const LINK_DOMAIN: &[u8] = b"peregrine.audit.link.v1\0";

/// The secret that entry n is authenticated with, and that every later one comes from.
#[derive(Clone, ZeroizeOnDrop)]
pub struct ChainKey([u8; BYTES]);

impl std::fmt::Debug for ChainKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChainKey(..)")
    }
}

fn hmac(key: &[u8; BYTES], parts: &[&[u8]]) -> [u8; BYTES] {
    // A shorter key is padded with zeros to the block (RFC 2104, section 2).
    let mut block = [0; 64];
    block[..BYTES].copy_from_slice(key);
    let mut mac = Hmac::<Sha256>::new((&block).into());
    block.zeroize();
    parts.iter().for_each(|part| mac.update(part));
    mac.finalize().into_bytes().into()
}

fn length(bytes: &[u8]) -> [u8; 8] {
    (bytes.len() as u64).to_le_bytes()
}

impl ChainKey {
    /// A new chain's first key.
    ///
    /// # Errors
    /// If the kernel has no randomness.
    pub fn random() -> std::io::Result<Self> {
        let mut key = [0; BYTES];
        random(&mut key)?;
        Ok(Self(key))
    }

    /// From 64 hexadecimal digits, white space around them ignored.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut key = [0; BYTES];
        hex::decode_to_slice(text.trim(), &mut key).ok()?;
        Some(Self(key))
    }

    /// 64 hexadecimal digits: a secret.
    #[must_use]
    pub fn to_hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The MAC of an entry's canonical bytes.
    pub(crate) fn mac(&self, tenant: &str, canonical: &[u8]) -> [u8; BYTES] {
        let mut key = hmac(&self.0, &[MAC_DOMAIN]);
        let tenant = tenant.as_bytes();
        let parts = [ENTRY_DOMAIN, &length(tenant), tenant, &length(canonical), canonical];
        let mac = hmac(&key, &parts);
        key.zeroize();
        mac
    }

    /// The next entry's key takes this one's place.
    pub(crate) fn ratchet(&mut self) {
        let next = hmac(&self.0, &[RATCHET_DOMAIN]);
        self.0.zeroize();
        self.0 = next;
    }
}

/// Fills `out` with the kernel's randomness.
pub(crate) fn random(out: &mut [u8]) -> std::io::Result<()> {
    let mut filled = 0;
    while filled < out.len() {
        filled += rustix::rand::getrandom(&mut out[filled..], rustix::rand::GetRandomFlags::empty())?;
    }
    Ok(())
}

/// The digest over all lines so far, in one step per line: it can be carried on without the lines before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(crate) struct Link(pub(crate) [u8; BYTES]);

impl Link {
    pub(crate) fn extend(&mut self, line: &[u8]) {
        let mut hash = Sha256::new();
        hash.update(LINK_DOMAIN);
        hash.update(self.0);
        hash.update(length(line));
        hash.update(line);
        self.0 = hash.finalize().into();
    }
}

/// `sha256:` and 64 hexadecimal digits.
pub(crate) fn text(digest: &[u8; BYTES]) -> String {
    format!("sha256:{}", hex::encode(digest))
}

/// Whether two texts are equal, in a time that tells nothing of where they differ.
pub(crate) fn equal(left: &str, right: &str) -> bool {
    left.as_bytes().ct_eq(right.as_bytes()).into()
}
