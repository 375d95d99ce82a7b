//! The command line. Each verb has a module; this one only parses, dispatches and prints errors.
//!
//! Exit codes: the command's own from `run`; 125 where Peregrine itself or the guest failed; 2 for bad usage.

mod doctor;
mod error;
mod guest;
mod image;
mod progress;
mod run;
mod session;
mod stdio;
mod template;
mod timing;

use clap::{Parser, Subcommand};
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
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Run(Box<run::RunArgs>),
    Image(image::ImageArgs),
    Template(template::TemplateArgs),
    Doctor(doctor::DoctorArgs),
    /// One microVM's process, spoken to over its standard input
    #[command(hide = true)]
    Worker,
}

/// Becomes a worker; returns only if standard input cannot be taken over.
fn worker() -> Result<u8, CliError> {
    let control = std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned();
    peregrine_vmm::worker::serve(control.map_err(CliError::io("cannot take over standard input"))?)
}

/// Runs the command line of this process.
pub(crate) fn main() -> ExitCode {
    let args = Args::parse();
    let result = match args.verb {
        Verb::Run(run) => run::run(&run, args.cache),
        Verb::Image(image) => image::image(&image, args.cache),
        Verb::Template(template) => template::template(&template, args.cache),
        Verb::Doctor(doctor) => doctor::doctor(&doctor, args.cache),
        Verb::Worker => worker(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("peregrine: {error}");
            ExitCode::from(session::failure_code(&error))
        }
    }
}
