//! `peregrine doctor`: what this host is, what is wrong with it, which floor to expect.

use super::{CliError, FAILURE};
use clap::Args;
use peregrine_image::{Kind, Store};
use peregrine_vmm::host::{self, KvmKind};
use peregrine_vmm::vm::open_kvm;
use serde::Serialize;
use std::path::PathBuf;

/// Say what this host can do, what is wrong with it, and which speed to expect
///
/// Exit code 0 if microVMs can run here, 125 if not.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    /// `ok`, `note` (works, but know this) or `wrong` (no microVM will run).
    verdict: Verdict,
    text: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Verdict {
    Ok,
    Note,
    Wrong,
}

/// Does the verb; the value is the exit code.
pub(crate) fn doctor(args: &DoctorArgs, cache: Option<PathBuf>) -> Result<u8, CliError> {
    let findings = [kvm(), kind(), memory(), io_uring(), artefacts(cache)];
    let healthy = findings.iter().all(|f| f.verdict != Verdict::Wrong);
    if args.json {
        println!("{}", serde_json::json!({ "healthy": healthy, "findings": findings }));
    } else {
        for f in &findings {
            let mark = match f.verdict {
                Verdict::Ok => "ok   ",
                Verdict::Note => "note ",
                Verdict::Wrong => "WRONG",
            };
            println!("{mark} {:<10} {}", f.what, f.text);
        }
    }
    Ok(if healthy { 0 } else { FAILURE })
}

fn kvm() -> Finding {
    let (verdict, text) = match open_kvm() {
        Ok(kvm) => (Verdict::Ok, format!("/dev/kvm answers, API version {}", kvm.get_api_version())),
        Err(e) => (Verdict::Wrong, e.to_string()),
    };
    Finding { what: "kvm", verdict, text }
}

fn kind() -> Finding {
    let kind = KvmKind::detect();
    let (verdict, floor) = match kind {
        KvmKind::Hardware => (Verdict::Ok, "guest kernel code runs natively"),
        KvmKind::Software => (
            Verdict::Note,
            "guest user code runs natively, guest kernel code at about 2 million instructions a second: \
             a boot takes seconds, a process start a good part of one",
        ),
    };
    Finding { what: "speed", verdict, text: format!("{kind}: {floor}") }
}

fn memory() -> Finding {
    let mib = host::memory_mib();
    let verdict = if mib < 1024 { Verdict::Note } else { Verdict::Ok };
    Finding { what: "memory", verdict, text: format!("{mib} MiB, the most one guest may have") }
}

fn io_uring() -> Finding {
    let (verdict, text) = match host::io_uring() {
        Ok(()) => (Verdict::Ok, "available".to_owned()),
        Err(e) => {
            (Verdict::Wrong, format!("not available ({e}); set the sysctl kernel.io_uring_disabled to 0"))
        }
    };
    Finding { what: "io_uring", verdict, text }
}

fn artefacts(cache: Option<PathBuf>) -> Finding {
    let store = match cache {
        Some(dir) => Store::at(&dir),
        None => Store::open(),
    };
    let built = |s: &Store, kind| s.entries(kind).is_ok_and(|entries| !entries.is_empty());
    let found =
        store.map(|s| (s.root().display().to_string(), built(&s, Kind::Kernel) && built(&s, Kind::Image)));
    let (verdict, text) = match found {
        Ok((root, true)) => (Verdict::Ok, format!("kernel and default image are built, in {root}")),
        Ok((root, false)) => (
            Verdict::Note,
            format!("kernel or default image not built yet; the first run does it, into {root}"),
        ),
        Err(e) => (Verdict::Note, e.to_string()),
    };
    Finding { what: "artefacts", verdict, text }
}
