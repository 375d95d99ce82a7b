//! Privileged instructions, exceptions, the way back to ring 3.

use crate::alu::ARITHMETIC;
use crate::cpu::{AC, Cpu, FIXED, IF, NT, R11, RAX, RCX, RDX, RF, RSP, TF, VM};
use crate::op::Op;
use crate::paging::is_canonical;
use crate::ram::Ram;
use crate::stop::{Break, Exec, Flow, Stop, Trap, foreign, general_protection, undefined_opcode};
use kvm_bindings::kvm_segment;

const FS_BASE: u32 = 0xc000_0100;
const GS_BASE: u32 = 0xc000_0101;
const KERNEL_GS_BASE: u32 = 0xc000_0102;
const STAR: u32 = 0xc000_0081;

const DOUBLE_FAULT: u8 = 8;
const CR4_PGE: u64 = 1 << 7;
/// In what is written to CR3: translations stay (with PCIDs).
const CR3_KEEP: u64 = 1 << 63;
/// The highest value that it can have.
const CR3_MOST: u64 = (1 << 52) - 1;

/// What POPF and IRET may change in ring 0 (SDM vol. 2, POPF), VIF and VIP left alone.
const RESTORABLE: u64 = ARITHMETIC | TF | IF | crate::cpu::DF | (3 << 12) | NT | AC | (1 << 21);

/// Nothing: NOP, PAUSE, ENDBR64, prefetches.
pub(crate) fn nothing(_: &mut Cpu, _: &Op) -> Exec {
    Ok(Flow::Next)
}

/// MFENCE and its like.
pub(crate) fn fence(_: &mut Cpu, _: &Op) -> Exec {
    std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    Ok(Flow::Next)
}

/// OUT to the port at which a trap from ring 3 is announced, which the engine need not be told; or of EAX to DX:
/// the bulk-memory doorbell, or somebody's device.
pub(crate) fn out(cpu: &mut Cpu, op: &Op) -> Exec {
    if op.kind == 1 {
        return Ok(Flow::Next);
    }
    if cpu.reg(RDX) as u16 != crate::BULK_PORT || op.bytes != 4 {
        return Err(foreign());
    }
    super::string::doorbell(cpu, op)
}

/// CLI, or STI if the kind is 1.
pub(crate) fn interrupts(cpu: &mut Cpu, op: &Op) -> Exec {
    if op.kind == 1 {
        cpu.flags |= IF
    } else {
        cpu.flags &= !IF
    }
    Ok(Flow::Next)
}

/// HLT, and an STI with a HLT behind it: KVM does both, so that no interrupt comes between them unseen.
pub(crate) fn halt(_: &mut Cpu, _: &Op) -> Exec {
    Err(Break::Stop(Stop::Halt))
}

/// CLAC, or STAC if the kind is 1.
pub(crate) fn user_access(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.set_flags(if op.kind == 1 { cpu.flags | AC } else { cpu.flags & !AC });
    Ok(Flow::Next)
}

/// PUSHF.
pub(crate) fn push_flags(cpu: &mut Cpu, _: &Op) -> Exec {
    cpu.push(cpu.flags & !(RF | VM))?;
    Ok(Flow::Next)
}

/// POPF.
pub(crate) fn pop_flags(cpu: &mut Cpu, _: &Op) -> Exec {
    let stack = cpu.reg(RSP);
    let value = cpu.load(stack, 8)?;
    if value & TF != 0 {
        return Err(foreign());
    }
    cpu.gpr[RSP as usize] = stack.wrapping_add(8);
    cpu.set_flags((cpu.flags & !(RESTORABLE | RF)) | (value & RESTORABLE) | FIXED);
    Ok(Flow::Next)
}

/// RDTSC.
pub(crate) fn read_tsc(cpu: &mut Cpu, _: &Op) -> Exec {
    let now = Ram::tsc();
    cpu.set_reg(RAX, 4, now);
    cpu.set_reg(RDX, 4, now >> 32);
    Ok(Flow::Next)
}

/// RDMSR: bases of segments. Others are KVM's.
pub(crate) fn read_msr(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = match cpu.reg(RCX) as u32 {
        FS_BASE => cpu.sregs.fs.base,
        GS_BASE => cpu.sregs.gs.base,
        KERNEL_GS_BASE => cpu.kernel_gs,
        _ => return Err(foreign()),
    };
    cpu.set_reg(RAX, 4, value);
    cpu.set_reg(RDX, 4, value >> 32);
    Ok(Flow::Next)
}

