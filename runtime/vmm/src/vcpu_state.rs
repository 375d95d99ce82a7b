//! A vCPU's whole state, taken from KVM and given back to it.
//!
//! May touch: one vCPU's file descriptor, outside KVM_RUN, with no exit left half done (`Vcpu::settle`). Must
//! not: threads, files.

use crate::VmmError;
use crate::sys::kvm::XsaveArea;
use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd};
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// IA32_TSC (SDM vol. 4). It is set before the deadline below, which KVM compares with it.
const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE: taken only once the LAPIC's timer is in that mode.
const TSC_DEADLINE: u32 = 0x6e0;

/// All of a vCPU that its guest can see: plain data, saved whole.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VcpuSnapshot {
    regs: kvm_regs,
    sregs: kvm_sregs,
    xcrs: kvm_xcrs,
    xsave: Vec<u8>,
    lapic: kvm_lapic_state,
    msrs: Vec<(u32, u64)>,
    events: kvm_vcpu_events,
    mp_state: kvm_mp_state,
    debugregs: kvm_debugregs,
    tsc_khz: u32,
}

impl VcpuSnapshot {
    /// Frequency of its TSC, 0 if KVM does not say.
    #[must_use]
    pub fn tsc_khz(&self) -> u32 {
        self.tsc_khz
    }

    /// The MSRs that were saved.
    pub(crate) fn msr_indices(&self) -> Arc<[u32]> {
        self.msrs.iter().map(|(index, _)| *index).collect()
    }

    /// Its instruction pointer.
    #[must_use]
    pub fn rip(&self) -> u64 {
        self.regs.rip
    }

    /// Takes the state. MP_STATE first: getting it makes KVM accept a pending INIT or SIPI, which changes the
    /// rest.
    pub(crate) fn capture(fd: &VcpuFd, area: &mut XsaveArea, msrs: &[u32]) -> Result<Self, VmmError> {
        let mp_state = fd.get_mp_state().map_err(VmmError::kvm("GET_MP_STATE"))?;
        area.read(fd).map_err(|source| VmmError::Os { what: "KVM_GET_XSAVE2", source })?;
        Ok(Self {
            mp_state,
            regs: fd.get_regs().map_err(VmmError::kvm("GET_REGS"))?,
            sregs: fd.get_sregs().map_err(VmmError::kvm("GET_SREGS"))?,
            xcrs: fd.get_xcrs().map_err(VmmError::kvm("GET_XCRS"))?,
            xsave: area.bytes_mut().to_vec(),
            lapic: fd.get_lapic().map_err(VmmError::kvm("GET_LAPIC"))?,
            msrs: read_msrs(fd, msrs)?,
            events: fd.get_vcpu_events().map_err(VmmError::kvm("GET_VCPU_EVENTS"))?,
            debugregs: fd.get_debug_regs().map_err(VmmError::kvm("GET_DEBUGREGS"))?,
            tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        })
    }

    /// Gives the state to a fresh vCPU whose CPUID is set. The order, and why:
    ///
    /// 1. SREGS: the APIC's base and mode, CR4 and EFER, which the rest is checked against.
    /// 2. XCRS before XSAVE: XCR0 says which components the image may have.
    /// 3. LAPIC before MSRs: TSC_DEADLINE is dropped unless the timer is in that mode.
    /// 4. MSRs: all of them, or it is an error; the timer's deadline last, moved by as much as the TSC is
    ///    off, and only if `timer` says so: else what is left of it is returned, for [`arm_timer`].
    /// 5. REGS before VCPU_EVENTS: setting registers clears a pending exception.
    /// 6. MP_STATE last but one: a halted vCPU with all else in place.
    pub(crate) fn restore(
        &self,
        fd: &VcpuFd,
        area: &mut XsaveArea,
        timer: Timer,
    ) -> Result<Option<u64>, VmmError> {
        fd.set_sregs(&self.sregs).map_err(VmmError::kvm("SET_SREGS"))?;
        fd.set_xcrs(&self.xcrs).map_err(VmmError::kvm("SET_XCRS"))?;
        let bytes = area.bytes_mut();
        if bytes.len() != self.xsave.len() {
            return Err(VmmError::Memory(format!(
                "the XSAVE image has {} bytes, this host's have {}",
                self.xsave.len(),
                bytes.len()
            )));
        }
        bytes.copy_from_slice(&self.xsave);
        area.write(fd).map_err(|source| VmmError::Os { what: "KVM_SET_XSAVE", source })?;
        fd.set_lapic(&self.lapic).map_err(VmmError::kvm("SET_LAPIC"))?;
        let left = self.restore_msrs(fd)?;
        let held = match (timer, left) {
            (Timer::Runs, Some(ticks)) => arm_timer(fd, ticks).map(|()| None)?,
            (_, left) => left,
        };
        fd.set_regs(&self.regs).map_err(VmmError::kvm("SET_REGS"))?;
        fd.set_vcpu_events(&self.events).map_err(VmmError::kvm("SET_VCPU_EVENTS"))?;
        fd.set_mp_state(self.mp_state).map_err(VmmError::kvm("SET_MP_STATE"))?;
        fd.set_debug_regs(&self.debugregs).map_err(VmmError::kvm("SET_DEBUGREGS"))?;
        Ok(held)
    }
}

