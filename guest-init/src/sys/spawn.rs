//! Starting a program.
//!
//! The child shares the agent's memory until it has executed the program, and the agent stands still
//! that long (vfork's rule): no page table is copied. So the code of the child must do nothing but
//! system calls and writes to the plan and the scratch memory, which are its own for that time.

use core::ffi::{CStr, c_char};
use core::ptr;

use guest_init::Stage;

use super::raw::{clone_vfork, syscall};
use super::system::set_policy;
use super::{Errno, Fd};

const STACK_BYTES: usize = 16 * 1024;
const PATH_MAX_BYTES: usize = libc::PATH_MAX as usize;
/// Most strings of arguments and environment together.
const STRINGS_MAX: usize = 4096;

/// Memory that spawning needs, made beforehand so that spawning cannot run out of it.
#[repr(C, align(16))]
pub(crate) struct Scratch {
    stack: [u8; STACK_BYTES],
    path: [u8; PATH_MAX_BYTES],
    /// argv, a null, envp, a null.
    strings: [usize; STRINGS_MAX + 2],
}

impl Scratch {
    pub(crate) const ZERO: Scratch =
        Scratch { stack: [0; STACK_BYTES], path: [0; PATH_MAX_BYTES], strings: [0; STRINGS_MAX + 2] };
}

/// What to start.
pub(crate) struct SpawnRequest<'a, A, E> {
    /// The program as it was named: with a slash a path, else to be found in `search`.
    pub(crate) program: &'a CStr,
    /// The agent's own program instead.
    pub(crate) own: Option<&'a Fd>,
    pub(crate) argv: A,
    pub(crate) env: E,
    /// Directories with colons between.
    pub(crate) search: &'a [u8],
    /// Empty is `/`, where the agent is.
    pub(crate) cwd: &'a CStr,
    pub(crate) user: Option<(u32, u32)>,
    /// stdin, stdout, stderr. None of them may have a number below 3.
    pub(crate) stdio: [&'a Fd; 3],
    /// stdin is the session's terminal.
    pub(crate) terminal: bool,
    /// Undo [`super::be_patient`] in the child.
    pub(crate) end_patience: bool,
}

/// Why nothing was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct SpawnFailed {
    pub(crate) errno: Errno,
    pub(crate) stage: Stage,
}

/// What the child reads, and where it says what went wrong.
struct Plan {
    program: *const c_char,
    own: Option<usize>,
    argv: *const usize,
    envp: *const usize,
    search: *const u8,
    search_bytes: usize,
    path: *mut [u8; PATH_MAX_BYTES],
    cwd: *const c_char,
    user: Option<(u32, u32)>,
    stdio: [usize; 3],
    terminal: bool,
    end_patience: bool,
    failed: Option<SpawnFailed>,
}

/// Starts a program as leader of a new session and process group, with all signals unblocked.
/// Returns its process id when it runs.
pub(crate) fn spawn<'s, A, E>(
    scratch: &mut Scratch,
    request: SpawnRequest<'s, A, E>,
) -> Result<u32, SpawnFailed>
where
    A: Iterator<Item = &'s CStr>,
    E: Iterator<Item = &'s CStr>,
{
    let env_at = list_strings(&mut scratch.strings, request.argv, request.env)
        .ok_or(SpawnFailed { errno: Errno::TOOBIG, stage: Stage::Limits })?;
    let mut plan = Plan {
        program: request.program.as_ptr(),
        own: request.own.map(Fd::raw),
        argv: scratch.strings.as_ptr(),
        envp: scratch.strings[env_at..].as_ptr(),
        search: request.search.as_ptr(),
        search_bytes: request.search.len(),
        path: &raw mut scratch.path,
        cwd: if matches!(request.cwd.to_bytes(), b"" | b"/") { ptr::null() } else { request.cwd.as_ptr() },
        user: request.user,
        stdio: request.stdio.map(Fd::raw),
        terminal: request.terminal,
        end_patience: request.end_patience,
        failed: None,
    };
    let plan = &raw mut plan;
    let stack_top = scratch.stack.as_mut_ptr_range().end;
    // SAFETY: the stack ends 16-byte aligned (Scratch's layout) and is this call's alone, as `scratch` is
    // borrowed mutably; so are the plan and the path. All pointers in the plan outlive the call.
    let pid = unsafe { clone_vfork(stack_top, child, plan) }
        .map_err(|errno| SpawnFailed { errno, stage: Stage::Clone })?;
    // SAFETY: the child has written it, if at all, before this process went on.
    match unsafe { ptr::read_volatile(&raw const (*plan).failed) } {
        None => Ok(pid as u32),
        // The dead child is reaped with the orphans.
        Some(failed) => Err(failed),
    }
}

/// Fills in argv and envp, and says where envp begins.
fn list_strings<'s>(
    list: &mut [usize],
    argv: impl Iterator<Item = &'s CStr>,
    env: impl Iterator<Item = &'s CStr>,
) -> Option<usize> {
    let mut at = 0;
    let mut put = |string: usize| {
        *list.get_mut(at)? = string;
        at += 1;
        Some(at)
    };
    for string in argv {
        put(string.as_ptr() as usize)?;
    }
    let env_at = put(0)?;
    for string in env {
        put(string.as_ptr() as usize)?;
    }
    put(0)?;
    Some(env_at)
}

