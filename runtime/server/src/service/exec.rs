//! exec: a command from its start to its end, all it writes in one answer.

use super::sandbox::Sandbox;
use super::{Service, ServiceError};
use crate::conversation::{Event, Process, Tape};
use peregrine_vmm::agent::Command;
use serde_json::json;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Longest that a command may be allowed to run.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// What to run.
#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// More environment, `NAME=VALUE`.
    pub env: Vec<String>,
    /// Where; empty is `/root`.
    pub cwd: String,
    /// Given to its standard input, which is else empty.
    pub stdin: Option<Vec<u8>>,
    /// Longest run.
    pub timeout: Option<Duration>,
    /// Rows and columns of its terminal, if it has one.
    pub terminal: Option<(u16, u16)>,
}

impl ExecRequest {
    /// A line for the shell.
    #[must_use]
    pub fn shell(line: &str) -> Self {
        let argv = ["/bin/sh", "-c", line].map(str::to_owned).to_vec();
        Self { argv, ..Self::default() }
    }
}

/// How a command ended, and what it wrote.
#[derive(Debug, Clone, Default)]
pub struct Finished {
    /// As a shell gives it.
    pub exit_code: u8,
    /// What it wrote to standard output.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// There was more than is here.
    pub truncated: bool,
    /// From the request to its end.
    pub took: Duration,
}

impl Service {
    /// Runs a command to its end.
    ///
    /// # Errors
    /// [`ServiceError::Timeout`]: it was killed.
    pub async fn exec(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        request: &ExecRequest,
    ) -> Result<Finished, ServiceError> {
        let _activity = sandbox.activity();
        let begun = Instant::now();
        let limit = self.exec_limit(request);
        let Process { mut output, input } = self.command(sandbox, request, request.stdin.is_some())?;
        let most = self.config.limits.output_bytes;
        let mut finished = Finished::default();
        let feed = async {
            if let Some(stdin) = &request.stdin {
                let _ = input.write(stdin).await;
                let _ = input.end();
            }
            std::future::pending::<()>().await;
        };
        let collect = async {
            loop {
                match output.next().await? {
                    Event::Stdout(bytes) => keep(&mut finished.stdout, &bytes, most, &mut finished.truncated),
                    Event::Stderr(bytes) => keep(&mut finished.stderr, &bytes, most, &mut finished.truncated),
                    Event::Exited(exited) => return Ok(exited.shell_code()),
                    Event::Failed { code, text } => {
                        finished.stderr.extend_from_slice(text.as_bytes());
                        finished.stderr.push(b'\n');
                        return Ok(code);
                    }
                }
            }
        };
        let result = tokio::select! {
            result = collect => result,
            () = feed => return Err(ServiceError::Internal("unreachable".to_owned())),
            () = tokio::time::sleep(limit) => {
                drop(output);
                self.exited(sandbox, None)?;
                return Err(ServiceError::Timeout { what: "the command", limit });
            }
        };
        finished.exit_code = match result.map_err(ServiceError::lost(&sandbox.id)) {
            Ok(code) => code,
            Err(error) => {
                self.exited(sandbox, None)?;
                return Err(error);
            }
        };
        finished.took = begun.elapsed();
        self.exited(sandbox, Some(finished.exit_code))?;
        Ok(finished)
    }

    /// How long a command may run.
    pub(crate) fn exec_limit(&self, request: &ExecRequest) -> Duration {
        request.timeout.unwrap_or(Duration::from_secs(self.config.defaults.exec_timeout_s)).min(LONGEST)
    }

    /// Starts a command; that it starts is in the audit log before it is asked for.
    pub(crate) fn command(
        &self,
        sandbox: &Rc<Sandbox>,
        request: &ExecRequest,
        stdin: bool,
    ) -> Result<Process, ServiceError> {
        self.command_on(sandbox, request, stdin, |_| None)
    }

    /// As [`Service::command`]; `tape` is told the command's number.
    pub(crate) fn command_on(
        &self,
        sandbox: &Rc<Sandbox>,
        request: &ExecRequest,
        stdin: bool,
        tape: impl FnOnce(u32) -> Option<Rc<Tape>>,
    ) -> Result<Process, ServiceError> {
        let running = sandbox.running()?;
        if request.argv.is_empty() {
            return Err(ServiceError::bad("command", "must not be empty"));
        }
        if !request.cwd.is_empty() && !request.cwd.starts_with('/') {
            return Err(ServiceError::bad("cwd", "must be an absolute path"));
        }
        // The command itself may hold secrets: its program is enough to know.
        let data = json!({ "program": request.argv[0], "terminal": request.terminal.is_some() });
        self.journal.append(&sandbox.tenant, &sandbox.id, "exec.start", data)?;
        let bytes = |text: &String| text.clone().into_bytes();
        let image = &sandbox.spec.shape.image;
        let given: Vec<String> = sandbox.spec.env.iter().chain(&request.env).cloned().collect();
        let cwd = Some(&request.cwd).filter(|cwd| !cwd.is_empty()).or(image.working_dir.as_ref());
        let command = Command {
            argv: request.argv.iter().map(bytes).collect(),
            env: image.env_with(&given).into_iter().map(bytes).collect(),
            cwd: cwd.map_or_else(|| b"/root".to_vec(), bytes),
            terminal: request.terminal,
            stdin,
            user: image.user,
        };
        running.conversation.exec_on(&command, tape).map_err(ServiceError::exec(&sandbox.id))
    }

    /// A command has ended; no code: it was killed for its time.
    pub(crate) fn exited(&self, sandbox: &Sandbox, code: Option<u8>) -> Result<(), ServiceError> {
        let data = json!({ "exit_code": code, "timed_out": code.is_none() });
        self.journal.append(&sandbox.tenant, &sandbox.id, "exec.exit", data)
    }
}

/// Keeps as much as there is room for.
fn keep(kept: &mut Vec<u8>, bytes: &[u8], most: usize, truncated: &mut bool) {
    let room = most - kept.len().min(most);
    let now = bytes.len().min(room);
    kept.extend_from_slice(&bytes[..now]);
    *truncated |= now < bytes.len();
}
