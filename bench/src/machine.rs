//! Where and when a run was made: a figure without these is not published.

use peregrine_vmm::host::KvmKind;
use std::fs;
use std::process::Command;

/// The machine, the code and the day of a run.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Kind of KVM.
    pub host_kind: String,
    /// CPU model and count.
    pub cpu: String,
    /// Load average over one minute before the run.
    pub load: String,
    /// Commit of the code, `+` if the tree differs from it.
    pub commit: String,
    /// Day, as YYYY-MM-DD in UTC.
    pub date: String,
}

impl Machine {
    /// Reads all of it from this host.
    #[must_use]
    pub fn of_this_host() -> Self {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpuinfo
            .lines()
            .find_map(|l| l.strip_prefix("model name"))
            .map_or("unknown CPU", |rest| rest.trim_start_matches([' ', '\t', ':']));
        let count = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
        let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
        let commit = output("git", &["describe", "--always", "--dirty=+"]);
        Self {
            host_kind: KvmKind::detect().to_string(),
            cpu: format!("{count} x {model}"),
            load: load.split(' ').next().unwrap_or_default().to_owned(),
            commit: commit.unwrap_or_else(|| "unknown".to_owned()),
            date: output("date", &["-u", "+%F"]).unwrap_or_else(|| "unknown".to_owned()),
        }
    }
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
