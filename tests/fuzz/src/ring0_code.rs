//! Code for ring 0: instructions that the engine knows, and some that it does not, with what there is to be
//! read and written.

use crate::tables::{PAGE, PT0, address};
use arbitrary::{Result, Unstructured};

/// Where code is mapped: two pages of it, the six of tables, then one of descriptors. No entry on the way there
/// is one that tables are bent by.
pub(crate) const CODE: u64 = 0xffff_9600_0000_0000 | 5 << 30 | 5 << 21 | 100 << 12;
pub(crate) const TABLES: u64 = CODE + 2 * PAGE;
pub(crate) const SYSTEM: u64 = CODE + 8 * PAGE;
/// The frames: data pages of the tables lead to them, too.
pub(crate) const CODE_FRAME: u64 = 0x2_e000;
pub(crate) const SYSTEM_FRAME: u64 = 0x2_d000;
/// Where much is mapped, if the tables are filled.
pub(crate) const FILLED: [u64; 2] = [0x1f_8000, 0xffff_8800_001f_8000];
/// Descriptor tables and handlers' stacks, by offset in [`SYSTEM`].
pub(crate) const IDT: u64 = 0;
pub(crate) const GDT: u64 = 0x200;
pub(crate) const TSS: u64 = 0x240;

/// Maps them, code with these rights.
pub(crate) fn map(low: &mut [u8], rights: u64) {
    let mut set = |at: u64, entry: u64| {
        low[at as usize..at as usize + 8].copy_from_slice(&entry.to_le_bytes());
    };
    set(0x1000 + 300 * 8, 0x2007);
    set(0x2000 + 5 * 8, 0x3007);
    set(0x3000 + 5 * 8, PT0 | 7);
    for page in 0..2 {
        set(PT0 + (100 + page) * 8, (CODE_FRAME + page * PAGE) | rights);
    }
    for page in 0..6 {
        set(PT0 + (102 + page) * 8, (page * PAGE) | 3);
    }
    set(PT0 + 108 * 8, SYSTEM_FRAME | 3);
}

/// Descriptors, gates to somewhere in the code, stacks.
pub(crate) fn write_system(page: &mut [u8], u: &mut Unstructured<'_>) -> Result<()> {
    let mut set = |at: u64, word: u64| {
        page[at as usize..at as usize + 8].copy_from_slice(&word.to_le_bytes());
    };
    let (data, text) = (0x00cf_9300_0000_ffff_u64, 0x00af_9b00_0000_ffff_u64);
    // A program's are at 0x28 and 0x30, as in Linux; one of 32 bits at 0x20.
    let descriptors =
        [0, u.arbitrary()?, text, data, data | 3 << 45 | 8 << 40, data | 3 << 45, text | 3 << 45, text];
    for (index, descriptor) in (0..).zip(descriptors) {
        set(GDT + index * 8, descriptor);
    }
    if u.ratio(1, 8)? {
        set(GDT + u.int_in_range(1..=7_u64)? * 8, text ^ 1 << u.int_in_range(0..=63)?);
    }
    for index in 0..7 {
        let words = u.int_in_range(0x100..=0x200)?;
        set(TSS + 0x24 + index * 8, SYSTEM + words * 8);
    }
    for vector in 0..32 {
        let bits: u16 = u.arbitrary()?;
        let handler = CODE + u64::from(bits & 0xff);
        let kind = if bits >> 8 & 31 == 0 { 12 } else { 14 | u64::from(bits >> 13 & 1) };
        let stack = if bits >> 14 == 3 { u64::from(bits >> 8 & 7) } else { 0 };
        let low = handler & 0xffff | 0x10 << 16 | stack << 32 | kind << 40 | 1 << 47;
        set(IDT + vector * 16, low | (handler & 0xffff_0000) << 32);
        set(IDT + vector * 16 + 8, handler >> 32);
    }
    Ok(())
}

