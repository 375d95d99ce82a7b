//! Runs the build tools. Children stay in the caller's process group, so that a terminal's Ctrl-C ends
//! them with us; a `Tool` dropped on an error path kills and reaps its child. Never goes through a shell.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;

use crate::error::Error;

/// What is kept of a tool's error output: its end says what went wrong.
const KEPT_ERROR_LINES: usize = 40;
const KEPT_LINE_BYTES: usize = 400;

/// A running build tool. Its standard output is read by the caller, its standard error is kept for the error
/// message.
#[derive(Debug)]
pub(crate) struct Tool {
    child: Child,
    program: String,
    errors: Option<JoinHandle<String>>,
    reaped: bool,
}

impl Tool {
    /// Starts `command` with no input and a plain C locale, since its output is read by programs.
    pub(crate) fn start(command: &mut Command) -> Result<Self, Error> {
        let program = program_name(command.get_program());
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .env("LC_ALL", "C")
            .spawn()
            .map_err(|source| Error::ToolUnusable { program: program.clone(), source })?;
        let errors = child.stderr.take().map(|stderr| std::thread::spawn(move || last_lines(stderr)));
        Ok(Self { child, program, errors, reaped: false })
    }

    /// The tool's standard output; `None` the second time.
    pub(crate) fn stdout(&mut self) -> Option<ChildStdout> {
        self.child.stdout.take()
    }

    /// Waits for the end. Anything but exit code 0 is an error that carries the last lines of standard error.
    pub(crate) fn finish(self) -> Result<(), Error> {
        let program = self.program.clone();
        let (status, errors) = self.wait()?;
        if status.success() {
            return Ok(());
        }
        Err(Error::ToolFailed { program, status: status.to_string(), output: errors })
    }

    /// Waits for the end, whatever it is: the status and the last lines of standard error.
    fn wait(mut self) -> Result<(ExitStatus, String), Error> {
        // An unread pipe would make the tool fail or hang; nobody wants the rest.
        drop(self.child.stdout.take());
        let status = self
            .child
            .wait()
            .map_err(|source| Error::ToolUnusable { program: self.program.clone(), source })?;
        self.reaped = true;
        let errors = self.errors.take().and_then(|reader| reader.join().ok()).unwrap_or_default();
        Ok((status, errors))
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if !self.reaped {
            // Both fail only if it has ended already, which is what is wanted.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Runs `command` to its end, handing each line of standard output to `on_line`.
pub(crate) fn run(command: &mut Command, mut on_line: impl FnMut(&str)) -> Result<(), Error> {
    let mut tool = Tool::start(command)?;
    if let Some(stdout) = tool.stdout() {
        for_each_line(stdout, &mut on_line);
    }
    tool.finish()
}

/// Runs `command` to its end and returns its standard output with its status: for tools whose exit code is an
/// answer.
pub(crate) fn ask(command: &mut Command) -> Result<(ExitStatus, String), Error> {
    let mut tool = Tool::start(command)?;
    let mut text = String::new();
    if let Some(stdout) = tool.stdout() {
        for_each_line(stdout, &mut |line| {
            text.push_str(line);
            text.push('\n');
        });
    }
    Ok((tool.wait()?.0, text))
}

/// Where `program` is: in PATH, or in the directories for administration that a user's PATH lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|candidate| candidate.is_file())
}

fn program_name(program: &OsStr) -> String {
    Path::new(program).file_name().unwrap_or(program).to_string_lossy().into_owned()
}

/// Lines of `stream` until its end; bytes that are not UTF-8 are replaced, read errors end it.
fn for_each_line(stream: impl Read, on_line: &mut dyn FnMut(&str)) {
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line).is_ok_and(|read| read > 0) {
        let text = String::from_utf8_lossy(&line);
        on_line(text.trim_end_matches(['\n', '\r']));
        line.clear();
    }
}

fn last_lines(stream: impl Read) -> String {
    let mut kept = VecDeque::new();
    for_each_line(stream, &mut |line| {
        if kept.len() == KEPT_ERROR_LINES {
            kept.pop_front();
        }
        let end = line.floor_char_boundary(KEPT_LINE_BYTES);
        kept.push_back(line[..end].to_owned());
    });
    Vec::from(kept).join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failing_tool_reports_its_status_and_the_last_lines_of_its_errors() {
        let mut command = Command::new("sh");
        command.args(["-c", "for i in $(seq 100); do echo line $i >&2; done; exit 7"]);
        let error = run(&mut command, |_| {}).unwrap_err().to_string();
        assert!(error.starts_with("sh failed (exit status: 7)\n"), "{error}");
        assert!(error.ends_with("\n    line 100"), "{error}");
        assert!(!error.contains("line 60\n"), "{error}");
    }

    #[test]
    fn a_tool_that_does_not_exist_is_named() {
        let error = run(&mut Command::new("/nonexistent/mkfs.wrong"), |_| {}).unwrap_err();
        assert!(error.to_string().starts_with("cannot run mkfs.wrong:"), "{error}");
    }

    #[test]
    fn a_tool_dropped_half_way_is_gone() {
        let tool = Tool::start(Command::new("sleep").arg("1000")).unwrap();
        let proc_dir = PathBuf::from(format!("/proc/{}", tool.child.id()));
        assert!(proc_dir.exists());
        drop(tool);
        assert!(!proc_dir.exists());
    }

    #[test]
    fn output_is_split_in_lines_and_odd_bytes_do_not_stop_it() {
        let mut lines = Vec::new();
        run(Command::new("printf").arg(r"a\r\n\377\nlast"), |line| lines.push(line.to_owned())).unwrap();
        assert_eq!(lines, ["a", "\u{fffd}", "last"]);
    }
}