/// WRMSR, likewise.
pub(crate) fn write_msr(cpu: &mut Cpu, _: &Op) -> Exec {
    let value = (cpu.reg(RDX) << 32) | (cpu.reg(RAX) & 0xffff_ffff);
    let which = cpu.reg(RCX) as u32;
    if which == STAR {
        cpu.star = None;
    }
    if !is_canonical(&cpu.sregs, value) {
        return Err(foreign());
    }
    match which {
        FS_BASE => cpu.sregs.fs.base = value,
        GS_BASE => cpu.sregs.gs.base = value,
        KERNEL_GS_BASE => cpu.kernel_gs = value,
        _ => return Err(foreign()),
    }
    Ok(Flow::Next)
}

/// RDFSBASE, RDGSBASE, WRFSBASE, WRGSBASE, by kind 0 to 3.
pub(crate) fn segment_base(cpu: &mut Cpu, op: &Op) -> Exec {
    const CR4_FSGSBASE: u64 = 1 << 16;
    if cpu.sregs.cr4 & CR4_FSGSBASE == 0 {
        return Err(undefined_opcode());
    }
    let value = cpu.reg(op.to) & crate::alu::mask(op.bytes);
    if op.kind >= 2 && !is_canonical(&cpu.sregs, value) {
        return Err(general_protection());
    }
    match op.kind {
        0 => cpu.set_reg(op.to, op.bytes, cpu.sregs.fs.base),
        1 => cpu.set_reg(op.to, op.bytes, cpu.sregs.gs.base),
        2 => cpu.sregs.fs.base = value,
        _ => cpu.sregs.gs.base = value,
    }
    Ok(Flow::Next)
}

/// SWAPGS.
pub(crate) fn swap_gs(cpu: &mut Cpu, _: &Op) -> Exec {
    std::mem::swap(&mut cpu.sregs.gs.base, &mut cpu.kernel_gs);
    Ok(Flow::Next)
}

/// MOV from a control register, or to one if bit 7 of the kind is set. CR0, CR8 and most of CR4 are KVM's to write.
pub(crate) fn control_register(cpu: &mut Cpu, op: &Op) -> Exec {
    let register = op.kind & 0x7f;
    if op.kind & 0x80 == 0 {
        let value = match register {
            0 => cpu.sregs.cr0,
            2 => cpu.sregs.cr2,
            3 => cpu.sregs.cr3,
            4 => cpu.sregs.cr4,
            _ => return Err(foreign()),
        };
        cpu.set_reg(op.to, 8, value);
        return Ok(Flow::Next);
    }
    let value = cpu.reg(op.to);
    match register {
        2 => cpu.sregs.cr2 = value,
        // Bits that no address has: KVM would refuse the state.
        3 if value & !CR3_KEEP <= CR3_MOST => {
            cpu.sregs.cr3 = value & !CR3_KEEP;
            cpu.flush_local();
        }
        // Turning PGE off and on again is how a kernel ends all translations.
        4 if cpu.sregs.cr4 ^ value == CR4_PGE => {
            cpu.sregs.cr4 = value;
            cpu.tlb.flush();
        }
        _ => return Err(foreign()),
    }
    Ok(Flow::Next)
}

/// INVLPG: of large pages there are many translations, so those of the address's half all go.
pub(crate) fn invalidate_page(cpu: &mut Cpu, op: &Op) -> Exec {
    let linear = cpu.address(op);
    cpu.tlb.flush_half(linear >> 63 == 1);
    Ok(Flow::Next)
}

/// MOV from a segment register: ES, CS, SS, DS, FS, GS by kind 0 to 5.
pub(crate) fn read_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let sregs = &cpu.sregs;
    let segment = match op.kind {
        0 => &sregs.es,
        1 => &sregs.cs,
        2 => &sregs.ss,
        3 => &sregs.ds,
        4 => &sregs.fs,
        _ => &sregs.gs,
    };
    let selector = u64::from(segment.selector);
    let bytes = if op.to == crate::op::MEMORY { 2 } else { op.bytes };
    cpu.set(op, op.to, bytes, selector)?;
    Ok(Flow::Next)
}

/// MOV to SS. KVM would hold interrupts off for one instruction after it, by emulating that too: here the engine does it,
/// and looks at no interrupt in between.
pub(crate) fn write_stack_segment(cpu: &mut Cpu, op: &Op) -> Exec {
    let selector = cpu.get(op, op.from, 2)? as u16;
    cpu.sregs.ss = if selector == 0 {
        null_segment(selector)
    } else {
        let segment = cpu.descriptor(selector, false)?;
        if segment.dpl != 0 || selector & 3 != 0 || segment.type_ & 2 == 0 {
            return Err(foreign());
        }
        segment
    };
    Ok(Flow::Next)
}

