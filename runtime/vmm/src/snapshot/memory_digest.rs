//! The digest of a memory image: over its pages that are not zero, so that holes and zeroes are the same,
//! with their numbers, so that moved pages are not.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use xxhash_rust::xxh3::Xxh3;

const PAGE_BYTES: usize = 4096;
const CHUNK_BYTES: usize = 256 * PAGE_BYTES;

/// XXH3-64 over (page number, page) of every page that is not zero. It finds damage, not forgery: whoever may
/// write the file may write the record beside it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryDigest {
    /// The hash.
    pub xxh3: u64,
    /// Pages that are not zero.
    pub pages: u64,
}

impl MemoryDigest {
    /// Of what is not there.
    pub const NONE: Self = Self { xxh3: 0, pages: 0 };
}

impl fmt::Display for MemoryDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x} ({} pages)", self.xxh3, self.pages)
    }
}

/// Digests a memory image, skipping its holes.
///
/// # Errors
/// What reading it gave.
pub fn digest_memory(file: &File) -> io::Result<MemoryDigest> {
    let end = file.metadata()?.len();
    let mut hash = Xxh3::new();
    let (mut pages, mut at) = (0, 0);
    let mut chunk = vec![0; CHUNK_BYTES];
    while at < end {
        let Some(data) = seek(file, rustix::fs::SeekFrom::Data(at))? else { break };
        let hole = seek(file, rustix::fs::SeekFrom::Hole(data))?.unwrap_or(end);
        at = data - data % PAGE_BYTES as u64;
        while at < hole {
            // At most CHUNK_BYTES.
            let len =
                (hole.next_multiple_of(PAGE_BYTES as u64).min(end) - at).min(CHUNK_BYTES as u64) as usize;
            file.read_exact_at(&mut chunk[..len], at)?;
            for (page, number) in chunk[..len].chunks(PAGE_BYTES).zip(at / PAGE_BYTES as u64..) {
                if page.iter().any(|byte| *byte != 0) {
                    hash.update(&number.to_le_bytes());
                    hash.update(page);
                    pages += 1;
                }
            }
            at += len as u64;
        }
    }
    Ok(MemoryDigest { xxh3: hash.digest(), pages })
}

/// The position sought, `None` past the last data.
fn seek(file: &File, to: rustix::fs::SeekFrom) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, to) {
        Ok(at) => Ok(Some(at)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(fill: impl FnOnce(&File)) -> MemoryDigest {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 << 20).unwrap();
        fill(&file);
        digest_memory(&file).unwrap()
    }

    #[test]
    fn zeroes_are_holes_and_every_bit_counts() {
        let page = [7_u8; PAGE_BYTES];
        let plain = image(|f| f.write_all_at(&page, 1 << 20).unwrap());
        let zeroes = image(|f| {
            f.write_all_at(&[0; 3 * PAGE_BYTES], 3 << 20).unwrap();
            f.write_all_at(&page, 1 << 20).unwrap();
        });
        let moved = image(|f| f.write_all_at(&page, 2 << 20).unwrap());
        let flipped = image(|f| {
            f.write_all_at(&page, 1 << 20).unwrap();
            f.write_all_at(&[6], (1 << 20) + 4095).unwrap();
        });
        assert_eq!(plain, zeroes);
        assert_eq!(plain.pages, 1);
        assert!(plain != moved && plain != flipped && moved != flipped);
    }
}
