//! Saving a guest's memory: the image it was restored from, and over it the pages that are its own since.
//!
//! The result is a snapshot like any other, which needs no other file: the unchanged part is copied inside
//! the kernel (and shared where the file system can), the changed part is found in /proc/self/pagemap.
//!
//! May touch: this process's guest memory, read-only, and the files it is handed. Must not: KVM. The guest
//! must stand still.

use crate::memory::GuestMemory;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt as _;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

const PAGE_BYTES: u64 = 4096;
/// Documentation/admin-guide/mm/pagemap.rst: the page is present, is swapped out, belongs to a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// Most bytes written at once.
const CHUNK_BYTES: u64 = 1 << 20;

/// Writes the image of `mem`, a private mapping of `base`, into the empty file `to`. Returns how many pages
/// were the guest's own.
///
/// # Errors
/// What a file gave; `to` is then of no use.
pub fn save_memory(mem: &GuestMemory, base: &File, to: &File) -> io::Result<u64> {
    let end = base.metadata()?.len();
    to.set_len(end)?;
    copy_data(base, to, end)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let (mut offset, mut pages) = (0, 0);
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    for region in mem.iter() {
        let start = region.start_addr().0;
        let host = mem.get_host_address(GuestAddress(start)).map_err(io::Error::other)? as u64;
        for run in private_runs(&pagemap, host, region.len())? {
            pages += (run.end - run.start) / PAGE_BYTES;
            let mut at = run.start;
            while at < run.end {
                // At most CHUNK_BYTES.
                let part = &mut buffer[..(run.end - at).min(CHUNK_BYTES) as usize];
                mem.read_slice(part, GuestAddress(start + at)).map_err(io::Error::other)?;
                to.write_all_at(part, offset + at)?;
                at += part.len() as u64;
            }
        }
        offset += region.len();
    }
    Ok(pages)
}

/// Copies what is no hole.
fn copy_data(from: &File, to: &File, end: u64) -> io::Result<()> {
    let mut at = 0;
    while at < end {
        let data = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(from, rustix::fs::SeekFrom::Hole(data))?;
        let (mut source, mut target) = (data, data);
        while source < hole {
            let left = (hole - source) as usize;
            match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), left) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(_) => {}
                // Two file systems that do not know each other.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS) => {
                    copy_bytes(from, to, source..hole)?;
                    source = hole;
                }
                Err(error) => return Err(error.into()),
            }
        }
        at = hole;
    }
    Ok(())
}

/// The same through this process, for files that the kernel does not copy between.
fn copy_bytes(from: &File, to: &File, range: Range<u64>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let mut at = range.start;
    while at < range.end {
        let part = &mut buffer[..(range.end - at).min(CHUNK_BYTES) as usize];
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += part.len() as u64;
    }
    Ok(())
}

/// Ranges (relative to `host`) of the pages that this process has made its own.
fn private_runs(pagemap: &File, host: u64, bytes: u64) -> io::Result<Vec<Range<u64>>> {
    const ENTRIES: u64 = 64 * 1024;
    let count = bytes / PAGE_BYTES;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; (ENTRIES * 8) as usize];
    let mut page = 0;
    while page < count {
        let part = &mut entries[..((count - page).min(ENTRIES) * 8) as usize];
        pagemap.read_exact_at(part, (host / PAGE_BYTES + page) * 8)?;
        for entry in part.chunks_exact(8) {
            let bits = entry.iter().rev().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
            if bits & (PRESENT | SWAPPED) != 0 && bits & OF_FILE == 0 {
                let at = page * PAGE_BYTES;
                match runs.last_mut().filter(|run| run.end == at) {
                    Some(run) => run.end += PAGE_BYTES,
                    None => runs.push(at..at + PAGE_BYTES),
                }
            }
            page += 1;
        }
    }
    Ok(runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::snapshot::digest_memory;
    use std::sync::Arc;

    #[test]
    fn an_image_is_its_base_and_what_was_written_over_it() {
        let base = Arc::new(tempfile::tempfile().unwrap());
        base.set_len(64 << 20).unwrap();
        base.write_all_at(b"base", 5 << 20).unwrap();
        base.write_all_at(b"changed", 9 << 20).unwrap();
        let mem = memory::map_private(64, &base).unwrap();
        mem.write_slice(b"mine", GuestAddress(7 << 20)).unwrap();
        mem.write_slice(b"CHANGED", GuestAddress(9 << 20)).unwrap();
        // Reading makes no page the guest's own.
        let mut seen = [0; 4];
        mem.read_slice(&mut seen, GuestAddress(5 << 20)).unwrap();
        let before = digest_memory(&base).unwrap();
        let to = tempfile::tempfile().unwrap();
        assert_eq!(save_memory(&mem, &base, &to).unwrap(), 2);
        for (text, at) in [(&b"base"[..], 5_u64), (b"mine", 7), (b"CHANGED", 9)] {
            let mut found = vec![0; text.len()];
            to.read_exact_at(&mut found, at << 20).unwrap();
            assert_eq!(found, text);
        }
        assert_eq!(digest_memory(&to).unwrap().pages, 3);
        assert_eq!(digest_memory(&base).unwrap(), before);
    }

    #[test]
    fn what_the_kernel_does_not_copy_is_copied_byte_by_byte() {
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        // More than one chunk, and the last one not whole.
        let bytes: Vec<u8> = (0..CHUNK_BYTES + 5000).map(|n| (n % 251) as u8).collect();
        from.write_all_at(&bytes, 0).unwrap();
        let end = bytes.len() as u64;
        copy_bytes(&from, &to, 100..end).unwrap();
        let mut found = vec![0; bytes.len() - 100];
        to.read_exact_at(&mut found, 100).unwrap();
        assert!(found == bytes[100..]);
        assert!(copy_bytes(&from, &to, 0..end + 1).is_err());
    }
}
