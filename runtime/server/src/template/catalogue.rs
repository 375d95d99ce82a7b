//! The templates there are: what each was made from, and whether anything can use it still.

use super::{TemplateError, key};
use crate::artefacts::AGENT_ELF;
use peregrine_image::{Key, Kind, Store, existing_agent_disk};
use peregrine_vmm::snapshot::Stored;
use peregrine_vmm::{DiskConfig, VmConfig};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

const INPUTS_FILE: &str = "inputs.json";

/// What a template was made from, as far as its user named it: enough to work its key out again. Lies beside
/// the state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Inputs {
    vcpus: u32,
    mem_mib: u64,
    kernel: PathBuf,
    kernel_parameters: String,
    /// The agent's first.
    disks: Vec<PathBuf>,
}

impl Inputs {
    pub(super) fn of(config: &VmConfig) -> Self {
        // Somebody else may stand in another directory.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        Self {
            vcpus: config.vcpus,
            mem_mib: config.mem_mib,
            kernel: absolute(&config.kernel),
            kernel_parameters: config.kernel_parameters.clone(),
            disks: config.disks.iter().map(|disk| absolute(&disk.path)).collect(),
        }
    }

    pub(super) fn write(&self, dir: &Path) -> Result<(), TemplateError> {
        let path = dir.join(INPUTS_FILE);
        let written = serde_json::to_vec_pretty(self).map_err(std::io::Error::from);
        written
            .and_then(|text| std::fs::write(&path, text))
            .map_err(|source| TemplateError::Input { path, source })
    }

    fn read(dir: &Path) -> Result<Self, TemplateError> {
        let path = dir.join(INPUTS_FILE);
        let read = std::fs::read(&path).and_then(|text| Ok(serde_json::from_slice(&text)?));
        read.map_err(|source| TemplateError::Input { path, source })
    }

    /// For people.
    pub(super) fn made_from(&self) -> Vec<String> {
        let mut all =
            vec![format!("{} vCPUs, {} MiB", self.vcpus, self.mem_mib), self.kernel.display().to_string()];
        all.extend(self.disks.iter().map(|disk| disk.display().to_string()));
        if !self.kernel_parameters.is_empty() {
            all.push(self.kernel_parameters.clone());
        }
        all
    }

    fn config(&self) -> VmConfig {
        let disk = |path: &PathBuf| DiskConfig { path: path.clone(), read_only: true };
        VmConfig {
            kernel: self.kernel.clone(),
            vcpus: self.vcpus,
            mem_mib: self.mem_mib,
            disks: self.disks.iter().map(disk).collect(),
            kernel_parameters: self.kernel_parameters.clone(),
            verbose: false,
            profile: None,
        }
    }
}

/// One template.
#[derive(Debug)]
pub struct Listed {
    /// Its name in the cache.
    pub key: Key,
    /// What it takes of the disk.
    pub disk_bytes: u64,
    /// vCPUs and memory, kernel, disks, parameters; empty if its record is damaged.
    pub made_from: Vec<String>,
    /// When it was made or used last.
    pub last_use: Option<SystemTime>,
    /// Why nothing on this host and of this build can use it.
    pub stale: Option<String>,
}

/// All templates of a cache, by key, damaged ones too. Their memory images are not read.
///
/// # Errors
/// If the cache cannot be listed.
pub fn list(store: &Store) -> Result<Vec<Listed>, TemplateError> {
    let agent = existing_agent_disk(store, AGENT_ELF);
    let keys = store.keys(Kind::Template)?;
    keys.into_iter()
        .map(|key| {
            let entry = store.entry(Kind::Template, &key);
            let (made_from, stale) = match entry {
                Ok(Some(entry)) => (entry.made_from, stale(&entry.dir, &key, agent.as_deref())),
                Ok(None) => (Vec::new(), Some("it is gone".to_owned())),
                Err(error) => (Vec::new(), Some(error.to_string())),
            };
            let (disk_bytes, last_use) =
                (store.disk_bytes(Kind::Template, &key)?, store.last_use(Kind::Template, &key));
            Ok(Listed { key, disk_bytes, made_from, last_use, stale })
        })
        .collect()
}

/// Why nothing can use it, if so. The key names the files by their places on the disk and their times: if it
/// comes out otherwise now, one of them, the CPU or this program has changed.
fn stale(dir: &Path, found: &Key, agent: Option<&Path>) -> Option<String> {
    if let Err(error) = Stored::open(dir) {
        return Some(error.to_string());
    }
    let inputs = match Inputs::read(dir) {
        Ok(inputs) => inputs,
        Err(error) => return Some(error.to_string()),
    };
    if inputs.disks.first().map(PathBuf::as_path) != agent {
        return Some("its agent is another build's".to_owned());
    }
    match key(&inputs.config()) {
        Ok(now) if now == *found => None,
        Ok(_) => Some("its kernel or image has changed, or this program has".to_owned()),
        Err(error) => Some(error.to_string()),
    }
}

/// The template that a person means by the beginning of its key.
///
/// # Errors
/// [`TemplateError::Name`] if there is none or more than one.
pub fn named<'l>(listed: &'l [Listed], name: &str) -> Result<&'l Listed, TemplateError> {
    let mut found = listed.iter().filter(|one| !name.is_empty() && one.key.as_str().starts_with(name));
    let problem = match (found.next(), found.next()) {
        (Some(one), None) => return Ok(one),
        (None, _) => "there is none whose key begins so; `peregrine template list` shows them",
        (Some(_), Some(_)) => "more than one key begins so; give more of it",
    };
    Err(TemplateError::Name { name: name.to_owned(), problem })
}