/// A number that means something: an address, a page-table entry, a count.
pub(crate) fn value(u: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match u.int_in_range(0..=15)? {
        0 => u.arbitrary()?,
        1 | 2 => u.int_in_range(0..=0x200)?,
        // An entry: the tables, a page, none.
        3 | 4 => u.int_in_range(0..=7_u64)? << 12 | 7,
        5 => u.int_in_range(0x20..=0x2f_u64)? << 12 | u64::from(u.arbitrary::<u8>()?),
        6 => 0,
        7 | 8 => CODE + u.int_in_range(0..=0x1ff_u64)?,
        9 => CODE + 0x1000 - u.int_in_range(0..=16_u64)?,
        10..=12 => {
            let index = *u.choose(&[0_u64, 1, 5, 100, 101, 102, 108, 255, 256, 272, 300, 510, 511])?;
            TABLES + u.int_in_range(0..=5_u64)? * PAGE + index * 8 + u64::from(u.ratio(1, 8)?)
        }
        13 => SYSTEM + u.int_in_range(0..=0x1ff_u64)? * 8,
        _ => address(u)?,
    })
}

/// What follows an opcode.
#[derive(Clone, Copy)]
enum Form {
    /// Nothing.
    Plain,
    /// A register, in the opcode's last byte.
    Register,
    /// Any register and any operand.
    Any,
    /// The same with a digit in the register's place.
    Digit(u8),
}
use Form::{Any, Digit, Plain, Register};

