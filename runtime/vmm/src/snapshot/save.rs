//! Saving a guest's memory: the image that it was restored from, which is linked, and the pages that are its own since,
//! which are written.
//!
//! So a hibernation costs what the guest has changed, not what it has, and a snapshot still needs no other
//! directory: the link keeps the image when the template that it came from is removed. What is the guest's
//! own is found in /proc/self/pagemap.
//!
//! May touch: this process's guest memory, read-only, and the files it is handed. Must not: KVM. The guest
//! must stand still.

use super::Run;
use crate::memory::GuestMemory;
use rustix::fs::{AtFlags, CWD};
use rustix::io::Errno;
use std::fs::File;
use std::io::{self, Write as _};
use std::ops::Range;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

const PAGE_BYTES: u64 = 4096;
/// Documentation/admin-guide/mm/pagemap.rst: the page is present, is swapped out, belongs to a file.
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const OF_FILE: u64 = 1 << 61;
/// Most bytes read or written at once.
const CHUNK_BYTES: u64 = 1 << 20;
/// Two runs with at most so many pages between them are one: a mapping costs a restore more than some pages that did
/// not change cost the disk.
const GAP_PAGES: u64 = 16;

/// Writes the pages of `mem`, a private mapping, that are not its image's into the empty file `to`: those that this process
/// wrote, and those of `known`, which were another file's before it was restored. Returns where they belong.
///
/// # Errors
/// What a file gave; `to` is then of no use.
pub fn save_pages(mem: &GuestMemory, known: &[Run], to: &File) -> io::Result<Vec<Run>> {
    let pagemap = File::open("/proc/self/pagemap")?;
    let mut out = io::BufWriter::with_capacity(CHUNK_BYTES as usize, to);
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let (mut image_page, mut all) = (0, Vec::new());
    for region in mem.iter() {
        let start = region.start_addr().0;
        let (host, pages) = (mem.get_host_address(GuestAddress(start)), region.len() / PAGE_BYTES);
        let own = private_runs(&pagemap, host.map_err(io::Error::other)? as u64, pages)?;
        let here = image_page..image_page + pages;
        let known = known.iter().map(|run| run.first..run.end()).filter(|run| here.contains(&run.start));
        // A run ends where its range of RAM does: the next one is mapped elsewhere.
        for run in union(own.into_iter().map(|run| run.start + here.start..run.end + here.start).chain(known))
        {
            all.push(Run { first: run.start, pages: run.end - run.start });
            let bytes = (run.end - run.start) * PAGE_BYTES;
            let at = start + (run.start - here.start) * PAGE_BYTES;
            let mut done = 0;
            while done < bytes {
                // At most CHUNK_BYTES.
                let part = &mut buffer[..(bytes - done).min(CHUNK_BYTES) as usize];
                mem.read_slice(part, GuestAddress(at + done)).map_err(io::Error::other)?;
                out.write_all(part)?;
                done += part.len() as u64;
            }
        }
        image_page = here.end;
    }
    out.flush()?;
    Ok(all)
}

/// The ranges' union in ascending order, ranges that nearly touch made one.
fn union(ranges: impl Iterator<Item = Range<u64>>) -> Vec<Range<u64>> {
    let mut ranges: Vec<_> = ranges.collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut all: Vec<Range<u64>> = Vec::new();
    for range in ranges {
        match all.last_mut().filter(|last| range.start <= last.end + GAP_PAGES) {
            Some(last) => last.end = last.end.max(range.end),
            None => all.push(range),
        }
    }
    all
}

