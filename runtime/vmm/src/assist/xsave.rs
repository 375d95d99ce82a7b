//! XSAVE, XSAVEOPT, XSAVEC, XSAVES, XRSTOR, XRSTORS (SDM vol. 1, 13.7 to 13.13, and vol. 2).
//!
//! XSAVE and XRSTOR run at every context switch of the guest, so each reads KVM's image once and
//! moves physically contiguous bytes at once. All checks come before the first byte is written,
//! to guest memory or to the image.

use std::ops::Range;

use iced_x86::Code;
use vm_memory::GuestMemoryMmap;

use super::paging::{Access, Paging, Span};
use super::step::{Step, Stop, device_not_available, general_protection, undefined_opcode};
use super::xstate::{
    AVX, EXTENDED_START, HEADER, Image, LEGACY_BYTES, MXCSR, MXCSR_INITIAL, MXCSR_MASK, SSE, ST, X87,
    X87_CONTROL, XMM, XsaveLayout, extended, put, u32_at, u64_at,
};
use super::{CpuState, Reason};

const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;
const IA32_XSS: u32 = 0xda0;
/// XCOMP_BV[63]: the area is in the compacted format.
const COMPACTED: u64 = 1 << 63;

/// Which components a save writes, and where.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Save {
    /// XSAVE: all that are asked for, standard format.
    Plain,
    /// XSAVEOPT: those in use, standard format.
    InUse,
    /// XSAVEC and XSAVES: those in use, compacted format.
    Compacted,
}

pub(super) fn xsave(step: &mut Step<'_>) -> Result<(), Stop> {
    save(step, Save::Plain)
}

pub(super) fn xsaveopt(step: &mut Step<'_>) -> Result<(), Stop> {
    save(step, Save::InUse)
}

pub(super) fn xsavec(step: &mut Step<'_>) -> Result<(), Stop> {
    save(step, Save::Compacted)
}

/// XSAVES without supervisor components is XSAVEC, but for the optional modified optimisation.
pub(super) fn xsaves(step: &mut Step<'_>) -> Result<(), Stop> {
    check_enabled(step.cpu)?;
    check_no_supervisor(step.cpu)?;
    save(step, Save::Compacted)
}

pub(super) fn xrstor(step: &mut Step<'_>) -> Result<(), Stop> {
    restore(step, false)
}

pub(super) fn xrstors(step: &mut Step<'_>) -> Result<(), Stop> {
    check_enabled(step.cpu)?;
    check_no_supervisor(step.cpu)?;
    restore(step, true)
}

/// Exceptions every instruction of the family has, in the order of SDM vol. 2.
pub(super) fn check_enabled(cpu: &mut dyn CpuState) -> Result<(), Stop> {
    let sregs = cpu.sregs();
    if sregs.cr4 & CR4_OSXSAVE == 0 {
        return Err(undefined_opcode());
    }
    if sregs.cr0 & CR0_TS != 0 {
        return Err(device_not_available());
    }
    Ok(())
}

/// KVM's image has no supervisor components, so XSAVES and XRSTORS are done only where the guest
/// enabled none.
fn check_no_supervisor(cpu: &mut dyn CpuState) -> Result<(), Stop> {
    match cpu.msr(IA32_XSS)? {
        0 => Ok(()),
        xss => Err(Reason::Component(xss).into()),
    }
}

/// What both directions start from.
struct Request<'a> {
    paging: Paging<'a>,
    linear: u64,
    xcr0: u64,
    /// RFBM, the requested-feature bitmap: EDX:EAX & XCR0 (SDM vol. 1, 13.3).
    wanted: u64,
    /// The REX.W form: 64-bit FIP and FDP.
    wide: bool,
}

impl<'a> Request<'a> {
    fn new(step: &mut Step<'a>) -> Result<Self, Stop> {
        check_enabled(step.cpu)?;
        let linear = step.linear(0)?;
        let paging = step.paging()?;
        step.check_canonical(&paging, linear, LEGACY_BYTES)?;
        if linear % 64 != 0 {
            return Err(general_protection());
        }
        let xcr0 = step.cpu.xcr0()?;
        step.host.layout.check_known(xcr0)?;
        let regs = step.cpu.regs();
        let mask = regs.rdx << 32 | regs.rax & 0xffff_ffff;
        let wide = is_wide(step.insn.code());
        Ok(Self { paging, linear, xcr0, wanted: mask & xcr0, wide })
    }

