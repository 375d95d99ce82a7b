//! A `peregrine serve` of a test's own, and the published client that drives it.

use crate::peregrine;
use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, OnceLock, PoisonError};

/// The client's versions: the law where documents disagree.
const PACKAGES: &[&str] = &["isorun@1.0.1", "node@22.23.3"];
/// What the client's MCP server needs beside it.
const MCP_PACKAGES: &[&str] = &["@modelcontextprotocol/sdk@1.29.0", "zod@4.4.3"];

/// A daemon; dropped, it is ended as a service is, and what it kept is removed.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// Its address.
    pub url: String,
    /// A key that is valid.
    pub key: String,
    state: tempfile::TempDir,
}

impl Daemon {
    /// Starts one with these lines of configuration.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(config: &str) -> Self {
        Self::start_with(config, &[])
    }

    /// The same, with these arguments more.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_with(config: &str, arguments: &[&str]) -> Self {
        let state = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let file = state.path().join("config.toml");
        std::fs::write(&file, config).unwrap_or_else(|e| panic!("{e}"));
        Self::start_in(state, &[&["--dev"], arguments].concat())
    }

    /// Starts one over the state directory of an earlier one.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_in(state: tempfile::TempDir, arguments: &[&str]) -> Self {
        Self::start_in_with(state, arguments, &[])
    }

    /// The same, with these variables more in its environment.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_in_with(state: tempfile::TempDir, arguments: &[&str], variables: &[(&str, &Path)]) -> Self {
        let mut child = Command::new(peregrine())
            .args(["serve", "--json", "--listen", "127.0.0.1:0", "--log", "warn", "--config"])
            .arg(state.path().join("config.toml"))
            .arg("--state")
            .arg(state.path().join("state"))
            .args(arguments)
            // Whatever its processes become, and whoever their parents are then, this says whose they are.
            .env("PEREGRINE_STATE", state.path().join("state"))
            .envs(variables.iter().copied())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("{e}"));
        let out = child.stdout.take().unwrap_or_else(|| panic!("a pipe"));
        let mut line = String::new();
        BufReader::new(out).read_line(&mut line).unwrap_or_else(|e| panic!("{e}"));
        let said: Value =
            serde_json::from_str(&line).unwrap_or_else(|e| panic!("the daemon said {line:?}: {e}"));
        let text = |field: &str| said[field].as_str().unwrap_or_default().to_owned();
        Self { child, url: text("url"), key: text("key"), state }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where it keeps things.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.state.path().join("state")
    }

    /// Its workers' processes, those of a daemon before it included.
    ///
    /// # Panics
    /// If `/proc` cannot be read.
    #[must_use]
    pub fn workers(&self) -> Vec<u32> {
        self.processes("worker")
    }

    /// The processes of this name that work on its state directory.
    ///
    /// # Panics
    /// If `/proc` cannot be read.
    #[must_use]
    pub fn processes(&self, name: &str) -> Vec<u32> {
        let state = self.state();
        let all = std::fs::read_dir("/proc").unwrap_or_else(|e| panic!("{e}"));
        let pids = all.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
        let ours = |pid: &u32| {
            let read = |file: &str| std::fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
            read("comm").trim_ascii() == name.as_bytes()
                && read("cmdline")
                    .split(|byte| *byte == 0)
                    .any(|word| word == state.as_os_str().as_encoded_bytes())
        };
        pids.filter(ours).collect()
    }

    /// Ends it as a service is ended, and waits; its state stays.
    #[must_use]
    pub fn end(mut self) -> tempfile::TempDir {
        let state = std::mem::replace(&mut self.state, empty());
        drop(self);
        state
    }

    /// Ends it as a service is ended; every audit chain that it kept must be sound.
    ///
    /// # Panics
    /// If one is not, or there is none.
    pub fn end_and_verify(self) {
        let home = self.end();
        let entries = std::fs::read_dir(home.path().join("state/audit")).unwrap_or_else(|e| panic!("{e}"));
        let chains: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|path| path.is_dir()).collect();
        assert!(!chains.is_empty(), "no audit log");
        for chain in chains {
            let verified = Command::new(peregrine()).args(["audit", "verify"]).arg(&chain).output();
            let verified = verified.unwrap_or_else(|e| panic!("{e}"));
            assert!(verified.status.success(), "{}: {verified:?}", chain.display());
        }
    }

    /// Most memory it ever had resident, in bytes.
    ///
    /// # Panics
    /// If it is gone.
    #[must_use]
    pub fn peak_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()));
        let status = status.unwrap_or_else(|e| panic!("{e}"));
        let kib = status.lines().find_map(|l| l.strip_prefix("VmHWM:")).unwrap_or_else(|| panic!("{status}"));
        kib.trim().trim_end_matches(" kB").parse::<u64>().unwrap_or_else(|e| panic!("{e}")) * 1024
    }

    /// Runs a program of `tests/conformance` against it, with the published client at hand.
    ///
    /// # Panics
    /// If Node cannot be run.
    #[must_use]
    pub fn node(&self, program: &str, arguments: &[&str]) -> Output {
        let client = client();
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance").join(program);
        // A module is looked for beside the file that asks for it.
        let here = client.join(program.file_name().unwrap_or_default());
        std::fs::copy(&program, &here).unwrap_or_else(|e| panic!("{}: {e}", program.display()));
        Command::new(client.join("node_modules/.bin/node"))
            .arg(&here)
            .args(arguments)
            .current_dir(&client)
            .env("ISORUN_API_URL", &self.url)
            .env("ISORUN_API_KEY", &self.key)
            .env("PEREGRINE", peregrine())
            .env("PEREGRINE_STATE", self.state())
            .env("DAEMON_PID", self.pid().to_string())
            .output()
            .unwrap_or_else(|e| panic!("node: {e}"))
    }

    /// Ends it at once, as a crash does; its state stays.
    ///
    /// # Panics
    /// If it was gone already.
    #[must_use]
    pub fn crash(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap_or_else(|e| panic!("{e}"));
        let _ = self.child.wait();
        std::mem::replace(&mut self.state, empty())
    }
}

fn empty() -> tempfile::TempDir {
    tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"))
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(Some(_))) {
            return;
        }
        // SIGTERM: it ends its sandboxes, and the workers with them.
        let _ = Command::new("kill").arg(self.pid().to_string()).status();
        let _ = self.child.wait();
    }
}

/// The folder with the published client and its Node, installed by npm on first use.
///
/// # Panics
/// If npm is missing or fails.
pub fn client() -> PathBuf {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    static CLIENT: OnceLock<PathBuf> = OnceLock::new();
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    CLIENT
        .get_or_init(|| {
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/conformance-client");
            let done = folder.join("installed");
            let wanted = [PACKAGES, MCP_PACKAGES].concat().join("\n");
            if std::fs::read_to_string(&done).is_ok_and(|text| text == wanted) {
                return folder;
            }
            std::fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
            let status = Command::new("npm")
                .args(["install", "--omit=optional", "--no-audit", "--no-fund", "--no-save"])
                .args(PACKAGES)
                .args(MCP_PACKAGES)
                .current_dir(&folder)
                .stdout(Stdio::null())
                .status()
                .unwrap_or_else(|e| panic!("npm: {e} (Debian's package is called npm)"));
            assert!(status.success(), "npm cannot install {wanted:?}");
            std::fs::write(&done, &wanted).unwrap_or_else(|e| panic!("{}: {e}", done.display()));
            folder
        })
        .clone()
}
