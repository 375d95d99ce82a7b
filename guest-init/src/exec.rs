//! From an `Exec` frame to a running command. It may make pipes, a terminal and a process, and
//! watch them; strings are used where they lie in the frame.

use core::ffi::CStr;

use guest_init::{
    EXEC_CLEAN_ENV, EXEC_LAZY_STARTED, EXEC_PTY, EXEC_SELF, EXEC_STDIN, EXEC_USER, Exec, Stage,
};

use crate::stream::{Stream, Wiring};
use crate::sys::{
    Epoll, Errno, Fd, READABLE, Scratch, SpawnFailed, SpawnRequest, open_terminal, pipe, spawn,
};

/// Where programs are looked for when the environment does not say.
const SEARCH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const PATH: &CStr = c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const HOME_OF_ROOT: &CStr = c"HOME=/root";
const HOME_OF_OTHERS: &CStr = c"HOME=/";
const TERM: &CStr = c"TERM=xterm-256color";

/// What a new command needs of the agent.
pub(crate) struct Means<'a> {
    pub(crate) epoll: &'a Epoll,
    pub(crate) null: &'a Fd,
    /// The agent's own program.
    pub(crate) own: &'a Fd,
    /// The agent's scheduling is not a command's.
    pub(crate) patient: bool,
    pub(crate) scratch: &'a mut Scratch,
}

/// The ends that the child gets; closed when it has them.
struct ChildEnds {
    stdin: Option<Fd>,
    stdout: Fd,
    stderr: Option<Fd>,
}

/// Starts the command; its files will be watched under `key` and its two followers.
pub(crate) fn start(id: u32, exec: &Exec<'_>, key: u64, means: Means<'_>) -> Result<Stream, SpawnFailed> {
    let user = (exec.flags & EXEC_USER != 0).then_some((exec.uid, exec.gid));
    let (wiring, ends) = if exec.flags & EXEC_PTY != 0 {
        terminal(exec, user).map_err(|errno| SpawnFailed { errno, stage: Stage::Terminal })?
    } else {
        pipes(exec).map_err(|errno| SpawnFailed { errno, stage: Stage::Pipes })?
    };
    for (output, key) in wiring.outputs.iter().zip(key..) {
        if let Some(fd) = output {
            means
                .epoll
                .watch(fd, READABLE, key)
                .map_err(|errno| SpawnFailed { errno, stage: Stage::Pipes })?;
        }
    }
    let pid = spawn(
        means.scratch,
        SpawnRequest {
            // The decoder has refused an empty argv.
            program: exec.argv.iter().next().unwrap_or(c""),
            own: (exec.flags & EXEC_SELF != 0).then_some(means.own),
            argv: exec.argv.iter(),
            env: environment(exec, user),
            search: exec
                .env
                .iter()
                .find_map(|entry| entry.to_bytes().strip_prefix(b"PATH="))
                .unwrap_or(SEARCH),
            cwd: exec.cwd,
            user,
            stdio: [
                ends.stdin.as_ref().unwrap_or(if wiring.terminal { &ends.stdout } else { means.null }),
                &ends.stdout,
                ends.stderr.as_ref().unwrap_or(&ends.stdout),
            ],
            terminal: wiring.terminal,
            end_patience: means.patient,
        },
    )?;
    Ok(Stream::live(id, pid, wiring))
}

fn pipes(exec: &Exec<'_>) -> Result<(Wiring, ChildEnds), Errno> {
    let stdin = if exec.flags & EXEC_STDIN != 0 { Some(pipe(true)?) } else { None };
    let (stdin_ours, stdin_theirs) = stdin.map(|ends| (ends.ours, ends.theirs)).unzip();
    let (stdout, stderr) = (pipe(false)?, pipe(false)?);
    let wiring = Wiring {
        outputs: [Some(stdout.ours), Some(stderr.ours)],
        stdin: stdin_ours,
        terminal: false,
        started_lazy: exec.flags & EXEC_LAZY_STARTED != 0,
    };
    Ok((wiring, ChildEnds { stdin: stdin_theirs, stdout: stdout.theirs, stderr: Some(stderr.theirs) }))
}

fn terminal(exec: &Exec<'_>, user: Option<(u32, u32)>) -> Result<(Wiring, ChildEnds), Errno> {
    let terminal = open_terminal(exec.rows, exec.cols, user)?;
    let wiring = Wiring {
        outputs: [Some(terminal.ours), None],
        stdin: None,
        terminal: true,
        started_lazy: exec.flags & EXEC_LAZY_STARTED != 0,
    };
    Ok((wiring, ChildEnds { stdin: None, stdout: terminal.theirs, stderr: None }))
}

/// The given entries, and the agent's for what they leave open unless they are to be all.
fn environment<'a>(exec: &Exec<'a>, user: Option<(u32, u32)>) -> impl Iterator<Item = &'a CStr> {
    let given = exec.env;
    let home = if user.is_none_or(|(uid, _)| uid == 0) { HOME_OF_ROOT } else { HOME_OF_OTHERS };
    let on_terminal = exec.flags & EXEC_PTY != 0;
    let defaults = [Some(PATH), Some(home), on_terminal.then_some(TERM)];
    let defaults = if exec.flags & EXEC_CLEAN_ENV != 0 { [None; 3] } else { defaults };
    let is_open = move |entry: &&CStr| given.iter().all(|other| name(other) != name(entry));
    given.iter().chain(defaults.into_iter().flatten().filter(is_open))
}

fn name(entry: &CStr) -> Option<&[u8]> {
    entry.to_bytes().split(|&byte| byte == b'=').next()
}
