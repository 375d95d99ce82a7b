//! Runs every suite and rewrites `bench/runs/latest.json`, `latest.md`, dated copies of both, and the plots.

use bench::machine::Machine;
use bench::plot::plot;
use bench::record::{Recorder, Row, markdown};
use bench::{clone, density, fork, hibernate};
use clap::Parser;
use peregrine::artefacts::Artefacts;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};

/// Measure every promise and write the report
#[derive(Debug, Parser)]
struct Args {
    /// Fewer samples
    #[arg(long)]
    quick: bool,
    /// Only these suites; the other rows stay as the last report has them
    #[arg(long, value_delimiter = ',', value_name = "SUITE", value_parser = SUITES)]
    only: Vec<String>,
    /// At most so many samples of each: a look, no report
    #[arg(long, value_name = "SAMPLES")]
    at_most: Option<u32>,
    /// Write there, not into bench/runs
    #[arg(long, value_name = "DIRECTORY")]
    into: Option<PathBuf>,
}

const SUITES: [&str; 10] =
    ["boot", "guest", "create", "exec", "fork", "children", "hibernate", "density", "sustained", "http"];

fn run(suite: &str, artefacts: &Artefacts, args: &Args) -> Result<Vec<Recorder>, Box<dyn Error>> {
    let quick = args.quick;
    let of = |few: u32, many| args.at_most.unwrap_or(u32::MAX).min(if quick { few } else { many });
    let sizes = |few, many| -> &'static [u64] { if quick { few } else { many } };
    let counts = |few, many| -> &'static [u32] { if quick { few } else { many } };
    let dirty = sizes(&[0, 16], &[0, 4, 16, 64, 256]);
    match suite {
        "boot" => bench::boot::suite(artefacts, of(5, 10), sizes(&[256, 1024], &[128, 256, 1024])),
        "guest" => bench::guest::suite(artefacts, quick),
        "create" => clone::create(artefacts, of(250, 1000), sizes(&[128, 1024], &[128, 256, 1024, 4096])),
        "exec" => clone::exec(artefacts, of(10, 100)),
        "fork" => fork::fork(artefacts, of(100, 1000), dirty),
        "children" => fork::children(artefacts, of(5, 20), counts(&[8], &[2, 8, 32, 100])),
        "hibernate" => hibernate::hibernate(artefacts, of(20, 200), dirty),
        "density" => density::density(artefacts, counts(&[50], &[50, 200])),
        "http" => bench::http::suite(artefacts.store.root(), of(200, 2000)),
        _ => density::sustained(artefacts, of(5, 30)),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    clone::become_worker_if_asked();
    let args = Args::parse();
    let machine = Machine::of_this_host();
    let artefacts = bench::boot::artefacts()?;
    let mut recorders = Vec::new();
    for suite in SUITES.iter().filter(|suite| args.only.is_empty() || args.only.iter().any(|o| o == *suite)) {
        recorders.extend(run(suite, &artefacts, &args)?);
    }
    let mut rows: Vec<Row> = recorders.iter().map(|r| r.row(&machine)).collect();

    let dir = args.into.unwrap_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("runs"));
    fs::create_dir_all(&dir)?;
    let latest = dir.join("latest.json");
    let before: Vec<Row> =
        fs::read(&latest).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    if !args.only.is_empty() {
        let kept = before.iter().filter(|old| rows.iter().all(|new| new.promise != old.promise)).cloned();
        rows.extend(kept.collect::<Vec<_>>());
    }
    let text = markdown(&rows, &before, &machine);
    let json = serde_json::to_vec_pretty(&rows)?;
    for name in ["latest".to_owned(), machine.date.clone()] {
        fs::write(dir.join(format!("{name}.json")), &json)?;
        fs::write(dir.join(format!("{name}.md")), &text)?;
    }
    plot(&rows, &dir)?;
    print!("{text}");
    Ok(())
}
