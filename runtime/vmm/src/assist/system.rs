//! Instructions of the system: traps, SMAP, FS and GS base, XCR0, and those that do nothing here.

use super::Exception;
use super::paging::Access;
use super::step::{Step, Stop, general_protection, undefined_opcode};
use super::xstate::Image;

const RFLAGS_AC: u64 = 1 << 18;
const CR4_FSGSBASE: u64 = 1 << 16;
const CR4_OSXSAVE: u64 = 1 << 18;
const CR4_PKE: u64 = 1 << 22;
const IA32_TIME_STAMP_COUNTER: u32 = 0x10;
const IA32_TSC_AUX: u32 = 0xc000_0103;
const VECTOR_BP: u8 = 3;

/// INT3 is a trap: it completes, so the handler sees RIP after it (SDM vol. 3, 6.15).
pub(super) fn int3(step: &mut Step<'_>) -> Result<(), Stop> {
    step.cpu.inject(Exception { vector: VECTOR_BP, error_code: None, cr2: None });
    Ok(())
}

/// UD0, UD1, UD2: kernels raise WARN and BUG with them.
pub(super) fn undefined(_: &mut Step<'_>) -> Result<(), Stop> {
    Err(undefined_opcode())
}

pub(super) fn clac(step: &mut Step<'_>) -> Result<(), Stop> {
    step.set_flags(RFLAGS_AC, 0);
    Ok(())
}

pub(super) fn stac(step: &mut Step<'_>) -> Result<(), Stop> {
    step.set_flags(RFLAGS_AC, RFLAGS_AC);
    Ok(())
}

/// Fences, hints and landing pads. An exit from the guest orders more than any fence.
pub(super) fn nothing(_: &mut Step<'_>) -> Result<(), Stop> {
    Ok(())
}

/// Cache line flushes: guest RAM is coherent, so only the translation's faults are left.
pub(super) fn flush(step: &mut Step<'_>) -> Result<(), Stop> {
    step.span(0, 1, Access::Read).map(drop)
}

pub(super) fn rdpid(step: &mut Step<'_>) -> Result<(), Stop> {
    let value = step.cpu.msr(IA32_TSC_AUX)?;
    step.set_reg(step.insn.op0_register(), value & 0xffff_ffff);
    Ok(())
}

/// RDTSCP is not #UD or #GP in ring 0 whatever CR4.TSD says (SDM vol. 2).
pub(super) fn rdtscp(step: &mut Step<'_>) -> Result<(), Stop> {
    let now = step.cpu.msr(IA32_TIME_STAMP_COUNTER)?;
    let aux = step.cpu.msr(IA32_TSC_AUX)?;
    let regs = step.cpu.regs_mut();
    regs.rax = now & 0xffff_ffff;
    regs.rdx = now >> 32;
    regs.rcx = aux & 0xffff_ffff;
    Ok(())
}

pub(super) fn rdpkru(step: &mut Step<'_>) -> Result<(), Stop> {
    check_pkru(step, step.cpu.regs().rcx)?;
    let value = Image::new(step.cpu.xsave()?, &step.host.layout)?.pkru();
    let regs = step.cpu.regs_mut();
    regs.rax = u64::from(value);
    regs.rdx = 0;
    Ok(())
}

pub(super) fn wrpkru(step: &mut Step<'_>) -> Result<(), Stop> {
    let regs = step.cpu.regs();
    check_pkru(step, regs.rcx | regs.rdx)?;
    let value = regs.rax as u32;
    Image::new(step.cpu.xsave()?, &step.host.layout)?.set_pkru(value)?;
    step.cpu.commit_xsave()?;
    Ok(())
}

/// #UD without CR4.PKE; #GP if the registers that must be 0 are not, 32 bits of each (SDM vol. 2).
fn check_pkru(step: &Step<'_>, zero: u64) -> Result<(), Stop> {
    if step.cpu.sregs().cr4 & CR4_PKE == 0 {
        return Err(undefined_opcode());
    }
    if zero as u32 == 0 { Ok(()) } else { Err(general_protection()) }
}

/// XGETBV: XCR0, or with ECX = 1 the components in use (SDM vol. 1, 13.3).
pub(super) fn xgetbv(step: &mut Step<'_>) -> Result<(), Stop> {
    if step.cpu.sregs().cr4 & CR4_OSXSAVE == 0 {
        return Err(undefined_opcode());
    }
    let index = step.cpu.regs().rcx as u32;
    let mut value = step.cpu.xcr0()?;
    match index {
        0 => {}
        1 => value &= Image::new(step.cpu.xsave()?, &step.host.layout)?.in_use_with_mxcsr(),
        _ => return Err(general_protection()),
    }
    let regs = step.cpu.regs_mut();
    regs.rax = value & 0xffff_ffff;
    regs.rdx = value >> 32;
    Ok(())
}

pub(super) fn rdfsbase(step: &mut Step<'_>) -> Result<(), Stop> {
    check_fsgsbase(step)?;
    let base = step.cpu.sregs().fs.base;
    step.set_operand(0, base)
}

pub(super) fn rdgsbase(step: &mut Step<'_>) -> Result<(), Stop> {
    check_fsgsbase(step)?;
    let base = step.cpu.sregs().gs.base;
    step.set_operand(0, base)
}

pub(super) fn wrfsbase(step: &mut Step<'_>) -> Result<(), Stop> {
    let base = new_base(step)?;
    step.cpu.sregs_mut().fs.base = base;
    Ok(())
}

pub(super) fn wrgsbase(step: &mut Step<'_>) -> Result<(), Stop> {
    let base = new_base(step)?;
    step.cpu.sregs_mut().gs.base = base;
    Ok(())
}

fn new_base(step: &mut Step<'_>) -> Result<u64, Stop> {
    check_fsgsbase(step)?;
    let base = step.operand(0)?;
    if step.paging()?.is_canonical(base, 1) { Ok(base) } else { Err(general_protection()) }
}

fn check_fsgsbase(step: &Step<'_>) -> Result<(), Stop> {
    match step.cpu.sregs().cr4 & CR4_FSGSBASE {
        0 => Err(undefined_opcode()),
        _ => Ok(()),
    }
}
