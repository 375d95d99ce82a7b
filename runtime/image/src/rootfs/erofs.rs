//! Writes EROFS metadata for a [`Tree`] behind file contents that lie in the image already. Uncompressed and
//! deterministic: the same tree over the same contents gives the same bytes. Layout and names: Linux,
//! fs/erofs/erofs_fs.h.
//!
//! ```text
//! block 0      superblock
//! block 1...   contents of files, each from a block's beginning, in the order of the layers
//! then         inodes: 64 bytes, xattrs, and what is small enough to lie inline (never across a block)
//! then         directories and links that are not
//! ```

use std::fs::File;
use std::io::{self, BufWriter, Seek as _, SeekFrom, Write};
use std::os::unix::fs::FileExt as _;

use super::tree::{Body, Node, NodeId, ROOT, Tree, Xattr};

pub(super) const BLOCK_BYTES: u64 = 4096;

const MAGIC: u32 = 0xE0F5_E1E2;
const SUPERBLOCK_OFFSET: usize = 1024;
const COMPAT_CHECKSUM: u32 = 0x1;
const COMPAT_MTIME: u32 = 0x2;
const BLOCK_BITS: u8 = 12;
const SLOT_BYTES: u64 = 32;
const INODE_BYTES: u64 = 64;
/// `i_format`: bit 0 is the extended inode, the next three its data's layout.
const EXTENDED_PLAIN: u16 = 1;
const EXTENDED_INLINE: u16 = 1 | 2 << 1;
const DIRENT_BYTES: usize = 12;
const XATTR_HEADER_BYTES: u64 = 12;
const XATTR_ENTRY_BYTES: usize = 4;
/// The root's number has 16 bits; 0 would be no inode number that readdir may give.
const ROOT_NID: u16 = 1;
/// Of all images: what tells them apart is their digest.
const UUID: [u8; 16] = *b"peregrine-oci-01";

/// Where a node's inode lies and what the tree alone does not say of it.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// In slots from the beginning of the metadata; 0 for a node that no name leads to.
    nid: u64,
    links: u32,
    /// Of a directory.
    parent: NodeId,
    /// Of a directory.
    bytes: u64,
    /// Contents that do not lie inline, in blocks from the beginning of those.
    outside: Option<u32>,
}

/// The image's size and which contents it does not need.
pub(super) struct Written {
    pub(super) blocks: u32,
    pub(super) unreachable: Vec<NodeId>,
}

/// Writes everything but the contents of files, which end before block `first_block`.
pub(super) fn write(tree: &Tree, file: &File, first_block: u32) -> io::Result<Written> {
    let plan = Plan::of(tree);
    let first_outside = u64::from(first_block) + plan.metadata_bytes.div_ceil(BLOCK_BYTES);
    let blocks = first_outside + u64::from(plan.outside_blocks);
    let blocks = u32::try_from(blocks).map_err(|_| io::Error::other("more than 16 TiB"))?;
    let mut file = file;
    file.seek(SeekFrom::Start(u64::from(first_block) * BLOCK_BYTES))?;
    let mut out = Padded { out: BufWriter::with_capacity(1 << 20, file), at: 0 };
    for (number, &id) in plan.order.iter().enumerate() {
        out.pad_to(plan.places[id as usize].nid * SLOT_BYTES)?;
        out.write_all(&plan.inode(tree, id, number as u32 + 1, first_outside as u32))?;
    }
    for &id in &plan.order {
        if plan.places[id as usize].outside.is_some() {
            out.pad_to(out.at.next_multiple_of(BLOCK_BYTES))?;
            out.write_all(&plan.contents(tree, id))?;
        }
    }
    out.pad_to(out.at.next_multiple_of(BLOCK_BYTES))?;
    out.out.flush()?;
    drop(out);
    file.write_all_at(&superblock(plan.order.len() as u64, blocks, first_block), 0)?;
    let unreachable = (0..tree.len() as NodeId).filter(|&id| plan.places[id as usize].nid == 0).collect();
    Ok(Written { blocks, unreachable })
}

fn superblock(inodes: u64, blocks: u32, first_block: u32) -> Vec<u8> {
    let mut block = vec![0; BLOCK_BYTES as usize];
    let mut put = |at: usize, bytes: &[u8]| {
        block[SUPERBLOCK_OFFSET + at..SUPERBLOCK_OFFSET + at + bytes.len()].copy_from_slice(bytes);
    };
    put(0, &MAGIC.to_le_bytes());
    put(8, &(COMPAT_CHECKSUM | COMPAT_MTIME).to_le_bytes());
    put(12, &[BLOCK_BITS]);
    put(14, &ROOT_NID.to_le_bytes());
    put(16, &inodes.to_le_bytes());
    put(36, &blocks.to_le_bytes());
    put(40, &first_block.to_le_bytes());
    put(48, &UUID);
    // As Linux, erofs_superblock_csum_verify: without the final inversion, the field itself as zero.
    let checksum = !crc32c::crc32c(&block[SUPERBLOCK_OFFSET..]);
    block[SUPERBLOCK_OFFSET + 4..SUPERBLOCK_OFFSET + 8].copy_from_slice(&checksum.to_le_bytes());
    block
}