/// INT3: a trap, so it returns behind itself.
pub(crate) fn breakpoint(cpu: &mut Cpu, op: &Op) -> Exec {
    cpu.rip = op.next(cpu);
    match cpu.deliver(Trap { vector: 3, code: None, linear: 0 }) {
        Ok(()) => Ok(Flow::Jump),
        Err(stop) => Err(Break::Stop(stop)),
    }
}

/// UD2.
pub(crate) fn undefined(_: &mut Cpu, _: &Op) -> Exec {
    Err(undefined_opcode())
}

/// IRETQ.
pub(crate) fn interrupt_return(cpu: &mut Cpu, _: &Op) -> Exec {
    if cpu.flags & NT != 0 {
        return Err(general_protection());
    }
    let stack = cpu.reg(RSP);
    let mut words = [0; 5];
    for (at, word) in (0..).zip(&mut words) {
        *word = cpu.load(stack.wrapping_add(8 * at), 8)?;
    }
    let [rip, cs, flags, rsp, ss] = words;
    let (cs, ss) = (cs as u16, ss as u16);
    if flags & (VM | TF) != 0 && cs & 3 == 0 {
        return Err(foreign());
    }
    if cs & 3 != 0 && cs & 3 != 3 {
        return Err(foreign());
    }
    let outer = cs & 3 == 3;
    let new_cs = cpu.descriptor(cs, true)?;
    if new_cs.l == 0 || new_cs.dpl != (cs & 3) as u8 {
        // 32-bit programs and the like: KVM has the last word.
        return Err(foreign());
    }
    let new_ss = if outer || ss != 0 { cpu.descriptor(ss, false)? } else { null_segment(ss) };
    if new_ss.unusable == 0 && (new_ss.dpl != new_cs.dpl || ss & 3 != cs & 3 || new_ss.type_ & 2 == 0) {
        return Err(foreign());
    }
    if !is_canonical(&cpu.sregs, rip) {
        return Err(general_protection());
    }
    cpu.rip = rip;
    cpu.gpr[RSP as usize] = rsp;
    cpu.set_flags((flags & (RESTORABLE | RF)) | FIXED);
    cpu.sregs.cs = new_cs;
    cpu.sregs.ss = new_ss;
    if outer {
        cpu.leave_ring0();
        return Ok(Flow::Leave(Stop::Ring3));
    }
    Ok(Flow::Jump)
}

/// SYSRETQ.
pub(crate) fn system_return(cpu: &mut Cpu, _: &Op) -> Exec {
    let Some(star) = cpu.star else {
        return Err(foreign());
    };
    let rip = cpu.reg(RCX);
    if !is_canonical(&cpu.sregs, rip) {
        return Err(general_protection());
    }
    let base = (star >> 48) as u16;
    cpu.rip = rip;
    cpu.set_flags((cpu.reg(R11) & 0x003c_7fd7) | FIXED);
    // Flat segments whatever the descriptor tables say (SDM vol. 2, SYSRET).
    let flat = kvm_segment { limit: 0xffff_ffff, present: 1, dpl: 3, s: 1, g: 1, ..Default::default() };
    cpu.sregs.cs = kvm_segment { selector: base.wrapping_add(16) | 3, type_: 0xb, l: 1, ..flat };
    cpu.sregs.ss = kvm_segment { selector: base.wrapping_add(8) | 3, type_: 3, db: 1, ..flat };
    Ok(Flow::Leave(Stop::Ring3))
}

fn null_segment(selector: u16) -> kvm_segment {
    kvm_segment { selector, unusable: 1, ..Default::default() }
}

