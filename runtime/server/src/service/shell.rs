//! A shell session: one bash, whose directory, variables and functions stay from command to command.
//!
//! ```text
//! eval 'COMMAND' </dev/null; __pg NONCE      -->  stdin
//! what it writes, then NONCE:CODE            <--  stdout
//! what it writes, then NONCE                 <--  stderr
//! ```
//!
//! The marks come from a duplicate of the session's first stdout and stderr, so a command may redirect those.
//! The nonce is new for each command and nothing that ran before can know it.

use super::sandbox::{Activity, Sandbox};
use super::{ExecRequest, Service, ServiceError, ids};
use crate::conversation::{Event, Input, Output, Process};
use std::rc::Rc;

/// Keeps `$?` for the next command.
const PROLOGUE: &str = "exec 199>&1 198>&2; __pg(){ set -- \"$1\" $?; printf '%s:%d\\n' \"$1\" $2 >&199; \
                        printf '%s\\n' \"$1\" >&198; return $2; }\n";
const NONCE_DIGITS: usize = 24;
/// Longest mark: the nonce, a colon, three digits, a line feed.
const MARK_BYTES: usize = NONCE_DIGITS + 5;

/// What a command of the session came to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ShellReply {
    /// What it wrote.
    pub stdout: Vec<u8>,
    /// What it wrote to standard error.
    pub stderr: Vec<u8>,
    /// As bash gives it; of the bash itself, if it ended.
    pub exit_code: u8,
    /// There was more.
    pub truncated: bool,
}

/// A session.
#[derive(Debug)]
pub struct ShellSession {
    service: Rc<Service>,
    sandbox: Rc<Sandbox>,
    input: Input,
    output: Output,
    closed: bool,
    _activity: Activity,
}

impl Service {
    /// Opens a session.
    ///
    /// # Errors
    /// If the sandbox does not run, or has neither bash nor sh.
    pub async fn shell(self: &Rc<Self>, sandbox: &Rc<Sandbox>) -> Result<ShellSession, ServiceError> {
        let activity = sandbox.activity();
        // bash where there is one: a first shell would cost as much again as the session's.
        for argv in [&["bash", "--noprofile", "--norc"][..], &["sh"]] {
            let argv = argv.iter().map(|&word| word.to_owned()).collect();
            let request = ExecRequest { argv, ..ExecRequest::default() };
            let Process { mut output, input } = self.command(sandbox, &request, true)?;
            input
                .write(format!("{PROLOGUE}printf 'ready\\n'\n").as_bytes())
                .await
                .map_err(ServiceError::lost(&sandbox.id))?;
            let mut said = Vec::new();
            while !said.ends_with(b"ready\n") {
                match output.next().await.map_err(ServiceError::lost(&sandbox.id))? {
                    Event::Stdout(bytes) => said.extend_from_slice(&bytes),
                    Event::Stderr(_) => {}
                    Event::Exited(_) | Event::Failed { .. } => break,
                }
            }
            if said.ends_with(b"ready\n") {
                let (service, sandbox) = (Rc::clone(self), Rc::clone(sandbox));
                return Ok(ShellSession {
                    service,
                    sandbox,
                    input,
                    output,
                    closed: false,
                    _activity: activity,
                });
            }
        }
        Err(ServiceError::bad("image", "it has neither bash nor sh"))
    }
}

