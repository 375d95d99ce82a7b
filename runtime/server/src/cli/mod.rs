//! The command line. Each verb has a module; this one only parses, dispatches and prints errors.
//!
//! Exit codes: the command's own from `run`; 125 where Peregrine itself or the guest failed; 2 for bad usage.

mod audit;
mod client;
mod doctor;
mod error;
mod guest;
mod image;
mod key;
mod pool;
mod progress;
mod run;
mod serve;
mod session;
mod stdio;
mod template;
mod timing;

use clap::{Parser, Subcommand};
use peregrine_vmm::worker;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::process::ExitCode;

pub(crate) use error::CliError;

/// Exit code for failures of Peregrine or of the guest, as distinct from the command's own (as env(1) and
/// container runtimes have it).
pub(crate) const FAILURE: u8 = 125;

/// Peregrine runs a command in a Linux microVM of its own.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
struct Args {
    /// Where built kernels and images are kept [default: $PEREGRINE_CACHE, else the XDG cache directory]
    #[arg(long, global = true, value_name = "DIR")]
    cache: Option<PathBuf>,
    /// Where keys, audit logs and sandboxes' records are kept [default: $PEREGRINE_STATE, else the XDG state directory]
    #[arg(long, global = true, value_name = "DIR")]
    state: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

impl Args {
    fn state(&self) -> Result<PathBuf, CliError> {
        let given = self.state.clone().or_else(|| std::env::var_os("PEREGRINE_STATE").map(Into::into));
        let home = || std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local/state"));
        let xdg = || std::env::var_os("XDG_STATE_HOME").map(PathBuf::from).or_else(home);
        given.or_else(|| xdg().map(|dir| dir.join("peregrine"))).ok_or_else(|| CliError::Argument {
            what: "--state",
            given: String::new(),
            limit: "must be given where neither PEREGRINE_STATE, XDG_STATE_HOME nor HOME is set",
        })
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    Serve(serve::ServeArgs),
    Image(image::ImageArgs),
    Template(template::TemplateArgs),
    Key(key::KeyArgs),
    Pool(pool::PoolArgs),
    Audit(audit::AuditArgs),
    Doctor(doctor::DoctorArgs),
    /// One microVM's process, spoken to over its standard input
    #[command(hide = true)]
    Worker,
    /// Forks itself for each worker that a daemon wants
    #[command(hide = true, name = peregrine::service::ZYGOTE_VERB)]
    Zygote,
    /// Makes one template, for a daemon
    #[command(hide = true, name = peregrine::template::maker::VERB)]
    MakeTemplate,
}

/// Becomes a worker, or what makes them, that is spoken to over standard input; returns only if that cannot be taken
/// over.
fn become_worker(serve: fn(OwnedFd) -> !) -> Result<u8, CliError> {
    let control = std::io::stdin().as_fd().try_clone_to_owned();
    serve(control.map_err(CliError::io("cannot take over standard input"))?)
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let args = Args::parse();
    let cache = args.cache.clone();
    let result = match &args.verb {
        Verb::Run(run) => run::run(run, cache),
        Verb::Image(image) => image::image(image, cache),
        Verb::Serve(serve) => args.state().and_then(|state| serve::serve(serve, cache, state)),
        Verb::Template(template) => template::template(template, cache),
        Verb::Key(key) => args.state().and_then(|state| key::key(key, &state.join("keys"))),
        Verb::Pool(pool) => pool::pool(pool),
        Verb::Audit(audit) => audit::audit(audit),
        Verb::Doctor(doctor) => doctor::doctor(doctor, cache),
        Verb::Worker => become_worker(worker::serve),
        Verb::Zygote => become_worker(worker::serve_zygote),
        Verb::MakeTemplate => {
            peregrine::template::maker::serve().map(|()| 0).map_err(CliError::io("no order"))
        }
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("peregrine: {error}");
            ExitCode::from(session::failure_code(&error))
        }
    }
}