/// Everything's place, before a byte is written.
struct Plan {
    places: Vec<Place>,
    /// Nodes by their place.
    order: Vec<NodeId>,
    metadata_bytes: u64,
    outside_blocks: u32,
}

impl Plan {
    fn of(tree: &Tree) -> Self {
        let mut plan = Self {
            places: vec![Place::default(); tree.len()],
            order: Vec::new(),
            metadata_bytes: 0,
            outside_blocks: 0,
        };
        plan.visit(tree);
        let mut at = u64::from(ROOT_NID) * SLOT_BYTES;
        for index in 0..plan.order.len() {
            let id = plan.order[index];
            let node = tree.node(id);
            let fixed = INODE_BYTES + xattr_bytes(&node.meta.xattrs);
            let place = &mut plan.places[id as usize];
            let contents = match &node.body {
                Body::Directory(_) => place.bytes,
                Body::Small(bytes) | Body::Symlink(bytes) => bytes.len() as u64,
                _ => 0,
            };
            let inline = fixed + contents <= BLOCK_BYTES;
            // The kernel reads inline contents from one block; an inode it could put together from two.
            let undivided = if inline { fixed + contents } else { INODE_BYTES };
            if at % BLOCK_BYTES + undivided > BLOCK_BYTES {
                at = at.next_multiple_of(BLOCK_BYTES);
            }
            place.nid = at / SLOT_BYTES;
            if !inline {
                place.outside = Some(plan.outside_blocks);
                plan.outside_blocks += contents.div_ceil(BLOCK_BYTES) as u32;
            }
            at = (at + fixed + if inline { contents } else { 0 }).next_multiple_of(SLOT_BYTES);
        }
        plan.metadata_bytes = at;
        plan
    }

    /// Puts all nodes that names lead to in order, parents before children, names sorted, and counts links.
    fn visit(&mut self, tree: &Tree) {
        let mut rest = vec![(ROOT, ROOT)];
        while let Some((id, parent)) = rest.pop() {
            let place = &mut self.places[id as usize];
            place.links += 1;
            if place.links > 1 {
                continue;
            }
            self.order.push(id);
            if let Body::Directory(children) = &tree.node(id).body {
                let directories = children
                    .values()
                    .filter(|child| matches!(tree.node(child.node).body, Body::Directory(_)))
                    .count();
                place.parent = parent;
                // Its name, its own dot, and its children's dots; counted again when it comes up is not.
                place.links = 2 + directories as u32;
                place.bytes = directory_bytes(children.keys().map(|name| &**name));
                rest.extend(children.values().rev().map(|child| (child.node, id)));
            }
        }
    }

    /// The inode, its xattrs and its inline contents.
    fn inode(&self, tree: &Tree, id: NodeId, number: u32, first_outside: u32) -> Vec<u8> {
        let (node, place) = (tree.node(id), &self.places[id as usize]);
        let outside = place.outside.map(|block| first_outside + block);
        let (size, data, inline) = match &node.body {
            Body::File { block, bytes } => (*bytes, *block, None),
            Body::Device { major, minor, .. } => (0, device_number(*major, *minor), None),
            Body::Fifo => (0, 0, None),
            Body::Directory(_) | Body::Small(_) | Body::Symlink(_) => {
                let contents = self.contents(tree, id);
                let inline =
                    outside.is_none().then_some(contents.clone()).filter(|contents| !contents.is_empty());
                (contents.len() as u64, outside.unwrap_or(0), inline)
            }
        };
        let xattrs = xattr_bytes(&node.meta.xattrs);
        let xattr_count = if xattrs == 0 { 0 } else { (xattrs - XATTR_HEADER_BYTES) / 4 + 1 };
        let mut out = vec![0; INODE_BYTES as usize];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        let format = if inline.is_some() { EXTENDED_INLINE } else { EXTENDED_PLAIN };
        put(0, &format.to_le_bytes());
        put(2, &(xattr_count as u16).to_le_bytes());
        put(4, &(file_type(node).mode | node.meta.mode).to_le_bytes());
        put(8, &size.to_le_bytes());
        put(16, &data.to_le_bytes());
        put(20, &number.to_le_bytes());
        put(24, &node.meta.uid.to_le_bytes());
        put(28, &node.meta.gid.to_le_bytes());
        put(32, &node.meta.mtime_s.to_le_bytes());
        put(44, &place.links.to_le_bytes());
        put_xattrs(&node.meta.xattrs, &mut out);
        out.extend(inline.unwrap_or_default());
        out
    }

    /// What is neither a file's contents nor nothing.
    fn contents(&self, tree: &Tree, id: NodeId) -> Vec<u8> {
        match &tree.node(id).body {
            Body::Small(bytes) | Body::Symlink(bytes) => bytes.to_vec(),
            Body::Directory(children) => {
                let entry =
                    |name, id: NodeId| (name, self.places[id as usize].nid, file_type(tree.node(id)).dirent);
                let mut entries = vec![entry(&b"."[..], id), entry(b"..", self.places[id as usize].parent)];
                entries.extend(children.iter().map(|(name, child)| entry(name, child.node)));
                // Dots are names like any other to the kernel's binary search.
                entries.sort();
                directory(&entries)
            }
            _ => Vec::new(),
        }
    }
}

