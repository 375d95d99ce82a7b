//! One command in one microVM, wired to this process's standard streams.
//!
//! Threads: this one reads the guest and writes stdout and stderr; one reads stdin; one waits for signals.
//! The last two end with the process: both block in calls that only the user can end.

use super::stdio::{self, RawMode};
use super::timing::{Timing, micros};
use super::{CliError, FAILURE};
use guest_init::{INITIAL_WINDOW_BYTES, PAYLOAD_MAX_BYTES, ToGuest, ToHost};
use peregrine_vmm::agent::{
    Agent, AgentError, AgentWriter, Boot, Command, Grants, Identity, Outcome, failed_text,
};
use peregrine_vmm::{MicroVm, StopReason};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;
use std::io::{self, Read as _, Write as _};
use std::ops::ControlFlow;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Ctrl-], twice in a row on a pseudo-terminal, ends the microVM.
const ESCAPE: u8 = 0x1d;

/// How long after losing the guest its stop reason is waited for.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// How the command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// It ran and exited or was killed.
    Exited(Outcome),
    /// It never started; the code is the one a shell would give.
    NotStarted(u8),
}

impl Ended {
    /// The exit code a shell would give.
    pub(crate) fn exit_code(self) -> u8 {
        match self {
            Self::Exited(Outcome::Code(code)) | Self::NotStarted(code) => code,
            Self::Exited(Outcome::Signal(signal)) => 128_u8.saturating_add(signal),
        }
    }
}

/// Waits for a booting guest's agent. On any error the microVM's own stop reason goes first.
pub(crate) fn boot(vm: &MicroVm, timeout: Duration, timing: &mut Timing) -> Result<Agent, CliError> {
    let (agent, boot) = vm.connect_agent(timeout).map_err(|error| explain(vm, error.into(), timeout))?;
    note_boot(timing, &boot, vm.stages().start, vm);
    Ok(agent)
}

/// Lets a restored guest go and tells it who it is.
pub(crate) fn adopt(vm: &MicroVm, timeout: Duration, timing: &mut Timing) -> Result<Agent, CliError> {
    let adopted = Identity::fresh().map_err(AgentError::Io).and_then(|identity| vm.adopt(&identity, timeout));
    let agent = adopted.map_err(|error| explain(vm, error.into(), timeout))?;
    timing.agent_us = Some(micros(vm.stages().start.elapsed()));
    timing.emulated_boot = vm.emulated_instructions();
    Ok(agent)
}

/// Runs `command` to its end. On any error the microVM's own stop reason goes first.
pub(crate) fn run(
    vm: &Arc<MicroVm>,
    mut agent: Agent,
    command: &Command,
    timing: &mut Timing,
) -> Result<Ended, CliError> {
    let result = converse(vm, &mut agent, command, timing, vm.stages().start);
    result.map_err(|error| explain(vm, error, Duration::ZERO))
}

fn note_boot(timing: &mut Timing, boot: &Boot, start: Instant, vm: &MicroVm) {
    let since = |at: Instant| Some(micros(at.saturating_duration_since(start)));
    timing.pid1_us = since(boot.pid1());
    timing.agent_us = since(Instant::now());
    timing.emulated_boot = vm.emulated_instructions();
}

/// A lost connection is a symptom; the reason the microVM stopped is the message people need.
fn explain(vm: &MicroVm, error: CliError, boot_timeout: Duration) -> CliError {
    let reason = match &error {
        CliError::Agent(AgentError::Closed) => vm.wait(REASON_TIMEOUT),
        _ => vm.stop_reason(),
    };
    match (reason, error) {
        (Some(reason), _) => CliError::Stopped(reason),
        (None, CliError::Agent(AgentError::Timeout(_))) => {
            let console = vm.console_text();
            let last = console.lines().last().unwrap_or_default();
            let hint = if last.is_empty() {
                "; --console shows what the guest kernel says".to_owned()
            } else {
                format!("; the guest kernel's last line: {last}")
            };
            CliError::NoAgent { seconds: boot_timeout.as_secs(), hint }
        }
        (None, error) => error,
    }
}

fn converse(
    vm: &Arc<MicroVm>,
    agent: &mut Agent,
    command: &Command,
    timing: &mut Timing,
    start: Instant,
) -> Result<Ended, CliError> {
    let raw = command.terminal.map(|_| RawMode::enter()).transpose();
    let raw = raw.map_err(CliError::io("cannot set the terminal to raw mode"))?;
    timing.exec_us = Some(micros(start.elapsed()));
    let stream = agent.exec(command)?;
    let writer = agent.writer();
    let credit = Arc::new(Credit::new(INITIAL_WINDOW_BYTES as usize));
    forward_signals(vm, &writer, stream, raw.is_some())?;
    forward_stdin(vm, &writer, stream, &credit, raw.is_some())?;
    let mut out = Streams::default();
    let mut grants = Grants::new(stream);
    let ended = agent.pump(|from, message| {
        if from != stream {
            return Ok(ControlFlow::Continue(()));
        }
        let now = || Some(micros(start.elapsed()));
        match message {
            ToHost::Started { .. } => timing.started_us = now(),
            ToHost::Stdout(bytes) => {
                timing.first_byte_us = timing.first_byte_us.or_else(now);
                out.stdout(bytes);
                grants.taken(bytes.len(), &writer)?;
            }
            ToHost::Stderr(bytes) => {
                timing.first_byte_us = timing.first_byte_us.or_else(now);
                out.stderr(bytes);
                grants.taken(bytes.len(), &writer)?;
            }
            ToHost::StdinWindow { bytes } => credit.add(bytes as usize),
            ToHost::Exited(exited) => {
                timing.exit_us = now();
                return Ok(ControlFlow::Break(Ended::Exited(exited.outcome)));
            }
            ToHost::ExecFailed(failed) => {
                eprintln!("peregrine: {}", failed_text(&failed));
                return Ok(ControlFlow::Break(Ended::NotStarted(failed.shell_code())));
            }
            _ => {}
        }
        if out.closed {
            // Nobody reads our output any more: end as a process killed by SIGPIPE would.
            vm.stop();
            return Ok(ControlFlow::Break(Ended::Exited(Outcome::Signal(libc::SIGPIPE as u8))));
        }
        Ok(ControlFlow::Continue(()))
    })?;
    drop(raw);
    Ok(ended)
}

