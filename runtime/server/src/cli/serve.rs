//! `peregrine serve`: the runner's HTTP API.

use super::{CliError, progress};
use clap::Args;
use peregrine::artefacts::{Artefacts, Wanted};
use peregrine::config::Config;
use peregrine::serve::{Start, run};
use std::io::{IsTerminal as _, Write as _};
use std::net::SocketAddr;
use std::path::PathBuf;
use tracing_subscriber::EnvFilter;

/// Serve the runner's HTTP API
///
/// Existing clients work unchanged: set `ISORUN_API_URL` and `ISORUN_API_KEY`. SIGTERM and SIGINT end it,
/// after requests that are under way.
#[derive(Debug, Args)]
pub(crate) struct ServeArgs {
    /// Configuration file (TOML); flags win over it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Address to listen on [default: 127.0.0.1:8700]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<SocketAddr>,
    /// Make an API key for this run and print it with the variables that clients read
    #[arg(long)]
    dev: bool,
    /// A name of an image that stands for another; may be repeated
    #[arg(long, value_name = "NAME=IMAGE", value_parser = alias)]
    image_alias: Vec<(String, String)>,
    /// What to log, as `info` or `peregrine=debug` [default: info]
    #[arg(long, value_name = "FILTER", default_value = "info")]
    log: String,
    /// Log in JSON, and print what is said at the start in JSON too
    #[arg(long)]
    json: bool,
}

fn alias(text: &str) -> Result<(String, String), String> {
    let (name, image) = text.split_once('=').ok_or("must be NAME=IMAGE")?;
    Ok((name.to_owned(), image.to_owned()))
}

/// Does the verb.
pub(crate) fn serve(args: &ServeArgs, cache: Option<PathBuf>, state: PathBuf) -> Result<u8, CliError> {
    let config = config(args)?;
    log(args)?;
    peregrine_vmm::vm::open_kvm()?;
    let wanted = Wanted { cache, ..Wanted::default() };
    let artefacts = Artefacts::prepare(&wanted, progress::for_stderr().as_mut())?;
    let program = std::env::current_exe().map_err(CliError::io("cannot name this program"))?;
    let (json, dev) = (args.json, args.dev);
    run(Start { config, state, artefacts, program, dev }, |address, key| ready(address, key, json))?;
    Ok(0)
}

fn config(args: &ServeArgs) -> Result<Config, CliError> {
    let mut config = match &args.config {
        Some(path) => Config::read(path)?,
        None => Config::default(),
    };
    config.listen = args.listen.unwrap_or(config.listen);
    config.image_aliases.extend(args.image_alias.iter().cloned());
    config.check()?;
    Ok(config)
}

fn log(args: &ServeArgs) -> Result<(), CliError> {
    let filter = EnvFilter::try_new(&args.log).map_err(|error| CliError::Argument {
        what: "--log",
        given: format!("{} ({error})", args.log),
        limit: "must be a level, or targets and levels",
    })?;
    let terminal = std::io::stderr().is_terminal();
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Only the command's own tests could have set one already.
    let _ = if args.json { format.json().try_init() } else { format.with_ansi(terminal).try_init() };
    Ok(())
}

/// Says where it listens, on standard output: scripts wait for it.
fn ready(address: SocketAddr, key: Option<&str>, json: bool) {
    let url = format!("http://{address}");
    let mut out = std::io::stdout().lock();
    // Nobody may be reading.
    let _ = if json {
        writeln!(out, "{}", serde_json::json!({ "url": url, "key": key }))
    } else if let Some(key) = key {
        writeln!(out, "Serving on {url}\n\nexport ISORUN_API_URL={url}\nexport ISORUN_API_KEY={key}")
    } else {
        writeln!(out, "Serving on {url}")
    };
    let _ = out.flush();
}
