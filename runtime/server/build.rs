//! Builds the guest's PID 1 as a static program, so that it is part of the `peregrine` binary.

use std::path::{Path, PathBuf};
use std::process::Command;

fn main() {
    let room = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../guest-init");
    for input in ["src", "static.sh", "Cargo.toml", "../Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", room.join(input).display());
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR")).join("agent");
    // Its own target directory: this build runs inside another one, which holds the lock of the usual place.
    let status = Command::new(room.join("static.sh")).arg(&out).status();
    match status {
        Ok(status) if status.success() => {}
        other => panic!("guest-init/static.sh failed: {other:?}"),
    }
    let program = out.join("x86_64-unknown-linux-gnu/release/guest-init");
    println!("cargo::rustc-env=PEREGRINE_AGENT_ELF={}", program.display());
}