impl VcpuSnapshot {
    /// All but the timer's deadline, which is disarmed: its rest in TSC ticks is returned.
    fn restore_msrs(&self, fd: &VcpuFd) -> Result<Option<u64>, VmmError> {
        let saved = |wanted| self.msrs.iter().find(|(index, _)| *index == wanted).map(|(_, data)| *data);
        let others: Vec<_> = self.msrs.iter().copied().filter(|(index, _)| *index != TSC_DEADLINE).collect();
        write_msrs(fd, &others)?;
        let armed = saved(TSC).zip(saved(TSC_DEADLINE).filter(|deadline| *deadline != 0));
        Ok(armed.map(|(tsc, deadline)| deadline.saturating_sub(tsc)))
    }
}

/// Whether a restored vCPU's timer runs at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Timer {
    Runs,
    /// It stands still with its guest: one that is parked for a second would else begin with the tick that
    /// was due in the meantime, where KVM emulates ring 0 20 ms of it.
    Held,
}

/// Lets the timer fire `ticks` from now. Software KVM cannot offset the TSC, it takes the write and goes on with the
/// host's: the saved deadline would be an interrupt at once in every clone, or a timer that never fires.
pub(crate) fn arm_timer(fd: &VcpuFd, ticks: u64) -> Result<(), VmmError> {
    let now = read_msrs(fd, &[TSC])?.first().map_or(0, |(_, data)| *data);
    // 0 would disarm it.
    write_msrs(fd, &[(TSC_DEADLINE, now.wrapping_add(ticks).max(1))])
}

/// The MSRs worth saving: those of KVM's list that a vCPU here lets read, and takes back. Found out on
/// a vCPU that has not run, because the list also names MSRs this CPU lacks or that only the host may write.
pub(crate) fn saved_msrs(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Arc<[u32]>, VmmError> {
    let all = kvm.get_msr_index_list().map_err(VmmError::kvm("GET_MSR_INDEX_LIST"))?;
    let mut list: Vec<u32> =
        all.as_slice().iter().copied().filter(|index| takes_back(vcpu, *index)).collect();
    // The deadline last; the TSC is somewhere before it.
    list.sort_by_key(|index| (*index == TSC_DEADLINE, *index != TSC));
    Ok(list.into())
}

fn takes_back(fd: &VcpuFd, index: u32) -> bool {
    read_msrs(fd, &[index]).is_ok_and(|values| write_msrs(fd, &values).is_ok())
}

fn read_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, VmmError> {
    let entries: Vec<_> =
        indices.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
    let mut msrs = Msrs::from_entries(&entries).map_err(|e| VmmError::Memory(format!("{e:?}")))?;
    let done = fd.get_msrs(&mut msrs).map_err(VmmError::kvm("GET_MSRS"))?;
    match indices.get(done) {
        Some(&index) => Err(VmmError::MsrsPartial { done, wanted: indices.len(), index }),
        None => Ok(msrs.as_slice().iter().map(|e| (e.index, e.data)).collect()),
    }
}

fn write_msrs(fd: &VcpuFd, values: &[(u32, u64)]) -> Result<(), VmmError> {
    let entries: Vec<_> =
        values.iter().map(|&(index, data)| kvm_msr_entry { index, data, ..Default::default() }).collect();
    let msrs = Msrs::from_entries(&entries).map_err(|e| VmmError::Memory(format!("{e:?}")))?;
    let done = fd.set_msrs(&msrs).map_err(VmmError::kvm("SET_MSRS"))?;
    match values.get(done) {
        Some(&(index, _)) => Err(VmmError::MsrsPartial { done, wanted: values.len(), index }),
        None => Ok(()),
    }
}