struct FileType {
    /// The upper bits of `st_mode`.
    mode: u16,
    dirent: u8,
}

fn file_type(node: &Node) -> FileType {
    let (mode, dirent): (u16, u8) = match node.body {
        Body::File { .. } | Body::Small(_) => (0o100_000, 1),
        Body::Directory(_) => (0o040_000, 2),
        Body::Device { character: true, .. } => (0o020_000, 3),
        Body::Device { character: false, .. } => (0o060_000, 4),
        Body::Fifo => (0o010_000, 5),
        Body::Symlink(_) => (0o120_000, 7),
    };
    FileType { mode, dirent }
}

/// As Linux, new_encode_dev.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

/// How many names fit each block, in order.
fn blocks_of_names(lengths: impl Iterator<Item = usize>) -> Vec<(usize, usize)> {
    let mut blocks = vec![(0, 0)];
    for length in lengths {
        let needed = DIRENT_BYTES + length;
        let (count, bytes) = blocks.last().copied().unwrap_or_default();
        if bytes + needed > BLOCK_BYTES as usize {
            blocks.push((1, needed));
        } else if let Some(last) = blocks.last_mut() {
            *last = (count + 1, bytes + needed);
        }
    }
    blocks
}

/// How long a directory with these names will be, its dots among them.
fn directory_bytes<'n>(names: impl Iterator<Item = &'n [u8]>) -> u64 {
    let mut names: Vec<&[u8]> = [&b"."[..], b".."].into_iter().chain(names).collect();
    names.sort_unstable();
    let blocks = blocks_of_names(names.iter().map(|name| name.len()));
    let last = blocks.last().map_or(0, |(_, bytes)| *bytes as u64);
    (blocks.len() as u64 - 1) * BLOCK_BYTES + last
}

/// Sorted entries as they lie in blocks: all entries of a block, then their names.
fn directory(entries: &[(&[u8], u64, u8)]) -> Vec<u8> {
    let blocks = blocks_of_names(entries.iter().map(|entry| entry.0.len()));
    let mut out = Vec::new();
    let mut rest = entries;
    for (count, _) in blocks {
        out.resize(out.len().next_multiple_of(BLOCK_BYTES as usize), 0);
        let (these, others) = rest.split_at(count);
        rest = others;
        let mut name_at = count * DIRENT_BYTES;
        for (name, nid, file_type) in these {
            out.extend_from_slice(&nid.to_le_bytes());
            out.extend_from_slice(&(name_at as u16).to_le_bytes());
            out.extend_from_slice(&[*file_type, 0]);
            name_at += name.len();
        }
        these.iter().for_each(|(name, ..)| out.extend_from_slice(name));
    }
    out
}

/// The number for a name's prefix and the rest of the name; `None` for what EROFS does not store.
pub(super) fn xattr_index(name: &[u8]) -> Option<(u8, &[u8])> {
    let prefixes: [(&[u8], u8); 3] = [(b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
    let (prefix, index) = prefixes.into_iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let rest = &name[prefix.len()..];
    (!rest.is_empty() && rest.len() <= 255).then_some((index, rest))
}

/// What all xattrs of a file take behind its inode; none take nothing.
fn xattr_bytes(xattrs: &[Xattr]) -> u64 {
    let one = |xattr: &Xattr| {
        let name = xattr_index(&xattr.name).map_or(0, |(_, name)| name.len());
        (XATTR_ENTRY_BYTES + name + xattr.value.len()).next_multiple_of(4) as u64
    };
    if xattrs.is_empty() { 0 } else { XATTR_HEADER_BYTES + xattrs.iter().map(one).sum::<u64>() }
}

fn put_xattrs(xattrs: &[Xattr], out: &mut Vec<u8>) {
    if xattrs.is_empty() {
        return;
    }
    // No name filter, no shared ones.
    out.extend_from_slice(&[0; XATTR_HEADER_BYTES as usize]);
    for xattr in xattrs {
        let (index, name) = xattr_index(&xattr.name).unwrap_or_default();
        out.extend_from_slice(&[name.len() as u8, index]);
        out.extend_from_slice(&(xattr.value.len() as u16).to_le_bytes());
        out.extend_from_slice(name);
        out.extend_from_slice(&xattr.value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
}

/// Counts what goes through, from the beginning of the metadata.
struct Padded<W> {
    out: W,
    at: u64,
}

impl<W: Write> Padded<W> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.at += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn pad_to(&mut self, at: u64) -> io::Result<()> {
        const ZEROS: [u8; BLOCK_BYTES as usize] = [0; BLOCK_BYTES as usize];
        while self.at < at {
            let part = (at - self.at).min(BLOCK_BYTES);
            self.write_all(&ZEROS[..part as usize])?;
        }
        Ok(())
    }
}
