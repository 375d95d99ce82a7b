//! The XSAVE and FXSAVE families, compared with the processor this runs on.

use proptest::prelude::*;

use super::super::xstate::extended;
use super::native::{AREA_BYTES, Area, SAFE};
use super::*;

pub(super) const XSAVE: &[u8] = &[0x0f, 0xae, 0x26];
pub(super) const XSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x26];
pub(super) const XSAVEOPT64: &[u8] = &[0x48, 0x0f, 0xae, 0x36];
pub(super) const XSAVEC64: &[u8] = &[0x48, 0x0f, 0xc7, 0x26];
pub(super) const XSAVES64: &[u8] = &[0x48, 0x0f, 0xc7, 0x2e];
pub(super) const XRSTOR: &[u8] = &[0x0f, 0xae, 0x2e];
pub(super) const XRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x2e];
pub(super) const XRSTORS64: &[u8] = &[0x48, 0x0f, 0xc7, 0x1e];
pub(super) const FXSAVE: &[u8] = &[0x0f, 0xae, 0x06];
pub(super) const FXSAVE64: &[u8] = &[0x48, 0x0f, 0xae, 0x06];
pub(super) const FXRSTOR: &[u8] = &[0x0f, 0xae, 0x0e];
pub(super) const FXRSTOR64: &[u8] = &[0x48, 0x0f, 0xae, 0x0e];
pub(super) const LDMXCSR: &[u8] = &[0x0f, 0xae, 0x16];
pub(super) const STMXCSR: &[u8] = &[0x0f, 0xae, 0x1e];

