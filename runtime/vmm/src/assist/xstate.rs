//! The extended state: the image KVM_GET_XSAVE2 gives (standard format, SDM vol. 1, 13.4) and where
//! the host's processor puts each component.
//!
//! Pure: bytes in, bytes out.

use std::ops::Range;
use std::sync::{Arc, LazyLock};

use super::Reason;
use super::step::Stop;

/// Bytes of the legacy region: x87, MXCSR and XMM (SDM vol. 1, 13.4.1).
pub(super) const LEGACY_BYTES: usize = 512;
/// The XSAVE header (SDM vol. 1, 13.4.2).
pub(super) const HEADER: Range<usize> = 512..576;
/// Where the extended region starts.
pub(super) const EXTENDED_START: usize = 576;
/// The largest XSAVE area the assist takes. AMX, the largest there is, needs 11,008 bytes.
pub(super) const MAX_AREA_BYTES: usize = 5 * 4096 - 64;

/// State component bitmap: x87.
pub(super) const X87: u64 = 1;
/// State component bitmap: SSE, that is XMM and (mostly) MXCSR.
pub(super) const SSE: u64 = 1 << 1;
/// State component bitmap: AVX.
pub(super) const AVX: u64 = 1 << 2;
/// State component bitmap: PKRU.
const PKRU_COMPONENT: usize = 9;

/// MXCSR after reset and in the initial configuration (SDM vol. 1, 13.6).
pub(super) const MXCSR_INITIAL: u32 = 0x1f80;
/// MXCSR bits a processor has that stores no mask of its own (SDM vol. 1, 11.6.6).
const MXCSR_MASK_DEFAULT: u32 = 0xffbf;
const FCW_INITIAL: u16 = 0x037f;

/// x87 control: FCW, FSW, FTW, FOP, FIP, FDP.
pub(super) const X87_CONTROL: Range<usize> = 0..24;
/// MXCSR.
pub(super) const MXCSR: Range<usize> = 24..28;
/// MXCSR_MASK.
pub(super) const MXCSR_MASK: Range<usize> = 28..32;
/// ST0 to ST7.
pub(super) const ST: Range<usize> = 32..160;
/// XMM0 to XMM15.
pub(super) const XMM: Range<usize> = 160..416;

/// What the assist must know of the host's processor. The guest sees the same: software KVM does
/// not virtualise CPUID.
#[derive(Clone, Debug)]
pub struct HostCpu {
    /// The XSAVE area's components.
    pub layout: XsaveLayout,
    /// MAXPHYADDR: more bits in a page-table entry are reserved.
    pub physical_address_bits: u8,
}

impl HostCpu {
    /// The processor this runs on. CPUID is slow in a virtual machine, so it is asked once.
    pub fn this() -> Arc<Self> {
        static THIS: LazyLock<Arc<HostCpu>> = LazyLock::new(|| {
            Arc::new(HostCpu::from_cpuid(|leaf, subleaf| {
                let answer = core::arch::x86_64::__cpuid_count(leaf, subleaf);
                [answer.eax, answer.ebx, answer.ecx, answer.edx]
            }))
        });
        Arc::clone(&THIS)
    }

    /// The same from any source of CPUID leaves (EAX, EBX, ECX, EDX).
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let bits = match cpuid(0x8000_0000, 0)[0] {
            0x8000_0008.. => (cpuid(0x8000_0008, 0)[0] & 0xff) as u8,
            _ => 36,
        };
        Self {
            layout: XsaveLayout::from_cpuid(|subleaf| cpuid(0xd, subleaf)),
            physical_address_bits: bits.clamp(32, 52),
        }
    }
}

/// A component of the extended region.
#[derive(Clone, Copy, Debug, Default)]
struct Component {
    /// Where it is in the standard format.
    offset: usize,
    bytes: usize,
    /// Whether it starts at a multiple of 64 in the compacted format.
    aligned: bool,
}

/// Where components are in an XSAVE area (CPUID leaf 0xd; SDM vol. 1, 13.2).
#[derive(Clone, Debug)]
pub struct XsaveLayout {
    components: [Component; 63],
    known: u64,
}

