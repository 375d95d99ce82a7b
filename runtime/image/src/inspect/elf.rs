//! The headers of a guest kernel, as far as needed to refuse what cannot be loaded. Pure over anything that
//! can be read at an offset: a byte slice in tests, a file in use. Layout: ELF-64, gABI ch. 4 and 5.

use object::elf::{self, FileHeader64};
use object::read::elf::{FileHeader as _, ProgramHeader as _};
use object::{LittleEndian, ReadRef};

use super::Refusal;

type Header = FileHeader64<LittleEndian>;

/// Linux, Documentation/arch/x86/boot.rst: the setup header's magic, in a compressed kernel.
const BZIMAGE_MAGIC_OFFSET: u64 = 0x202;
const BZIMAGE_MAGIC: &[u8] = b"HdrS";

/// What a sound kernel says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KernelInfo {
    /// Physical address of the first instruction.
    pub entry: u64,
    /// First byte behind the last loaded segment, in guest-physical memory: RAM must reach at least here.
    pub end_of_load: u64,
    /// Length of the file.
    pub bytes: u64,
}

/// Why a file is not a kernel that can be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KernelFault {
    /// It could not be read at all.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// No ELF magic.
    #[error("it is not an ELF file")]
    NotElf,
    /// A compressed kernel.
    #[error("it is a compressed bzImage; give the uncompressed `vmlinux` of the same build")]
    Compressed,
    /// An ELF file that is no x86-64 executable.
    #[error("it is not a 64-bit x86-64 executable ({0})")]
    WrongKind(&'static str),
    /// The file ends before its contents do.
    #[error("it is truncated: {length_bytes} bytes, but {part} reaches to {needed_bytes}")]
    Truncated {
        /// What does not fit.
        part: &'static str,
        /// Length of the file.
        length_bytes: u64,
        /// Where that part ends.
        needed_bytes: u64,
    },
    /// The headers contradict themselves.
    #[error("it is corrupt: {0}")]
    Corrupt(&'static str),
}

/// Checks the ELF header, that all segments and the section table lie in the file, and that the entry point
/// is loaded.
pub fn parse_kernel<'data, R: ReadRef<'data>>(data: R) -> Result<KernelInfo, KernelFault> {
    let bytes = data.len().map_err(|()| KernelFault::NotElf)?;
    let magic = data.read_bytes_at(0, 4).unwrap_or_default();
    if magic != elf::ELFMAG {
        return Err(if data.read_bytes_at(BZIMAGE_MAGIC_OFFSET, 4) == Ok(BZIMAGE_MAGIC) {
            KernelFault::Compressed
        } else {
            KernelFault::NotElf
        });
    }
    let header = read_header(data, bytes)?;
    let (entry, end_of_load) = check_segments(header, data, bytes)?;
    check_section_table(header, bytes)?;
    Ok(KernelInfo { entry, end_of_load, bytes })
}

fn read_header<'data, R: ReadRef<'data>>(data: R, bytes: u64) -> Result<&'data Header, KernelFault> {
    let needed_bytes = size_of::<Header>() as u64;
    let header = data.read_at::<Header>(0).map_err(|()| KernelFault::Truncated {
        part: "the ELF header",
        length_bytes: bytes,
        needed_bytes,
    })?;
    if header.e_ident.class != elf::ELFCLASS64 {
        return Err(KernelFault::WrongKind("not 64-bit"));
    }
    if header.e_ident.data != elf::ELFDATA2LSB {
        return Err(KernelFault::WrongKind("not little-endian"));
    }
    if header.e_machine(LittleEndian) != elf::EM_X86_64 {
        return Err(KernelFault::WrongKind("built for another machine"));
    }
    if header.e_type(LittleEndian) != elf::ET_EXEC {
        return Err(KernelFault::WrongKind("an object file or library, not a linked kernel"));
    }
    Ok(header)
}

/// The entry point and the end of the loaded segments, all in physical addresses.
fn check_segments<'data, R: ReadRef<'data>>(
    header: &Header,
    data: R,
    length_bytes: u64,
) -> Result<(u64, u64), KernelFault> {
    let endian = LittleEndian;
    let table_end = table_end(header.e_phoff(endian), header.e_phnum(endian), header.e_phentsize(endian));
    fits("the program header table", table_end, length_bytes)?;
    let segments = header
        .program_headers(endian, data)
        .map_err(|_| KernelFault::Corrupt("the program headers cannot be read"))?;
    let entry = header.e_entry(endian);
    let mut end_of_load = 0;
    let mut entry_is_loaded = false;
    for segment in segments.iter().filter(|segment| segment.p_type(endian) == elf::PT_LOAD) {
        let end = segment.p_offset(endian).checked_add(segment.p_filesz(endian));
        fits("a loaded segment", end, length_bytes)?;
        let start = segment.p_paddr(endian);
        let Some(end) = start.checked_add(segment.p_memsz(endian)) else {
            return Err(KernelFault::Corrupt("a segment wraps around the end of memory"));
        };
        if segment.p_memsz(endian) < segment.p_filesz(endian) {
            return Err(KernelFault::Corrupt("a segment has more bytes in the file than in memory"));
        }
        end_of_load = end_of_load.max(end);
        entry_is_loaded |= (start..end).contains(&entry);
    }
    if !entry_is_loaded {
        return Err(KernelFault::Corrupt("the entry point is in no loaded segment"));
    }
    Ok((entry, end_of_load))
}

