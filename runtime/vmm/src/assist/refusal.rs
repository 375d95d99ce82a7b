//! Why an instruction was not done: the guest cannot go on, and this is its last message.

use std::fmt;
use std::io;

use iced_x86::Mnemonic;

use super::MAX_INSTRUCTION_BYTES;

/// An instruction the assist did not do. Nothing of the vCPU or its memory was changed.
#[derive(Debug, thiserror::Error)]
#[error("the guest stopped at {rip:#x}: {what}[{}]: {reason}", Hex(self.bytes()))]
pub struct Unassisted {
    rip: u64,
    code: [u8; MAX_INSTRUCTION_BYTES],
    len: usize,
    what: Name,
    reason: Reason,
}

impl Unassisted {
    pub(super) fn new(rip: u64, bytes: &[u8], what: Option<Mnemonic>, reason: Reason) -> Self {
        let len = bytes.len().min(MAX_INSTRUCTION_BYTES);
        let mut code = [0; MAX_INSTRUCTION_BYTES];
        code[..len].copy_from_slice(&bytes[..len]);
        let what = Name(what);
        Self { rip, code, len, what, reason }
    }

    /// The guest's RIP.
    pub fn rip(&self) -> u64 {
        self.rip
    }

    /// The instruction's bytes, as far as they are known.
    pub fn bytes(&self) -> &[u8] {
        &self.code[..self.len]
    }

    /// Why it was not done.
    pub fn reason(&self) -> &Reason {
        &self.reason
    }
}

/// Why an instruction was not done.
#[derive(Debug, thiserror::Error)]
pub enum Reason {
    /// A valid instruction that is not in the table.
    #[error(
        "KVM cannot emulate this instruction in ring 0 and neither can the assist; \
         take the CPU feature away with clearcpuid= on the guest's command line, or add the \
         instruction to the assist's table"
    )]
    Unknown,
    /// No x86-64 instruction starts with these bytes.
    #[error("these bytes are not an x86-64 instruction")]
    Undecodable,
    /// KVM gave fewer bytes than the instruction has, and the guest's page tables gave no more.
    #[error("the instruction's bytes could not be read from guest memory")]
    TooFewBytes,
    /// The code is not 64-bit code.
    #[error("the vCPU is not in 64-bit mode, the only one the assist serves")]
    NotLongMode,
    /// The code is not supervisor code, so KVM should have run it natively.
    #[error("the vCPU is in ring {0}; only ring 0 is assisted")]
    NotRing0(u16),
    /// The guest's page tables, or an access through them, lead outside its RAM.
    #[error("guest-physical address {0:#x} is not RAM")]
    NotRam(u64),
    /// A locked access that is not naturally aligned: it cannot be made atomic.
    #[error("a compare and exchange at unaligned address {0:#x} cannot be atomic")]
    Unaligned(u64),
    /// An operand form the assist does not do.
    #[error("this operand form is not assisted")]
    Operand,
    /// XCR0 or IA32_XSS has components whose place in the XSAVE area is not known.
    #[error("XSAVE components {0:#x} are not ones the host describes in CPUID leaf 0xd")]
    Component(u64),
    /// The XSAVE image KVM gave is shorter than the enabled components need.
    #[error("KVM's XSAVE image has {0} bytes, fewer than the enabled components need")]
    ShortImage(usize),
    /// Another vCPU kept changing the page tables under the walk.
    #[error("the page tables for {0:#x} kept changing under the walk")]
    PagingRace(u64),
    /// The vCPU's state could not be read or written.
    #[error("the vCPU's state could not be reached: {0}")]
    State(#[from] io::Error),
}

/// A mnemonic and a blank, or nothing.
#[derive(Debug)]
struct Name(Option<Mnemonic>);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(mnemonic) => write!(f, "{} ", format!("{mnemonic:?}").to_lowercase()),
            None => Ok(()),
        }
    }
}

/// Bytes as an instruction dump shows them: `f3 0f b8 c1`.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            let gap = if index == 0 { "" } else { " " };
            write!(f, "{gap}{byte:02x}")?;
        }
        Ok(())
    }
}