/// Opcodes, and how many bytes of immediate they have.
const OPCODES: &[(&[u8], Form, usize)] = &[
    // MOV, several times: most stores are.
    (&[0x88], Any, 0),
    (&[0x89], Any, 0),
    (&[0x89], Any, 0),
    (&[0x89], Any, 0),
    (&[0x8a], Any, 0),
    (&[0x8b], Any, 0),
    (&[0xc6], Digit(0), 1),
    (&[0xc7], Digit(0), 4),
    (&[0x0f, 0xc3], Any, 0),
    (&[0x8d], Any, 0),
    // Arithmetic.
    (&[0x01], Any, 0),
    (&[0x08], Any, 0),
    (&[0x13], Any, 0),
    (&[0x31], Any, 0),
    (&[0x39], Any, 0),
    (&[0x80], Digit(1), 1),
    (&[0x81], Digit(4), 4),
    (&[0x83], Digit(4), 1),
    (&[0x83], Digit(1), 1),
    (&[0x85], Any, 0),
    (&[0xf7], Digit(2), 0),
    (&[0xf7], Digit(3), 0),
    (&[0xf7], Digit(4), 0),
    (&[0xf7], Digit(6), 0),
    (&[0xff], Digit(0), 0),
    (&[0xfe], Digit(1), 0),
    (&[0xd3], Digit(4), 0),
    (&[0xc1], Digit(5), 1),
    (&[0x0f, 0xaf], Any, 0),
    (&[0x0f, 0xa5], Any, 0),
    (&[0x0f, 0xc8], Register, 0),
    // Exchanges, and bits.
    (&[0x86], Any, 0),
    (&[0x87], Any, 0),
    (&[0x0f, 0xb0], Any, 0),
    (&[0x0f, 0xb1], Any, 0),
    (&[0x0f, 0xc1], Any, 0),
    (&[0x0f, 0xa3], Any, 0),
    (&[0x0f, 0xab], Any, 0),
    (&[0x0f, 0xb3], Any, 0),
    (&[0x0f, 0xba], Digit(5), 1),
    (&[0x0f, 0xba], Digit(6), 1),
    (&[0x0f, 0xbc], Any, 0),
    (&[0x0f, 0xb6], Any, 0),
    (&[0x0f, 0xbf], Any, 0),
    (&[0x63], Any, 0),
    (&[0x0f, 0x44], Any, 0),
    (&[0x0f, 0x95], Digit(0), 0),
    // The stack, and branches.
    (&[0x50], Register, 0),
    (&[0x58], Register, 0),
    (&[0x8f], Digit(0), 0),
    (&[0xff], Digit(6), 0),
    (&[0x68], Plain, 4),
    (&[0xc9], Plain, 0),
    (&[0x9c], Plain, 0),
    (&[0x9d], Plain, 0),
    (&[0xc3], Plain, 0),
    (&[0xc2], Plain, 2),
    (&[0xff], Digit(2), 0),
    (&[0xff], Digit(4), 0),
    (&[0xeb], Plain, 1),
    (&[0x74], Plain, 1),
    (&[0x77], Plain, 1),
    (&[0xe2], Plain, 1),
    (&[0xe3], Plain, 1),
    // Strings.
    (&[0xa4], Plain, 0),
    (&[0xa5], Plain, 0),
    (&[0xa6], Plain, 0),
    (&[0xaa], Plain, 0),
    (&[0xab], Plain, 0),
    (&[0xad], Plain, 0),
    (&[0xae], Plain, 0),
    (&[0xfc], Plain, 0),
    (&[0xfd], Plain, 0),
    // Ring 0's own.
    (&[0x48, 0xcf], Plain, 0),
    (&[0x48, 0x0f, 0x07], Plain, 0),
    (&[0x0f, 0x01, 0xf8], Plain, 0),
    (&[0x0f, 0x01], Digit(7), 0),
    (&[0x0f, 0x01], Digit(2), 0),
    (&[0x0f, 0x01], Digit(3), 0),
    (&[0x0f, 0x01, 0xca], Plain, 0),
    (&[0x0f, 0x01, 0xcb], Plain, 0),
    (&[0x0f, 0x20, 0xd8], Register, 0),
    (&[0x0f, 0x22, 0xd0], Register, 0),
    (&[0x0f, 0x22, 0xd8], Register, 0),
    (&[0x0f, 0x22, 0xe0], Register, 0),
    (&[0x0f, 0x30], Plain, 0),
    (&[0x0f, 0x32], Plain, 0),
    (&[0x0f, 0xae], Digit(2), 0),
    (&[0x8e, 0xd0], Register, 0),
    (&[0x8c, 0xd0], Register, 0),
    (&[0xfa], Plain, 0),
    (&[0xfb], Plain, 0),
    (&[0xf4], Plain, 0),
    (&[0xef], Plain, 0),
    (&[0xe6, 0xf4], Plain, 0),
    (&[0xcc], Plain, 0),
    (&[0x0f, 0x0b], Plain, 0),
];
const PREFIXES: &[&[u8]] = &[
    &[],
    &[],
    &[],
    &[0x48],
    &[0x48],
    &[0x48],
    &[0x4c],
    &[0x49],
    &[0x66],
    &[0xf0],
    &[0xf0, 0x48],
    &[0xf3],
    &[0xf3, 0x48],
    &[0xf2],
    &[0x65, 0x48],
    &[0x64],
    &[0x67],
];
/// Some that come together.
const PHRASES: &[&[u8]] = &[
    // mov edx, 0x6b0; mov eax, 1 or 2; out dx, eax
    &[0xba, 0xb0, 6, 0, 0, 0xb8, 1, 0, 0, 0, 0xef],
    &[0xba, 0xb0, 6, 0, 0, 0xb8, 2, 0, 0, 0, 0xef],
    // mov ecx, -1; mov edx, 0x6b0; mov eax, 2; out dx, eax
    &[0x48, 0xc7, 0xc1, 0xff, 0xff, 0xff, 0xff, 0xba, 0xb0, 6, 0, 0, 0xb8, 2, 0, 0, 0, 0xef],
    // mov ecx, 0x80000; rep stosb, movsb, lodsb
    &[0xb9, 0, 0, 8, 0, 0xf3, 0xaa],
    &[0xb9, 0, 0, 8, 0, 0xf3, 0xa4],
    &[0xb9, 0, 0, 8, 0, 0xf3, 0xac],
    // mov ecx, the bases of segments; wrmsr
    &[0xb9, 0, 1, 0, 0xc0, 0x0f, 0x30],
    &[0xb9, 2, 1, 0, 0xc0, 0x0f, 0x30],
    // sti; hlt
    &[0xfb, 0xf4],
    // Frames for IRET: to a program (SS 0x2b, CS 0x33), and to ring 0.
    &[0x6a, 0x2b, 0x54, 0x9c, 0x6a, 0x33, 0x51, 0x48, 0xcf],
    &[0x6a, 0x18, 0x54, 0x9c, 0x6a, 0x10, 0x50, 0x48, 0xcf],
    &[0x6a, 0, 0x54, 0x9c, 0x6a, 0x10, 0x50, 0x48, 0xcf],
];

