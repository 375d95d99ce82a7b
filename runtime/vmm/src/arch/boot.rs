//! Direct 64-bit boot of `vmlinux`: boot parameters, page tables and segments, as
//! Documentation/arch/x86/boot.rst ("64-bit boot protocol") of the Linux kernel asks for them.

use super::layout;
use crate::VmmError;
use crate::memory::GuestMemory;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

fn memory_error(what: &str) -> impl Fn(vm_memory::GuestMemoryError) -> VmmError + '_ {
    move |e| VmmError::Memory(format!("{what}: {e}"))
}

/// Writes command line, zero page, page tables and GDT into guest memory.
///
/// # Errors
/// [`VmmError::Memory`] if the guest is too small to hold them.
pub fn write_boot_structures(mem: &GuestMemory, command_line: &str) -> Result<(), VmmError> {
    let mut line = command_line.as_bytes().to_vec();
    line.push(0);
    mem.write_slice(&line, GuestAddress(layout::COMMAND_LINE)).map_err(memory_error("command line"))?;
    write_zero_page(mem, command_line.len())?;
    write_page_tables(mem)?;
    for (i, entry) in gdt().iter().enumerate() {
        mem.write_obj(*entry, GuestAddress(layout::GDT + 8 * i as u64)).map_err(memory_error("GDT"))?;
    }
    mem.write_obj(0_u64, GuestAddress(layout::IDT)).map_err(memory_error("IDT"))
}

fn write_zero_page(mem: &GuestMemory, command_line_len: usize) -> Result<(), VmmError> {
    let mut params = boot_params::default();
    params.hdr.type_of_loader = 0xff;
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = 0x5372_6448; // "HdrS"
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = layout::COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line_len as u32;
    let mut map: Vec<(u64, u64, u32)> = vec![
        (0, layout::MAILBOX, E820_RAM),
        (layout::MAILBOX, layout::MAILBOX_END - layout::MAILBOX, E820_RESERVED),
        (layout::MAILBOX_END, layout::EBDA - layout::MAILBOX_END, E820_RAM),
        (layout::EBDA, layout::HIGH_MEMORY - layout::EBDA, E820_RESERVED),
    ];
    for region in mem.iter() {
        let start = region.start_addr().0.max(layout::HIGH_MEMORY);
        let end = region.start_addr().0 + region.len();
        if end > start {
            map.push((start, end - start, E820_RAM));
        }
    }
    for (i, &(addr, size, kind)) in map.iter().enumerate() {
        params.e820_table[i] = boot_e820_entry { addr, size, r#type: kind };
    }
    params.e820_entries = map.len() as u8;
    let params = BootParams::new(&params, GuestAddress(layout::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, mem)
        .map_err(|e| VmmError::Memory(format!("zero page: {e}")))
}

/// Identity-maps the first 4 GiB with 2 MiB pages; the kernel replaces these tables at once.
fn write_page_tables(mem: &GuestMemory) -> Result<(), VmmError> {
    const PRESENT_WRITABLE: u64 = 0x3;
    const LARGE: u64 = 0x80;
    let put =
        |at: u64, value: u64| mem.write_obj(value, GuestAddress(at)).map_err(memory_error("page tables"));
    put(layout::PML4, layout::PDPT | PRESENT_WRITABLE)?;
    for gib in 0..4_u64 {
        let directory = layout::PAGE_DIRECTORIES + gib * 0x1000;
        put(layout::PDPT + gib * 8, directory | PRESENT_WRITABLE)?;
        for i in 0..512_u64 {
            put(directory + i * 8, ((gib << 30) + (i << 21)) | PRESENT_WRITABLE | LARGE)?;
        }
    }
    Ok(())
}

/// Flat descriptors at the selectors the boot protocol names: `__BOOT_CS` = 0x10, `__BOOT_DS` = 0x18.
const fn gdt() -> [u64; 4] {
    [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff]
}

fn segment(selector: u16, type_: u8, long: bool) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        dpl: 0,
        db: u8::from(!long),
        s: 1,
        l: u8::from(long),
        g: 1,
        ..Default::default()
    }
}

/// Sets long mode, flat segments and the boot page tables on the boot processor's special registers.
pub fn set_boot_sregs(sregs: &mut kvm_sregs) {
    const CR0_PE_PG_ET_MP_NE_WP: u64 = 0x8001_0033;
    const CR4_PAE: u64 = 0x20;
    const EFER_LME_LMA: u64 = 0x500;
    sregs.cs = segment(0x10, 0xb, true);
    let data = segment(0x18, 0x3, false);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = kvm_segment { s: 0, type_: 0xb, ..segment(0, 0xb, false) };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (gdt().len() * 8 - 1) as u16;
    sregs.idt.base = layout::IDT;
    sregs.idt.limit = 7;
    sregs.cr0 = CR0_PE_PG_ET_MP_NE_WP;
    sregs.cr3 = layout::PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LME_LMA;
}

/// The boot processor's registers at the kernel's 64-bit entry: RSI points to the zero page.
#[must_use]
pub fn boot_regs(entry: u64) -> kvm_regs {
    kvm_regs {
        rflags: 2,
        rip: entry,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        ..Default::default()
    }
}
