//! Code that was decoded before there was a guest to run it.
//!
//! What an instruction does depends on its bytes and its address alone. So the kernel's, which all clones of a template
//! have in common, can be decoded once, by a process that the others are forked from: their engines find it there,
//! have less to do at their first steps, and share its memory. A guest's bytes are compared with those that were
//! decoded before an entry is believed; a wrong book costs time, and nothing else.

use crate::decode;
use crate::op::Op;
use crate::ram::{PAGE, Ram};
use crate::shadow::PageMap;

/// Decoded instructions of a book; beyond, nothing is added.
const MOST_OPS: usize = 1 << 18;

/// Instructions as they lie in a guest's memory, up to a branch or the end of their page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Code {
    /// The address of the first one.
    pub rip: u64,
    /// Their bytes.
    pub bytes: Vec<u8>,
}

#[derive(Clone, Copy)]
struct Entry {
    first_op: u32,
    ops: u32,
    /// Where its bytes are, and how many.
    from: u32,
    len: u32,
}

/// See the module's text.
#[derive(Default)]
pub struct CodeBook {
    ops: Vec<Op>,
    bytes: Vec<u8>,
    entries: PageMap<Entry>,
}

impl CodeBook {
    /// Decodes what it does not have. Code that reaches beyond its page, or is none, is left out.
    pub fn learn(&mut self, code: &[Code]) {
        for Code { rip, bytes } in code {
            let within = *rip as usize % PAGE;
            let len = bytes.len().min(decode::MOST_BYTES);
            if self.ops.len() >= MOST_OPS
                || within + len > PAGE
                || self.entries.contains_key(&(*rip as usize))
            {
                continue;
            }
            let (first_op, from) = (self.ops.len(), self.bytes.len());
            if !decode::block(*rip, &bytes[..len], &mut self.ops) || self.ops.len() == first_op {
                self.ops.truncate(first_op);
                continue;
            }
            self.bytes.extend_from_slice(&bytes[..len]);
            let ops = self.ops.len() - first_op;
            let entry =
                Entry { first_op: first_op as u32, ops: ops as u32, from: from as u32, len: len as u32 };
            self.entries.insert(*rip as usize, entry);
        }
    }

    /// The first op and the number of ops of what lies at `rip`, which is this place in RAM.
    pub(crate) fn find(&self, rip: u64, ram: &Ram, at: usize) -> Option<(u32, u32)> {
        let entry = self.entries.get(&(rip as usize))?;
        let known = self.bytes.get(entry.from as usize..)?.get(..entry.len as usize)?;
        let mut bytes = [0; decode::MOST_BYTES];
        let bytes = bytes.get_mut(..known.len())?;
        ram.read(at, bytes);
        (bytes == known).then_some((entry.first_op, entry.ops))
    }

    /// The ops of an entry.
    #[inline]
    pub(crate) fn ops(&self, first: u32, count: u32) -> &[Op] {
        &self.ops[first as usize..(first + count) as usize]
    }
}

impl std::fmt::Debug for CodeBook {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CodeBook")
            .field("entries", &self.entries.len())
            .field("ops", &self.ops.len())
            .finish()
    }
}