impl Cpu {
    /// A return to an outer ring takes away data segments that are not its (SDM vol. 2, IRET): of a kernel's flat ones
    /// nothing but a zero selector is left.
    fn leave_ring0(&mut self) {
        let sregs = &mut self.sregs;
        for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs] {
            if segment.unusable == 0 && segment.selector != 0 && segment.dpl < 3 && segment.type_ & 0xc != 0xc
            {
                let base = segment.base;
                *segment = kvm_segment { base, ..null_segment(0) };
            }
        }
    }

    /// A code or data segment of the GDT or LDT.
    fn descriptor(&mut self, selector: u16, code: bool) -> Result<kvm_segment, Break> {
        let index = u64::from(selector & !7);
        let (base, limit) = if selector & 4 == 0 {
            (self.sregs.gdt.base, u64::from(self.sregs.gdt.limit))
        } else {
            // Local descriptor tables are rare enough for KVM.
            return Err(foreign());
        };
        if selector & !3 == 0 || index + 7 > limit {
            return Err(Break::Trap(Trap { vector: 13, code: Some(u32::from(selector & !3)), linear: 0 }));
        }
        let raw = self.load(base.wrapping_add(index), 8)?;
        let bit = |at: u32| (raw >> at & 1) as u8;
        let segment = kvm_segment {
            base: (raw >> 16 & 0xff_ffff) | (raw >> 32 & 0xff00_0000),
            limit: expand_limit(raw),
            selector,
            type_: (raw >> 40 & 15) as u8 | 1,
            present: bit(47),
            dpl: (raw >> 45 & 3) as u8,
            db: bit(54),
            s: bit(44),
            l: bit(53),
            g: bit(55),
            avl: bit(52),
            ..Default::default()
        };
        if segment.s == 0 || segment.present == 0 || (segment.type_ & 8 != 0) != code {
            return Err(foreign());
        }
        Ok(segment)
    }

    /// Takes an exception: the handler of the IDT goes on (SDM vol. 3, 6.14). Another one on the way there takes its
    /// place, or makes it a double fault; one on the way to that handler ends the guest.
    pub(crate) fn deliver(&mut self, mut trap: Trap) -> Result<(), Stop> {
        loop {
            if trap.vector == 14 {
                self.sregs.cr2 = trap.linear;
            }
            match self.enter_handler(trap) {
                Ok(()) => return Ok(()),
                Err(Break::Trap(second)) if trap.vector != DOUBLE_FAULT => {
                    if second.vector == 14 {
                        self.sregs.cr2 = second.linear;
                    }
                    let double = Trap { vector: DOUBLE_FAULT, code: Some(0), linear: 0 };
                    trap = if makes_double_fault(trap.vector, second.vector) { double } else { second };
                }
                Err(_) => return Err(Stop::TripleFault),
            }
        }
    }

    fn enter_handler(&mut self, trap: Trap) -> Result<(), Break> {
        let at = u64::from(trap.vector) * 16;
        if at + 15 > u64::from(self.sregs.idt.limit) {
            return Err(general_protection());
        }
        let low = self.load(self.sregs.idt.base.wrapping_add(at), 8)?;
        let high = self.load(self.sregs.idt.base.wrapping_add(at + 8), 8)?;
        let (kind, present) = (low >> 40 & 15, low >> 47 & 1 == 1);
        let selector = (low >> 16) as u16;
        if !present || !matches!(kind, 14 | 15) {
            return Err(general_protection());
        }
        let handler = (low & 0xffff) | (low >> 32 & 0xffff_0000) | (high << 32);
        let cs = self.descriptor(selector & !3, true)?;
        if cs.l == 0 || cs.db == 1 || cs.dpl != 0 {
            // Gates of other rings and of 32-bit code.
            return Err(Break::Trap(Trap { vector: 13, code: Some(u32::from(selector & !3)), linear: 0 }));
        }
        let stack = match low >> 32 & 7 {
            0 => self.reg(RSP),
            // The task state segment's interrupt stacks (SDM vol. 3, 7.7).
            ist => self.load(self.sregs.tr.base.wrapping_add(0x24 + 8 * (ist - 1)), 8)?,
        };
        let (old_cs, old_ss) = (self.sregs.cs.selector, self.sregs.ss.selector);
        let frame = [u64::from(old_ss), self.reg(RSP), self.flags, u64::from(old_cs), self.rip];
        let mut top = stack & !15;
        let code = trap.code.map(u64::from);
        // RF is set in what faults leave, so that a breakpoint does not come again; traps leave it.
        let faulted = if trap.vector == 3 { 0 } else { RF };
        for (index, word) in frame.into_iter().chain(code).enumerate() {
            top = top.wrapping_sub(8);
            self.store(top, 8, if index == 2 { word | faulted } else { word })?;
        }
        self.gpr[RSP as usize] = top;
        self.sregs.cs = cs;
        self.flags &= !(TF | NT | RF | VM);
        if kind == 14 {
            self.flags &= !IF;
        }
        self.rip = handler;
        Ok(())
    }
}

/// Whether two exceptions, the second on the way to the handler of the first, are a double fault (SDM vol. 3, 6.15).
fn makes_double_fault(first: u8, second: u8) -> bool {
    let contributory = |vector| matches!(vector, 0 | 10..=13);
    match first {
        14 => contributory(second) || second == 14,
        _ => contributory(first) && contributory(second),
    }
}

fn expand_limit(raw: u64) -> u32 {
    let limit = (raw & 0xffff) as u32 | (raw >> 32 & 0xf_0000) as u32;
    if raw >> 55 & 1 == 1 { limit << 12 | 0xfff } else { limit }
}
