//! FXSAVE, FXRSTOR, LDMXCSR, STMXCSR and WAIT: the older instructions on the same state.

use iced_x86::Code;

use super::Exception;
use super::paging::Access;
use super::step::{Step, Stop, device_not_available, general_protection, undefined_opcode};
use super::xstate::{Image, LEGACY_BYTES, MXCSR, MXCSR_MASK, SSE, X87, X87_CONTROL, XMM, u32_at};

const CR0_MP: u64 = 1 << 1;
const CR0_EM: u64 = 1 << 2;
const CR0_TS: u64 = 1 << 3;
const CR4_OSFXSR: u64 = 1 << 9;
const VECTOR_MF: u8 = 16;

/// FXSAVE with CR4.OSFXSR set, as every 64-bit kernel has it: XMM and MXCSR are saved too
/// (SDM vol. 2, FXSAVE). Bytes 416 to 511 are not written.
pub(super) fn fxsave(step: &mut Step<'_>) -> Result<(), Stop> {
    let span = open(step, Access::Write)?;
    let wide = step.insn.code() == Code::Fxsave64_m512byte;
    let mut image = Image::new(step.cpu.xsave()?, &step.host.layout)?;
    let in_use = image.in_use();
    image.initialise((X87 | SSE) & !in_use);
    let mut area = [0; XMM.end];
    area[X87_CONTROL].copy_from_slice(&image.x87_control(wide));
    area[MXCSR.start..].copy_from_slice(&image.bytes[MXCSR.start..XMM.end]);
    area[MXCSR_MASK].copy_from_slice(&image.mxcsr_mask().to_le_bytes());
    span.write(step.mem, 0, &area)
}

pub(super) fn fxrstor(step: &mut Step<'_>) -> Result<(), Stop> {
    let span = open(step, Access::Read)?;
    let wide = step.insn.code() == Code::Fxrstor64_m512byte;
    let mut area = [0; XMM.end];
    span.read(step.mem, 0, &mut area)?;
    let mxcsr = u32_at(&area, MXCSR.start);
    let mut image = Image::new(step.cpu.xsave()?, &step.host.layout)?;
    if mxcsr & !image.mxcsr_mask() != 0 {
        return Err(general_protection());
    }
    image.load_x87(&area, wide);
    image.bytes[XMM].copy_from_slice(&area[XMM]);
    let in_use = image.in_use();
    image.set_in_use(in_use | X87 | SSE);
    image.set_mxcsr(mxcsr);
    step.cpu.commit_xsave()?;
    Ok(())
}

fn open(step: &mut Step<'_>, access: Access) -> Result<super::paging::Span, Stop> {
    if step.cpu.sregs().cr0 & (CR0_EM | CR0_TS) != 0 {
        return Err(device_not_available());
    }
    if step.linear(0)? % 16 != 0 {
        return Err(general_protection());
    }
    step.span(0, LEGACY_BYTES, access)
}

pub(super) fn ldmxcsr(step: &mut Step<'_>) -> Result<(), Stop> {
    check_sse(step)?;
    let value = step.operand(0)? as u32;
    let mut image = Image::new(step.cpu.xsave()?, &step.host.layout)?;
    if value & !image.mxcsr_mask() != 0 {
        return Err(general_protection());
    }
    // From here on SSE counts as in use (set_mxcsr); its registers must then hold what they held.
    let in_use = image.in_use();
    image.initialise(SSE & !in_use);
    image.set_mxcsr(value);
    step.cpu.commit_xsave()?;
    Ok(())
}

pub(super) fn stmxcsr(step: &mut Step<'_>) -> Result<(), Stop> {
    check_sse(step)?;
    let value = Image::new(step.cpu.xsave()?, &step.host.layout)?.mxcsr();
    step.set_operand(0, u64::from(value))
}

/// SDM vol. 3, table 13-1 (the control bits that gate SSE instructions).
fn check_sse(step: &Step<'_>) -> Result<(), Stop> {
    let sregs = step.cpu.sregs();
    if sregs.cr0 & CR0_EM != 0 || sregs.cr4 & CR4_OSFXSR == 0 {
        return Err(undefined_opcode());
    }
    if sregs.cr0 & CR0_TS != 0 {
        return Err(device_not_available());
    }
    Ok(())
}

/// WAIT (FWAIT): a pending unmasked x87 exception is taken here as #MF. CR0.NE is taken as set; no
/// 64-bit kernel uses the external interrupt of the 387.
pub(super) fn wait(step: &mut Step<'_>) -> Result<(), Stop> {
    if step.cpu.sregs().cr0 & (CR0_MP | CR0_TS) == CR0_MP | CR0_TS {
        return Err(device_not_available());
    }
    let image = Image::new(step.cpu.xsave()?, &step.host.layout)?;
    if image.in_use() & X87 != 0 && image.x87_exception_pending() {
        let exception = Exception { vector: VECTOR_MF, error_code: None, cr2: None };
        return Err(Stop::Fault(exception));
    }
    Ok(())
}
