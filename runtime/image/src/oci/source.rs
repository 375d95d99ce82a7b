//! Where an image's blobs come from when it is no registry: an OCI layout directory, or an archive of one, or
//! what `docker save` writes. Names in an archive are looked up in a list, never on the host.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tar::EntryType;

use super::manifest::{
    CONFIG_MAX_BYTES, Descriptor, Digest, Document, MANIFEST_MAX_BYTES, Manifest, for_this_platform,
};
use crate::error::Error;
use crate::rootfs::{Expected, TarError, TarStream};

const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// An archive of more members is none of an image.
const MEMBERS_MAX: usize = 100_000;

/// All that an image is made from.
pub(super) struct Image<'s> {
    /// What names it for good: the manifest's digest, or the configuration's where there is no manifest.
    pub(super) digest: Digest,
    pub(super) config: Vec<u8>,
    /// Lowest first.
    pub(super) layers: Vec<Layer<'s>>,
}

pub(super) struct Layer<'s> {
    /// Its diff ID is not known to it.
    pub(super) expected: Expected,
    pub(super) bytes: u64,
    pub(super) open: Box<dyn Fn() -> io::Result<Box<dyn Read + Send>> + 's>,
}

/// A local source of blobs.
pub(super) enum Source {
    /// An OCI layout directory.
    Layout(PathBuf),
    /// A tar file and where its members lie.
    Archive { file: File, members: HashMap<Vec<u8>, Member> },
}

pub(super) enum Member {
    File {
        at: u64,
        bytes: u64,
    },
    /// Old `docker save` links layers that are the same.
    Link(Vec<u8>),
}

#[derive(Deserialize)]
struct IndexFile {
    manifests: Vec<Descriptor>,
}

/// An image in what `docker save` writes.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Saved {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