/// The child's whole life before the program.
///
/// # Safety
///
/// Only for `clone_vfork`, with a valid plan.
unsafe extern "C" fn child(plan: *mut Plan) -> ! {
    // SAFETY: the parent stands still and has vouched for the plan and all it points to.
    let plan = unsafe { &mut *plan };
    // SAFETY: as above.
    if let Err(failed) = unsafe { prepare(plan) } {
        plan.failed = Some(failed);
    } else {
        // SAFETY: as above.
        let errno = unsafe { execute(plan) };
        plan.failed = Some(SpawnFailed { errno, stage: Stage::Exec });
    }
    loop {
        // SAFETY: ends this process only; the parent's memory and files stay.
        let _ = unsafe { syscall(libc::SYS_exit, [127, 0, 0, 0, 0, 0]) };
    }
}

/// # Safety
///
/// Only in the child, with a valid plan.
unsafe fn prepare(plan: &Plan) -> Result<(), SpawnFailed> {
    let at = |stage| move |errno| SpawnFailed { errno, stage };
    let no_signals = 0u64;
    let mask = &raw const no_signals as usize;
    // SAFETY: pointers are the plan's or to locals; the rest changes this process's own files,
    // credentials and directory, which vfork does not share.
    unsafe {
        syscall(libc::SYS_setsid, [0; 6]).map_err(at(Stage::Session))?;
        for (number, &fd) in plan.stdio.iter().enumerate() {
            // dup2 onto another number also takes close-on-exec off.
            syscall(libc::SYS_dup2, [fd, number, 0, 0, 0, 0]).map_err(at(Stage::Stdio))?;
        }
        if plan.terminal {
            syscall(libc::SYS_ioctl, [0, libc::TIOCSCTTY as usize, 0, 0, 0, 0])
                .map_err(at(Stage::Terminal))?;
        }
        if let Some((uid, gid)) = plan.user {
            syscall(libc::SYS_setgroups, [0; 6]).map_err(at(Stage::User))?;
            syscall(libc::SYS_setgid, [gid as usize, 0, 0, 0, 0, 0]).map_err(at(Stage::User))?;
            syscall(libc::SYS_setuid, [uid as usize, 0, 0, 0, 0, 0]).map_err(at(Stage::User))?;
        }
        if !plan.cwd.is_null() {
            // As the user: it must be allowed to be there.
            syscall(libc::SYS_chdir, [plan.cwd as usize, 0, 0, 0, 0, 0]).map_err(at(Stage::Cwd))?;
        }
        if plan.end_patience {
            set_policy(libc::SCHED_OTHER).map_err(at(Stage::Session))?;
        }
        // Dispositions are the defaults: the agent has no handlers and ignores nothing.
        syscall(libc::SYS_rt_sigprocmask, [libc::SIG_SETMASK as usize, mask, 0, 8, 0, 0])
            .map_err(at(Stage::Session))?;
    }
    Ok(())
}

/// Executes the program, searching for it as execvp does; comes back only with an error.
///
/// # Safety
///
/// Only in the child, with a valid plan.
unsafe fn execute(plan: &Plan) -> Errno {
    // SAFETY: path, argv and envp are NUL- and null-terminated, by the plan.
    let try_path = |path: *const c_char| unsafe {
        syscall(libc::SYS_execve, [path as usize, plan.argv as usize, plan.envp as usize, 0, 0, 0])
    };
    if let Some(fd) = plan.own {
        let (argv, envp, flags) = (plan.argv as usize, plan.envp as usize, libc::AT_EMPTY_PATH as usize);
        // SAFETY: argv and envp as above; an empty path means the open file itself.
        let result =
            unsafe { syscall(libc::SYS_execveat, [fd, c"".as_ptr() as usize, argv, envp, flags, 0]) };
        return result.err().unwrap_or(Errno::NOENT);
    }
    // SAFETY: the plan's strings are valid, and the path memory is the child's for now.
    let (program, search, path) = unsafe {
        let search = core::slice::from_raw_parts(plan.search, plan.search_bytes);
        (CStr::from_ptr(plan.program), search, &mut *plan.path)
    };
    if program.is_empty() {
        return Errno::NOENT;
    }
    if program.to_bytes().contains(&b'/') {
        return try_path(plan.program).err().unwrap_or(Errno::NOENT);
    }
    let mut last = Errno::NOENT;
    for directory in search.split(|&byte| byte == b':') {
        if join(path, directory, program).is_none() {
            continue;
        }
        match try_path(path.as_ptr().cast()) {
            Err(Errno(libc::ENOENT | libc::ENOTDIR)) => {}
            // Found but forbidden: that is the answer unless another directory has a better one.
            Err(Errno(libc::EACCES)) => last = Errno(libc::EACCES),
            Err(errno) => return errno,
            Ok(_) => return Errno::NOENT,
        }
    }
    last
}

/// Writes `directory/program` and a NUL. An empty directory is the current one.
fn join(path: &mut [u8], directory: &[u8], program: &CStr) -> Option<()> {
    let directory = if directory.is_empty() { b"." } else { directory };
    let (head, rest) = path.split_at_mut_checked(directory.len())?;
    head.copy_from_slice(directory);
    let (slash, rest) = rest.split_first_mut()?;
    *slash = b'/';
    let program = program.to_bytes_with_nul();
    rest.get_mut(..program.len())?.copy_from_slice(program);
    Some(())
}
