//! The guest-physical address map. Everything that needs an address takes it from here.

use std::ops::Range;

/// Where the Linux zero page (`boot_params`) lies.
pub const ZERO_PAGE: u64 = 0x7000;
/// The boot stack pointer; the 64-bit entry needs one only until it sets its own.
pub const BOOT_STACK: u64 = 0x8ff0;
/// The boot page tables: PML4, PDPT, then four page directories.
pub const PML4: u64 = 0x9000;
/// See [`PML4`].
pub const PDPT: u64 = 0xa000;
/// See [`PML4`]; four consecutive pages map the first 4 GiB with 2 MiB pages.
pub const PAGE_DIRECTORIES: u64 = 0xb000;
/// The boot GDT.
pub const GDT: u64 = 0x500;
/// The boot IDT (empty).
pub const IDT: u64 = 0x520;
/// The kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes a command line may have, its NUL included.
pub const COMMAND_LINE_MAX: usize = 2048;
/// Extended BIOS data area: the MultiProcessor tables lie here, and usable low memory ends.
pub const EBDA: u64 = 0x9_fc00;
/// Where memory above the legacy hole begins; the kernel is loaded above it.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// First address of the device hole: RAM ends here and goes on at 4 GiB.
pub const DEVICE_HOLE: u64 = 0xd000_0000;
/// Where RAM goes on above the device hole.
pub const ABOVE_4G: u64 = 0x1_0000_0000;
/// RAM that the guest kernel is told to leave alone: what a frozen guest finds when it goes on (see guest-init).
pub const MAILBOX: u64 = guest_init::GATE_MAILBOX;
/// End of [`MAILBOX`].
pub const MAILBOX_END: u64 = MAILBOX + guest_init::GATE_MAILBOX_BYTES as u64;
/// The gate's register, above all virtio-mmio windows there can be.
pub const GATE_REGISTER: u64 = guest_init::GATE_REGISTER;
/// First virtio-mmio register window; windows are 4 KiB apart.
pub const VIRTIO_MMIO: u64 = DEVICE_HOLE;
/// Interrupt line of the first virtio-mmio device (IRQ 0 to 4 are the ISA bus's own).
pub const FIRST_GSI: u32 = 5;
/// The I/O APIC's registers, where the in-kernel irqchip has them.
pub const IO_APIC: u32 = 0xfec0_0000;
/// The local APIC's registers.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that Intel VT-x needs for real-mode emulation (KVM_SET_TSS_ADDR), in the device hole.
pub const KVM_TSS: usize = 0xfffb_d000;

/// The guest-physical RAM ranges of a guest with `bytes` of memory: one below the device hole and, for
/// larger guests, one above 4 GiB.
#[must_use]
pub fn ram_ranges(bytes: u64) -> Vec<Range<u64>> {
    let low = 0..bytes.min(DEVICE_HOLE);
    let high = ABOVE_4G..ABOVE_4G + bytes.saturating_sub(DEVICE_HOLE);
    [low, high].into_iter().filter(|range| !range.is_empty()).collect()
}

// The boot structures below 640 KiB must not overlap.
const _: () = assert!(ZERO_PAGE + 0x1000 <= BOOT_STACK && BOOT_STACK < PML4);
const _: () = assert!(PAGE_DIRECTORIES + 4 * 0x1000 <= COMMAND_LINE);
const _: () = assert!(COMMAND_LINE + (COMMAND_LINE_MAX as u64) <= MAILBOX && MAILBOX_END < EBDA);
const _: () = assert!(MAILBOX.is_multiple_of(4096) && MAILBOX_END.is_multiple_of(4096));
const _: () = assert!(GATE_REGISTER > VIRTIO_MMIO);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_never_covers_the_device_hole() {
        for mib in [64_u64, 256, 3327, 3328, 3329, 4096, 65536] {
            let ranges = ram_ranges(mib << 20);
            assert_eq!(ranges.iter().map(|r| r.end - r.start).sum::<u64>(), mib << 20);
            for r in ranges {
                assert!(r.end <= DEVICE_HOLE || r.start >= ABOVE_4G, "{r:x?}");
            }
        }
    }
}