impl Source {
    /// Opens a directory or an archive.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let metadata = path.metadata().map_err(Error::io("open", path))?;
        if metadata.is_dir() {
            return Ok(Self::Layout(path.to_owned()));
        }
        if !metadata.is_file() {
            return Err(Error::BadSource {
                source_name: path.display().to_string(),
                why: "it is neither a file nor a directory".to_owned(),
            });
        }
        let file = File::open(path).map_err(Error::io("open", path))?;
        let bad = |why: String| Error::BadSource { source_name: path.display().to_string(), why };
        let file = plain(file).map_err(|error| bad(error.to_string()))?;
        let members = members(&file).map_err(bad)?;
        Ok(Self::Archive { file, members })
    }

    /// The image that `tag` names, or the only one. The error is a reason in words.
    pub(super) fn image(&self, tag: Option<&str>) -> Result<Image<'_>, String> {
        if self.size("index.json").is_err() && self.size("manifest.json").is_ok() {
            return self.saved(tag);
        }
        let index = self.small("index.json", MANIFEST_MAX_BYTES)?;
        let index: IndexFile = serde_json::from_slice(&index)
            .map_err(|error| format!("its index.json cannot be read: {error}"))?;
        let chosen = choose(&index.manifests, tag)?;
        let (digest, manifest) = self.manifest(chosen, 0)?;
        let config = self.blob(&manifest.config, CONFIG_MAX_BYTES)?;
        let layers = manifest.layers.iter().map(|layer| self.layer(layer)).collect();
        Ok(Image { digest, config, layers })
    }

    /// Follows an index, and an index in it, to a manifest for this machine.
    fn manifest(&self, descriptor: &Descriptor, depth: u32) -> Result<(Digest, Manifest), String> {
        match Document::parse(&self.blob(descriptor, MANIFEST_MAX_BYTES)?)? {
            Document::Manifest(manifest) => Ok((descriptor.digest.clone(), manifest)),
            Document::Index(_) if depth > 1 => Err("its indexes lead to indexes without end".to_owned()),
            Document::Index(manifests) => self.manifest(for_this_platform(&manifests)?, depth + 1),
        }
    }

    fn saved(&self, tag: Option<&str>) -> Result<Image<'_>, String> {
        let text = self.small("manifest.json", MANIFEST_MAX_BYTES)?;
        let all: Vec<Saved> = serde_json::from_slice(&text)
            .map_err(|error| format!("its manifest.json cannot be read: {error}"))?;
        let tags = |one: &Saved| one.repo_tags.clone().unwrap_or_default();
        let named = |one: &Saved, tag: &str| tags(one).iter().any(|name| is_named(name, tag));
        let names = all.iter().flat_map(tags).collect::<Vec<_>>().join(", ");
        let count = all.len();
        let saved = match tag {
            Some(tag) => {
                all.into_iter().find(|one| named(one, tag)).ok_or_else(|| format!("it has no image {tag:?}"))
            }
            None if count == 1 => all.into_iter().next().ok_or_else(String::new),
            None => Err(format!("it has {count} images; append one of its tags: {names}")),
        }?;
        let config = self.small(&saved.config, CONFIG_MAX_BYTES)?;
        let mut layers = Vec::new();
        for name in saved.layers {
            let bytes = self.size(&name)?;
            let expected = Expected { name: name.clone(), ..Expected::default() };
            layers.push(Layer { expected, bytes, open: Box::new(move || self.open_member(&name)) });
        }
        Ok(Image { digest: Digest::of(&config), config, layers })
    }

    fn layer(&self, descriptor: &Descriptor) -> Layer<'_> {
        let expected = Expected {
            name: descriptor.digest.to_string(),
            stored: Some((descriptor.digest.hex().to_owned(), descriptor.size)),
            diff_id: None,
        };
        let path = blob_path(&descriptor.digest);
        Layer { expected, bytes: descriptor.size, open: Box::new(move || self.open_member(&path)) }
    }

    /// A blob whose digest is right.
    fn blob(&self, descriptor: &Descriptor, most_bytes: u64) -> Result<Vec<u8>, String> {
        let bytes = self.small(&blob_path(&descriptor.digest), most_bytes)?;
        if bytes.len() as u64 != descriptor.size || Digest::of(&bytes) != descriptor.digest {
            return Err(format!("its blob {} has other bytes than that digest and size", descriptor.digest));
        }
        Ok(bytes)
    }

    fn small(&self, name: &str, most_bytes: u64) -> Result<Vec<u8>, String> {
        let bytes = self.size(name)?;
        if bytes > most_bytes {
            return Err(format!("its {name} has {bytes} bytes, more than {most_bytes}"));
        }
        let mut text = Vec::new();
        let read = self.open_member(name).and_then(|file| file.take(most_bytes).read_to_end(&mut text));
        read.map(|_| text).map_err(|error| format!("its {name} cannot be read: {error}"))
    }

    fn size(&self, name: &str) -> Result<u64, String> {
        match self {
            Self::Layout(dir) => {
                let found = dir.join(name).metadata().map_err(|error| format!("its {name}: {error}"))?;
                if found.is_file() { Ok(found.len()) } else { Err(format!("its {name} is no file")) }
            }
            Self::Archive { .. } => Ok(self.member(name).ok_or_else(|| format!("it has no {name}"))?.1),
        }
    }

    fn open_member(&self, name: &str) -> io::Result<Box<dyn Read + Send>> {
        match self {
            Self::Layout(dir) => Ok(Box::new(File::open(dir.join(name))?)),
            Self::Archive { file, .. } => {
                let (at, left) = self.member(name).ok_or(io::ErrorKind::NotFound)?;
                Ok(Box::new(Section { file: file.try_clone()?, at, left }))
            }
        }
    }

    fn member(&self, name: &str) -> Option<(u64, u64)> {
        let Self::Archive { members, .. } = self else { return None };
        match members.get(name.as_bytes())? {
            Member::File { at, bytes } => Some((*at, *bytes)),
            Member::Link(target) => match members.get(target)? {
                Member::File { at, bytes } => Some((*at, *bytes)),
                Member::Link(_) => None,
            },
        }
    }
}

