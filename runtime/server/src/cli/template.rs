//! `peregrine template`: the frozen guests that `run` restores. They are made by themselves; this makes,
//! shows and removes them.

use super::guest::GuestArgs;
use super::{CliError, progress};
use clap::{Args, Subcommand};
use peregrine::template::{self, Listed};
use peregrine_image::{Kind, Store};
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Make, show and remove templates: the frozen guests that `run` restores
#[derive(Debug, Args)]
pub(crate) struct TemplateArgs {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Make the template that `run` with the same options restores, unless there is one
    Build(GuestArgs),
    /// Show the templates: key, size on disk, last use, what each was made from, and whether `run` can use it
    List {
        /// Print one JSON array
        #[arg(long)]
        json: bool,
    },
    /// Remove templates; sandboxes that were made from them go on
    Rm(RmArgs),
}

#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct RmArgs {
    /// Keys, or as much of each as no other begins with
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
    /// All of them
    #[arg(long)]
    all: bool,
    /// Those that nothing can use any more: kernel, agent, image, CPU or program changed, or the files are
    /// damaged
    #[arg(long)]
    stale: bool,
}

/// Does the verb; the value is the exit code.
pub(crate) fn template(args: &TemplateArgs, cache: Option<PathBuf>) -> Result<u8, CliError> {
    match &args.verb {
        Verb::Build(guest) => build(guest, cache),
        Verb::List { json } => list(*json, &open(cache)?),
        Verb::Rm(rm) => remove(rm, &open(cache)?),
    }
}

fn open(cache: Option<PathBuf>) -> Result<Store, CliError> {
    Ok(cache.map_or_else(Store::open, |dir| Store::at(&dir))?)
}

fn build(guest: &GuestArgs, cache: Option<PathBuf>) -> Result<u8, CliError> {
    let mut progress = progress::for_stderr();
    let artefacts = guest.prepare(cache, progress.as_mut())?.artefacts;
    let config = guest.config(&artefacts);
    template::prepare(&artefacts.store, &config, progress.as_mut())?;
    let key = template::key(&config)?;
    println!("{} {}", key.short(), mebibytes(artefacts.store.disk_bytes(Kind::Template, &key)?));
    Ok(0)
}

fn list(json: bool, store: &Store) -> Result<u8, CliError> {
    let listed = template::list(store)?;
    if json {
        let values: Vec<_> = listed.iter().map(value).collect();
        println!("{}", serde_json::Value::from(values));
        return Ok(0);
    }
    for one in &listed {
        let made_from = one.made_from.join(", ");
        println!(
            "{}  {:>9}  {:>9}  {made_from}",
            one.key.short(),
            mebibytes(one.disk_bytes),
            ago(one.last_use)
        );
        if let Some(why) = &one.stale {
            println!("{:>12}  stale: {why}", "");
        }
    }
    Ok(0)
}

fn value(one: &Listed) -> serde_json::Value {
    let since_1970 = one.last_use.and_then(|at| at.duration_since(UNIX_EPOCH).ok());
    serde_json::json!({
        "key": one.key.as_str(), "disk_bytes": one.disk_bytes, "last_use_unix_s": since_1970.map(|d| d.as_secs()),
        "made_from": one.made_from, "fits": one.stale.is_none(), "stale": one.stale,
    })
}

fn remove(args: &RmArgs, store: &Store) -> Result<u8, CliError> {
    let listed = template::list(store)?;
    // All names are looked up before anything is removed.
    let chosen: Vec<&Listed> = if args.all || args.stale {
        listed.iter().filter(|one| args.all || one.stale.is_some()).collect()
    } else {
        args.keys.iter().map(|name| template::named(&listed, name)).collect::<Result<_, _>>()?
    };
    for one in chosen {
        if store.remove(Kind::Template, &one.key)? {
            println!("removed {}, {}", one.key.short(), mebibytes(one.disk_bytes));
        }
    }
    Ok(0)
}

fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}

/// For people.
fn ago(at: Option<SystemTime>) -> String {
    // A clock that was set back makes it now.
    let Some(elapsed) = at.map(|at| at.elapsed().unwrap_or(Duration::ZERO)) else { return "-".to_owned() };
    match elapsed.as_secs() {
        s @ 0..60 => format!("{s} s ago"),
        s @ 60..3600 => format!("{} min ago", s / 60),
        s @ 3600..172_800 => format!("{} h ago", s / 3600),
        s => format!("{} d ago", s / 86_400),
    }
}
