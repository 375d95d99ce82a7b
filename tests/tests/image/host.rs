//! The host that hostile layers try to reach, and what must come of each of them.

use peregrine_image::oci::{self, Reference};
use peregrine_image::{Error, Silent, Store};
use sha2::{Digest as _, Sha256};
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use tests::oci::{Compression, Layer, Layout, Stored, debian_tools};

/// What must come of it.
pub(crate) enum Outcome {
    /// An error that says this.
    Refused(&'static str),
    /// An image in which these are, and these are not.
    Contained(&'static [&'static str], &'static [&'static str]),
}
pub(crate) use Outcome::{Contained, Refused};

pub(crate) type Case = (&'static str, Vec<Layer>, Outcome);

/// A directory of the host that layers try to reach.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
    before: String,
}

impl Host {
    pub(crate) fn new() -> Self {
        debian_tools(&["erofs-utils"]);
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("planted")).unwrap();
        fs::write(dir.path().join("planted/secret"), "secret").unwrap();
        fs::write(dir.path().join("outside"), "outside").unwrap();
        let before = host_digest(dir.path());
        Self { dir, before }
    }

    pub(crate) fn planted(&self) -> String {
        self.dir.path().join("planted").display().to_string()
    }

    fn assert_unchanged(&self, case: &str) {
        assert_eq!(host_digest(self.dir.path()), self.before, "{case}: the host's tree has changed");
        for name in [
            "/escaped",
            "/tmp/escaped",
            "/etc/escaped",
            "/root/escaped",
            "escaped",
            "../escaped",
            "../../escaped",
        ] {
            assert!(!Path::new(name).exists(), "{case}: {name} is there");
        }
    }
}

/// Names, kinds, owners, times and contents of the planted tree (the cache aside), what / holds, and the host's accounts.
fn host_digest(dir: &Path) -> String {
    fn walk(path: &Path, hasher: &mut Sha256) {
        let m = path.symlink_metadata().unwrap();
        hasher.update(path.as_os_str().as_bytes());
        let facts = (m.mode(), m.uid(), m.gid(), m.rdev(), m.nlink(), m.size(), m.mtime(), m.mtime_nsec());
        hasher.update(format!("{facts:?}"));
        if m.is_dir() {
            let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
            names.sort();
            names.iter().for_each(|path| walk(path, hasher));
        } else if m.is_file() {
            hasher.update(fs::read(path).unwrap());
        }
    }
    let mut hasher = Sha256::new();
    for name in ["planted", "outside"] {
        walk(&dir.join(name), &mut hasher);
    }
    let mut names: Vec<_> = fs::read_dir("/").unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    hasher.update(format!("{names:?}"));
    for path in ["/etc/passwd", "/etc/shadow", "/etc/group", "/etc/hosts"] {
        hasher.update(fs::read(path).unwrap_or_default());
    }
    hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether an image has something at `path`, as erofs-utils sees it.
fn has(image: &Path, path: &str) -> bool {
    let output = Command::new("dump.erofs").arg(format!("--path={path}")).arg(image).output().unwrap();
    String::from_utf8_lossy(&output.stdout).contains("NID:")
}

pub(crate) fn assert_outcome(
    host: &Host,
    case: &str,
    image: &Path,
    result: Result<(), Error>,
    outcome: &Outcome,
) {
    match (result, outcome) {
        (Err(error), Refused(words)) => {
            assert!(error.to_string().contains(words), "{case}: {words:?} is missing in: {error}");
        }
        (Ok(()), Contained(present, absent)) => {
            let fsck = Command::new("fsck.erofs").arg(image).output().unwrap();
            assert!(fsck.status.success(), "{case}: {}", String::from_utf8_lossy(&fsck.stderr));
            present.iter().for_each(|path| assert!(has(image, path), "{case}: {path} is missing"));
            absent.iter().for_each(|path| assert!(!has(image, path), "{case}: {path} is there"));
        }
        (Ok(()), Refused(words)) => panic!("{case}: accepted, where {words:?} was expected"),
        (Err(error), Contained(..)) => panic!("{case}: {error}"),
    }
    host.assert_unchanged(case);
}

/// Each case's layers, compressed in turn in each way, as an image in a layout.
pub(crate) fn run(cases: Vec<Case>) {
    let host = Host::new();
    for (number, (case, layers, outcome)) in cases.into_iter().enumerate() {
        let layout = Layout::new(&host.dir.path().join(format!("layout-{number}")));
        let compressions = [Compression::Plain, Compression::Gzip, Compression::Zstd];
        let stored: Vec<Stored> = layers
            .iter()
            .zip(compressions.iter().cycle().skip(number))
            .map(|(layer, compression)| layout.layer(&layer.tar(), *compression))
            .collect();
        layout.image("t", &serde_json::json!({}), &stored);
        let (image, result) = import(&host, &layout);
        assert_outcome(&host, case, &image, result, &outcome);
    }
}

pub(crate) fn import(host: &Host, layout: &Layout) -> (std::path::PathBuf, Result<(), Error>) {
    let store = Store::at(&host.dir.path().join("cache")).unwrap();
    let reference = Reference::parse("hostile").unwrap();
    let result = oci::import(&store, layout.dir().to_str().unwrap(), &reference, &mut Silent);
    match result {
        Ok(image) => (image.path, Ok(())),
        Err(error) => {
            let left = fs::read_dir(store.root().join("tmp"))
                .map_or(0, |dir| dir.filter(|entry| entry.as_ref().unwrap().file_name() != "gate").count());
            assert_eq!(left, 0, "something was left of a refused image");
            (std::path::PathBuf::new(), Err(error))
        }
    }
}