/// Bytes that a seed decides (xorshift64*): large areas without large test cases.
pub(super) fn noise(seed: u64) -> Area {
    let mut area = Area([0; AREA_BYTES]);
    let mut state = seed | 1;
    for chunk in area.0.chunks_exact_mut(8) {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        chunk.copy_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    area
}

pub(super) fn put(area: &mut Area, at: usize, value: u64) {
    area.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

fn mxcsr_mask() -> u32 {
    let image = native::initial_image();
    u32::from_le_bytes(image[28..32].try_into().unwrap())
}

fn set_mxcsr(area: &mut Area, value: u32) {
    area.0[24..28].copy_from_slice(&value.to_le_bytes());
}

/// A valid area in the standard format.
pub(super) fn standard(seed: u64, components: u64, initial_mxcsr: bool) -> Area {
    let mut area = noise(seed);
    area.0[512..576].fill(0);
    put(&mut area, 512, components & SAFE & native::xcr0());
    // FIP and FDP: processors make what is loaded canonical, each for its own address width.
    for at in [8, 16] {
        let pointer = seed.rotate_left(at as u32) as i64 >> 17;
        put(&mut area, at, pointer as u64);
    }
    let mxcsr = if initial_mxcsr { 0x1f80 } else { seed as u32 & mxcsr_mask() };
    set_mxcsr(&mut area, mxcsr);
    area
}

/// A valid area in the compacted format.
pub(super) fn compacted(seed: u64, format: u64, components: u64, initial_mxcsr: bool) -> Area {
    let mut area = standard(seed, components & format, initial_mxcsr);
    put(&mut area, 520, format & SAFE & native::xcr0() | 1 << 63);
    area
}

fn any_standard() -> impl Strategy<Value = Area> {
    (any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(s, c, m)| standard(s, c, m))
}

fn any_compacted() -> impl Strategy<Value = Area> {
    (any::<u64>(), any::<u64>(), any::<u64>(), any::<bool>()).prop_map(|(s, f, c, m)| compacted(s, f, c, m))
}

/// Valid areas, and ones with a bit of the header or MXCSR flipped or set.
fn any_source() -> impl Strategy<Value = Area> {
    let valid = || prop_oneof![any_standard(), any_compacted()];
    let flip = (valid(), 512usize..576, 0u8..8).prop_map(|(mut area, at, bit)| {
        area.0[at] ^= 1 << bit;
        area
    });
    let low_flip = (valid(), 512usize..528, 0u8..8).prop_map(|(mut area, at, bit)| {
        area.0[at] ^= 1 << bit;
        area
    });
    let mxcsr = (valid(), any::<u32>()).prop_map(|(mut area, value)| {
        set_mxcsr(&mut area, value);
        area
    });
    prop_oneof![4 => valid(), 2 => flip, 2 => low_flip, 1 => mxcsr]
}

/// EDX:EAX: components that are safe to load, and bits XCR0 does not have.
fn any_mask() -> impl Strategy<Value = u64> {
    prop_oneof![any::<u64>().prop_map(|mask| mask & (SAFE | !native::xcr0())), Just(SAFE),]
}

/// A machine whose vCPU has the state the processor makes of `load`.
pub(super) fn machine(load: &Area, mask: u64) -> Machine {
    let mut m = Machine::new();
    m.cpu.image = native::state_after(load).0.to_vec();
    m.cpu.regs.rsi = DATA;
    m.cpu.regs.rax = 0xdead_0000_0000_0000 | mask & 0xffff_ffff;
    m.cpu.regs.rdx = 0xdead_0000_0000_0000 | mask >> 32;
    m
}

pub(super) fn same_bytes(ours: &[u8], theirs: &[u8], what: &str) -> Result<(), String> {
    let Some(at) = ours.iter().zip(theirs).position(|(a, b)| a != b) else {
        return Ok(());
    };
    let end = (at + 16).min(ours.len()).min(theirs.len());
    let (ours, theirs) = (&ours[at..end], &theirs[at..end]);
    Err(format!("{what} at byte {at}: {ours:02x?}, the processor {theirs:02x?}"))
}

/// Name, bytes, the instruction itself.
type Save = (&'static str, &'static [u8], fn(&Area, &mut Area, u64));
type Restore = (&'static str, &'static [u8], fn(&Area, &Area, u64) -> Option<Area>);

const SAVES: &[Save] = &[
    ("xsave", XSAVE, native::xsave),
    ("xsave64", XSAVE64, native::xsave64),
    ("xsaveopt64", XSAVEOPT64, native::xsaveopt64),
    ("xsavec64", XSAVEC64, native::xsavec64),
    ("fxsave", FXSAVE, native::fxsave),
    ("fxsave64", FXSAVE64, native::fxsave64),
];

const RESTORES: &[Restore] = &[
    ("xrstor", XRSTOR, native::xrstor),
    ("xrstor64", XRSTOR64, native::xrstor64),
    ("fxrstor", FXRSTOR, native::fxrstor),
    ("fxrstor64", FXRSTOR64, native::fxrstor64),
];

/// KVM wants SSE marked as in use if MXCSR is; the processor's XSAVE does not count MXCSR.
fn count_mxcsr(image: &mut [u8]) {
    if image[24..28] != 0x1f80u32.to_le_bytes() {
        image[512] |= 2;
    }
}

/// Compares two images of the state, component by component.
pub(super) fn same_state(host: &HostCpu, ours: &[u8], theirs: &[u8], what: &str) -> Result<(), String> {
    let mut theirs = theirs.to_vec();
    count_mxcsr(&mut theirs);
    // SSE may stay marked from before, when MXCSR was not the initial one.
    let (in_use, at_least) = (ours[512], theirs[512]);
    if in_use & !2 != at_least & !2 || in_use < at_least {
        return Err(format!("XINUSE after {what}: {in_use:#x}, the processor {at_least:#x}"));
    }
    same_bytes(&ours[..416], &theirs[..416], &format!("legacy region after {what}"))?;
    for index in extended(SAFE & native::xcr0()) {
        let range = host.layout.standard(index);
        let what = format!("component {index} after {what}");
        same_bytes(&ours[range.clone()], &theirs[range], &what)?;
    }
    Ok(())
}

/// XINUSE is the processor's to choose (SDM vol. 1, 13.6), and a context switch of this process
/// between two looks at one state may change it. So a difference counts if it is there every time.
fn steadily(compare: impl Fn() -> Result<(), String>) {
    let differences: Vec<String> = (0..5).map_while(|_| compare().err()).collect();
    assert!(differences.len() < 5, "{}", differences[0]);
}

fn compare_save(form: &Save, load: &Area, before: &Area, mask: u64) -> Result<(), String> {
    let (name, bytes, processor) = form;
    let mut m = machine(load, mask);
    m.write(DATA_GPA, &before.0);
    m.done(bytes);
    assert_eq!(m.cpu.commits, 0, "a save changes no state");
    let mut theirs = before.clone();
    processor(load, &mut theirs, mask);
    same_bytes(&m.bytes(DATA_GPA, AREA_BYTES), &theirs.0, name)
}

fn compare_restore(form: &Restore, load: &Area, source: &Area, mask: u64) -> Result<(), String> {
    let (name, bytes, processor) = form;
    let mut m = machine(load, mask);
    count_mxcsr(&mut m.cpu.image);
    m.write(DATA_GPA, &source.0);
    let Some(mut theirs) = processor(load, source, mask) else {
        m.run(bytes).unwrap();
        let same = m.cpu.injected == [general_protection()];
        return same.then_some(()).ok_or_else(|| format!("only the processor's {name} faults"));
    };
    m.run(bytes).unwrap();
    if !m.cpu.injected.is_empty() {
        return Err(format!("the processor's {name} does not fault"));
    }
    assert_eq!(m.cpu.commits, 1, "a restore commits once");
    if theirs.0[2] & 0x80 == 0 {
        // AMD loads FOP, FIP and FDP only with an exception pending; Intel, and the assist, always.
        theirs.0[6..24].copy_from_slice(&m.cpu.image[6..24]);
    }
    same_state(&m.host, &m.cpu.image, &theirs.0, name)
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn saves_write_what_the_processor_writes(
        load in any_standard(), before in any::<u64>(), mask in any_mask(),
    ) {
        for form in SAVES {
            steadily(|| compare_save(form, &load, &noise(before), mask));
        }
    }

    #[test]
    fn restores_make_the_state_the_processor_makes(
        load in any_standard(), source in any_source(), mask in any_mask(),
    ) {
        for form in RESTORES {
            steadily(|| compare_restore(form, &load, &source, mask));
        }
    }
}

#[test]
fn every_bit_of_the_header_is_checked_as_the_processor_checks_it() {
    let load = standard(1, SAFE, true);
    for area in [standard(2, 5, true), compacted(3, 0x47, 0x45, true)] {
        for bit in 0..512 {
            let mut source = area.clone();
            source.0[512 + bit / 8] ^= 1 << (bit % 8);
            for form in &RESTORES[..2] {
                steadily(|| compare_restore(form, &load, &source, SAFE));
            }
        }
    }
}
