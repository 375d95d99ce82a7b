//! Runs every suite and rewrites `bench/runs/latest.json`, `latest.md` and dated copies of both.

use bench::machine::Machine;
use bench::record::{Recorder, Row, markdown};
use clap::Parser;
use peregrine::artefacts::Artefacts;
use std::error::Error;
use std::fs;
use std::path::Path;

/// Measure every promise and write the report
#[derive(Debug, Parser)]
struct Args {
    /// Fewer samples
    #[arg(long)]
    quick: bool,
    /// Only these suites; the other rows stay as the last report has them
    #[arg(long, value_delimiter = ',', value_name = "SUITE", value_parser = SUITES)]
    only: Vec<String>,
}

const SUITES: [&str; 8] = ["boot", "guest", "create", "exec", "fork", "hibernate", "density", "http"];

fn run(suite: &str, artefacts: &Artefacts, quick: bool) -> Result<Vec<Recorder>, Box<dyn Error>> {
    let of = |few, many| if quick { few } else { many };
    let sizes = |few, many| -> &'static [u64] { if quick { few } else { many } };
    match suite {
        "boot" => bench::boot::suite(artefacts, of(5, 10), sizes(&[256], &[128, 256, 1024])),
        "guest" => bench::guest::suite(artefacts, quick),
        "create" => {
            bench::clone::create(artefacts, of(1000, 2000), sizes(&[128, 1024], &[128, 256, 1024, 4096]))
        }
        "exec" => bench::clone::exec(artefacts, of(10, 100)),
        "fork" => bench::clone::fork(artefacts, of(100, 1000), sizes(&[0, 16], &[0, 4, 16, 64])),
        "hibernate" => bench::clone::hibernate(artefacts, of(20, 200), sizes(&[0, 16], &[0, 4, 16, 64])),
        "http" => bench::http::suite(artefacts.store.root(), of(200, 2000)),
        _ => bench::clone::density(artefacts, of(50, 200)),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    bench::clone::become_worker_if_asked();
    let args = Args::parse();
    let machine = Machine::of_this_host();
    let artefacts = bench::boot::artefacts()?;
    let mut recorders = Vec::new();
    for suite in SUITES.iter().filter(|suite| args.only.is_empty() || args.only.iter().any(|o| o == *suite)) {
        recorders.extend(run(suite, &artefacts, args.quick)?);
    }
    let mut rows: Vec<Row> = recorders.iter().map(|r| r.row(&machine)).collect();

    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
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
    print!("{text}");
    Ok(())
}