impl XsaveLayout {
    /// Builds the layout from CPUID leaf 0xd, given as a function of the subleaf. Only user
    /// components have a place in the image KVM gives; others are not known here.
    pub fn from_cpuid(mut leaf: impl FnMut(u32) -> [u32; 4]) -> Self {
        let [low, _, _, high] = leaf(0);
        let supported = u64::from(high) << 32 | u64::from(low);
        let mut components = [Component::default(); 63];
        let mut known = X87 | SSE;
        for (index, place) in components.iter_mut().enumerate().skip(2) {
            if supported >> index & 1 == 0 {
                continue;
            }
            let [bytes, offset, flags, _] = leaf(index as u32);
            let component =
                Component { offset: offset as usize, bytes: bytes as usize, aligned: flags & 2 != 0 };
            let fits = component.offset >= EXTENDED_START
                && component.bytes > 0
                && component.offset.saturating_add(component.bytes) <= MAX_AREA_BYTES;
            if flags & 1 == 0 && fits {
                *place = component;
                known |= 1 << index;
            }
        }
        Self { components, known }
    }

    /// Refuses components whose place is not known.
    pub(super) fn check_known(&self, components: u64) -> Result<(), Reason> {
        match components & !self.known {
            0 => Ok(()),
            unknown => Err(Reason::Component(unknown)),
        }
    }

    /// Where a component (2 and up) is in the standard format.
    pub(super) fn standard(&self, index: usize) -> Range<usize> {
        let component = self.components[index];
        component.offset..component.offset + component.bytes
    }

    /// Where a component is in the compacted format of XCOMP_BV `format`
    /// (SDM vol. 1, 13.4.3), given where the one before it ended.
    pub(super) fn compacted_after(&self, index: usize, end: usize) -> Range<usize> {
        let component = self.components[index];
        let start = if component.aligned { end.next_multiple_of(64) } else { end };
        start..start + component.bytes
    }
}

/// The indices of a component bitmap's extended components, ascending.
pub(super) fn extended(components: u64) -> impl Iterator<Item = usize> {
    (2..63).filter(move |index| components >> index & 1 == 1)
}

/// The image KVM gives, long enough for every component the layout knows and the image holds.
pub(super) struct Image<'a> {
    pub(super) bytes: &'a mut [u8],
    layout: &'a XsaveLayout,
}

impl<'a> Image<'a> {
    pub(super) fn new(bytes: &'a mut [u8], layout: &'a XsaveLayout) -> Result<Self, Stop> {
        if bytes.len() < EXTENDED_START {
            return Err(Reason::ShortImage(bytes.len()).into());
        }
        Ok(Self { bytes, layout })
    }

    /// Refuses an image that has no room for some of `components`.
    pub(super) fn check_holds(&self, components: u64) -> Result<(), Stop> {
        let short = extended(components).any(|i| self.layout.standard(i).end > self.bytes.len());
        if short { Err(Reason::ShortImage(self.bytes.len()).into()) } else { Ok(()) }
    }

    /// XINUSE: components not in their initial configuration. MXCSR does not count.
    pub(super) fn in_use(&self) -> u64 {
        u64_at(self.bytes, HEADER.start)
    }

    /// XINUSE, with MXCSR counted as part of SSE, as XSAVEC and XGETBV do (SDM vol. 1, 13.6 and
    /// 13.10) and KVM wants it in an image.
    pub(super) fn in_use_with_mxcsr(&self) -> u64 {
        let mxcsr = if self.mxcsr() == MXCSR_INITIAL { 0 } else { SSE };
        self.in_use() | mxcsr
    }

    pub(super) fn set_in_use(&mut self, components: u64) {
        put(self.bytes, HEADER.start, &components.to_le_bytes());
    }

    pub(super) fn mxcsr(&self) -> u32 {
        u32_at(self.bytes, MXCSR.start)
    }

    pub(super) fn set_mxcsr(&mut self, value: u32) {
        put(self.bytes, MXCSR.start, &value.to_le_bytes());
        let in_use = self.in_use_with_mxcsr();
        self.set_in_use(in_use);
    }

