//! The `guest` suite: what guest-kernel work costs inside a microVM, and how many of the guest kernel's instructions
//! were emulated for it. The program is `bench/guest/guestbench.rs`; the levers can be switched off, to measure before
//! beside after.

use crate::boot::{TIMEOUT, config};
use crate::record::{Promise, Recorder, Unit};
use peregrine::artefacts::Artefacts;
use peregrine_vmm::agent::{Agent, Command};
use peregrine_vmm::{MicroVm, VmConfig};
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process;
use std::time::Duration;

/// One thing that guestbench measures.
struct Item {
    name: &'static str,
    definition: &'static str,
    /// Samples in one run.
    n: u32,
    goal_p50_ms: Option<f64>,
}

const fn item(name: &'static str, definition: &'static str, n: u32, goal: Option<f64>) -> Item {
    Item { name, definition, n, goal_p50_ms: goal }
}

const ITEMS: &[Item] = &[
    item("null-call", "one getppid(2)", 200, Some(0.120)),
    item("fault-1mib", "first write to a 4 KiB page of fresh anonymous memory, 1 MiB in all", 20, Some(0.3)),
    item("fault-64mib", "the same, 64 MiB in all", 3, Some(0.02)),
    item("huge-64mib", "the same, 64 MiB in all, MADV_HUGEPAGE", 3, None),
    item("fork", "fork, exit of the child, wait; small process", 10, Some(250.0)),
    item("vfork", "vfork, exit of the child, wait", 10, None),
    item(
        "spawn-static",
        "posix_spawn from tmpfs of a static program that is nothing but exit_group (no libc), wait",
        10,
        Some(120.0),
    ),
    item("spawn-std", "the same of a static program with Rust's and glibc's start-up, 1.3 MiB", 10, None),
    item("spawn-dynamic", "posix_spawn of /usr/bin/true, wait", 5, None),
    item("pipe-1mib", "1 MiB into a pipe and out again, 64 KiB at a time", 10, Some(30.0)),
    item("switch", "one byte to a child and back over pipes: two switches, four calls", 50, None),
    item("read-cold", "reading /usr/bin/python3 from the root image, first time", 1, None),
    item("read-warm", "reading /usr/bin/bash from the page cache", 5, None),
    item("python-pass", "posix_spawn of python3 -c pass, wait", 3, Some(1500.0)),
    item("python-50mb", "posix_spawn of python3 that fills a bytes object of 50 MB, wait", 2, Some(1500.0)),
];

/// Kernel parameters that switch the levers of software KVM off: the later word wins, and `bulk_memory=`
/// replaces ours.
pub const LEVERS_OFF: &str = "ring0_doorbell=off syscall_by_fault bulk_memory=0 file_around=0,0 cow_around=0 \
                              pipe_runs=0 vsock_rx=4 pelt_step=1 tick_stretch=1 peregrine.thp=0 peregrine.batch=0";

/// As shipped; the same with ring 0 left to KVM's emulator; nothing of ours.
const VARIANTS: [(&str, &str); 3] =
    [("as shipped", ""), ("ring 0 by KVM", "ring0_doorbell=off"), ("levers off", LEVERS_OFF)];

/// Builds a program of `bench/guest` with rustc, beside the other build products.
fn build(name: &str, flags: &[&str]) -> Result<PathBuf, Box<dyn Error>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (out, source) = (root.join("../target").join(name), root.join(format!("guest/{name}.rs")));
    let common = ["--edition=2024", "-O", "-Cstrip=symbols", "-Cpanic=abort"];
    let status =
        process::Command::new("rustc").args(common).args(flags).arg("-o").arg(&out).arg(source).status()?;
    if status.success() { Ok(out) } else { Err(format!("rustc {name}: {status}").into()) }
}

