//! Images by name: imported, pulled, unpacked without trust, run with their configuration.
#![allow(clippy::unwrap_used)]

mod host;
mod layers;
mod local;
mod real;
mod registry;

use std::path::Path;
use std::process::{Command, Output};
use tests::{artefacts, peregrine};

/// `peregrine ARGS` with a cache of its own that shares kernel, agent and default image with the others.
fn command(cache: &Path, args: &[&str]) -> Command {
    let shared = artefacts().store.root().to_owned();
    std::fs::create_dir_all(cache).unwrap();
    for kind in ["kernel", "agent", "image"] {
        let link = cache.join(kind);
        if !link.exists() {
            std::os::unix::fs::symlink(shared.join(kind), link).unwrap();
        }
    }
    let mut command = Command::new(peregrine());
    command.arg("--cache").arg(cache).args(args);
    for name in ["PEREGRINE_DEFAULT_REGISTRY", "PEREGRINE_REGISTRY_MIRRORS", "PEREGRINE_HTTP_REGISTRIES"] {
        command.env_remove(name);
    }
    command
}

fn peregrine_in(cache: &Path, args: &[&str]) -> Output {
    command(cache, args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What it prints, if it succeeds.
fn stdout_of(output: &Output) -> String {
    assert!(output.status.success(), "{:?}: {}", output.status, text(&output.stderr));
    text(&output.stdout)
}
