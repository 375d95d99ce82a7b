//! Manifests, indexes and configurations, as far as they are needed, of the OCI image specification and of
//! Docker's registry (v2 schema 2). Pure; whoever made the bytes is not trusted.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

/// As the distribution project's registries.
pub(crate) const MANIFEST_MAX_BYTES: u64 = 4 << 20;
pub(crate) const CONFIG_MAX_BYTES: u64 = 8 << 20;
/// Docker's own limit is 127.
const LAYERS_MAX: usize = 1000;
const OS: &str = "linux";
const ARCHITECTURE: &str = "amd64";

/// `sha256:` and 64 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Digest(String);

impl Digest {
    pub(crate) fn parse(text: &str) -> Option<Self> {
        crate::Key::parse(text.strip_prefix("sha256:")?)?;
        Some(Self(text.to_owned()))
    }

    pub(crate) fn of(bytes: &[u8]) -> Self {
        use sha2::Digest as _;
        Self(format!("sha256:{}", crate::digest::hex(&sha2::Sha256::digest(bytes))))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn hex(&self) -> &str {
        &self.0["sha256:".len()..]
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        Self::parse(&text).ok_or_else(|| format!("{text:?} is no sha256 digest"))
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names a blob and says what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Descriptor {
    #[serde(default)]
    pub(crate) media_type: String,
    pub(crate) digest: Digest,
    pub(crate) size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Platform {
    #[serde(default)]
    pub(crate) architecture: String,
    #[serde(default)]
    pub(crate) os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) variant: Option<String>,
}

/// What a tag or digest leads to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Document {
    Manifest(Manifest),
    Index(Vec<Descriptor>),
}

/// One image for one platform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Manifest {
    pub(crate) config: Descriptor,
    /// Lowest first.
    pub(crate) layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    schema_version: u32,
    #[serde(default)]
    manifests: Option<Vec<Descriptor>>,
    #[serde(default)]
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

impl Document {
    /// The error is a reason in words.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let raw: Raw =
            serde_json::from_slice(bytes).map_err(|error| format!("the manifest cannot be read: {error}"))?;
        if raw.schema_version != 2 {
            return Err(format!(
                "the manifest has schema version {}, only 2 is supported",
                raw.schema_version
            ));
        }
        match (raw.manifests, raw.config, raw.layers) {
            (Some(manifests), None, None) => Ok(Self::Index(manifests)),
            (None, Some(_), Some(layers)) if layers.len() > LAYERS_MAX => {
                Err(format!("the manifest has {} layers, an image may have {LAYERS_MAX}", layers.len()))
            }
            (None, Some(config), Some(layers)) => Ok(Self::Manifest(Manifest { config, layers })),
            // What is both at once means two things to two readers.
            (Some(_), ..) => Err("the manifest is an index too".to_owned()),
            _ => Err("the manifest has no configuration or no list of layers".to_owned()),
        }
    }
}

/// The manifest of an index that is for this machine.
pub(crate) fn for_this_platform(manifests: &[Descriptor]) -> Result<&Descriptor, String> {
    let fits = |platform: &Platform| platform.os == OS && platform.architecture == ARCHITECTURE;
    // A higher variant needs a newer CPU than there may be.
    let plain = |platform: &Platform| platform.variant.as_deref().is_none_or(|variant| variant == "v1");
    let mut fitting = manifests.iter().filter(|one| one.platform.as_ref().is_some_and(fits));
    let first = fitting.clone().next();
    let best = fitting.find(|one| one.platform.as_ref().is_some_and(plain)).or(first);
    match (best, manifests) {
        (Some(best), _) => Ok(best),
        (None, [only]) if only.platform.is_none() => Ok(only),
        _ => {
            let name = |platform: &Platform| format!("{}/{}", platform.os, platform.architecture);
            let there: Vec<_> = manifests.iter().filter_map(|one| one.platform.as_ref().map(name)).collect();
            Err(format!("it is not made for {OS}/{ARCHITECTURE}, only for: {}", there.join(", ")))
        }
    }
}

/// The configuration file of an image.
#[derive(Debug, Clone, Deserialize)]
pub(crate) struct ConfigFile {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    pub(crate) config: Option<Process>,
    pub(crate) rootfs: RootFs,
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct RootFs {
    /// Of the decompressed layers, lowest first.
    #[serde(default)]
    pub(crate) diff_ids: Vec<Digest>,
}

/// How its process runs.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct Process {
    pub(crate) env: Option<Vec<String>>,
    pub(crate) working_dir: Option<String>,
    pub(crate) user: Option<String>,
    pub(crate) entrypoint: Option<Words>,
    pub(crate) cmd: Option<Words>,
}

/// A command: its words, or one line for a shell.
#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
pub(crate) enum Words {
    List(Vec<String>),
    Line(String),
}

impl Words {
    pub(crate) fn argv(words: Option<Self>) -> Vec<String> {
        match words {
            Some(Self::List(words)) => words,
            Some(Self::Line(line)) if !line.is_empty() => vec!["/bin/sh".to_owned(), "-c".to_owned(), line],
            _ => Vec::new(),
        }
    }
}

impl ConfigFile {
    /// The error is a reason in words.
    pub(crate) fn parse(bytes: &[u8], layers: usize) -> Result<Self, String> {
        let file: Self = serde_json::from_slice(bytes)
            .map_err(|error| format!("the configuration cannot be read: {error}"))?;
        let right = |found: &str, wanted: &str| found.is_empty() || found == wanted;
        if !right(&file.os, OS) || !right(&file.architecture, ARCHITECTURE) {
            return Err(format!(
                "it is made for {}/{}, not for {OS}/{ARCHITECTURE}",
                file.os, file.architecture
            ));
        }
        let named = file.rootfs.diff_ids.len();
        if named != layers {
            return Err(format!("the manifest has {layers} layers, the configuration {named}"));
        }
        let strings = file.config.iter().flat_map(|process| {
            let words =
                [&process.entrypoint, &process.cmd].into_iter().flatten().flat_map(|words| match words {
                    Words::List(list) => list.iter().collect::<Vec<_>>(),
                    Words::Line(line) => vec![line],
                });
            process.env.iter().flatten().chain(&process.working_dir).chain(words)
        });
        for string in strings {
            if string.contains('\0') {
                return Err("the configuration has a NUL in a string".to_owned());
            }
        }
        Ok(file)
    }
}

/// Parses bytes as whatever they may be, for fuzzing.
#[doc(hidden)]
pub fn parse_documents(bytes: &[u8]) {
    if let Ok(Document::Index(manifests)) = Document::parse(bytes) {
        let _ = for_this_platform(&manifests);
    }
    if let Ok(file) = ConfigFile::parse(bytes, 0) {
        let process = file.config.unwrap_or_default();
        let _ = Words::argv(process.entrypoint);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    fn descriptor(platform: &str) -> String {
        format!(r#"{{"mediaType":"m","digest":"sha256:{HEX}","size":7{platform}}}"#)
    }

    #[test]
    fn a_document_that_is_manifest_and_index_at_once_is_refused() {
        let one = descriptor("");
        let both = format!(r#"{{"schemaVersion":2,"manifests":[],"config":{one},"layers":[]}}"#);
        assert!(Document::parse(both.as_bytes()).unwrap_err().contains("too"));
        for (text, reason) in [
            ("", "cannot be read"),
            ("{}", "schemaVersion"),
            (r#"{"schemaVersion":1}"#, "schema version 1"),
            (r#"{"schemaVersion":2}"#, "no configuration"),
            (r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:../..","size":1}]}"#, "no sha256 digest"),
            (r#"{"schemaVersion":2,"manifests":[{"digest":"sha256:","size":-1}]}"#, "no sha256"),
        ] {
            let error = Document::parse(text.as_bytes()).unwrap_err();
            assert!(error.contains(reason), "{text}: {error}");
        }
    }

    #[test]
    fn ten_thousand_layers_are_refused_and_none_are_not() {
        let layers = vec![descriptor(""); 10_000].join(",");
        let text = |layers: &str| {
            format!(r#"{{"schemaVersion":2,"config":{},"layers":[{layers}]}}"#, descriptor(""))
        };
        assert!(Document::parse(text(&layers).as_bytes()).unwrap_err().contains("10000 layers"));
        assert!(
            matches!(Document::parse(text("").as_bytes()), Ok(Document::Manifest(m)) if m.layers.is_empty())
        );
    }

    #[test]
    fn the_plainest_manifest_for_this_platform_is_taken() {
        let index = |platforms: &[(&str, &str)]| {
            let all: Vec<_> = platforms
                .iter()
                .map(|(architecture, variant)| {
                    descriptor(&format!(
                        r#","platform":{{"os":"linux","architecture":"{architecture}","variant":"{variant}"}}"#
                    ))
                })
                .collect();
            match Document::parse(
                format!(r#"{{"schemaVersion":2,"manifests":[{}]}}"#, all.join(",")).as_bytes(),
            ) {
                Ok(Document::Index(all)) => all,
                other => panic!("{other:?}"),
            }
        };
        let all = index(&[("arm64", "v8"), ("amd64", "v3"), ("amd64", "v1")]);
        let platform = for_this_platform(&all).unwrap().platform.clone().unwrap();
        assert_eq!(platform.variant.as_deref(), Some("v1"));
        assert!(for_this_platform(&index(&[("arm64", "v8")])).unwrap_err().contains("linux/arm64"));
        assert!(for_this_platform(&[]).is_err());
    }

    #[test]
    fn a_command_in_shell_form_is_given_to_a_shell() {
        let text =
            r#"{"rootfs":{"diff_ids":[]},"config":{"Env":null,"Cmd":"echo $HOME","Volumes":{"/x":{}}}}"#;
        let process = ConfigFile::parse(text.as_bytes(), 0).unwrap().config.unwrap();
        assert_eq!(Words::argv(process.cmd), ["/bin/sh", "-c", "echo $HOME"]);
    }

    #[test]
    fn a_configuration_for_another_machine_or_another_manifest_is_refused() {
        for (text, layers, reason) in [
            (r#"{"os":"windows","architecture":"amd64","rootfs":{}}"#, 0, "windows"),
            (r#"{"architecture":"arm64","rootfs":{}}"#, 0, "arm64"),
            (r#"{"rootfs":{}}"#, 3, "3 layers"),
            (r#"{"rootfs":{"diff_ids":["sha256:x"]}}"#, 1, "no sha256"),
            (r#"{"rootfs":{},"config":{"Env":["A=\u0000"]}}"#, 0, "NUL"),
        ] {
            let error = ConfigFile::parse(text.as_bytes(), layers).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
