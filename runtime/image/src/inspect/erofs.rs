//! The superblock of an EROFS image, as far as needed to refuse what the guest could not mount. Pure: takes
//! the first bytes and the file's length. Layout: Linux, fs/erofs/erofs_fs.h, `struct erofs_super_block`.

use super::Refusal;

/// How much of a file `parse_image` wants to see: the superblock's checksum covers the whole first block.
pub const IMAGE_HEAD_BYTES: usize = 4096;

const SUPERBLOCK_OFFSET: usize = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
const INODE_SLOT_BYTES: u64 = 32;
const COMPAT_CHECKSUM: u32 = 0x1;
/// The kernel's page size on x86-64 bounds the block size it mounts; 512 is EROFS's own minimum.
const BLOCK_BITS: std::ops::RangeInclusive<u8> = 9..=12;

/// What a sound image says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageInfo {
    /// Length of the file system, which the file may exceed.
    pub bytes: u64,
    /// Size of a block.
    pub block_bytes: u32,
    /// Number of files and directories.
    pub inodes: u64,
    /// Incompatible features that a kernel must know to mount it; 0 for the plain images made here.
    pub feature_incompat: u32,
    /// Whether the superblock carries a checksum (then it has been checked).
    pub has_checksum: bool,
}

/// Why a file is not an image that can be mounted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFault {
    /// It could not be read at all.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// Shorter than a superblock.
    #[error("it is too short for an EROFS image ({0} bytes)")]
    TooShort(u64),
    /// Something else than EROFS.
    #[error("it is not an EROFS image (no EROFS magic at offset 1024)")]
    NotErofs,
    /// The superblock's bytes have changed.
    #[error("it is corrupt: the superblock's checksum is {found:#010x}, recorded is {recorded:#010x}")]
    Checksum {
        /// Computed over the bytes.
        found: u32,
        /// Stored in them.
        recorded: u32,
    },
    /// A field has a value that no image has.
    #[error("it is corrupt: {0}")]
    Corrupt(&'static str),
    /// The file ends before the file system does.
    #[error("it is truncated: {length_bytes} bytes, but its file system has {needed_bytes}")]
    Truncated {
        /// Length of the file.
        length_bytes: u64,
        /// What the superblock says.
        needed_bytes: u64,
    },
    /// A valid image of a kind this runner cannot attach.
    #[error("it needs {0}, which Peregrine does not attach")]
    Unsupported(&'static str),
}

/// Checks the superblock in `head`, the first `IMAGE_HEAD_BYTES` (or all) of a file of `length_bytes`.
pub fn parse_image(head: &[u8], length_bytes: u64) -> Result<ImageInfo, ImageFault> {
    let superblock = head
        .get(SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES)
        .ok_or(ImageFault::TooShort(length_bytes))?;
    if u32_at(superblock, 0) != MAGIC {
        return Err(ImageFault::NotErofs);
    }
    let block_bits = superblock[12];
    if !BLOCK_BITS.contains(&block_bits) {
        return Err(ImageFault::Corrupt("the block size is not one that Linux mounts"));
    }
    let block_bytes = 1u32 << block_bits;
    let has_checksum = u32_at(superblock, 8) & COMPAT_CHECKSUM != 0;
    if has_checksum {
        check_checksum(head, block_bytes as usize, u32_at(superblock, 4))?;
    }

    // Both products stay far below 2^64: 32-bit block numbers, blocks of at most 2^12 bytes.
    let needed_bytes = u64::from(u32_at(superblock, 36)) * u64::from(block_bytes);
    if length_bytes < needed_bytes {
        return Err(ImageFault::Truncated { length_bytes, needed_bytes });
    }
    let root_inode = u64::from(u32_at(superblock, 40)) * u64::from(block_bytes)
        + u64::from(u16_at(superblock, 14)) * INODE_SLOT_BYTES;
    if root_inode + INODE_SLOT_BYTES > needed_bytes {
        return Err(ImageFault::Corrupt("the root directory lies outside the file system"));
    }
    if u16_at(superblock, 86) != 0 {
        return Err(ImageFault::Unsupported("additional devices"));
    }
    if !length_bytes.is_multiple_of(512) {
        return Err(ImageFault::Unsupported("a disk whose size is no multiple of 512 bytes"));
    }
    Ok(ImageInfo {
        bytes: needed_bytes,
        block_bytes,
        inodes: u64_at(superblock, 16),
        feature_incompat: u32_at(superblock, 80),
        has_checksum,
    })
}

/// As Linux, `erofs_superblock_csum_verify`: CRC-32C without the final inversion, from the superblock
/// to the end of its block, the checksum field taken as zero.
fn check_checksum(head: &[u8], block_bytes: usize, recorded: u32) -> Result<(), ImageFault> {
    let end = if block_bytes > SUPERBLOCK_OFFSET { block_bytes } else { SUPERBLOCK_OFFSET + block_bytes };
    let before = head.get(SUPERBLOCK_OFFSET..SUPERBLOCK_OFFSET + 4);
    let after = head.get(SUPERBLOCK_OFFSET + 8..end);
    let (Some(before), Some(after)) = (before, after) else {
        return Err(ImageFault::TooShort(head.len() as u64));
    };
    let crc = [before, &[0; 4], after].iter().fold(0, |crc, part| crc32c::crc32c_append(crc, part));
    match !crc {
        found if found == recorded => Ok(()),
        found => Err(ImageFault::Checksum { found, recorded }),
    }
}

// The callers pass a slice of SUPERBLOCK_BYTES and constant offsets within it.
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LENGTH_BYTES: u64 = 4 * 4096;

    /// The first block of a 4-block image with a right checksum.
    fn sound_head() -> Vec<u8> {
        let mut head = vec![0; IMAGE_HEAD_BYTES];
        let mut put = |at: usize, bytes: &[u8]| {
            head[SUPERBLOCK_OFFSET + at..SUPERBLOCK_OFFSET + at + bytes.len()].copy_from_slice(bytes);
        };
        put(0, &MAGIC.to_le_bytes());
        put(8, &COMPAT_CHECKSUM.to_le_bytes());
        put(12, &[12]);
        put(14, &36u16.to_le_bytes());
        put(16, &3u64.to_le_bytes());
        put(36, &4u32.to_le_bytes());
        seal(&mut head);
        head
    }

    fn seal(head: &mut [u8]) {
        head[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].fill(0);
        let checksum = !crc32c::crc32c(&head[SUPERBLOCK_OFFSET..]);
        head[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    }

    #[test]
    fn a_sound_superblock_is_accepted() {
        let info = parse_image(&sound_head(), LENGTH_BYTES).unwrap();
        assert_eq!((info.bytes, info.block_bytes, info.inodes), (LENGTH_BYTES, 4096, 3));
        assert!(info.has_checksum);
    }

    #[test]
    fn every_flipped_bit_under_the_checksum_is_noticed() {
        for bit in (SUPERBLOCK_OFFSET * 8)..(IMAGE_HEAD_BYTES * 8) {
            let mut head = sound_head();
            head[bit / 8] ^= 1 << (bit % 8);
            let checksum_switched_off = bit == (SUPERBLOCK_OFFSET + 8) * 8;
            assert_eq!(parse_image(&head, LENGTH_BYTES).is_ok(), checksum_switched_off, "bit {bit}");
        }
    }

    #[test]
    fn an_image_cut_by_one_sector_is_truncated() {
        let fault = parse_image(&sound_head(), LENGTH_BYTES - 512).unwrap_err();
        assert!(matches!(fault, ImageFault::Truncated { needed_bytes: LENGTH_BYTES, .. }), "{fault}");
    }

    #[test]
    fn other_files_are_told_from_corrupt_ones() {
        assert!(matches!(parse_image(b"", 0), Err(ImageFault::TooShort(0))));
        assert!(matches!(parse_image(&[0; 4096], 4096), Err(ImageFault::NotErofs)));
    }

    #[test]
    fn a_root_directory_behind_the_end_is_corrupt() {
        let mut head = sound_head();
        head[SUPERBLOCK_OFFSET + 40..SUPERBLOCK_OFFSET + 44].copy_from_slice(&u32::MAX.to_le_bytes());
        seal(&mut head);
        assert!(matches!(parse_image(&head, LENGTH_BYTES), Err(ImageFault::Corrupt(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            start in proptest::collection::vec(any::<u8>(), 0..IMAGE_HEAD_BYTES),
            fields in proptest::collection::vec(any::<u8>(), SUPERBLOCK_BYTES - 4),
            length_bytes in any::<u64>(),
        ) {
            let _ = parse_image(&start, length_bytes);
            // The same behind the right magic, where the fields are looked at.
            let mut head = sound_head();
            head[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + SUPERBLOCK_BYTES].copy_from_slice(&fields);
            let _ = parse_image(&head, length_bytes);
            seal(&mut head);
            if let Ok(info) = parse_image(&head, length_bytes) {
                prop_assert!(info.bytes <= length_bytes);
            }
        }
    }
}
