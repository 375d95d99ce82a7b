//! One processor's state while the engine has it, and how its instructions reach memory.

use crate::alu::mask;
use crate::op::{self, Op};
use crate::paging::{self, is_canonical};
use crate::ram::{PAGE, Ram};
use crate::shadow::Shadow;
use crate::stop::{Break, foreign, general_protection};
use crate::tlb::{Access, Tlb};
use kvm_bindings::{kvm_regs, kvm_sregs};

/// Interrupts are taken.
pub(crate) const IF: u64 = 1 << 9;
/// String instructions go down.
pub(crate) const DF: u64 = 1 << 10;
/// Trap flag: single step.
pub(crate) const TF: u64 = 1 << 8;
/// Nested task.
pub(crate) const NT: u64 = 1 << 14;
/// Resume: no breakpoint at the next instruction.
pub(crate) const RF: u64 = 1 << 16;
/// Virtual-8086 mode.
pub(crate) const VM: u64 = 1 << 17;
/// Alignment check; suspends SMAP in ring 0.
pub(crate) const AC: u64 = 1 << 18;
/// Always set.
pub(crate) const FIXED: u64 = 1 << 1;

/// A general register's number in instructions.
pub(crate) const RAX: u8 = 0;
pub(crate) const RCX: u8 = 1;
pub(crate) const RDX: u8 = 2;
pub(crate) const RSP: u8 = 4;
pub(crate) const RBP: u8 = 5;
pub(crate) const RSI: u8 = 6;
pub(crate) const RDI: u8 = 7;
pub(crate) const R11: u8 = 11;
/// A register that is always 0: no base, no index.
pub(crate) const NONE: u8 = 16;
/// The first byte of the page that the instruction lies in.
pub(crate) const CODE_PAGE: u8 = 17;

/// See the module's text.
pub struct Cpu {
    /// By number in instructions; see [`NONE`] and [`CODE_PAGE`].
    pub(crate) gpr: [u64; 32],
    pub(crate) rip: u64,
    pub(crate) flags: u64,
    /// Segments, control registers, descriptor tables.
    pub sregs: kvm_sregs,
    /// IA32_KERNEL_GS_BASE, which SWAPGS exchanges.
    pub kernel_gs: u64,
    /// IA32_STAR, which SYSRET takes the selectors from; none until the owner has asked KVM for it.
    pub star: Option<u64>,
    pub(crate) ram: Ram,
    pub(crate) tlb: Tlb,
    pub(crate) shadow: Shadow,
    /// A store went to a page that code was decoded from.
    pub(crate) code_stale: bool,
    /// Bytes that string instructions have moved: they take time too.
    spent_bytes: u64,
    /// There are translations of the upper half that a change of CR3 ends.
    local_kernel: bool,
}

/// Where bytes of an operand are.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    linear: u64,
    at: usize,
    /// Where the rest is and how many bytes are before it, if it lies in another page.
    rest: Option<(usize, u8)>,
    watched: bool,
}

impl Cpu {
    pub(crate) fn new(ram: Ram) -> Self {
        let shadow = Shadow::new(ram.bytes() / PAGE);
        Self {
            gpr: [0; 32],
            rip: 0,
            flags: FIXED,
            sregs: kvm_sregs::default(),
            kernel_gs: 0,
            star: None,
            ram,
            tlb: Tlb::new(),
            shadow,
            code_stale: false,
            spent_bytes: 0,
            local_kernel: false,
        }
    }