    fn open(&self, step: &Step<'_>, len: usize, access: Access) -> Result<Span, Stop> {
        step.check_canonical(&self.paging, self.linear, len)?;
        Span::open(&self.paging, self.linear, len, access)
    }
}

fn is_wide(code: Code) -> bool {
    matches!(
        code,
        Code::Xsave64_mem
            | Code::Xsaveopt64_mem
            | Code::Xsavec64_mem
            | Code::Xsaves64_mem
            | Code::Xrstor64_mem
            | Code::Xrstors64_mem
    )
}

/// A move between the image and an area: equally many bytes at two offsets.
struct Run {
    image: usize,
    area: usize,
    len: usize,
}

/// Moves, neighbours merged: a full XSAVE is three.
#[derive(Default)]
struct Runs(Vec<Run>);

impl Runs {
    fn add(&mut self, image: Range<usize>, area: usize) {
        match self.0.last_mut() {
            Some(run) if run.image + run.len == image.start && run.area + run.len == area => {
                run.len += image.len();
            }
            _ => self.0.push(Run { image: image.start, area, len: image.len() }),
        }
    }

    /// Adds the extended components in `moved` of an area whose places are those of `format`: the
    /// XCOMP_BV of a compacted area, or none for the standard format.
    fn add_extended(&mut self, layout: &XsaveLayout, moved: u64, format: Option<u64>) {
        let mut end = EXTENDED_START;
        for index in extended(format.unwrap_or(moved)) {
            let standard = layout.standard(index);
            let place = match format {
                Some(_) => layout.compacted_after(index, end),
                None => standard.clone(),
            };
            end = place.end;
            if moved >> index & 1 == 1 {
                self.add(standard, place.start);
            }
        }
    }

    /// Bytes of the area up to the end of the last move, at least legacy region and header.
    fn area_bytes(&self) -> usize {
        let ends = self.0.iter().map(|run| run.area + run.len);
        ends.max().unwrap_or(0).max(EXTENDED_START)
    }
}

fn save(step: &mut Step<'_>, form: Save) -> Result<(), Stop> {
    let request = Request::new(step)?;
    let (host, mem, wanted) = (step.host, step.mem, request.wanted);
    let format = (form == Save::Compacted).then_some(wanted);

    // Room is asked for as if all were in use: software provides it for all it asks for.
    let mut room = Runs::default();
    room.add_extended(&host.layout, wanted, format);
    let span = request.open(step, room.area_bytes(), Access::Write)?;

    let mut image = Image::new(step.cpu.xsave()?, &host.layout)?;
    image.check_holds(wanted)?;
    let in_use = match form {
        Save::Compacted => image.in_use_with_mxcsr(),
        _ => image.in_use(),
    };
    // KVM zeroes what is not in use; do not depend on it.
    image.initialise(wanted & !image.in_use());
    let saved = if form == Save::Plain { wanted } else { wanted & in_use };
    // XSAVE and XSAVEOPT write MXCSR for AVX too, in use or not (SDM vol. 1, 13.7 and 13.9).
    let mxcsr = match form {
        Save::Compacted => saved & SSE,
        _ => wanted & (SSE | AVX),
    };

    let mut runs = Runs::default();
    for (chosen, range) in [
        (saved & X87 != 0 && request.wide, X87_CONTROL),
        (mxcsr != 0, MXCSR.start..MXCSR_MASK.end),
        (saved & X87 != 0, ST),
        (saved & SSE != 0, XMM),
    ] {
        if chosen {
            runs.add(range.clone(), range.start);
        }
    }
    runs.add_extended(&host.layout, saved, format);
    if saved & X87 != 0 && !request.wide {
        span.write(mem, X87_CONTROL.start, &image.x87_control(false))?;
    }
    for run in &runs.0 {
        span.write(mem, run.area, &image.bytes[run.image..run.image + run.len])?;
    }
    write_header(&span, mem, &request, in_use, form)
}

