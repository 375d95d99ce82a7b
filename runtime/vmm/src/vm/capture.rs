//! Capture: a paused microVM's state as plain data.

use super::MicroVm;
use super::shared::Shared;
use crate::VmmError;
use crate::agent::{Agent, AgentError};
use crate::code_book;
use crate::devices::mmio::State as DeviceState;
use crate::event_loop;
use crate::memory::GuestMemory;
use crate::snapshot::{AgentState, Compat, MachineState, Snapshot, SnapshotError, digest_memory};
use crate::vcpu_state::VcpuSnapshot;
use guest_init::ToGuest;
use kvm_bindings::{KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// A microVM that stands still: its vCPUs are parked and its event loop holds no operation. It goes on when
/// this is dropped.
pub struct Paused<'a> {
    microvm: &'a MicroVm,
    vcpus: Vec<VcpuSnapshot>,
    // Fields are dropped in this order: the devices go on before the gate opens.
    devices: event_loop::Paused,
    _gate: OpenOnDrop<'a>,
}

/// The gate opens again on every way out.
struct OpenOnDrop<'a>(&'a Shared);

impl Drop for OpenOnDrop<'_> {
    fn drop(&mut self) {
        self.0.open();
    }
}

impl MicroVm {
    /// Stops the vCPUs, then the devices. The guest goes on when the guard is dropped.
    ///
    /// # Errors
    /// [`VmmError::Stopped`] if the guest has ended, [`VmmError::NotGoing`] if it was not let go yet; otherwise
    /// the guest goes on.
    pub fn pause(&self) -> Result<Paused<'_>, VmmError> {
        if self.shared.approaches() {
            return Err(VmmError::NotGoing);
        }
        let gate = OpenOnDrop(&self.shared);
        self.event_loop.attend();
        // vCPUs first: they are what gives the devices work.
        let vcpus = self.shared.close(self.vcpus)?;
        let devices = self.event_loop.pause()?;
        Ok(Paused { microvm: self, vcpus, devices, _gate: gate })
    }

    /// Brings the guest to its freeze point, where it stands still: clones of it take their first request
    /// without an interrupt. `false`, and the guest goes on, if it has no gate.
    ///
    /// # Errors
    /// If the guest cannot be asked.
    pub fn freeze_point(&self, agent: &Agent, timeout: Duration) -> Result<bool, AgentError> {
        self.shared.want_freeze();
        agent.writer().send(0, &ToGuest::Freeze)?;
        let frozen = self.shared.wait_frozen(timeout);
        self.at_gate.store(frozen, Ordering::Relaxed);
        Ok(frozen)
    }

    /// Ends the microVM and makes what it was a snapshot in `dir`, where `memory` is the image that it was
    /// booted into ([`MicroVm::boot_into`]): nothing is copied.
    ///
    /// # Errors
    /// What could not be captured or written. The microVM is gone either way.
    pub fn freeze(self, agent: &Agent, memory: &File, dir: &Path) -> Result<(), VmmError> {
        let paused = self.pause()?;
        let code = self.shared.take_code();
        let conversation = agent.state().map_err(|e| VmmError::Agent(e.to_string()))?;
        let machine = paused.capture(conversation)?;
        // Before the gate opens: not one more instruction may change the memory.
        self.stop();
        drop(paused);
        let (vcpus, mem_mib, disks_bytes) = (self.vcpus, self.mem_mib, self.disks_bytes.clone());
        // No thread of it may write its memory any more.
        drop(self);
        let image = dir.join(crate::snapshot::MEMORY_FILE);
        let digest = digest_memory(memory).map_err(SnapshotError::io(&image))?;
        let tsc_khz = machine.vcpus.first().map_or(0, VcpuSnapshot::tsc_khz);
        let compat = Compat { tsc_khz, vcpus, mem_mib, disks_bytes, memory: digest, ..Compat::host() };
        if !code.is_empty() {
            code_book::write(dir, code)?;
        }
        Ok(Snapshot { compat, machine }.write_state(dir)?)
    }
}

impl Paused<'_> {
    /// The guest's memory: for a child process that builds a microVM over its own copy of it.
    pub(crate) fn memory(&self) -> GuestMemory {
        self.microvm.mem.clone()
    }

    /// The devices' states, in bus order.
    pub(crate) fn devices(&self) -> &[DeviceState] {
        self.devices.states()
    }

    /// Everything but memory and disks; `agent` is where the conversation stands now that nothing moves. I/O that
    /// ended after the vCPUs had left their states may have raised interrupts: a restored device raises what
    /// is not acknowledged once more.
    ///
    /// # Errors
    /// What KVM refused.
    pub fn capture(&self, agent: AgentState) -> Result<MachineState, VmmError> {
        let vm = &self.microvm.vm;
        let irqchips = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
            .into_iter()
            .map(|chip_id| {
                let mut chip = kvm_irqchip { chip_id, ..Default::default() };
                vm.get_irqchip(&mut chip).map_err(VmmError::kvm("GET_IRQCHIP"))?;
                Ok(chip)
            })
            .collect::<Result<_, VmmError>>()?;
        Ok(MachineState {
            vcpus: self.vcpus.clone(),
            irqchips,
            clock: vm.get_clock().map_err(VmmError::kvm("GET_CLOCK"))?,
            devices: self.devices.states().to_vec(),
            agent,
            at_gate: self.microvm.at_gate.load(Ordering::Relaxed),
            runs: Vec::new(),
        })
    }
}
