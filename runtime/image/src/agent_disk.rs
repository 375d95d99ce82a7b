//! The disk that carries our PID 1: a tiny EROFS with `/init` and the mount points it needs.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;

use crate::digest::{Inputs, Key};
use crate::error::Error;
use crate::progress::Progress;
use crate::recipe::MKFS_OPTIONS;
use crate::store::{Kind, Store};
use crate::{inspect, mkfs};

const FILE: &str = "agent.erofs";

/// Where PID 1 mounts things before it leaves for the real root.
const MOUNT_POINTS: &[&str] = &["dev", "lower", "newroot", "proc", "rw", "sys", "tmp"];

fn key(agent_elf: &[u8]) -> Key {
    let inputs = Inputs::new("agent/1").with("elf", agent_elf).with("tree", MOUNT_POINTS.join(" "));
    inputs.with("mkfs.erofs", MKFS_OPTIONS.join(" ")).key()
}

/// The agent disk for this agent, if there is one in the cache already.
pub fn existing_agent_disk(store: &Store, agent_elf: &[u8]) -> Option<PathBuf> {
    let dir = store.lookup(Kind::Agent, &key(agent_elf)).ok()??;
    Some(dir.join(FILE))
}

/// The agent disk for this agent: from the cache, or else made, in well under a second.
pub fn agent_disk(store: &Store, agent_elf: &[u8], progress: &mut dyn Progress) -> Result<PathBuf, Error> {
    let key = key(agent_elf);
    let check = |dir: &std::path::Path| inspect::inspect_image(&dir.join(FILE)).map(|_| ());
    let dir = store.get_or_build(Kind::Agent, &key, progress, check, |place, progress| {
        let root = place.scratch.join("root");
        for name in MOUNT_POINTS {
            let dir = root.join(name);
            fs::create_dir_all(&dir).map_err(Error::io("create", &dir))?;
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(&dir, mode).map_err(Error::io("set the mode of", &dir))?;
        }
        let init = root.join("init");
        fs::write(&init, agent_elf).map_err(Error::io("write", &init))?;
        for path in [&init, &root] {
            let mode = fs::Permissions::from_mode(0o755);
            fs::set_permissions(path, mode).map_err(Error::io("set the mode of", path))?;
        }
        mkfs::make(&place.out.join(FILE), &root, progress)?;
        Ok(vec![format!("agent of {} bytes", agent_elf.len())])
    })?;
    Ok(dir.join(FILE))
}
