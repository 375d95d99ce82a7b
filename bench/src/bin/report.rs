//! Runs every suite and rewrites `bench/runs/latest.json`, `latest.md` and dated copies of both.

use bench::machine::Machine;
use bench::record::{Row, markdown};
use clap::Parser;
use std::error::Error;
use std::fs;
use std::path::Path;

/// Measure every promise and write the report
#[derive(Debug, Parser)]
struct Args {
    /// Fewer samples: under five minutes
    #[arg(long)]
    quick: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    let machine = Machine::of_this_host();
    let (samples, sizes): (u32, &[u64]) = if args.quick { (5, &[256]) } else { (10, &[128, 256, 1024]) };
    let artefacts = bench::boot::artefacts()?;
    let mut recorders = bench::boot::suite(&artefacts, samples, sizes)?;
    recorders.extend(bench::guest::suite(&artefacts, args.quick)?);
    let rows: Vec<Row> = recorders.iter().map(|r| r.row(&machine)).collect();

    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("runs");
    fs::create_dir_all(&dir)?;
    let latest = dir.join("latest.json");
    let before: Vec<Row> =
        fs::read(&latest).ok().and_then(|json| serde_json::from_slice(&json).ok()).unwrap_or_default();
    let text = markdown(&rows, &before, &machine);
    let json = serde_json::to_vec_pretty(&rows)?;
    for name in ["latest".to_owned(), machine.date.clone()] {
        fs::write(dir.join(format!("{name}.json")), &json)?;
        fs::write(dir.join(format!("{name}.md")), &text)?;
    }
    print!("{text}");
    Ok(())
}
