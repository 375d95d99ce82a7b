//! Registries on loopback: Debian's `docker-registry`, which is the real thing, and one of our own that fails on
//! demand.

use crate::oci::{Layout, debian_tools};
use std::collections::HashMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Debian's registry; it ends when this is dropped.
#[derive(Debug)]
pub struct Registry {
    child: Child,
    host: String,
    _dir: tempfile::TempDir,
}

impl Registry {
    /// Starts one; with `htpasswd` lines it wants their passwords.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start(htpasswd: Option<&str>) -> Self {
        debian_tools(&["docker-registry", "skopeo"]);
        let dir = tempfile::tempdir().unwrap_or_else(|e| panic!("{e}"));
        let storage = dir.path().join("storage");
        let mut config = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            storage.display()
        );
        if let Some(lines) = htpasswd {
            let path = dir.path().join("htpasswd");
            fs::write(&path, lines).unwrap_or_else(|e| panic!("{e}"));
            config += &format!("auth:\n  htpasswd:\n    realm: test\n    path: {}\n", path.display());
        }
        let path = dir.path().join("config.yml");
        fs::write(&path, config).unwrap_or_else(|e| panic!("{e}"));
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&path)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|e| panic!("docker-registry: {e}"));
        let stderr = child.stderr.take().unwrap_or_else(|| panic!("no stderr"));
        let mut lines = BufReader::new(stderr).lines().map_while(Result::ok);
        let mut said = Vec::new();
        // `… msg="listening on 127.0.0.1:40001" …`
        let host = lines.by_ref().find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            let host = rest.split(['"', ',', ' ']).next().map(str::to_owned);
            said.push(line.clone());
            host
        });
        let host = host.unwrap_or_else(|| panic!("docker-registry does not listen: {said:?}"));
        // It must not block on a full pipe.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, host, _dir: dir }
    }

    /// `127.0.0.1:PORT`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Pushes an image of a layout with skopeo.
    ///
    /// # Panics
    /// If skopeo does.
    pub fn push(&self, layout: &Layout, tag: &str, name: &str, extra: &[&str]) {
        let output = Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--dest-tls-verify=false", "--preserve-digests", "--quiet"])
            .args(extra)
            .arg(format!("oci:{}:{tag}", layout.dir().display()))
            .arg(format!("docker://{}/{name}", self.host))
            .output()
            .unwrap_or_else(|e| panic!("skopeo: {e}"));
        assert!(output.status.success(), "skopeo: {}", String::from_utf8_lossy(&output.stderr));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How the failing registry fails.
#[derive(Debug, Clone, Default)]
pub struct Faults {
    /// Only with this bearer token, which its token service gives to `me` with the password `secret`.
    pub token: Option<String>,
    /// The body of each blob's first answer ends after so many bytes.
    pub cut_after_bytes: Option<usize>,
    /// So many requests are answered with 503 first.
    pub unavailable: usize,
    /// Ranges are ignored: everything is sent again.
    pub no_ranges: bool,
    /// Every blob has one bit flipped.
    pub flip: bool,
    /// Everything is answered with this status.
    pub status: Option<u16>,
}

#[derive(Default)]
struct Served {
    /// Path, and its `Range`, of every request.
    requests: Vec<(String, String)>,
    cut: Vec<String>,
}

/// A registry that serves one layout's blobs and its images by tag, and fails as told.
pub struct FailingRegistry {
    host: String,
    stop: Arc<AtomicBool>,
    served: Arc<Mutex<Served>>,
}

impl FailingRegistry {
    /// Serves `repository` from `layout`; tags are the layout's.
    ///
    /// # Panics
    /// If it cannot listen.
    #[must_use]
    pub fn start(layout: &Layout, faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap_or_else(|e| panic!("{e}"));
        let host = listener.local_addr().unwrap_or_else(|e| panic!("{e}")).to_string();
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Served::default())));
        let (stopped, log, dir, name) =
            (Arc::clone(&stop), Arc::clone(&served), layout.dir().to_owned(), host.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (log, dir, name, faults) = (Arc::clone(&log), dir.clone(), name.clone(), faults.clone());
                std::thread::spawn(move || serve(stream, &dir, &name, &faults, &log));
            }
        });
        Self { host, stop, served }
    }

    /// `127.0.0.1:PORT`.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Path and range of every request so far.
    #[must_use]
    pub fn requests(&self) -> Vec<(String, String)> {
        self.served.lock().unwrap_or_else(PoisonError::into_inner).requests.clone()
    }
}