    /// The MXCSR bits this processor has; setting another is #GP.
    pub(super) fn mxcsr_mask(&self) -> u32 {
        match u32_at(self.bytes, MXCSR_MASK.start) {
            0 => MXCSR_MASK_DEFAULT,
            mask => mask,
        }
    }

    /// Whether an unmasked x87 exception is pending: what FSW.ES says (SDM vol. 1, 8.1.3.3),
    /// computed because an image not yet loaded may not have ES right.
    pub(super) fn x87_exception_pending(&self) -> bool {
        let masked = u16_at(self.bytes, 0);
        let raised = u16_at(self.bytes, 2);
        raised & !masked & 0x3f != 0
    }

    /// PKRU; 0 in its initial configuration.
    pub(super) fn pkru(&self) -> u32 {
        let at = self.layout.standard(PKRU_COMPONENT);
        let held = self.in_use() >> PKRU_COMPONENT & 1 == 1;
        if held && at.len() >= 4 && at.end <= self.bytes.len() { u32_at(self.bytes, at.start) } else { 0 }
    }

    /// Sets PKRU, which then counts as in use.
    pub(super) fn set_pkru(&mut self, value: u32) -> Result<(), Stop> {
        let component = 1 << PKRU_COMPONENT;
        self.layout.check_known(component)?;
        self.check_holds(component)?;
        let at = self.layout.standard(PKRU_COMPONENT);
        self.bytes[at.clone()].fill(0);
        put(self.bytes, at.start, &value.to_le_bytes());
        self.set_in_use(self.in_use() | component);
        Ok(())
    }

    /// Writes the initial configuration (SDM vol. 1, 13.6) of some components. MXCSR is left.
    pub(super) fn initialise(&mut self, components: u64) {
        if components & X87 != 0 {
            self.bytes[X87_CONTROL].fill(0);
            self.bytes[ST].fill(0);
            put(self.bytes, 0, &FCW_INITIAL.to_le_bytes());
        }
        if components & SSE != 0 {
            self.bytes[XMM].fill(0);
        }
        for index in extended(components) {
            self.bytes[self.layout.standard(index)].fill(0);
        }
    }

    /// The x87 control bytes in the form with REX.W, or without it: then FIP and FDP are 32 bits, and the
    /// segment selectors beside them 0, as processors that no longer keep them have it (CPUID.7.EBX[13]).
    pub(super) fn x87_control(&self, wide: bool) -> [u8; 24] {
        let mut control = [0; 24];
        control.copy_from_slice(&self.bytes[X87_CONTROL]);
        if !wide {
            control[12..16].fill(0);
            control[20..24].fill(0);
        }
        control
    }

    /// Loads x87 state from a legacy region, in the form `wide` says.
    pub(super) fn load_x87(&mut self, legacy: &[u8], wide: bool) {
        self.bytes[X87_CONTROL].copy_from_slice(&legacy[X87_CONTROL]);
        self.bytes[ST].copy_from_slice(&legacy[ST]);
        if !wide {
            self.bytes[12..16].fill(0);
            self.bytes[20..24].fill(0);
        }
        self.canonicalise_x87();
    }

    /// Makes loaded x87 state what the processor makes of it: reserved bits get their fixed
    /// values, ES and B follow the raised and masked exceptions (SDM vol. 1, 8.1.3.3 and 10.5.1.1).
    fn canonicalise_x87(&mut self) {
        let fcw = u16_at(self.bytes, 0) & 0x1f3f | 0x40;
        put(self.bytes, 0, &fcw.to_le_bytes());
        let summary = if self.x87_exception_pending() { 0x8080 } else { 0 };
        let fsw = u16_at(self.bytes, 2) & !0x8080 | summary;
        put(self.bytes, 2, &fsw.to_le_bytes());
        self.bytes[5] = 0;
        let fop = u16_at(self.bytes, 6) & 0x7ff;
        put(self.bytes, 6, &fop.to_le_bytes());
        for register in self.bytes[ST].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at + 2)) << 16 | u32::from(u16_at(bytes, at))
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at + 4)) << 32 | u64::from(u32_at(bytes, at))
}

pub(super) fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}
