//! Makes container images for tests: layers as tar, in any of the compressions, well-formed or not, in an OCI
//! layout directory.

use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use tar::{EntryType, Header};

/// How a layer is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// As it is.
    Plain,
    /// gzip.
    Gzip,
    /// Zstandard.
    Zstd,
}

/// A layer being written: a tar stream in memory. Names and links are put in raw, because what a good writer
/// refuses is what tests are about.
#[derive(Debug, Default, Clone)]
pub struct Layer {
    bytes: Vec<u8>,
}

impl Layer {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A header with these fields and a right checksum.
    ///
    /// # Panics
    /// If a name does not fit the header.
    #[must_use]
    pub fn header(kind: EntryType, path: &[u8], link: &[u8], size: u64) -> Header {
        let mut header = Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path);
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link);
        header.set_entry_type(kind);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.set_size(size);
        header.set_cksum();
        header
    }

    /// Bytes as they are, right or wrong.
    #[must_use]
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self
    }

    /// A header and its contents, padded.
    #[must_use]
    pub fn entry(self, header: &Header, contents: &[u8]) -> Self {
        let padding = vec![0; contents.len().next_multiple_of(512) - contents.len()];
        self.raw(header.as_bytes()).raw(contents).raw(&padding)
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, path: &str, contents: &[u8]) -> Self {
        self.entry(&Self::header(EntryType::Regular, path.as_bytes(), b"", contents.len() as u64), contents)
    }

    /// A regular file with a mode.
    #[must_use]
    pub fn program(self, path: &str, contents: &[u8]) -> Self {
        let mut header = Self::header(EntryType::Regular, path.as_bytes(), b"", contents.len() as u64);
        header.set_mode(0o755);
        header.set_cksum();
        self.entry(&header, contents)
    }

    /// A directory.
    #[must_use]
    pub fn directory(self, path: &str) -> Self {
        self.entry(&Self::header(EntryType::Directory, path.as_bytes(), b"", 0), b"")
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Self {
        self.entry(&Self::header(EntryType::Symlink, path.as_bytes(), target.as_bytes(), 0), b"")
    }

    /// A hard link.
    #[must_use]
    pub fn link(self, path: &str, target: &str) -> Self {
        self.entry(&Self::header(EntryType::Link, path.as_bytes(), target.as_bytes(), 0), b"")
    }

    /// A pax header for the entry that follows.
    #[must_use]
    pub fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut text = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            // The length counts its own digits.
            let digits = (1..9).find(|digits| (rest + digits).to_string().len() == *digits).unwrap_or(1);
            text.extend_from_slice(format!("{} {key}=", rest + digits).as_bytes());
            text.extend_from_slice(value);
            text.push(b'\n');
        }
        let header = Self::header(EntryType::XHeader, b"pax", b"", text.len() as u64);
        self.entry(&header, &text)
    }

    /// The stream with the two blocks that end it.
    #[must_use]
    pub fn tar(&self) -> Vec<u8> {
        [&self.bytes[..], &[0; 1024]].concat()
    }

    /// The stream without an end.
    #[must_use]
    pub fn unended(&self) -> Vec<u8> {
        self.bytes.clone()
    }
}

/// Compresses a layer.
///
/// # Panics
/// Never: it writes into memory.
#[must_use]
pub fn compress(bytes: &[u8], compression: Compression) -> Vec<u8> {
    match compression {
        Compression::Plain => bytes.to_vec(),
        Compression::Gzip => {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(bytes).and_then(|()| gzip.finish()).unwrap_or_else(|e| panic!("{e}"))
        }
        Compression::Zstd => zstd::encode_all(bytes, 1).unwrap_or_else(|e| panic!("{e}")),
    }
}

/// `sha256:…` of bytes.
#[must_use]
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// An OCI layout directory being written.
#[derive(Debug)]
pub struct Layout {
    dir: PathBuf,
}

/// A layer as a layout stores it.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The descriptor, to be falsified at will.
    pub descriptor: serde_json::Value,
    /// Digest of the tar stream.
    pub diff_id: String,
}

impl Layout {
    /// An empty one in `dir`.
    ///
    /// # Panics
    /// If it cannot be written.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        fs::create_dir_all(dir.join("blobs/sha256")).unwrap_or_else(|e| panic!("{e}"));
        fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)
            .unwrap_or_else(|e| panic!("{e}"));
        Self { dir: dir.to_owned() }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Adds a blob; gives its descriptor.
    ///
    /// # Panics
    /// If it cannot be written.
    #[must_use]
    pub fn blob(&self, bytes: &[u8], media_type: &str) -> serde_json::Value {
        let digest = digest(bytes);
        let path = self.dir.join("blobs").join(digest.replace(':', "/"));
        fs::write(path, bytes).unwrap_or_else(|e| panic!("{e}"));
        serde_json::json!({ "mediaType": media_type, "digest": digest, "size": bytes.len() })
    }

    /// Adds a layer.
    #[must_use]
    pub fn layer(&self, tar: &[u8], compression: Compression) -> Stored {
        let suffix = match compression {
            Compression::Plain => "",
            Compression::Gzip => "+gzip",
            Compression::Zstd => "+zstd",
        };
        let media_type = format!("application/vnd.oci.image.layer.v1.tar{suffix}");
        Stored { descriptor: self.blob(&compress(tar, compression), &media_type), diff_id: digest(tar) }
    }

    /// Writes configuration, manifest and index of one image with this `config` and these layers; gives the
    /// manifest's digest.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn image(&self, tag: &str, config: &serde_json::Value, layers: &[Stored]) -> String {
        let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
        let config = serde_json::json!({
            "architecture": "amd64", "os": "linux", "config": config,
            "rootfs": { "type": "layers", "diff_ids": diff_ids },
        });
        let config = self.blob(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json");
        let layers: Vec<_> = layers.iter().map(|layer| &layer.descriptor).collect();
        let media_type = "application/vnd.oci.image.manifest.v1+json";
        let manifest = serde_json::json!({ "schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers });
        let mut descriptor = self.blob(manifest.to_string().as_bytes(), media_type);
        let digest = descriptor["digest"].as_str().unwrap_or_default().to_owned();
        descriptor["annotations"] = serde_json::json!({ "org.opencontainers.image.ref.name": tag });
        let path = self.dir.join("index.json");
        let mut index = fs::read(&path)
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_else(|| serde_json::json!({ "schemaVersion": 2, "manifests": [] }));
        if let Some(manifests) = index["manifests"].as_array_mut() {
            manifests.push(descriptor);
        }
        fs::write(path, index.to_string()).unwrap_or_else(|e| panic!("{e}"));
        digest
    }
}

/// Debian's static busybox, installed if root may, as an image's only program.
///
/// # Panics
/// If it is not there and cannot be had.
#[must_use]
pub fn busybox() -> Vec<u8> {
    debian_tools(&["busybox-static"]);
    fs::read("/bin/busybox").unwrap_or_else(|e| panic!("/bin/busybox: {e}"))
}

/// Makes sure of Debian packages that a test needs.
///
/// # Panics
/// If one is missing and this is not root.
pub fn debian_tools(packages: &[&str]) {
    peregrine_image::ensure_tools(packages, &mut peregrine_image::Lines::new(std::io::stderr()))
        .unwrap_or_else(|e| panic!("{e}"));
}

/// A layer with busybox and the links to it that these applets need.
#[must_use]
pub fn busybox_layer(applets: &[&str]) -> Layer {
    let layer = Layer::new().program("bin/busybox", &busybox());
    applets.iter().fold(layer, |layer, name| layer.symlink(&format!("bin/{name}"), "busybox"))
}