    /// Takes the general registers.
    pub fn set_regs(&mut self, regs: &kvm_regs) {
        let kvm_regs { rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, .. } =
            *regs;
        let all = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15];
        self.gpr[..16].copy_from_slice(&all);
        self.rip = regs.rip;
        self.set_flags(regs.rflags);
    }

    /// Sets the flags. AC decides about accesses to user pages, which translations in the cache have been through.
    pub(crate) fn set_flags(&mut self, flags: u64) {
        if (self.flags ^ flags) & AC != 0 {
            self.tlb.flush_half(false);
        }
        self.flags = flags;
    }

    /// The general registers.
    #[must_use]
    pub fn regs(&self) -> kvm_regs {
        let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15, ..] = self.gpr;
        kvm_regs {
            rax,
            rcx,
            rdx,
            rbx,
            rsp,
            rbp,
            rsi,
            rdi,
            r8,
            r9,
            r10,
            r11,
            r12,
            r13,
            r14,
            r15,
            rip: self.rip,
            rflags: self.flags,
        }
    }

    /// Takes the special registers as somebody else has left them: if that changed what memory looks like, all
    /// translations go.
    pub fn set_sregs(&mut self, sregs: &kvm_sregs) {
        let old = &self.sregs;
        let same = (old.cr0, old.cr4, old.efer) == (sregs.cr0, sregs.cr4, sregs.efer);
        let (cr3, new_cr3) = (old.cr3, sregs.cr3);
        self.sregs = *sregs;
        if !same {
            self.tlb.flush();
        } else if cr3 != new_cr3 {
            self.flush_local();
        }
    }

    /// All of RAM.
    #[must_use]
    pub fn ram(&self) -> &Ram {
        &self.ram
    }

    /// Where in RAM a linear address is, for a load.
    pub fn locate(&mut self, linear: u64) -> Option<usize> {
        self.translate(linear, Access::Read).ok()
    }

    /// A string instruction has moved so many bytes.
    pub(crate) fn spend(&mut self, bytes: u64) {
        self.spent_bytes += bytes;
    }

    /// What that, and looking through page tables, is in instructions, about.
    pub(crate) fn spent(&self) -> u64 {
        self.spent_bytes / 64 + self.shadow.looked()
    }

    /// Ends translations that do not belong to all address spaces.
    pub(crate) fn flush_local(&mut self) {
        self.tlb.flush_half(false);
        if self.local_kernel {
            self.tlb.flush_half(true);
            self.local_kernel = false;
        }
    }

    #[inline]
    pub(crate) fn reg(&self, number: u8) -> u64 {
        self.gpr[(number & 31) as usize]
    }

    #[inline]
    pub(crate) fn set_reg(&mut self, number: u8, bytes: u8, value: u64) {
        let cell = &mut self.gpr[(number & 15) as usize];
        // Writes of 32 bits clear the upper half, narrower ones keep the rest (SDM vol. 1, 3.4.1.1).
        *cell = match bytes {
            8 => value,
            4 => value & 0xffff_ffff,
            2 => *cell & !0xffff | value & 0xffff,
            _ => *cell & !0xff | value & 0xff,
        };
    }

    /// The linear address of an instruction's memory operand.
    #[inline]
    pub(crate) fn address(&self, op: &Op) -> u64 {
        let base = self.reg(op.base).wrapping_add(op.disp as i64 as u64);
        let offset = base.wrapping_add(self.reg(op.index) << op.scale);
        offset.wrapping_add(match op.segment {
            op::FS => self.sregs.fs.base,
            op::GS => self.sregs.gs.base,
            _ => 0,
        })
    }

    /// An operand's value, zero-extended.
    #[inline]
    pub(crate) fn get(&mut self, op: &Op, operand: u8, bytes: u8) -> Result<u64, Break> {
        Ok(match operand {
            0..=15 => self.gpr[operand as usize] & mask(bytes),
            op::HIGH_BYTES..=op::LAST_HIGH_BYTE => {
                (self.gpr[(operand - op::HIGH_BYTES) as usize] >> 8) & 0xff
            }
            op::MEMORY => self.load(self.address(op), bytes)?,
            _ => op.immediate & mask(bytes),
        })
    }

    /// Writes an operand.
    #[inline]
    pub(crate) fn set(&mut self, op: &Op, operand: u8, bytes: u8, value: u64) -> Result<(), Break> {
        match operand {
            op::MEMORY => return self.store(self.address(op), bytes, value),
            op::HIGH_BYTES..=op::LAST_HIGH_BYTE => {
                let cell = &mut self.gpr[(operand - op::HIGH_BYTES) as usize];
                *cell = *cell & !0xff00 | (value & 0xff) << 8;
            }
            _ => self.set_reg(operand, bytes, value),
        }
        Ok(())
    }

    /// Replaces an operand by what `change` makes of it; memory is found writable before it is read.
    #[inline]
    pub(crate) fn modify(
        &mut self,
        op: &Op,
        operand: u8,
        bytes: u8,
        change: impl Fn(&mut Self, u64) -> u64,
    ) -> Result<(), Break> {
        if operand != op::MEMORY {
            let old = self.get(op, operand, bytes)?;
            let new = change(self, old);
            return self.set(op, operand, bytes, new);
        }
        let place = self.place(self.address(op), bytes)?;
        self.modify_place(place, bytes, op.locked, change);
        Ok(())
    }

    /// The same for bytes that were found. `change` may be asked again if somebody else has changed them.
    pub(crate) fn modify_place(
        &mut self,
        place: Place,
        bytes: u8,
        locked: bool,
        change: impl Fn(&mut Self, u64) -> u64,
    ) {
        let mut old = self.take(place, bytes);
        let flags = self.flags;
        loop {
            let new = change(self, old);
            if !locked || place.rest.is_some() {
                self.put(place, bytes, new);
                return;
            }
            match self.exchange(place, bytes, old, new) {
                Ok(()) => return,
                Err(found) => old = found,
            }
            self.flags = flags;
        }
    }

    fn exchange(&mut self, place: Place, bytes: u8, old: u64, new: u64) -> Result<(), u64> {
        if !place.watched {
            return self.ram.compare_exchange(place.at, bytes, old, new);
        }
        let entry = place.at & !7;
        let before = self.ram.load(entry, 8);
        self.ram.compare_exchange(place.at, bytes, old, new)?;
        self.note(place.linear, place.at, before);
        Ok(())
    }

    #[inline]
    pub(crate) fn load(&mut self, linear: u64, bytes: u8) -> Result<u64, Break> {
        if let Some(at) = self.tlb.find(linear, bytes as usize, Access::Read) {
            return Ok(self.ram.load(at, bytes));
        }
        self.load_slowly(linear, bytes)
    }

    #[inline(never)]
    fn load_slowly(&mut self, linear: u64, bytes: u8) -> Result<u64, Break> {
        let at = self.translate(linear, Access::Read)?;
        let here = PAGE - linear as usize % PAGE;
        if here >= bytes as usize {
            return Ok(self.ram.load(at, bytes));
        }
        let rest = self.translate(linear.wrapping_add(here as u64), Access::Read)?;
        let mut all = [0; 8];
        self.ram.read(at, &mut all[..here]);
        self.ram.read(rest, &mut all[here..bytes as usize]);
        Ok(u64::from_le_bytes(all))
    }

    #[inline]
    pub(crate) fn store(&mut self, linear: u64, bytes: u8, value: u64) -> Result<(), Break> {
        if let Some(at) = self.tlb.find(linear, bytes as usize, Access::Write) {
            self.ram.store(at, bytes, value);
            return Ok(());
        }
        let place = self.place(linear, bytes)?;
        self.put(place, bytes, value);
        Ok(())
    }

    /// Finds bytes that will be written; the page fault, if there is one, is that of a write.
    pub(crate) fn place(&mut self, linear: u64, bytes: u8) -> Result<Place, Break> {
        if let Some(at) = self.tlb.find(linear, bytes as usize, Access::Write) {
            return Ok(Place { linear, at, rest: None, watched: false });
        }
        let at = self.translate(linear, Access::Write)?;
        let here = PAGE - linear as usize % PAGE;
        let mut place = Place { linear, at, rest: None, watched: self.shadow.watches(at) };
        if here < bytes as usize {
            let rest = self.translate(linear.wrapping_add(here as u64), Access::Write)?;
            place.rest = Some((rest, here as u8));
        }
        Ok(place)
    }

    /// The bytes at a place.
    pub(crate) fn take(&self, place: Place, bytes: u8) -> u64 {
        let Some((rest, here)) = place.rest else {
            return self.ram.load(place.at, bytes);
        };
        let mut all = [0; 8];
        self.ram.read(place.at, &mut all[..here as usize]);
        self.ram.read(rest, &mut all[here as usize..bytes as usize]);
        u64::from_le_bytes(all)
    }

    /// Stores bytes at a place.
    pub(crate) fn put(&mut self, place: Place, bytes: u8, value: u64) {
        match place.rest {
            None if !place.watched => self.ram.store(place.at, bytes, value),
            None => self.put_watched(place.linear, place.at, bytes, value),
            Some((rest, here)) => {
                let value = value.to_le_bytes();
                for (index, byte) in value.into_iter().take(bytes as usize).enumerate() {
                    let at =
                        if index < here as usize { place.at + index } else { rest + index - here as usize };
                    self.put_watched(place.linear.wrapping_add(index as u64), at, 1, u64::from(byte));
                }
            }
        }
    }

    fn put_watched(&mut self, linear: u64, at: usize, bytes: u8, value: u64) {
        // Bytes across two entries of a table: one entry at a time.
        if bytes > 1 && at % 8 + bytes as usize > 8 && self.shadow.is_table(at) {
            for index in 0..bytes {
                let byte = value >> (8 * index) & 0xff;
                self.put_watched(linear.wrapping_add(u64::from(index)), at + index as usize, 1, byte);
            }
            return;
        }
        let before = self.ram.load(at & !7, 8);
        self.ram.store(at, bytes, value);
        self.note(linear, at, before);
    }

    /// A watched page was stored to; `before` are the eight bytes around as they were.
    fn note(&mut self, linear: u64, at: usize, before: u64) {
        if self.shadow.is_code(at) {
            self.code_stale = true;
        }
        if self.shadow.is_table(at) {
            let after = self.ram.load(at & !7, 8);
            let Self { ram, shadow, tlb, .. } = self;
            shadow.changed(ram, linear & !7, at & !7, (before, after), &mut |page| tlb.watch(page));
        }
    }

    /// Where in RAM an address is, with the rights of the access.
    pub(crate) fn translate(&mut self, linear: u64, access: Access) -> Result<usize, Break> {
        if let Some(at) = self.tlb.find(linear, 1, access) {
            return Ok(at);
        }
        if !is_canonical(&self.sregs, linear) {
            return Err(general_protection());
        }
        let leaf = paging::walk(&self.ram, &self.sregs, linear, access, self.flags & AC != 0)?;
        // A device's register: KVM and the device do the access.
        let at = self.ram.offset(leaf.gpa).ok_or_else(foreign)?;
        if !leaf.global && linear >> 63 == 1 {
            self.local_kernel = true;
        }
        if access != Access::Write || !self.shadow.watches(at) {
            self.tlb.keep(linear, at, access);
        }
        Ok(at)
    }
}