/// XSTATE_BV and, for the compacted format, XCOMP_BV; the rest of the header is not written.
fn write_header(
    span: &Span,
    mem: &GuestMemoryMmap<()>,
    request: &Request<'_>,
    in_use: u64,
    form: Save,
) -> Result<(), Stop> {
    let wanted = request.wanted;
    let mut header = [0; 16];
    if form == Save::Compacted {
        put(&mut header, 0, &(wanted & in_use).to_le_bytes());
        put(&mut header, 8, &(wanted | COMPACTED).to_le_bytes());
        return span.write(mem, HEADER.start, &header);
    }
    span.read(mem, HEADER.start, &mut header[..8])?;
    let kept = u64_at(&header, 0) & !wanted;
    put(&mut header, 0, &(kept | wanted & in_use).to_le_bytes());
    span.write(mem, HEADER.start, &header[..8])
}

/// What a restore does, from the area's header.
#[derive(Debug)]
struct Plan {
    /// Components loaded from the area.
    loaded: u64,
    /// XCOMP_BV of a compacted area.
    format: Option<u64>,
}

impl Plan {
    /// Checks a header (SDM vol. 1, 13.8, 13.12 and the exceptions of XRSTOR in vol. 2).
    fn new(header: &[u8; 64], request: &Request<'_>, compacted_only: bool) -> Result<Self, Stop> {
        let held = u64_at(header, 0);
        let layout = u64_at(header, 8);
        let format = layout & !COMPACTED;
        let is_zero = |range: Range<usize>| header[range].iter().all(|byte| *byte == 0);
        let valid = if layout & COMPACTED == 0 {
            !compacted_only && held & !request.xcr0 == 0 && is_zero(8..24)
        } else {
            format & !request.xcr0 == 0 && held & !format == 0 && is_zero(16..64)
        };
        if !valid {
            return Err(general_protection());
        }
        Ok(Self { loaded: held & request.wanted, format: (layout & COMPACTED != 0).then_some(format) })
    }

    /// The MXCSR to set: the area's, the initial one, or none.
    fn mxcsr(&self, wanted: u64, in_area: u32) -> Option<u32> {
        match self.format {
            // The standard form loads it whatever XSTATE_BV says (SDM vol. 1, 13.8.1).
            None => (wanted & (SSE | AVX) != 0).then_some(in_area),
            Some(_) if self.loaded & SSE != 0 => Some(in_area),
            Some(_) => (wanted & SSE != 0).then_some(MXCSR_INITIAL),
        }
    }
}

fn restore(step: &mut Step<'_>, compacted_only: bool) -> Result<(), Stop> {
    let request = Request::new(step)?;
    let (host, mem, wanted) = (step.host, step.mem, request.wanted);
    let mut span = request.open(step, EXTENDED_START, Access::Read)?;
    let mut header = [0; HEADER.end - HEADER.start];
    span.read(mem, HEADER.start, &mut header)?;
    let plan = Plan::new(&header, &request, compacted_only)?;

    let mut runs = Runs::default();
    runs.add_extended(&host.layout, plan.loaded, plan.format);
    step.check_canonical(&request.paging, request.linear, runs.area_bytes())?;
    span.extend(&request.paging, runs.area_bytes())?;
    // Read once, so that what is checked is what is loaded.
    let mut legacy = [0; XMM.end];
    span.read(mem, 0, &mut legacy)?;
    let mxcsr = plan.mxcsr(wanted, u32_at(&legacy, MXCSR.start));

    let mut image = Image::new(step.cpu.xsave()?, &host.layout)?;
    image.check_holds(wanted)?;
    if mxcsr.is_some_and(|value| value & !image.mxcsr_mask() != 0) {
        return Err(general_protection());
    }
    for run in &runs.0 {
        span.read(mem, run.area, &mut image.bytes[run.image..run.image + run.len])?;
    }
    image.initialise(wanted & !plan.loaded);
    if plan.loaded & X87 != 0 {
        image.load_x87(&legacy, request.wide);
    }
    if plan.loaded & SSE != 0 {
        image.bytes[XMM].copy_from_slice(&legacy[XMM]);
    }
    let in_use = image.in_use() & !wanted | plan.loaded;
    image.set_in_use(in_use);
    if let Some(value) = mxcsr {
        image.set_mxcsr(value);
    }
    step.cpu.commit_xsave()?;
    Ok(())
}
