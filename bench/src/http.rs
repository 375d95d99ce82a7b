//! Creates over HTTP: the client's clock, from the moment a request was due to its answer. Open loop: requests
//! are sent when they are due, however long others take, and every sample counts.

use crate::record::{Promise, Recorder, Unit};
use serde_json::Value;
use std::error::Error;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Barrier, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

type Failure = Box<dyn Error>;

const DEFINITION: &str =
    "request due -> answer 201 read, client's clock, keep-alive, 128 MiB, pool kept full";
/// Creates a second of the staggered load.
const RATE_PER_S: u32 = 20;
/// Creates at once of a burst.
const BURST: usize = 100;
/// Creates one after the other until the pool is given time to fill again: they take its workers faster than it makes
/// them.
const ROUND: u32 = 40;

/// Size of the file that goes up and down.
const FILE_MIB: u32 = 32;

/// A daemon with a full pool.
struct Daemon {
    child: Child,
    address: String,
    key: String,
    home: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // SIGTERM: it ends its sandboxes and workers.
        let _ = Command::new("kill").arg(self.child.id().to_string()).status();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.home);
    }
}

impl Daemon {
    fn start(home: &Path) -> Result<Self, Failure> {
        let home = home.join(format!("bench-http-{}", std::process::id()));
        std::fs::create_dir_all(&home)?;
        let config = home.join("config.toml");
        let pool =
            format!("[[pools]]\nimage = \"default\"\nmem_mib = 128\nmin = {BURST}\nmax = {}\n", 2 * BURST);
        std::fs::write(&config, pool)?;
        let mut child = Command::new(program()?)
            .arg("--state")
            .arg(home.join("state"))
            .args(["serve", "--dev", "--json", "--listen", "127.0.0.1:0", "--log", "warn", "--config"])
            .arg(&config)
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().ok_or("no pipe")?).read_line(&mut line)?;
        let said: Value = serde_json::from_str(&line)?;
        let text = |field: &str| said[field].as_str().unwrap_or_default().to_owned();
        let address = text("url").trim_start_matches("http://").to_owned();
        let daemon = Self { child, address, key: text("key"), home };
        daemon.fill()?;
        Ok(daemon)
    }

    /// Waits until the pool is full.
    fn fill(&self) -> Result<(), Failure> {
        let mut client = self.client()?;
        for _ in 0..6000 {
            let pools = client.call("GET", "/v1/pools", "")?;
            if pools["pools"][0]["ready"].as_u64() >= Some(BURST as u64) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(20));
        }
        Err("the pool does not fill".into())
    }

    fn client(&self) -> Result<Client, Failure> {
        let stream = TcpStream::connect(&self.address)?;
        stream.set_nodelay(true)?;
        Ok(Client { reader: BufReader::new(stream), key: self.key.clone() })
    }
}

/// The release build of the command, built if it must be.
fn program() -> Result<PathBuf, Failure> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let status =
        Command::new(cargo).args(["build", "--release", "-p", "peregrine"]).current_dir(root).status()?;
    if !status.success() {
        return Err("cargo build failed".into());
    }
    Ok(std::env::current_exe()?.with_file_name("peregrine"))
}

/// One connection, one request at a time.
struct Client {
    reader: BufReader<TcpStream>,
    key: String,
}

impl Client {
    fn call(&mut self, method: &str, path: &str, body: &str) -> Result<Value, Failure> {
        let len = self.ask(method, path, body)?.ok_or("an answer without a length")?;
        let mut bytes = vec![0; len];
        self.reader.read_exact(&mut bytes)?;
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// How many bytes the answer's body has: it comes in chunks.
    fn download(&mut self, path: &str) -> Result<u64, Failure> {
        if self.ask("GET", path, "")?.is_some() {
            return Err("an answer that does not come in chunks".into());
        }
        let mut all = 0;
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            let len = u64::from_str_radix(line.trim(), 16)?;
            // With the end of its line.
            std::io::copy(&mut self.reader.by_ref().take(len + 2), &mut std::io::sink())?;
            if len == 0 {
                return Ok(all);
            }
            all += len;
        }
    }

    /// Sends a request and reads the head of its answer; the length of the body, if it is given.
    fn ask(&mut self, method: &str, path: &str, body: &str) -> Result<Option<usize>, Failure> {
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: bench\r\nauthorization: Bearer {}\r\ncontent-length: {}\r\n\r\n{body}",
            self.key,
            body.len()
        );
        self.reader.get_mut().write_all(request.as_bytes())?;
        let (mut status, mut len) = (String::new(), None);
        self.reader.read_line(&mut status)?;
        loop {
            let mut line = String::new();
            self.reader.read_line(&mut line)?;
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
                len = Some(value.trim().parse()?);
            }
            if line.trim().is_empty() {
                break;
            }
        }
        if !status.starts_with("HTTP/1.1 2") {
            let mut bytes = vec![0; len.unwrap_or(0)];
            self.reader.read_exact(&mut bytes)?;
            return Err(format!("{}: {}", status.trim(), String::from_utf8_lossy(&bytes)).into());
        }
        Ok(len)
    }

    /// A create that was due at `due`, and how long after that its answer was there.
    fn create(&mut self, due: Instant) -> Result<(Duration, String), Failure> {
        let run = self.call("POST", "/v1/runs", r#"{"image":"default","mem_mib":128,"timeout":120}"#)?;
        Ok((due.elapsed(), run["id"].as_str().unwrap_or_default().to_owned()))
    }

    fn destroy(&mut self, id: &str) -> Result<(), Failure> {
        self.call("DELETE", &format!("/v1/runs/{id}"), "").map(drop)
    }
}

