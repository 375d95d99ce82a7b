//! Bare programs: an ELF file of a few bytes of code. The VMM's loader takes it as a kernel, Linux as PID 1.

/// Where the file is loaded; the code follows its headers.
const LOAD_ADDRESS: u64 = 0x10_0000;
const HEADERS: u64 = 64 + 56;

/// Address of the first byte of code.
pub const ENTRY: u64 = LOAD_ADDRESS + HEADERS;

/// An ELF executable whose one segment is `code`.
#[must_use]
pub fn elf(code: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    // ELF-64 header: little endian, executable, x86-64.
    out.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
    out.extend_from_slice(&2_u16.to_le_bytes());
    out.extend_from_slice(&62_u16.to_le_bytes());
    out.extend_from_slice(&1_u32.to_le_bytes());
    out.extend_from_slice(&ENTRY.to_le_bytes());
    out.extend_from_slice(&64_u64.to_le_bytes());
    out.extend_from_slice(&0_u64.to_le_bytes());
    out.extend_from_slice(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        out.extend_from_slice(&half.to_le_bytes());
    }
    // One PT_LOAD segment, readable, writable and executable.
    out.extend_from_slice(&1_u32.to_le_bytes());
    out.extend_from_slice(&7_u32.to_le_bytes());
    let size = HEADERS + code.len() as u64;
    for word in [0, LOAD_ADDRESS, LOAD_ADDRESS, size, size, 0x1000] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(code);
    out
}

/// `ud2` without an interrupt table: an exception that cannot be delivered, a triple fault.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];

/// `vaddps ymm0, ymm0, ymm0` in ring 0: native on hardware KVM, beyond KVM's emulator and the assist.
pub const UNKNOWN_INSTRUCTION: &[u8] = &[0xc5, 0xfc, 0x58, 0xc0];

/// `out 0x64, 0xfe`: the keyboard controller's reset.
pub const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64];

/// Code that prints `text` to the early console's port, then resets.
#[must_use]
pub fn print_and_reset(text: &str) -> Vec<u8> {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for byte in text.bytes() {
        // mov al, byte; out dx, al
        code.extend_from_slice(&[0xb0, byte, 0xee]);
    }
    code.extend_from_slice(RESET);
    code
}

/// As PID 1: `exit(3)`, which the kernel answers with a panic.
pub const EXIT_3: &[u8] = &[0xb8, 60, 0, 0, 0, 0xbf, 3, 0, 0, 0, 0x0f, 0x05];