/// Whether a tag, or a whole name with one, is this tag.
fn is_named(name: &str, tag: &str) -> bool {
    name == tag || name.strip_suffix(tag).is_some_and(|rest| rest.ends_with(':'))
}

fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn choose<'d>(manifests: &'d [Descriptor], tag: Option<&str>) -> Result<&'d Descriptor, String> {
    let name =
        |one: &'d Descriptor| one.annotations.as_ref().and_then(|all| all.get(REF_NAME)).map(String::as_str);
    match (tag, manifests) {
        (None, [only]) => Ok(only),
        (None, many) => for_this_platform(many).map_err(|_| {
            let tags: Vec<_> = many.iter().filter_map(name).collect();
            format!("it has {} images; append one of its tags: {}", many.len(), tags.join(", "))
        }),
        (Some(tag), many) => many
            .iter()
            .find(|one| name(one).is_some_and(|name| is_named(name, tag)))
            .ok_or_else(|| format!("it has no tag {tag:?}")),
    }
}

/// The archive itself, or a decompressed copy that no path leads to.
fn plain(mut file: File) -> io::Result<File> {
    let mut magic = [0; 4];
    let read = file.read_at(&mut magic, 0)?;
    let mut decoder: Box<dyn Read> = match magic {
        [0x1f, 0x8b, ..] if read == 4 => Box::new(flate2::read::MultiGzDecoder::new(&mut file)),
        [0x28, 0xb5, 0x2f, 0xfd] => Box::new(zstd::Decoder::new(&mut file)?),
        _ => return Ok(file),
    };
    let most_bytes = crate::rootfs::Limits::default().bytes;
    let mut copy = tempfile::tempfile()?;
    if io::copy(&mut decoder.by_ref().take(most_bytes), &mut copy)? == most_bytes {
        return Err(io::Error::other("it is too large decompressed"));
    }
    copy.seek(SeekFrom::Start(0))?;
    Ok(copy)
}

fn members(file: &File) -> Result<HashMap<Vec<u8>, Member>, String> {
    let mut members = HashMap::new();
    let mut archive = TarStream::new(BufReader::with_capacity(
        1 << 20,
        Section { file: file.try_clone().map_err(|e| e.to_string())?, at: 0, left: u64::MAX },
    ));
    loop {
        let member = match archive.next_member() {
            Ok(Some(member)) => member,
            Ok(None) => return Ok(members),
            Err(TarError::Io(error)) => return Err(format!("it is no archive of an image: {error}")),
            Err(TarError::Entry(name, reason)) => {
                return Err(format!("its {:?} {reason}", String::from_utf8_lossy(&name)));
            }
        };
        let at = archive.position();
        let path = normal(&member.path);
        match member.kind {
            EntryType::Regular => drop(members.insert(path, Member::File { at, bytes: member.bytes })),
            EntryType::Symlink => {
                // `../LAYER/layer.tar`, from a directory of the archive's root.
                let target = member.link.strip_prefix(b"../").unwrap_or(&member.link);
                drop(members.insert(path, Member::Link(normal(target))));
            }
            EntryType::Link => drop(members.insert(path, Member::Link(normal(&member.link)))),
            _ => {}
        }
        if members.len() > MEMBERS_MAX {
            return Err("it has too many members for an image".to_owned());
        }
    }
}

fn normal(path: &[u8]) -> Vec<u8> {
    path.strip_prefix(b"./").unwrap_or(path).to_vec()
}

/// Part of a file, read without its offset.
struct Section {
    file: File,
    at: u64,
    left: u64,
}

impl Read for Section {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.file.read_at(&mut buffer[..most], self.at)?;
        self.at += read as u64;
        self.left -= read as u64;
        Ok(read)
    }
}