/// Makes `to`, which does not exist, the image `base`: a second name of it or, on another file system, a copy.
///
/// # Errors
/// What a file gave.
pub fn place_image(base: &File, to: &Path) -> io::Result<()> {
    let by_number = format!("/proc/self/fd/{}", base.as_raw_fd());
    if rustix::fs::linkat(CWD, &by_number, CWD, to, AtFlags::SYMLINK_FOLLOW).is_ok() {
        return base.sync_all();
    }
    let copy = File::options().write(true).create_new(true).open(to)?;
    let end = base.metadata()?.len();
    copy.set_len(end)?;
    copy_data(base, &copy, end)?;
    copy.sync_all()
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

/// Of `count` pages from `host` on, those that this process has made its own, as page numbers from 0.
fn private_runs(pagemap: &File, host: u64, count: u64) -> io::Result<Vec<Range<u64>>> {
    const ENTRIES: u64 = 64 * 1024;
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut entries = vec![0; (ENTRIES * 8) as usize];
    let mut page = 0;
    while page < count {
        let part = &mut entries[..((count - page).min(ENTRIES) * 8) as usize];
        pagemap.read_exact_at(part, (host / PAGE_BYTES + page) * 8)?;
        for entry in part.chunks_exact(8) {
            let bits = entry.iter().rev().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
            if bits & (PRESENT | SWAPPED) != 0 && bits & OF_FILE == 0 {
                match runs.last_mut().filter(|run| run.end == page) {
                    Some(run) => run.end += 1,
                    None => runs.push(page..page + 1),
                }
            }
            page += 1;
        }
    }
    Ok(runs)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory;
    use crate::snapshot::digest_memory;
    use proptest::prelude::*;
    use std::sync::Arc;

    const MIB: u64 = 64;

    /// An image with a text at each MiB of `texts`.
    fn image(texts: &[(u64, &str)]) -> Arc<File> {
        let base = tempfile::tempfile().unwrap();
        base.set_len(MIB << 20).unwrap();
        texts.iter().for_each(|(at, text)| base.write_all_at(text.as_bytes(), at << 20).unwrap());
        Arc::new(base)
    }

    fn text(mem: &GuestMemory, mib: u64, len: usize) -> String {
        let mut found = vec![0; len];
        mem.read_slice(&mut found, GuestAddress(mib << 20)).unwrap();
        String::from_utf8(found).unwrap()
    }

    #[test]
    fn pages_that_were_written_are_saved_and_those_of_the_image_are_not() {
        let base = image(&[(5, "base"), (9, "changed")]);
        let before = digest_memory(&base).unwrap();
        let mem = memory::map_private(MIB, &base).unwrap();
        mem.write_slice(b"mine", GuestAddress(7 << 20)).unwrap();
        mem.write_slice(b"CHANGED", GuestAddress(9 << 20)).unwrap();
        // Reading makes no page the guest's own.
        assert_eq!(text(&mem, 5, 4), "base");
        let pages = Arc::new(tempfile::tempfile().unwrap());
        let runs = save_pages(&mem, &[], &pages).unwrap();
        let at = |mib: u64| Run { first: mib * 256, pages: 1 };
        assert_eq!(runs, [at(7), at(9)]);
        assert_eq!(pages.metadata().unwrap().len(), 2 * PAGE_BYTES);
        assert_eq!(digest_memory(&base).unwrap(), before);

        // Restored, changed in one place more, and saved again: the pages of both times.
        let again = memory::map_private(MIB, &base).unwrap();
        memory::map_pages(&again, &pages, &runs).unwrap();
        again.write_slice(b"more", GuestAddress(20 << 20)).unwrap();
        let second = Arc::new(tempfile::tempfile().unwrap());
        let runs = save_pages(&again, &runs, &second).unwrap();
        assert_eq!(runs, [at(7), at(9), at(20)]);
        let last = memory::map_private(MIB, &base).unwrap();
        memory::map_pages(&last, &second, &runs).unwrap();
        for (mib, wanted) in [(5, "base"), (7, "mine"), (9, "CHANGED"), (20, "more")] {
            assert_eq!(text(&last, mib, wanted.len()), wanted);
        }
    }

    #[test]
    fn runs_that_do_not_fit_the_memory_are_refused_and_it_is_as_it_was() {
        let mem = memory::map_private(MIB, &image(&[(0, "base")])).unwrap();
        let pages = Arc::new(tempfile::tempfile().unwrap());
        let end = MIB * 256;
        for (first, pages_wanted) in [(end, 1), (end - 1, 2), (u64::MAX, 2), (0, u64::MAX), (0, 0)] {
            let run = Run { first, pages: pages_wanted };
            assert!(memory::map_pages(&mem, &pages, &[run]).is_err(), "{run:?}");
        }
        assert_eq!(text(&mem, 0, 4), "base");
    }

    #[test]
    fn an_image_on_the_same_file_system_is_linked() {
        use std::os::unix::fs::MetadataExt as _;
        let dir = tempfile::tempdir().unwrap();
        let base =
            File::options().read(true).write(true).create(true).truncate(true).open(dir.path().join("a"));
        let base = base.unwrap();
        place_image(&base, &dir.path().join("b")).unwrap();
        std::fs::remove_file(dir.path().join("a")).unwrap();
        let linked = std::fs::metadata(dir.path().join("b")).unwrap();
        assert_eq!((linked.ino(), linked.nlink()), (base.metadata().unwrap().ino(), 1));
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

    proptest! {
        #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn memory_saved_and_restored_twice_is_the_same_byte_for_byte(
            first in prop::collection::vec((0..MIB * 256, any::<u8>()), 0..80),
            second in prop::collection::vec((0..MIB * 256, any::<u8>()), 0..80),
        ) {
            let base = image(&[(1, "one"), (2, "two"), (63, "last")]);
            let mut mem = memory::map_private(MIB, &base).unwrap();
            let mut runs = Vec::new();
            for writes in [first, second] {
                for (page, byte) in writes {
                    mem.write_slice(&[byte; 3], GuestAddress(page * PAGE_BYTES + 17)).unwrap();
                }
                let pages = Arc::new(tempfile::tempfile().unwrap());
                runs = save_pages(&mem, &runs, &pages).unwrap();
                let restored = memory::map_private(MIB, &base).unwrap();
                memory::map_pages(&restored, &pages, &runs).unwrap();
                let (mut left, mut right) = (vec![0; 1 << 20], vec![0; 1 << 20]);
                for mib in 0..MIB {
                    mem.read_slice(&mut left, GuestAddress(mib << 20)).unwrap();
                    restored.read_slice(&mut right, GuestAddress(mib << 20)).unwrap();
                    prop_assert!(left == right, "MiB {mib}");
                }
                mem = restored;
            }
        }

        #[test]
        fn a_union_holds_every_page_in_order_and_leaves_gaps_between_its_ranges(
            ranges in prop::collection::vec((0_u64..1000, 1_u64..40), 0..60)
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, len)| start..start + len).collect();
            let all = union(ranges.iter().cloned());
            prop_assert!(all.windows(2).all(|pair| pair[0].end + GAP_PAGES < pair[1].start));
            prop_assert!(ranges.iter().all(|range| all.iter().any(|a| a.start <= range.start && range.end <= a.end)));
        }
    }
}
