//! `peregrine pool`: what a running daemon keeps ready.

use super::CliError;
use super::client::{Client, ServerArgs};
use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

/// Show and set what a running daemon keeps ready
///
/// A pool keeps microVMs of one image and size waiting, so that a create takes one instead of restoring it. What is
/// set here lasts: the next daemon with the same state directory keeps it too, and it wins over the configuration's.
#[derive(Debug, Args)]
pub(crate) struct PoolArgs {
    #[command(flatten)]
    server: ServerArgs,
    /// Print what the API answers, as one JSON object
    #[arg(long, global = true)]
    json: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show the pools: how many are ready, how often one was, and how long a checkout takes
    List,
    Set(SetArgs),
    Rm(RmArgs),
}

/// Keep a pool, or change the one of this image and size; what is not given stays as it is
#[derive(Debug, Args)]
struct SetArgs {
    #[command(flatten)]
    of: OfArgs,
    /// MicroVMs kept ready whatever the demand [default: 1]
    #[arg(long, value_name = "COUNT")]
    min: Option<usize>,
    /// MicroVMs that demand may raise that to [default: twice --min]
    #[arg(long, value_name = "COUNT")]
    max: Option<usize>,
    /// MicroVMs made a second in the long run [default: 100]
    #[arg(long, value_name = "COUNT")]
    refill_per_s: Option<f64>,
}

/// Keep a pool no longer; one of the configuration comes back with the next daemon
#[derive(Debug, Args)]
struct RmArgs {
    #[command(flatten)]
    of: OfArgs,
}

/// Which pool.
#[derive(Debug, Args)]
struct OfArgs {
    /// Its image, under the name that creates give
    image: String,
    /// Its virtual CPUs [default: the pool's of this image, else the daemon's default]
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,
    /// Its memory in MiB [default: the pool's of this image, else the daemon's default]
    #[arg(long, value_name = "MIB")]
    mem: Option<u64>,
}

/// Does the verb; the value is the exit code.
pub(crate) fn pool(args: &PoolArgs) -> Result<u8, CliError> {
    let client = Client::new(&args.server)?;
    let answer = match &args.verb {
        Verb::List => client.get("/v1/pools")?,
        Verb::Set(set) => self::set(&client, set)?,
        Verb::Rm(rm) => client.send("DELETE", "/v1/pools", Some(&json(&rm.of, &[])))?,
    };
    if args.json {
        println!("{answer}");
        return Ok(0);
    }
    match &args.verb {
        Verb::List => list(answer["pools"].as_array().map(Vec::as_slice).unwrap_or_default()),
        Verb::Set(_) => list(std::slice::from_ref(&answer)),
        Verb::Rm(_) => println!("removed {}", answer["id"].as_str().unwrap_or_default()),
    }
    Ok(0)
}

/// Changes the pool if it is there, and makes it if not.
fn set(client: &Client, set: &SetArgs) -> Result<Value, CliError> {
    let refill_per_s = set.refill_per_s.map(Value::from);
    let body = json(
        &set.of,
        &[
            ("min", set.min.map(Value::from)),
            ("max", set.max.map(Value::from)),
            ("refill_per_s", refill_per_s),
        ],
    );
    match client.send("PATCH", "/v1/pools", Some(&body)) {
        Err(CliError::Refusal(refusal)) if refusal.code == "pool_not_found" => {
            client.send("POST", "/v1/pools", Some(&body))
        }
        other => other,
    }
}

/// What was given, and nothing else: the rest is the daemon's to say.
fn json(of: &OfArgs, more: &[(&str, Option<Value>)]) -> Value {
    let mut body = Map::from_iter([("image".to_owned(), json!(of.image))]);
    let sizes = [("vcpus", of.vcpus.map(Value::from)), ("mem_mib", of.mem.map(Value::from))];
    for (name, value) in sizes.iter().chain(more) {
        body.extend(value.clone().map(|value| ((*name).to_owned(), value)));
    }
    Value::Object(body)
}

const HEADS: [&str; 9] =
    ["IMAGE", "VCPUS", "MIB", "READY", "MAKING", "MIN", "MAX", "HITS", "CHECKOUT P50/P99/P99.9"];

fn list(pools: &[Value]) {
    let rows: Vec<[String; 9]> = pools.iter().map(row).collect();
    let heads = HEADS.map(str::to_owned);
    let width = |column: usize| {
        rows.iter().chain([&heads]).map(|row| row[column].chars().count()).max().unwrap_or_default()
    };
    for (at, row) in [&heads].into_iter().chain(&rows).enumerate() {
        let cells = row.iter().enumerate().map(|(column, cell)| format!("{cell:<0$}", width(column)));
        println!("{}", cells.collect::<Vec<_>>().join("  ").trim_end());
        if let Some(error) = at.checked_sub(1).and_then(|at| pools[at]["error"].as_str()) {
            println!("  {error}");
        }
    }
}

fn row(pool: &Value) -> [String; 9] {
    let text = |field: &str| pool[field].as_str().map_or_else(|| pool[field].to_string(), str::to_owned);
    let count = |field: &str| pool[field].as_u64().unwrap_or_default();
    let all = count("hits") + count("misses");
    let hits = match pool["hit_rate"].as_f64().filter(|_| all > 0) {
        Some(rate) => format!("{:.1} % of {all}", 100.0 * rate),
        None => "-".to_owned(),
    };
    let quantile = |name: &str| pool["checkout_us"][name].to_string();
    let checkout = match all {
        0 => "-".to_owned(),
        _ => format!("{} us", ["p50", "p99", "p999"].map(quantile).join(" / ")),
    };
    let [image, vcpus, mib, ready, making, min, max] =
        ["image", "vcpus", "mem_mib", "ready", "making", "min", "max"].map(text);
    [image, vcpus, mib, ready, making, min, max, hits, checkout]
}
