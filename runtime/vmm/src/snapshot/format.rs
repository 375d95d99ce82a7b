//! The state file: a fixed header, then a compatibility record that anybody can read, then the state.
//!
//! ```text
//! offset  bytes  what
//!      0      8  "PGSNAP01"
//!      8      4  length of the compatibility record (JSON), little endian
//!     12      4  length of the state (postcard), little endian
//!     16     32  SHA-256 of bytes 0 to 15 and everything from byte 48 on
//!     48      -  the record, then the state; nothing follows
//! ```
//!
//! Pure: it may touch only the bytes it is handed. The checksum is compared before anything is decoded, and
//! what a field means is fixed by [`super::compat::VERSION`] in the record.

use super::{Compat, MachineState, Snapshot};
use sha2::{Digest as _, Sha256};

const MAGIC: [u8; 8] = *b"PGSNAP01";
const HEADER_BYTES: usize = 48;
/// Longer state files are refused unread: 32 vCPUs need a tenth of it.
pub const MAX_BYTES: usize = 16 << 20;

const _: () = assert!(MAGIC.len() + 4 + 4 + 32 == HEADER_BYTES);

/// What is wrong with a state file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The first bytes are others.
    #[error("it does not begin with the magic number of a state file")]
    Magic,
    /// Its length is not what the header says.
    #[error("it has {found} bytes, its header says {wanted}")]
    Length {
        /// Bytes there are.
        found: usize,
        /// Bytes there should be.
        wanted: usize,
    },
    /// The checksum differs.
    #[error("its checksum does not match")]
    Checksum,
    /// A part does not decode, or does not encode.
    #[error("its {part} does not decode: {why}")]
    Part {
        /// Which.
        part: &'static str,
        /// The decoder's words.
        why: String,
    },
}

/// A state file whose checksum is right, not decoded yet.
#[derive(Debug)]
pub struct Parts<'a> {
    compat: &'a [u8],
    machine: &'a [u8],
}

/// Checks header, lengths and checksum.
///
/// # Errors
/// The first thing wrong.
pub fn parse(bytes: &[u8]) -> Result<Parts<'_>, FormatError> {
    let Some((header, body)) = bytes.split_at_checked(HEADER_BYTES) else {
        return Err(FormatError::Length { found: bytes.len(), wanted: HEADER_BYTES });
    };
    if header[..8] != MAGIC {
        return Err(FormatError::Magic);
    }
    let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let (compat, machine) = (word(8) as usize, word(12) as usize);
    let wanted = HEADER_BYTES.saturating_add(compat).saturating_add(machine);
    if bytes.len() != wanted || wanted > MAX_BYTES {
        return Err(FormatError::Length { found: bytes.len(), wanted });
    }
    if header[16..] != checksum(&header[..16], body) {
        return Err(FormatError::Checksum);
    }
    let (compat, machine) = body.split_at(compat);
    Ok(Parts { compat, machine })
}

fn checksum(lengths: &[u8], body: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update(lengths);
    hash.update(body);
    hash.finalize().into()
}

impl Parts<'_> {
    /// The compatibility record.
    ///
    /// # Errors
    /// [`FormatError::Part`].
    pub fn compat(&self) -> Result<Compat, FormatError> {
        serde_json::from_slice(self.compat).map_err(part("compatibility record"))
    }

    /// The state.
    ///
    /// # Errors
    /// [`FormatError::Part`].
    pub fn machine(&self) -> Result<MachineState, FormatError> {
        match postcard::take_from_bytes(self.machine).map_err(part("state"))? {
            (machine, []) => Ok(machine),
            (_, rest) => Err(part("state")(format!("{} bytes too many", rest.len()))),
        }
    }
}

fn part<E: ToString>(part: &'static str) -> impl FnOnce(E) -> FormatError {
    move |why| FormatError::Part { part, why: why.to_string() }
}

/// Encodes a snapshot's state file.
///
/// # Errors
/// [`FormatError`] if it is longer than any reader would take.
pub fn encode(snapshot: &Snapshot) -> Result<Vec<u8>, FormatError> {
    let compat = serde_json::to_vec_pretty(&snapshot.compat).map_err(part("compatibility record"))?;
    let machine = postcard::to_stdvec(&snapshot.machine).map_err(part("state"))?;
    let wanted = HEADER_BYTES + compat.len() + machine.len();
    if wanted > MAX_BYTES {
        return Err(FormatError::Length { found: wanted, wanted: MAX_BYTES });
    }
    let mut lengths = MAGIC.to_vec();
    // Below MAX_BYTES.
    lengths.extend((compat.len() as u32).to_le_bytes());
    lengths.extend((machine.len() as u32).to_le_bytes());
    let body = [compat, machine].concat();
    let sum = checksum(&lengths, &body);
    Ok([lengths.as_slice(), &sum, &body].concat())
}

#[cfg(test)]
mod tests;
