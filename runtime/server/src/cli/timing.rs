//! `run --timing`: when each stage of a run was reached, and what the guest cost, on standard error.

use peregrine_vmm::MicroVm;
use serde::Serialize;
use std::time::{Duration, Instant};

/// The stages of one run, in microseconds since the VM's build began, and the counters at its end.
#[derive(Debug, Serialize)]
pub(crate) struct Timing {
    /// Artefacts found or built, before the VM.
    pub(crate) prepare_us: u64,
    /// VM, memory, devices and kernel in place.
    pub(crate) built_us: u64,
    /// The boot processor entered the kernel.
    pub(crate) kernel_entry_us: Option<u64>,
    /// The guest made its first VM exit.
    pub(crate) first_exit_us: Option<u64>,
    /// First instruction of PID 1 (by the guest's own clock, read when it says hello).
    pub(crate) pid1_us: Option<u64>,
    /// The agent was ready for a command.
    pub(crate) agent_us: Option<u64>,
    /// The command was sent.
    pub(crate) exec_us: Option<u64>,
    /// Its process was running.
    pub(crate) started_us: Option<u64>,
    /// Its first byte of output.
    pub(crate) first_byte_us: Option<u64>,
    /// Its exit status was known.
    pub(crate) exit_us: Option<u64>,
    /// Guest instructions that were emulated, until PID 1's agent was ready and in all.
    pub(crate) emulated_boot: Option<u64>,
    /// See `emulated_boot`.
    pub(crate) emulated_total: Option<u64>,
    /// VM exits in all.
    pub(crate) exits: Option<u64>,
    /// Instructions that the assist did, by name.
    pub(crate) assists: Vec<(String, u64)>,
    /// Work of the devices and of the bulk-memory doorbell, by name.
    pub(crate) devices: Vec<(&'static str, u64)>,
}

impl Timing {
    pub(crate) fn new(prepare: Duration) -> Self {
        Self {
            prepare_us: micros(prepare),
            built_us: 0,
            kernel_entry_us: None,
            first_exit_us: None,
            pid1_us: None,
            agent_us: None,
            exec_us: None,
            started_us: None,
            first_byte_us: None,
            exit_us: None,
            emulated_boot: None,
            emulated_total: None,
            exits: None,
            assists: Vec::new(),
            devices: Vec::new(),
        }
    }

    /// Takes the VM's own stages and its counters, at the end of the run.
    pub(crate) fn finish(&mut self, vm: &MicroVm) {
        let stages = vm.stages();
        let since = |at: Instant| micros(at.saturating_duration_since(stages.start));
        self.built_us = micros(stages.built.saturating_duration_since(stages.start));
        self.kernel_entry_us = stages.entered.map(since);
        self.first_exit_us = stages.first_exit.map(since);
        self.emulated_total = vm.emulated_instructions();
        self.exits = vm.exits();
        self.assists =
            vm.assists().iter().filter(|(_, n)| *n > 0).map(|(op, n)| (op.name().to_owned(), n)).collect();
        let (devices, doorbell) = (vm.device_stats(), vm.doorbell());
        self.devices = vec![
            ("interrupts", devices.interrupts),
            ("block requests", devices.block_requests),
            ("block bytes read", devices.block_read_bytes),
            ("vsock packets out", devices.vsock_packets_from_guest),
            ("vsock packets in", devices.vsock_packets_to_guest),
            ("doorbell calls", doorbell.calls),
            ("doorbell bytes", doorbell.copied_bytes + doorbell.filled_bytes),
        ];
    }

    /// The table people read.
    pub(crate) fn table(&self) -> String {
        let mut out = String::from("stage                      ms since VM start\n");
        let rows = [
            ("VM built", Some(self.built_us)),
            ("guest entered", self.kernel_entry_us),
            ("first VM exit", self.first_exit_us),
            ("PID 1", self.pid1_us),
            ("agent ready", self.agent_us),
            ("exec sent", self.exec_us),
            ("command running", self.started_us),
            ("first byte", self.first_byte_us),
            ("exit", self.exit_us),
        ];
        for (name, us) in rows {
            if let Some(us) = us {
                out += &format!("{name:<24} {:>12.3}\n", us as f64 / 1000.0);
            }
        }
        out += &format!("(prepared in {:.3} ms before that)\n", self.prepare_us as f64 / 1000.0);
        let counters = [
            ("emulated to agent ready", self.emulated_boot),
            ("emulated in all", self.emulated_total),
            ("VM exits", self.exits),
        ];
        for (name, n) in counters {
            if let Some(n) = n {
                out += &format!("{name:<24} {n:>12}\n");
            }
        }
        for (name, n) in &self.devices {
            out += &format!("{name:<24} {n:>12}\n");
        }
        for (op, n) in &self.assists {
            out += &format!("assist {op:<17} {n:>12}\n");
        }
        out
    }
}

pub(crate) fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}
