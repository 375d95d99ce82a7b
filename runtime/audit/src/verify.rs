//! The verifier. Streams: memory does not grow with the log. Touches only what it is given.

use crate::chain::{self, ChainKey, Link};
use crate::checkpoint::{Checkpoint, VerifyingKey};
use crate::entry::{ENTRY_MAX_BYTES, Entry, GENESIS};
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufRead, Read as _};

/// What the verifier believes.
#[derive(Debug, Default)]
pub struct Trust {
    /// Whose log it is said to be.
    pub tenant: String,
    /// The chain's first key: every entry's MAC is compared.
    pub key: Option<ChainKey>,
    /// Whose checkpoints count.
    pub signer: Option<VerifyingKey>,
    /// The checkpoints: those beside the log, and any kept elsewhere.
    pub checkpoints: Vec<Checkpoint>,
}

/// What became of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was changed, as far as [`Trust`] lets one see.
    Intact,
    /// All whole entries are intact, and an incomplete line of so many bytes follows: a crash while writing. The writer cuts
    /// it off when it opens the log again.
    Torn {
        /// Bytes after the last line feed.
        bytes: u64,
    },
    /// Somebody changed it.
    Broken {
        /// The first entry that is wrong, by its place in the file, from 0.
        entry: u64,
        /// How.
        how: Breakage,
    },
}

/// How a log is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Breakage {
    /// A line that no writer writes: not an entry, or an entry in another spelling.
    NotAnEntry,
    /// Another entry's number: something was dropped, swapped or inserted here.
    Sequence {
        /// The number it has.
        found: u64,
    },
    /// Its `prev` is not the `hmac` of the entry before.
    Link,
    /// Its `hmac` is not what the key gives: its text was changed, or the whole entry made up.
    Mac,
    /// A checkpoint knows more entries than there are: the log was truncated or rolled back.
    Truncated {
        /// How many the checkpoint knows.
        entries: u64,
    },
    /// A checkpoint that ends here knows other entries.
    Checkpoint,
    /// A checkpoint that the signer did not sign, or of another tenant.
    Forged,
}

impl fmt::Display for Breakage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotAnEntry => f.write_str("the line is not an entry as the writer spells it"),
            Self::Sequence { found } => {
                write!(f, "it has the number {found}: an entry was dropped, swapped or inserted here")
            }
            Self::Link => f.write_str("its `prev` is not the `hmac` of the entry before it"),
            Self::Mac => f.write_str("its `hmac` does not fit its text: it was changed or made up"),
            Self::Truncated { entries } => {
                write!(f, "a checkpoint knows {entries} entries: the log was truncated or rolled back")
            }
            Self::Checkpoint => f.write_str("a checkpoint knows other entries up to here"),
            Self::Forged => f.write_str("a checkpoint is not signed by the given key, or not this tenant's"),
        }
    }
}

/// What [`verify`] found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Report {
    /// Whole entries that are right.
    pub entries: u64,
    /// Checkpoints that were compared.
    pub checkpoints: u64,
    /// What became of the log.
    pub verdict: Verdict,
}

/// Reads a whole log and says what became of it.
///
/// With the chain's first key every change shows but the loss of entries at the end, which checkpoints show. With checkpoints
/// alone every change of what the last of them covers shows.
///
/// # Errors
/// If `log` cannot be read.
pub fn verify(log: impl BufRead, trust: Trust) -> io::Result<Report> {
    let mut checkpoints: BTreeMap<u64, Vec<Checkpoint>> = BTreeMap::new();
    if let Some(signer) = &trust.signer {
        for checkpoint in trust.checkpoints {
            if checkpoint.tenant != trust.tenant || !checkpoint.is_signed_by(signer) {
                let verdict = Verdict::Broken { entry: checkpoint.entries, how: Breakage::Forged };
                return Ok(Report { entries: 0, checkpoints: 0, verdict });
            }
            checkpoints.entry(checkpoint.entries).or_default().push(checkpoint);
        }
    }
    let mut walk = Walk {
        tenant: trust.tenant,
        key: trust.key,
        entries: 0,
        bytes: 0,
        head: GENESIS.to_owned(),
        digest: Link::default(),
    };
    let mut report = Report { entries: 0, checkpoints: 0, verdict: Verdict::Intact };
    report.verdict = walk.all(log, &checkpoints, &mut report.checkpoints)?;
    report.entries = walk.entries;
    Ok(report)
}

/// Where the verifier stands.
struct Walk {
    tenant: String,
    key: Option<ChainKey>,
    entries: u64,
    bytes: u64,
    head: String,
    digest: Link,
}

impl Walk {
    fn all(
        &mut self,
        mut log: impl BufRead,
        checkpoints: &BTreeMap<u64, Vec<Checkpoint>>,
        compared: &mut u64,
    ) -> io::Result<Verdict> {
        let mut line = Vec::new();
        let torn = loop {
            for checkpoint in checkpoints.get(&self.entries).into_iter().flatten() {
                if !self.agrees(checkpoint) {
                    return Ok(self.broken(Breakage::Checkpoint));
                }
                *compared += 1;
            }
            line.clear();
            log.by_ref().take(ENTRY_MAX_BYTES as u64 + 1).read_until(b'\n', &mut line)?;
            let Some((b'\n', body)) = line.split_last() else {
                if line.len() > ENTRY_MAX_BYTES {
                    return Ok(self.broken(Breakage::NotAnEntry));
                }
                break line.len() as u64;
            };
            if let Err(how) = self.step(body) {
                return Ok(self.broken(how));
            }
        };
        Ok(match checkpoints.last_key_value() {
            Some((&entries, _)) if entries > self.entries => self.broken(Breakage::Truncated { entries }),
            _ if torn > 0 => Verdict::Torn { bytes: torn },
            _ => Verdict::Intact,
        })
    }

    fn broken(&self, how: Breakage) -> Verdict {
        Verdict::Broken { entry: self.entries, how }
    }

    fn agrees(&self, checkpoint: &Checkpoint) -> bool {
        checkpoint.bytes == self.bytes
            && checkpoint.head == self.head
            && checkpoint.digest == chain::text(&self.digest.0)
    }

    fn step(&mut self, line: &[u8]) -> Result<(), Breakage> {
        let entry = Entry::parse(line).ok_or(Breakage::NotAnEntry)?;
        if entry.seq != self.entries {
            return Err(Breakage::Sequence { found: entry.seq });
        }
        if entry.prev != self.head {
            return Err(Breakage::Link);
        }
        if let Some(key) = &mut self.key {
            let mac = entry.mac(&self.tenant, key).map_err(|_| Breakage::NotAnEntry)?;
            if !chain::equal(&mac, &entry.hmac) {
                return Err(Breakage::Mac);
            }
            key.ratchet();
        }
        self.digest.extend(line);
        self.entries += 1;
        self.bytes += line.len() as u64 + 1;
        self.head = entry.hmac;
        Ok(())
    }
}
