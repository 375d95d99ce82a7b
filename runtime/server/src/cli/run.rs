//! `peregrine run`: the main job. One sandbox, one command, its output as it comes, its exit code.

use super::guest::{GuestArgs, Prepared};
use super::session::{self, Ended};
use super::timing::Timing;
use super::{CliError, progress, stdio};
use clap::Args;
use guest_init::parse_user;
use peregrine::artefacts::Artefacts;
use peregrine::template;
use peregrine_image::oci::ReadyImage;
use peregrine_vmm::agent::{Command, Outcome};
use peregrine_vmm::profile::Symbols;
use peregrine_vmm::{MicroVm, VmConfig};
use std::ffi::OsString;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long a guest may take to boot before it is given up: over ten times the slowest seen.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long a restored guest may take to accept its new identity: it has nothing else to do.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(60);
/// How often `--profile-guest` looks at the guest's instruction pointer.
const PROFILE_INTERVAL: Duration = Duration::from_millis(1);

/// Run a command in a microVM of its own
///
/// The first run builds the guest kernel and the default image (bash, coreutils, python3), boots the guest
/// once and freezes it as a template, and says so. Later runs with the same kernel, image, vCPUs and memory
/// restore that. Standard input is forwarded; with a terminal on both ends the command gets a
/// pseudo-terminal.
///
/// Exit code: the command's own; 128+n if signal n killed it; 126 if it cannot be executed, 127 if it is not
/// found; 125 if Peregrine or the guest failed.
///
/// Ctrl-C is sent to the command; a second one ends the microVM. On a pseudo-terminal Ctrl-C is a key like
/// any other, and Ctrl-] twice ends the microVM.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    #[command(flatten)]
    guest: GuestArgs,
    /// Set an environment variable in the guest; may be repeated
    #[arg(long = "env", short = 'e', value_name = "NAME=VALUE")]
    env: Vec<OsString>,
    /// Working directory of the command in the guest [default: the image's, else /root]
    #[arg(long, value_name = "DIR")]
    cwd: Option<OsString>,
    /// Who runs the command: USER or USER:GROUP, numbers, or names of an image that has a name itself [default: the
    /// image's, else root]
    #[arg(long, value_name = "USER")]
    user: Option<String>,
    /// Network profile; only `none` exists so far: the guest has a loopback interface and nothing else
    #[arg(long, default_value = "none", value_parser = ["none"], value_name = "PROFILE")]
    network: String,
    /// Never use a pseudo-terminal
    #[arg(long)]
    no_tty: bool,
    /// Print the stages of the run and the guest's instruction counts to standard error
    #[arg(long)]
    timing: bool,
    /// Print the outcome (and timing) as one JSON object on standard error
    #[arg(long)]
    json: bool,
    /// Copy the guest kernel's console to standard error
    #[arg(long)]
    console: bool,
    /// Boot the guest instead of restoring its template; implied by --console
    #[arg(long)]
    boot: bool,
    /// Sample the guest kernel while it runs (with --boot, from its first instruction on); write a flame
    /// graph if FILE ends in .svg, else folded stacks
    ///
    /// Stacks are found by scanning: a frame may be missing, and seldom one is wrong.
    #[arg(long, value_name = "FILE")]
    profile_guest: Option<PathBuf>,
    /// The command and its arguments [default: the image's entrypoint and command]
    #[arg(last = true, required_unless_present = "image", value_name = "CMD")]
    command: Vec<OsString>,
}

impl RunArgs {
    /// What is asked for can only be had of a guest that boots.
    fn boots(&self) -> bool {
        self.boot || self.console
    }
}

/// Does the verb; the value is the exit code.
pub(crate) fn run(args: &RunArgs, cache: Option<PathBuf>) -> Result<u8, CliError> {
    let begun = Instant::now();
    let mut command = command(args)?;
    let Prepared { artefacts, image } = args.guest.prepare(cache, progress::for_stderr().as_mut())?;
    if let Some(image) = &image {
        complete(&mut command, args, image)?;
    }
    if let (Some(user), None, None) = (&args.user, &image, command.user) {
        let limit = "must be a number or two with a colon, unless the image has a name";
        return Err(CliError::Argument { what: "--user", given: user.clone(), limit });
    }
    if command.argv.is_empty() {
        return Err(CliError::NoCommand);
    }
    let config = config(args, &artefacts);
    // Everything is checked before a template is made of it.
    let mut timing;
    let (vm, agent) = if args.boots() {
        let checked = config.check()?;
        timing = Timing::new(begun.elapsed());
        let vm = Arc::new(MicroVm::boot(checked)?);
        let agent = session::boot(&vm, BOOT_TIMEOUT, &mut timing);
        (vm, agent)
    } else {
        let mut vm = template::restore(&artefacts.store, &config, progress::for_stderr().as_mut())?;
        timing = Timing::new(vm.stages().start.saturating_duration_since(begun));
        if let Some(interval) = config.profile {
            vm.sample(interval)?;
        }
        let vm = Arc::new(vm);
        let agent = session::adopt(&vm, ADOPT_TIMEOUT, &mut timing);
        (vm, agent)
    };
    let result = agent.and_then(|agent| session::run(&vm, agent, &command, &mut timing));
    timing.finish(&vm);
    vm.stop();
    report(args, &artefacts, &vm, &timing, &result)?;
    result.map(Ended::exit_code)
}

