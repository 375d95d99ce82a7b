//! KVM's binary statistics of a vCPU (Documentation/virt/kvm/api.rst, section 4.133): among them the count of
//! guest instructions that KVM emulated, which is what work costs on software KVM.

use std::fs::File;
use std::os::unix::fs::FileExt;

const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// Descriptors and bytes of data accepted; a vCPU has a few dozen.
const LIMIT: usize = 4096;

/// Reads one counter by its name, or `None` where this kernel has no such counter.
#[must_use]
pub fn read(fd: &File, wanted: &str) -> Option<u64> {
    let mut header = [0_u8; HEADER_BYTES];
    fd.read_exact_at(&mut header, 0).ok()?;
    let word =
        |i: usize| u32::from_le_bytes([header[i], header[i + 1], header[i + 2], header[i + 3]]) as usize;
    let (name_bytes, count, descriptors, data) = (word(4), word(8), word(16), word(20));
    if name_bytes > LIMIT || count > LIMIT {
        return None;
    }
    let stride = DESCRIPTOR_BYTES + name_bytes;
    let mut table = vec![0_u8; stride * count];
    fd.read_exact_at(&mut table, descriptors as u64).ok()?;
    for entry in table.chunks_exact(stride) {
        let name = entry[DESCRIPTOR_BYTES..].split(|b| *b == 0).next()?;
        if name == wanted.as_bytes() {
            let offset = u32::from_le_bytes([entry[8], entry[9], entry[10], entry[11]]);
            let mut value = [0_u8; 8];
            fd.read_exact_at(&mut value, data as u64 + u64::from(offset)).ok()?;
            return Some(u64::from_le_bytes(value));
        }
    }
    None
}

/// The name of the counter of emulated guest instructions.
pub const INSTRUCTIONS_EMULATED: &str = "insn_emulation";
/// The name of the counter of VM exits.
pub const EXITS: &str = "exits";
