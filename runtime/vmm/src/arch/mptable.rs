//! The MultiProcessor table: without ACPI it is how Linux learns of the CPUs and of the interrupt lines.
//! Intel MultiProcessor Specification 1.4, chapter 4.

use super::layout;
use crate::VmmError;
use crate::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

const APIC_VERSION: u8 = 0x14;
/// Interrupt lines of the I/O APIC that KVM's in-kernel irqchip has.
pub const IO_APIC_PINS: u8 = 24;

/// Writes the floating pointer and the configuration table for `vcpus` processors.
///
/// # Errors
/// [`VmmError::Memory`] if guest memory does not cover the EBDA.
pub fn write(mem: &GuestMemory, vcpus: u8) -> Result<(), VmmError> {
    let table = table(vcpus);
    let at = layout::EBDA;
    // Floating pointer structure (§4.1): 16 bytes, right before the table it points to.
    let mut pointer = *b"_MP_\0\0\0\0\x01\x04\0\0\0\0\0\0";
    pointer[4..8].copy_from_slice(&((at + 16) as u32).to_le_bytes());
    pointer[10] = checksum(&pointer);
    for (bytes, at) in [(&pointer[..], at), (&table[..], at + 16)] {
        mem.write_slice(bytes, GuestAddress(at))
            .map_err(|e| VmmError::Memory(format!("MultiProcessor table: {e}")))?;
    }
    Ok(())
}

fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0_u8, |sum, b| sum.wrapping_add(*b)).wrapping_neg()
}

fn table(vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries: Vec<u8> = Vec::new();
    let mut count: u16 = 0;
    let mut push = |bytes: &[u8]| {
        entries.extend_from_slice(bytes);
        count += 1;
    };
    for id in 0..vcpus {
        // Processor (§4.3.1): enabled, the first is the boot processor; family 6, APIC and FPU on chip.
        let flags = 1 | if id == 0 { 2 } else { 0 };
        let mut e = [0_u8; 20];
        e[..4].copy_from_slice(&[0, id, APIC_VERSION, flags]);
        e[4..8].copy_from_slice(&0x600_u32.to_le_bytes());
        e[8..12].copy_from_slice(&0x201_u32.to_le_bytes());
        push(&e);
    }
    // Bus (§4.3.2): ISA, whose interrupts are edge-triggered and active high by default.
    push(b"\x01\x00ISA   ");
    // I/O APIC (§4.3.3).
    let mut e = [2, io_apic_id, APIC_VERSION, 1, 0, 0, 0, 0];
    e[4..].copy_from_slice(&layout::IO_APIC.to_le_bytes());
    push(&e);
    for pin in 0..IO_APIC_PINS {
        // I/O interrupt assignment (§4.3.4): ISA line n is I/O APIC pin n.
        push(&[3, 0, 0, 0, 0, pin, io_apic_id, pin]);
    }
    // Local interrupt assignment (§4.3.5): ExtINT on LINT0, NMI on LINT1 of every CPU.
    push(&[4, 3, 0, 0, 0, 0, 0, 0]);
    push(&[4, 1, 0, 0, 0, 0, 0xff, 1]);

    // Configuration table header (§4.2), 44 bytes.
    let mut t = Vec::with_capacity(44 + entries.len());
    t.extend_from_slice(b"PCMP");
    t.extend_from_slice(&((44 + entries.len()) as u16).to_le_bytes());
    t.extend_from_slice(&[4, 0]);
    t.extend_from_slice(b"PEREGRIN");
    t.extend_from_slice(b"MICROVM     ");
    t.extend_from_slice(&[0; 6]);
    t.extend_from_slice(&count.to_le_bytes());
    t.extend_from_slice(&layout::LOCAL_APIC.to_le_bytes());
    t.extend_from_slice(&[0; 4]);
    t.extend_from_slice(&entries);
    t[7] = checksum(&t);
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_sums_to_zero_and_says_its_own_length() {
        for vcpus in [1, 2, 8, 32] {
            let t = table(vcpus);
            assert_eq!(t.iter().fold(0_u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(usize::from(u16::from_le_bytes([t[4], t[5]])), t.len());
            let entries = usize::from(u16::from_le_bytes([t[34], t[35]]));
            assert_eq!(entries, usize::from(vcpus) + 2 + usize::from(IO_APIC_PINS) + 2);
        }
    }

    #[test]
    fn the_table_of_the_largest_guest_fits_below_the_legacy_hole() {
        assert!(layout::EBDA as usize + 16 + table(crate::vm::MAX_VCPUS).len() <= 0xa_0000);
    }
}