/// Code at the start of both pages, and at the end of the first.
pub(crate) fn write(pages: &mut [u8], long: bool, u: &mut Unstructured<'_>) -> Result<()> {
    if long && u.arbitrary()? {
        let code = long_ones(u)?;
        pages[..code.len()].copy_from_slice(&code);
        return Ok(());
    }
    if u.ratio(1, 16)? {
        let random: [u8; 64] = u.arbitrary()?;
        pages[..64].copy_from_slice(&random);
        return Ok(());
    }
    let second = u.int_in_range(0xff0..=0x1000)?;
    for (start, count) in [(0, 24_usize), (second, 8)] {
        let mut code = Vec::new();
        for _ in 0..count {
            instruction(&mut code, u)?;
        }
        pages[start..start + code.len()].copy_from_slice(&code);
    }
    Ok(())
}

/// Bulk instructions one after the other.
fn long_ones(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut code = Vec::new();
    for _ in 0..9 {
        // mov rdi; mov ecx
        code.extend([0x48, 0xbf]);
        code.extend(u.choose(&FILLED)?.to_le_bytes());
        code.push(0xb9);
        code.extend(u.choose(&[0xf_ffff_u32, 0x3f_0000, 0x40_0000, 0x7fff_ffff])?.to_le_bytes());
        match u.int_in_range(0..=7)? {
            0 => code.extend([0xf3, 0xaa]),
            1 => code.extend([0xf3, 0xae]),
            2 => code.extend([0x48, 0x89, 0xfe, 0xf3, 0xac]),
            // mov edx, 0x6b0; mov eax, 2; out dx, eax
            _ => code.extend([0xba, 0xb0, 6, 0, 0, 0xb8, 2, 0, 0, 0, 0xef]),
        }
    }
    Ok(code)
}

fn instruction(code: &mut Vec<u8>, u: &mut Unstructured<'_>) -> Result<()> {
    match u.int_in_range(0..=15)? {
        0 => code.extend(u.arbitrary::<[u8; 4]>()?),
        1 => code.extend(*u.choose(PHRASES)?),
        // MOV of a number that means something.
        2 | 3 => {
            code.extend([0x48, 0xb8 | u.int_in_range(0..=7)?]);
            code.extend(value(u)?.to_le_bytes());
        }
        // A jump, perhaps to the other page of code.
        4 => {
            code.push(0xe9);
            code.extend(u.int_in_range(-0x200..=0x1200_i32)?.to_le_bytes());
        }
        _ => {
            code.extend(*u.choose(PREFIXES)?);
            let &(opcode, form, immediate) = u.choose(OPCODES)?;
            code.extend(opcode);
            operand(code, form, u)?;
            code.extend(&u.arbitrary::<[u8; 4]>()?[..immediate]);
        }
    }
    Ok(())
}

fn operand(code: &mut Vec<u8>, form: Form, u: &mut Unstructured<'_>) -> Result<()> {
    let digit = match form {
        Plain => return Ok(()),
        Register => {
            if let Some(last) = code.last_mut() {
                *last |= u.int_in_range(0..=7)?;
            }
            return Ok(());
        }
        Any => u.int_in_range(0..=7)?,
        Digit(digit) => digit,
    };
    let (bits, disp): (u8, u8) = (u.arbitrary()?, u.arbitrary()?);
    let register = digit << 3;
    match bits >> 5 {
        0 => code.push(0xc0 | register | bits & 7),
        1 => {
            // What is near the code, the tables among it.
            code.push(register | 5);
            code.extend(i32::from(u.arbitrary::<i16>()?).to_le_bytes());
        }
        2 => code.extend([0x40 | register | 4, u.arbitrary()?, disp]),
        _ if bits & 7 == 4 => code.extend([0x40 | register | 4, 0x24, disp & 0x78]),
        _ => code.extend([0x40 | register | bits & 7, disp & 0x78]),
    }
    Ok(())
}
