//! Pulls, unpacks and optimises a 500 MB image from a real registry on loopback, beside `skopeo copy` followed by
//! `umoci unpack`, in turn: wall time and peak memory of each, as a table.

use clap::Parser;
use std::error::Error;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use tests::oci::{Compression, Layer, Layout, debian_tools};
use tests::peregrine;
use tests::registry::Registry;

/// Compare a pull with skopeo and umoci
#[derive(Debug, Parser)]
struct Args {
    /// Size of the image's files
    #[arg(long, default_value_t = 500, value_name = "MB")]
    megabytes: usize,
    /// How often each
    #[arg(long, default_value_t = 3, value_name = "N")]
    times: usize,
}

const LAYERS: usize = 5;
const SAMPLE_INTERVAL: Duration = Duration::from_millis(2);

struct Measured {
    seconds: f64,
    peak_mib: f64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    debian_tools(&["docker-registry", "skopeo", "umoci"]);
    let dir = tempfile::tempdir()?;
    let registry = Registry::start(None);
    push_image(&registry, dir.path(), args.megabytes);
    let source = format!("{}/bench:big", registry.host());
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for time in 0..args.times {
        let work = dir.path().join(time.to_string());
        std::fs::create_dir(&work)?;
        let cache = work.join("cache");
        let mut pull = Command::new(peregrine());
        pull.arg("--cache").arg(&cache).args(["image", "pull", &source]);
        ours.push(measured(&mut pull)?);

        let mut skopeo = Command::new("skopeo");
        skopeo.args(["--insecure-policy", "copy", "--src-tls-verify=false", "--quiet"]);
        skopeo.arg(format!("docker://{source}")).arg(format!("oci:{}:big", work.join("oci").display()));
        let copied = measured(&mut skopeo)?;
        let mut umoci = Command::new("umoci");
        umoci.args(["unpack", "--image"]).arg(format!("{}:big", work.join("oci").display()));
        let unpacked = measured(umoci.arg(work.join("bundle")))?;
        theirs.push(Measured {
            seconds: copied.seconds + unpacked.seconds,
            peak_mib: copied.peak_mib.max(unpacked.peak_mib),
        });
        std::fs::remove_dir_all(&work)?;
    }
    println!(
        "| {} MB, {LAYERS} layers, gzip | wall time s, median (all) | peak memory MiB |",
        args.megabytes
    );
    println!("|---|---|---|");
    print_row("peregrine image pull", ours);
    print_row("skopeo copy, umoci unpack", theirs);
    Ok(())
}

fn print_row(name: &str, mut all: Vec<Measured>) {
    let in_order: Vec<String> = all.iter().map(|one| format!("{:.2}", one.seconds)).collect();
    all.sort_by(|a, b| a.seconds.total_cmp(&b.seconds));
    let peak = all.iter().map(|one| one.peak_mib).fold(0.0, f64::max);
    println!("| {name} | {:.2} ({}) | {peak:.0} |", all[all.len() / 2].seconds, in_order.join(", "));
}

/// Runs a command to its end; its memory is the kernel's own high-water mark, looked at until then.
fn measured(command: &mut Command) -> Result<Measured, Box<dyn Error>> {
    let begun = Instant::now();
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let status_path = format!("/proc/{}/status", child.id());
    let mut peak_kib = 0_u64;
    loop {
        let status = std::fs::read_to_string(&status_path).unwrap_or_default();
        let mark = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kib = mark.and_then(|mark| mark.trim().trim_end_matches(" kB").parse().ok());
        peak_kib = peak_kib.max(kib.unwrap_or(0));
        if let Some(status) = child.try_wait()? {
            if !status.success() {
                return Err(format!("{command:?}: {status}").into());
            }
            return Ok(Measured {
                seconds: begun.elapsed().as_secs_f64(),
                peak_mib: peak_kib as f64 / 1024.0,
            });
        }
        std::thread::sleep(SAMPLE_INTERVAL);
    }
}

/// Files of 1 KiB to 1 MiB of words that compress about threefold, the same ones each time.
fn push_image(registry: &Registry, dir: &Path, megabytes: usize) {
    let layout = Layout::new(&dir.join("layout"));
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut layers = Vec::new();
    for number in 0..LAYERS {
        let (mut layer, mut bytes, mut file) = (Layer::new(), 0, 0);
        while bytes < megabytes * 1_000_000 / LAYERS {
            let size = 1024_usize << (random() % 11);
            let mut contents = Vec::with_capacity(size + 16);
            while contents.len() < size {
                contents.extend_from_slice(
                    format!("{:x} word{} ", random() & 0xfff_ffff, random() % 1000).as_bytes(),
                );
            }
            layer = layer.file(&format!("opt/l{number}/d{}/f{file}", file % 100), &contents[..size]);
            (bytes, file) = (bytes + size, file + 1);
        }
        layers.push(layout.layer(&layer.tar(), Compression::Gzip));
    }
    layout.image("big", &serde_json::json!({}), &layers);
    registry.push(&layout, "big", "bench:big", &[]);
}