fn command(args: &RunArgs) -> Result<Command, CliError> {
    let bytes = |s: &OsString| s.as_bytes().to_vec();
    let argv: Vec<Vec<u8>> = args.command.iter().map(bytes).collect();
    let env = args.env.iter().map(check_env).collect::<Result<_, _>>()?;
    let cwd = args.cwd.as_ref().map_or_else(|| b"/root".to_vec(), bytes);
    if !cwd.starts_with(b"/") {
        return Err(CliError::Argument {
            what: "--cwd",
            given: String::from_utf8_lossy(&cwd).into_owned(),
            limit: "must be an absolute path",
        });
    }
    let terminal = (!args.no_tty && stdio::is_terminal()).then(|| {
        let size = stdio::size();
        (size.rows, size.cols)
    });
    let user = args.user.as_deref().and_then(parse_user);
    Ok(Command { argv, env, cwd, terminal, stdin: true, user })
}

/// What the caller left open is as the image says.
fn complete(command: &mut Command, args: &RunArgs, image: &ReadyImage) -> Result<(), CliError> {
    let user = match &args.user {
        Some(user) => image.user(user)?,
        None => image.config.user.clone(),
    };
    command.env = image.config.env_with(&command.env, &user);
    command.user = (user.uid != 0 || user.gid != 0).then_some((user.uid, user.gid));
    if command.argv.is_empty() {
        command.argv = image.config.default_command().into_iter().map(String::into_bytes).collect();
    }
    if args.cwd.is_none() {
        command.cwd = image.config.working_dir.clone().into_bytes();
    }
    Ok(())
}

fn check_env(given: &OsString) -> Result<Vec<u8>, CliError> {
    let bytes = given.clone().into_vec();
    match bytes.iter().position(|b| *b == b'=') {
        Some(at) if at > 0 => Ok(bytes),
        _ => Err(CliError::Env { given: given.to_string_lossy().into_owned() }),
    }
}

fn config(args: &RunArgs, artefacts: &Artefacts) -> VmConfig {
    VmConfig {
        verbose: args.console,
        profile: args.profile_guest.is_some().then_some(PROFILE_INTERVAL),
        ..args.guest.config(artefacts)
    }
}

/// The flame graph of folded stacks.
fn flame_graph(folded: &str) -> Result<Vec<u8>, CliError> {
    let mut options = inferno::flamegraph::Options::default();
    "Guest kernel".clone_into(&mut options.title);
    "samples".clone_into(&mut options.count_name);
    let mut svg = Vec::new();
    inferno::flamegraph::from_lines(&mut options, folded.lines(), &mut svg)
        .map_err(|e| CliError::io("cannot draw the guest profile")(std::io::Error::other(e)))?;
    Ok(svg)
}

/// Prints and writes what was asked for beside the command's own output.
fn report(
    args: &RunArgs,
    artefacts: &Artefacts,
    vm: &MicroVm,
    timing: &Timing,
    result: &Result<Ended, CliError>,
) -> Result<(), CliError> {
    if let Some(path) = &args.profile_guest {
        let map = artefacts.system_map.as_ref().map_or(Ok(String::new()), std::fs::read_to_string);
        let symbols = Symbols::parse(&map.map_err(CliError::io("cannot read System.map"))?);
        let folded = vm.folded_samples(&symbols, &artefacts.kernel)?;
        let svg = path.extension().is_some_and(|e| e == "svg");
        let bytes = if svg { flame_graph(&folded)? } else { folded.into_bytes() };
        std::fs::write(path, bytes).map_err(CliError::io("cannot write the guest profile"))?;
    }
    if args.json {
        let (code, error) = match result {
            Ok(ended) => (ended.exit_code(), None),
            Err(error) => (session::failure_code(error), Some(error.to_string())),
        };
        let signal = match result {
            Ok(Ended::Exited(Outcome::Signal(n))) => Some(*n),
            _ => None,
        };
        let value = serde_json::json!({
            "exit_code": code, "signal": signal, "error": error, "timing": timing,
        });
        eprintln!("{value}");
    } else if args.timing {
        eprint!("{}", timing.table());
    }
    Ok(())
}