fn row(variant: &str, goals: Option<(f64, f64)>) -> Recorder {
    let promise = Promise {
        name: "create over HTTP".to_owned(),
        definition: DEFINITION.to_owned(),
        goal_p50: goals.map(|goals| goals.0),
        goal_p999: goals.map(|goals| goals.1),
    };
    Recorder::new(promise, variant, Unit::Milliseconds)
}

/// One client, one create after the other, with a full pool and for as long as it holds; then creates at a steady rate;
/// then bursts; a file up and down.
///
/// # Errors
/// The first request that failed.
pub fn suite(cache: &Path, samples: u32) -> Result<Vec<Recorder>, Failure> {
    let daemon = Daemon::start(cache)?;
    let mut sequential = row("one client, one after the other", Some((1.0, 4.0)));
    let mut client = daemon.client()?;
    for n in 0..samples {
        if n % ROUND == 0 {
            eprintln!("create over HTTP, sequential: {n} of {samples}");
            daemon.fill()?;
        }
        let (took, id) = client.create(Instant::now())?;
        sequential.duration(took);
        client.destroy(&id)?;
    }
    let mut endless = row("one client, without a pause for the pool", None);
    daemon.fill()?;
    for _ in 0..samples {
        let (took, id) = client.create(Instant::now())?;
        endless.duration(took);
        client.destroy(&id)?;
    }
    daemon.fill()?;
    let staggered = spread(&daemon, samples / 2)?;
    let mut burst = row(&format!("{BURST} at once"), None);
    for n in 0..(samples / 100).max(3) {
        eprintln!("create over HTTP, bursts: {n}");
        daemon.fill()?;
        for took in at_once(&daemon)? {
            burst.duration(took);
        }
    }
    let [up, down] = files(&daemon)?;
    Ok(vec![sequential, endless, staggered, burst, up, down])
}

/// A file up and down again, some times.
fn files(daemon: &Daemon) -> Result<[Recorder; 2], Failure> {
    const TIMES: u32 = 10;
    let mut rows = ["up", "down"].map(|way| {
        let promise = Promise {
            name: "file over HTTP, a MiB".to_owned(),
            definition: format!(
                "request -> end of the answer, client's clock, of a {FILE_MIB} MiB file in memory, per MiB"
            ),
            goal_p50: None,
            goal_p999: None,
        };
        Recorder::new(promise, way, Unit::Milliseconds)
    });
    let mut client = daemon.client()?;
    let (_, id) = client.create(Instant::now())?;
    let body = "0123456789abcde\n".repeat((FILE_MIB << 20) as usize / 16);
    for n in 0..TIMES {
        eprintln!("file over HTTP: {n} of {TIMES}");
        let begun = Instant::now();
        client.call("POST", &format!("/v1/runs/{id}/files/upload?path=/tmp/file"), &body)?;
        rows[0].duration(begun.elapsed() / FILE_MIB);
        let begun = Instant::now();
        let bytes = client.download(&format!("/v1/runs/{id}/files/download?path=/tmp/file"))?;
        rows[1].duration(begun.elapsed() / FILE_MIB);
        if bytes != u64::from(FILE_MIB) << 20 {
            return Err(format!("{bytes} bytes came back").into());
        }
    }
    client.destroy(&id)?;
    Ok(rows)
}

/// Creates at a steady rate, each by the next of a few clients; one that is late counts from when it was due.
fn spread(daemon: &Daemon, samples: u32) -> Result<Recorder, Failure> {
    const CLIENTS: u32 = 32;
    let recorder = Arc::new(Mutex::new(row(&format!("{RATE_PER_S} a second, open loop"), None)));
    let begun = Instant::now() + Duration::from_millis(100);
    let mut threads = Vec::new();
    for first in 0..CLIENTS {
        let (mut client, recorder) = (daemon.client()?, Arc::clone(&recorder));
        threads.push(thread::spawn(move || {
            for n in (first..samples).step_by(CLIENTS as usize) {
                let due = begun + Duration::from_secs(1) * n / RATE_PER_S;
                thread::sleep(due.saturating_duration_since(Instant::now()));
                let (took, id) = client.create(due).map_err(|e| e.to_string())?;
                recorder.lock().unwrap_or_else(PoisonError::into_inner).duration(took);
                client.destroy(&id).map_err(|e| e.to_string())?;
            }
            Ok::<(), String>(())
        }));
    }
    for thread in threads {
        thread.join().map_err(|_| "a client panicked")??;
    }
    let recorder = Arc::into_inner(recorder).ok_or("a client is left")?;
    Ok(recorder.into_inner().unwrap_or_else(PoisonError::into_inner))
}

fn at_once(daemon: &Daemon) -> Result<Vec<Duration>, Failure> {
    let start = Arc::new(Barrier::new(BURST));
    let clients = (0..BURST).map(|_| daemon.client()).collect::<Result<Vec<_>, _>>()?;
    let threads: Vec<_> = clients
        .into_iter()
        .map(|mut client| {
            let start = Arc::clone(&start);
            thread::spawn(move || {
                start.wait();
                let (took, id) = client.create(Instant::now()).map_err(|e| e.to_string())?;
                client.destroy(&id).map_err(|e| e.to_string())?;
                Ok::<_, String>(took)
            })
        })
        .collect();
    let joined = threads.into_iter().map(|thread| Ok(thread.join().map_err(|_| "a client panicked")??));
    joined.collect()
}
