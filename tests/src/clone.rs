//! Clones: guests restored from a template.

use peregrine_vmm::agent::{Agent, Command, Identity, Output};
use peregrine_vmm::snapshot::Stored;
use peregrine_vmm::{MicroVm, VmConfig, VmmError};
use std::time::{Duration, Instant};

/// Longer than any command of a test is silent: a lost guest fails its test, and does not hang it.
pub const PATIENCE: Duration = Duration::from_secs(120);
/// Longer than any restore, however loaded the machine is.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(60);

/// A restored guest that was told who it is.
pub struct Clone {
    /// The microVM.
    pub vm: MicroVm,
    /// Its agent.
    pub agent: Agent,
    /// What it was told.
    pub identity: Identity,
    /// How long it took to take that, from the moment at which it was put together.
    pub adopted_in: Duration,
}

impl Clone {
    /// Restores a template that was made from `config`, and gives the clone an identity of its own.
    ///
    /// # Panics
    /// If it does not come up; with the console's text.
    #[must_use]
    pub fn of(template: &Stored, config: &VmConfig) -> Self {
        let vm = Self::restore(template, config).unwrap_or_else(|e| panic!("{e}"));
        let begun = Instant::now();
        let identity = Identity::fresh().unwrap_or_else(|e| panic!("{e}"));
        let mut agent = vm.adopt(&identity, ADOPT_TIMEOUT).unwrap_or_else(|e| {
            panic!("{e}; stop reason {:?}; console:\n{}", vm.stop_reason(), vm.console_text())
        });
        let adopted_in = begun.elapsed();
        agent.set_timeout(Some(PATIENCE)).unwrap_or_else(|e| panic!("{e}"));
        Self { vm, agent, identity, adopted_in }
    }

    /// Restores a template that was made from `config`; the guest stands still.
    ///
    /// # Errors
    /// What does not fit.
    ///
    /// # Panics
    /// If a disk or `/dev/kvm` cannot be opened.
    pub fn restore(template: &Stored, config: &VmConfig) -> Result<MicroVm, VmmError> {
        let disks = config.open_disks().unwrap_or_else(|e| panic!("{e}"));
        let kvm = peregrine_vmm::vm::open_kvm().unwrap_or_else(|e| panic!("{e}"));
        MicroVm::restore(template, disks, &kvm)
    }

    /// Runs a command in the guest with `stdin`.
    ///
    /// # Panics
    /// If the guest is lost; with its stop reason.
    pub fn run(&mut self, argv: &[&str], stdin: &[u8]) -> Output {
        self.agent.output(&Command::new(argv), stdin).unwrap_or_else(|e| {
            let (reason, console) = (self.vm.stop_reason(), self.vm.console_text());
            panic!("{e}; stop reason {reason:?}; console:\n{console}\n{}", self.state())
        })
    }

    /// What a guest is at that does not answer: whether its CPUs do anything, and, if it still takes commands, its
    /// timers and processes.
    fn state(&mut self) -> String {
        let counts = |vm: &MicroVm| (vm.emulated_instructions(), vm.exits());
        let before = counts(&self.vm);
        std::thread::sleep(Duration::from_secs(1));
        let after = counts(&self.vm);
        // Failures have nothing else to say.
        let _ = self.agent.set_timeout(Some(Duration::from_secs(60)));
        let look = "cat /proc/uptime /proc/interrupts /proc/timer_list /proc/[0-9]*/stat /tmp/* 2>&1 | head -c 60000";
        let said = self.agent.output(&Command::new(&["sh", "-c", look]), b"");
        let said = said.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        format!(
            "instructions and exits {before:?}, a second later {after:?}\n{}",
            said.unwrap_or_else(|e| e.to_string())
        )
    }

    /// The standard output of a bash script, trimmed; it must succeed and say nothing on standard error.
    ///
    /// # Panics
    /// If it does not.
    pub fn said(&mut self, script: &str) -> String {
        let output = self.run(&["bash", "-c", script], b"");
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!((output.code(), stderr.as_str()), (0, ""), "{script}");
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}