/// Linkers write the section table last: if it is there, the file was not cut. Stripped kernels have none.
fn check_section_table(header: &Header, length_bytes: u64) -> Result<(), KernelFault> {
    let endian = LittleEndian;
    let offset = header.e_shoff(endian);
    if offset == 0 {
        return Ok(());
    }
    let end = table_end(offset, header.e_shnum(endian), header.e_shentsize(endian));
    fits("the section header table", end, length_bytes)
}

fn table_end(offset: u64, entries: u16, entry_bytes: u16) -> Option<u64> {
    offset.checked_add(u64::from(entries) * u64::from(entry_bytes))
}

fn fits(part: &'static str, end: Option<u64>, length_bytes: u64) -> Result<(), KernelFault> {
    match end {
        Some(end) if end <= length_bytes => Ok(()),
        Some(needed_bytes) => Err(KernelFault::Truncated { part, length_bytes, needed_bytes }),
        None => Err(KernelFault::Corrupt("an offset wraps around")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A kernel in small: one loaded segment of 0x40 bytes at file offset 0x80, then a section table of one
    /// entry.
    fn sound_kernel() -> Vec<u8> {
        let mut file = vec![0; 0x80 + 0x40 + 64];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        put(16, &elf::ET_EXEC.0.to_le_bytes());
        put(18, &elf::EM_X86_64.0.to_le_bytes());
        put(24, &0x100_0000u64.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(40, &0xc0u64.to_le_bytes());
        put(54, &[56, 0, 1, 0, 64, 0, 1, 0]);
        put(64, &elf::PT_LOAD.0.to_le_bytes());
        put(72, &0x80u64.to_le_bytes());
        put(88, &0x100_0000u64.to_le_bytes());
        put(96, &0x40u64.to_le_bytes());
        put(104, &0x1000u64.to_le_bytes());
        file
    }

    #[test]
    fn a_sound_kernel_is_accepted() {
        let info = parse_kernel(sound_kernel().as_slice()).unwrap();
        assert_eq!(info, KernelInfo { entry: 0x100_0000, end_of_load: 0x100_1000, bytes: 256 });
    }

    #[test]
    fn a_kernel_cut_anywhere_is_refused() {
        let whole = sound_kernel();
        for length in 0..whole.len() {
            let fault = parse_kernel(&whole[..length]).unwrap_err();
            let expected_not_elf = length < 4;
            assert_eq!(matches!(fault, KernelFault::NotElf), expected_not_elf, "{length}: {fault}");
            assert!(
                expected_not_elf || fault.to_string().starts_with("it is truncated"),
                "{length}: {fault}"
            );
        }
    }

    #[test]
    fn a_kernel_without_section_table_is_refused_if_a_segment_is_cut() {
        let mut stripped = sound_kernel();
        stripped[40..48].fill(0);
        assert!(parse_kernel(&stripped[..0xc0]).is_ok());
        let fault = parse_kernel(&stripped[..0xbf]).unwrap_err();
        assert!(matches!(fault, KernelFault::Truncated { part: "a loaded segment", .. }), "{fault}");
    }

    #[test]
    fn other_kinds_of_file_are_named() {
        let changed = |at: usize, byte: u8| {
            let mut file = sound_kernel();
            file[at] = byte;
            parse_kernel(file.as_slice()).unwrap_err().to_string()
        };
        assert!(changed(0, 0).contains("not an ELF"));
        assert!(changed(4, 1).contains("not 64-bit"));
        assert!(changed(5, 2).contains("not little-endian"));
        assert!(changed(16, 1).contains("object file"));
        assert!(changed(18, 183).contains("another machine"));
        assert!(changed(27, 9).contains("entry point"));
        let mut compressed = vec![0; 4096];
        compressed[0x202..0x206].copy_from_slice(b"HdrS");
        assert!(matches!(parse_kernel(compressed.as_slice()), Err(KernelFault::Compressed)));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(
            noise in proptest::collection::vec(any::<u8>(), 0..512),
            at in 8usize..120,
            bytes in any::<[u8; 8]>(),
        ) {
            let _ = parse_kernel(noise.as_slice());
            let mut file = sound_kernel();
            file[at..at + 8].copy_from_slice(&bytes);
            if let Ok(info) = parse_kernel(file.as_slice()) {
                prop_assert!(info.entry < info.end_of_load);
            }
        }
    }
}