/// Standard output and error, unbuffered: a byte the guest wrote is a byte the user sees.
#[derive(Default)]
struct Streams {
    closed: bool,
}

impl Streams {
    fn stdout(&mut self, bytes: &[u8]) {
        let mut out = io::stdout().lock();
        self.note(out.write_all(bytes).and_then(|()| out.flush()));
    }

    fn stderr(&mut self, bytes: &[u8]) {
        self.note(io::stderr().write_all(bytes));
    }

    fn note(&mut self, result: io::Result<()>) {
        self.closed |= result.is_err();
    }
}

/// Stdin bytes that the guest has room for.
struct Credit {
    bytes: Mutex<usize>,
    more: Condvar,
}

impl Credit {
    fn new(bytes: usize) -> Self {
        Self { bytes: Mutex::new(bytes), more: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, usize> {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: usize) {
        *self.lock() += bytes;
        self.more.notify_one();
    }

    /// Takes up to `most` bytes of credit, waiting until there is some.
    fn take(&self, most: usize) -> usize {
        let guard = self.lock();
        let mut guard = self.more.wait_while(guard, |b| *b == 0).unwrap_or_else(PoisonError::into_inner);
        let taken = most.min(*guard);
        *guard -= taken;
        taken
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<(), CliError> {
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .map(drop)
        .map_err(CliError::io("cannot start a thread"))
}

fn forward_stdin(
    vm: &Arc<MicroVm>,
    writer: &AgentWriter,
    stream: u32,
    credit: &Arc<Credit>,
    raw: bool,
) -> Result<(), CliError> {
    let (vm, writer, credit) = (Arc::clone(vm), writer.clone(), Arc::clone(credit));
    spawn("stdin", move || {
        let mut buffer = vec![0; PAYLOAD_MAX_BYTES];
        let mut escape = Escape::default();
        loop {
            let room = credit.take(PAYLOAD_MAX_BYTES);
            let len = match io::stdin().read(&mut buffer[..room]) {
                Ok(len) => len,
                // A signal is not the end of the input.
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {
                    credit.add(room);
                    continue;
                }
                Err(_) => 0,
            };
            credit.add(room - len);
            if raw && escape.seen(&buffer[..len]) {
                vm.stop();
                return;
            }
            let message = if len == 0 { ToGuest::StdinEof } else { ToGuest::Stdin(&buffer[..len]) };
            if writer.send(stream, &message).is_err() || len == 0 {
                return;
            }
        }
    })
}

/// Looks for the escape key twice in a row.
#[derive(Default)]
struct Escape {
    armed: bool,
}

impl Escape {
    fn seen(&mut self, bytes: &[u8]) -> bool {
        for &byte in bytes {
            let now = byte == ESCAPE;
            if now && self.armed {
                return true;
            }
            self.armed = now;
        }
        false
    }
}

fn forward_signals(vm: &Arc<MicroVm>, writer: &AgentWriter, stream: u32, raw: bool) -> Result<(), CliError> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP, SIGWINCH])
        .map_err(CliError::io("cannot watch for signals"))?;
    let (vm, writer) = (Arc::clone(vm), writer.clone());
    spawn("signals", move || {
        let mut ending = false;
        for signal in signals.forever() {
            let message = if signal == SIGWINCH {
                if !raw {
                    continue;
                }
                let size = stdio::size();
                ToGuest::Resize { rows: size.rows, cols: size.cols }
            } else {
                if ending {
                    vm.stop();
                    return;
                }
                ending = true;
                ToGuest::Signal { signo: signal.unsigned_abs() }
            };
            // If the guest is gone, the main thread says so.
            let _ = writer.send(stream, &message);
        }
    })
}

/// The exit code for an error of this room.
pub(crate) fn failure_code(error: &CliError) -> u8 {
    match error {
        // The user ended it: as a shell reports a command killed by SIGINT.
        CliError::Stopped(StopReason::Requested) => 130,
        _ => FAILURE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_escape_is_two_keys_in_a_row_even_across_reads() {
        let mut escape = Escape::default();
        assert!(!escape.seen(b"a\x1db"));
        assert!(!escape.seen(b"\x1d"));
        assert!(escape.seen(b"\x1d"));
    }

    #[test]
    fn credit_is_never_overdrawn() {
        let credit = Credit::new(10);
        assert_eq!(credit.take(4), 4);
        assert_eq!(credit.take(100), 6);
        credit.add(3);
        assert_eq!(credit.take(100), 3);
    }
}