impl ShellSession {
    /// The bash has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Runs a command after those before it.
    ///
    /// # Errors
    /// If the sandbox ends.
    pub async fn run(&mut self, command: &str) -> Result<ShellReply, ServiceError> {
        if command.contains('\0') {
            return Err(ServiceError::bad("run", "must not hold NUL"));
        }
        let nonce = ids::random_digits(NONCE_DIGITS)?;
        let line = format!("eval '{}' </dev/null; __pg {nonce}\n", command.replace('\'', "'\\''"));
        let most = self.service.config.limits.output_bytes;
        let (mut stdout, mut stderr) = (Capture::new(&nonce, most), Capture::new(&nonce, most));
        let lost = ServiceError::lost(&self.sandbox.id);
        let (input, output) = (&self.input, &mut self.output);
        let feed = async {
            let _ = input.write(line.as_bytes()).await;
            std::future::pending::<()>().await;
        };
        let listen = async {
            loop {
                match output.next().await? {
                    Event::Stdout(bytes) => stdout.add(&bytes),
                    Event::Stderr(bytes) => stderr.add(&bytes),
                    Event::Exited(exited) => return Ok(Some(exited.shell_code())),
                    Event::Failed { code, .. } => return Ok(Some(code)),
                }
                if stdout.mark.is_some() && stderr.mark.is_some() {
                    return Ok(None);
                }
            }
        };
        let ended = tokio::select! {
            ended = listen => ended.map_err(lost)?,
            () = feed => None,
        };
        self.closed = ended.is_some();
        if self.closed {
            // No mark will come: what was held back for it is output.
            stdout.give_up();
            stderr.give_up();
        }
        let exit_code = ended.or(stdout.mark).unwrap_or_default();
        let truncated = stdout.truncated || stderr.truncated;
        Ok(ShellReply { stdout: stdout.kept, stderr: stderr.kept, exit_code, truncated })
    }
}

/// Output up to its mark.
struct Capture<'n> {
    nonce: &'n str,
    most: usize,
    kept: Vec<u8>,
    /// The end of what came, where the mark may stand.
    tail: Vec<u8>,
    /// The number behind the mark; 0 where there is none.
    mark: Option<u8>,
    truncated: bool,
}

impl<'n> Capture<'n> {
    fn new(nonce: &'n str, most: usize) -> Self {
        Self { nonce, most, kept: Vec::new(), tail: Vec::new(), mark: None, truncated: false }
    }

    fn give_up(&mut self) {
        if self.mark.is_none() {
            self.kept.append(&mut self.tail);
        }
    }

    fn add(&mut self, bytes: &[u8]) {
        self.tail.extend_from_slice(bytes);
        let nonce = self.nonce.as_bytes();
        let found = self.tail.windows(nonce.len()).position(|window| window == nonce);
        // What comes after the mark is a background process's; it is not this command's any more.
        let ends = found.and_then(|at| {
            let rest = &self.tail[at + nonce.len()..];
            let end = rest.iter().position(|&byte| byte == b'\n')?;
            let digits = std::str::from_utf8(&rest[..end]).ok()?.trim_start_matches(':');
            Some((at, digits.parse().unwrap_or(0)))
        });
        let settled = match (ends, found) {
            (Some((at, code)), _) => {
                self.mark = Some(code);
                at
            }
            (None, Some(at)) => at,
            (None, None) => self.tail.len().saturating_sub(MARK_BYTES),
        };
        let room = self.most.saturating_sub(self.kept.len()).min(settled);
        self.truncated |= room < settled;
        self.kept.extend_from_slice(&self.tail[..room]);
        self.tail.drain(..settled);
        if self.mark.is_some() {
            self.tail.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_found_however_the_bytes_are_cut() {
        let nonce = "0123456789abcdef01234567";
        let text = format!("no line feed{nonce}:42\n");
        for cut in 0..text.len() {
            let mut capture = Capture::new(nonce, 1000);
            capture.add(&text.as_bytes()[..cut]);
            assert_eq!(capture.mark, None);
            capture.add(&text.as_bytes()[cut..]);
            assert_eq!((capture.mark, capture.kept.as_slice()), (Some(42), &b"no line feed"[..]));
        }
    }

    #[test]
    fn what_is_over_the_bound_is_dropped_and_the_mark_still_found() {
        let nonce = "0123456789abcdef01234567";
        let mut capture = Capture::new(nonce, 10);
        for _ in 0..100 {
            capture.add(b"0123456789");
        }
        capture.add(nonce.as_bytes());
        capture.add(b"\n");
        assert_eq!((capture.mark, capture.kept.len(), capture.truncated), (Some(0), 10, true));
    }
}