impl Drop for FailingRegistry {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        // Wakes the listener.
        let _ = TcpStream::connect(&self.host);
    }
}

/// One request per connection.
fn serve(mut stream: TcpStream, dir: &Path, host: &str, faults: &Faults, log: &Mutex<Served>) {
    let mut lines = BufReader::new(&stream).lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let headers: HashMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.split_once(": ").map(|(k, v)| (k.to_ascii_lowercase(), v.to_owned())))
        .collect();
    let range = headers.get("range").cloned().unwrap_or_default();
    let (number, first_time) = {
        let mut served = log.lock().unwrap_or_else(PoisonError::into_inner);
        served.requests.push((path.clone(), range.clone()));
        let first_time = !served.cut.contains(&path);
        if first_time && path.contains("/blobs/") {
            served.cut.push(path.clone());
        }
        (served.requests.len(), first_time)
    };
    let authorized = faults.token.as_ref().is_none_or(|token| {
        headers.get("authorization").is_some_and(|given| *given == format!("Bearer {token}"))
    });
    let (status, extra, mut body) = if number <= faults.unavailable {
        (503, String::new(), b"{}".to_vec())
    } else if let Some(status) = faults.status {
        (status, String::new(), br#"{"errors":[{"code":"X","message":"told to"}]}"#.to_vec())
    } else if path.starts_with("/token") {
        // me:secret
        let known = headers.get("authorization").is_some_and(|given| given == "Basic bWU6c2VjcmV0");
        let token = faults.token.clone().unwrap_or_default();
        if known {
            (200, String::new(), format!(r#"{{"token":"{token}"}}"#).into_bytes())
        } else {
            (401, String::new(), b"{}".to_vec())
        }
    } else if !authorized {
        let challenge =
            format!("WWW-Authenticate: Bearer realm=\"http://{host}/token\",service=\"test\"\r\n");
        (401, challenge, b"{}".to_vec())
    } else {
        answer(dir, &path, &range, faults)
    };
    let length = body.len();
    if path.contains("/blobs/") {
        if faults.flip && !body.is_empty() {
            body[0] ^= 1;
        }
        if let Some(cut) = faults.cut_after_bytes.filter(|_| first_time) {
            body.truncate(cut);
        }
    }
    let head =
        format!("HTTP/1.1 {status} Status\r\nContent-Length: {length}\r\nConnection: close\r\n{extra}\r\n");
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
    let _ = stream.shutdown(std::net::Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
}

fn answer(dir: &Path, path: &str, range: &str, faults: &Faults) -> (u16, String, Vec<u8>) {
    let name = path.rsplit('/').next().unwrap_or_default();
    let digest = if name.starts_with("sha256:") {
        name.to_owned()
    } else {
        let index = fs::read(dir.join("index.json")).unwrap_or_default();
        let index: serde_json::Value = serde_json::from_slice(&index).unwrap_or_default();
        let all = index["manifests"].as_array().cloned().unwrap_or_default();
        let tag = |one: &&serde_json::Value| one["annotations"]["org.opencontainers.image.ref.name"] == name;
        all.iter().find(tag).and_then(|one| one["digest"].as_str()).unwrap_or_default().to_owned()
    };
    let Ok(body) = fs::read(dir.join("blobs").join(digest.replace(':', "/"))) else {
        return (404, String::new(), br#"{"errors":[{"message":"unknown"}]}"#.to_vec());
    };
    let from = range
        .strip_prefix("bytes=")
        .and_then(|range| range.strip_suffix('-'))
        .and_then(|n| n.parse::<usize>().ok());
    match from.filter(|from| !faults.no_ranges && *from < body.len()) {
        Some(from) => {
            let total = body.len();
            (206, format!("Content-Range: bytes {from}-{}/{total}\r\n", total - 1), body[from..].to_vec())
        }
        None => (200, String::new(), body),
    }
}