/// Builds guestbench and the program that it spawns.
///
/// # Errors
/// If rustc is missing or refuses.
pub fn programs() -> Result<[PathBuf; 2], Box<dyn Error>> {
    let bare = [
        "-Clink-arg=-nostartfiles",
        "-Clink-arg=-nostdlib",
        "-Clink-arg=-static",
        "-Crelocation-model=static",
    ];
    Ok([build("guestbench", &["-Ctarget-feature=+crt-static"])?, build("exits", &bare)?])
}

struct Bench {
    vm: MicroVm,
    agent: Agent,
}

impl Bench {
    fn boot(config: &VmConfig) -> Result<Self, Box<dyn Error>> {
        let vm = MicroVm::boot(config.check()?)?;
        let (agent, _) = vm.connect_agent(TIMEOUT)?;
        let mut bench = Self { vm, agent };
        for (program, at) in programs()?.iter().zip(["/tmp/guestbench", "/tmp/guestbench-exits"]) {
            let script = format!("cat > {at} && chmod +x {at}");
            bench.agent.output(&Command::new(&["/bin/sh", "-c", &script]), &std::fs::read(program)?)?;
        }
        Ok(bench)
    }

    /// Runs one item; the samples in nanoseconds and the instructions emulated for all of it.
    fn run(&mut self, name: &str, n: u32) -> Result<(Vec<u64>, u64), Box<dyn Error>> {
        let before = self.vm.emulated_instructions().unwrap_or(0);
        let command = Command::new(&["/tmp/guestbench", name, &n.to_string()]);
        let output = self.agent.output(&command, b"")?;
        if output.code() != 0 {
            let text = String::from_utf8_lossy(&output.stderr);
            return Err(format!("guestbench {name} exited with {}: {text}", output.code()).into());
        }
        let samples = String::from_utf8(output.stdout)?.lines().map(str::parse).collect::<Result<_, _>>()?;
        Ok((samples, self.vm.emulated_instructions().unwrap_or(0) - before))
    }
}

/// Runs every item with the levers on and off; `quick` runs them as shipped only.
///
/// # Errors
/// The first item that failed.
pub fn suite(artefacts: &Artefacts, quick: bool) -> Result<Vec<Recorder>, Box<dyn Error>> {
    let variants = if quick { &VARIANTS[..1] } else { &VARIANTS };
    let mut rows = Vec::new();
    for (variant, parameters) in variants {
        let config = VmConfig { kernel_parameters: (*parameters).to_owned(), ..config(artefacts, 512) };
        let mut bench = Bench::boot(&config)?;
        let (_, overhead) = bench.run("nothing", 1)?;
        for item in ITEMS {
            eprintln!("guestbench {} ({variant})", item.name);
            let (samples, emulated) = bench.run(item.name, item.n)?;
            rows.extend(record(item, variant, &samples, emulated.saturating_sub(overhead)));
        }
        let (calls, ring0) = (bench.vm.doorbell().calls, bench.vm.ring0_instructions());
        let calls = if *parameters == LEVERS_OFF { calls } else { 0 };
        let ring0 = if parameters.is_empty() { 0 } else { ring0 };
        if calls + ring0 > 0 {
            return Err(format!("{calls} doorbell calls, {ring0} instructions of ours: {variant}").into());
        }
    }
    Ok(rows)
}

fn record(item: &Item, variant: &str, samples: &[u64], emulated: u64) -> [Recorder; 2] {
    let name = format!("guest: {}", item.name);
    let promise = Promise {
        name: name.clone(),
        definition: item.definition.to_owned(),
        goal_p50: item.goal_p50_ms,
        goal_p999: None,
    };
    let mut time = Recorder::new(promise, variant, Unit::Milliseconds);
    samples.iter().for_each(|ns| time.duration(Duration::from_nanos(*ns)));
    let counted = Promise {
        name: format!("{name}, emulated"),
        definition: format!(
            "guest-kernel instructions emulated, by KVM or the VMM, for one sample of {}",
            item.name
        ),
        goal_p50: None,
        goal_p999: None,
    };
    let mut instructions = Recorder::new(counted, variant, Unit::Thousands);
    instructions.count(emulated / (samples.len().max(1) as u64));
    [time, instructions]
}
