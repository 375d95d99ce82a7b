//! A stopped vCPU as the instruction assist sees it: registers are read once, the rest when asked for, and
//! only what changed is written back.

use crate::assist::{CpuState, Exception};
use crate::memory::GuestMemory;
use crate::sys::{atomic, kvm::XsaveArea};
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_sync_regs};
use kvm_ioctls::{SyncReg, VcpuFd};
use std::io;
use vm_memory::GuestAddress;

/// See the module's text.
pub(crate) struct VcpuState<'a> {
    fd: &'a mut VcpuFd,
    regs: kvm_regs,
    sregs: kvm_sregs,
    sregs_before: kvm_sregs,
    area: &'a mut XsaveArea,
    area_read: bool,
    exception: Option<Exception>,
}

fn io_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

/// Has KVM leave general and special registers in the run page at every exit: a system call for each costs
/// several microseconds on software KVM, where these exits are frequent.
pub(crate) fn share_registers(fd: &mut VcpuFd) {
    fd.set_sync_valid_reg(SyncReg::Register);
    fd.set_sync_valid_reg(SyncReg::SystemRegister);
}

impl<'a> VcpuState<'a> {
    /// Takes the registers that [`share_registers`] has KVM leave in the run page, without a system call.
    pub(crate) fn load(fd: &'a mut VcpuFd, area: &'a mut XsaveArea) -> Self {
        let kvm_sync_regs { regs, sregs, .. } = fd.sync_regs();
        Self { fd, regs, sregs, sregs_before: sregs, area, area_read: false, exception: None }
    }

    /// The same for registers that are somebody else's to keep: [`VcpuState::into_parts`] gives them back.
    pub(crate) fn with(
        fd: &'a mut VcpuFd,
        area: &'a mut XsaveArea,
        regs: kvm_regs,
        sregs: kvm_sregs,
    ) -> Self {
        Self { fd, regs, sregs, sregs_before: sregs, area, area_read: false, exception: None }
    }

    /// The registers, and the exception that the guest is to take.
    pub(crate) fn into_parts(self) -> (kvm_regs, kvm_sregs, Option<Exception>) {
        (self.regs, self.sregs, self.exception)
    }

    /// Writes back what changed. Special registers before events: an injected page fault needs its CR2.
    pub(crate) fn store(mut self) -> io::Result<()> {
        if let Some(Exception { cr2: Some(cr2), .. }) = self.exception {
            self.sregs.cr2 = cr2;
        }
        if self.sregs != self.sregs_before {
            // One that is on its way to the guest is KVM's to remember; set here, it would be queued a second time.
            let sregs = kvm_sregs { interrupt_bitmap: [0; 4], ..self.sregs };
            self.fd.set_sregs(&sregs).map_err(io_error)?;
        }
        let Some(exception) = self.exception else {
            self.fd.sync_regs_mut().regs = self.regs;
            self.fd.set_sync_dirty_reg(SyncReg::Register);
            return Ok(());
        };
        // Registers before events: setting them clears an exception that KVM itself has pending.
        self.fd.set_regs(&self.regs).map_err(io_error)?;
        let mut events = self.fd.get_vcpu_events().map_err(io_error)?;
        events.exception.injected = 1;
        events.exception.nr = exception.vector;
        events.exception.has_error_code = u8::from(exception.error_code.is_some());
        events.exception.error_code = exception.error_code.unwrap_or(0);
        self.fd.set_vcpu_events(&events).map_err(io_error)?;
        Ok(())
    }
}

impl CpuState for VcpuState<'_> {
    fn regs(&self) -> &kvm_regs {
        &self.regs
    }

    fn regs_mut(&mut self) -> &mut kvm_regs {
        &mut self.regs
    }

    fn sregs(&self) -> &kvm_sregs {
        &self.sregs
    }

    fn sregs_mut(&mut self) -> &mut kvm_sregs {
        &mut self.sregs
    }

    fn xsave(&mut self) -> io::Result<&mut [u8]> {
        if !self.area_read {
            self.area.read(&*self.fd)?;
            self.area_read = true;
        }
        Ok(self.area.bytes_mut())
    }

    fn commit_xsave(&mut self) -> io::Result<()> {
        self.area.write(&*self.fd)
    }

    fn xcr0(&mut self) -> io::Result<u64> {
        let xcrs = self.fd.get_xcrs().map_err(io_error)?;
        let all = &xcrs.xcrs[..(xcrs.nr_xcrs as usize).min(xcrs.xcrs.len())];
        // A vCPU that never executed XSETBV has the reset value, x87 alone.
        Ok(all.iter().find(|x| x.xcr == 0).map_or(1, |x| x.value))
    }

    fn msr(&mut self, index: u32) -> io::Result<u64> {
        let entry = kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry]).map_err(|_| io::ErrorKind::InvalidInput)?;
        match self.fd.get_msrs(&mut msrs).map_err(io_error)? {
            1 => Ok(msrs.as_slice()[0].data),
            _ => Err(io::Error::other(format!("KVM has no MSR {index:#x}"))),
        }
    }

    fn random(&mut self) -> io::Result<u64> {
        let mut bytes = [0; 8];
        match rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())? {
            8 => Ok(u64::from_ne_bytes(bytes)),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn cmpxchg16(&mut self, mem: &GuestMemory, at: GuestAddress, old: u128, new: u128) -> io::Result<u128> {
        atomic::compare_exchange_16(mem, at.0, old, new)
            .ok_or_else(|| io::Error::other("cmpxchg16b outside RAM, unaligned, or not on this CPU"))
    }

    fn inject(&mut self, exception: Exception) {
        self.exception = Some(exception);
    }
}
