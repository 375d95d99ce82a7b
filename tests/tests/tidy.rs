//! House rules as tests: where unsafe code may stand, which way dependencies point, how long a file may get.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").canonicalize().unwrap()
}

fn rust_files() -> Vec<(String, String)> {
    fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
        for entry in std::fs::read_dir(dir).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), &mut found);
    found
        .into_iter()
        .map(|path| {
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            (name, std::fs::read_to_string(&path).unwrap())
        })
        .collect()
}

#[test]
fn unsafe_code_stands_only_in_its_rooms() {
    let rooms = [
        "runtime/vmm/src/memory",
        "runtime/vmm/src/sys/",
        "runtime/vmm/src/event_loop/ring.rs",
        "runtime/ring0/src/ram.rs",
        "guest-init/src/sys/",
        "tests/fuzz/src/guarded.rs",
    ];
    let allows = ["allow(unsafe", "_code)"].concat();
    let strays: Vec<String> = rust_files()
        .into_iter()
        .filter(|(name, text)| {
            let test = name.contains("/tests/") || name.ends_with("/tests.rs");
            text.contains(&allows) && !test && !rooms.iter().any(|room| name.starts_with(room))
        })
        .map(|(name, _)| name)
        .collect();
    assert!(strays.is_empty(), "unsafe code outside its rooms: {strays:?}");
}

#[test]
fn dependencies_between_rooms_point_one_way() {
    let allowed: BTreeMap<&str, &[&str]> = BTreeMap::from([
        ("guest-init", &[][..]),
        ("prewarm", &[]),
        ("runtime/ring0", &[]),
        ("runtime/vmm", &["guest-init", "peregrine-ring0"]),
        ("runtime/image", &[]),
        ("runtime/audit", &[]),
        ("runtime/server", &["guest-init", "peregrine-vmm", "peregrine-image", "peregrine-audit", "prewarm"]),
        ("bench", &["peregrine", "peregrine-vmm", "peregrine-image", "tests"]),
        (
            "tests",
            &["peregrine", "peregrine-vmm", "peregrine-image", "peregrine-audit", "guest-init", "prewarm"],
        ),
        ("tests/fuzz", &["peregrine-vmm", "peregrine-ring0", "peregrine-image", "guest-init"]),
    ]);
    let ours = [
        "guest-init",
        "prewarm",
        "peregrine-ring0",
        "peregrine-vmm",
        "peregrine-image",
        "peregrine-audit",
        "peregrine",
        "bench",
        "tests",
    ];
    for (room, may) in allowed {
        let manifest = std::fs::read_to_string(root().join(room).join("Cargo.toml")).unwrap();
        for name in ours {
            let uses = manifest
                .lines()
                .any(|l| l.split(['=', '.']).next().is_some_and(|key| key.trim() == name && l.contains('=')));
            assert!(!uses || may.contains(&name), "{room} must not depend on {name}");
        }
    }
}

#[test]
fn files_fit_a_reader() {
    let long: Vec<String> = rust_files()
        .into_iter()
        .filter(|(_, text)| text.lines().count() > 600)
        .map(|(name, text)| format!("{name}: {} lines", text.lines().count()))
        .collect();
    assert!(long.is_empty(), "files over 600 lines: {long:?}");
}

#[test]
fn every_kernel_patch_says_its_reason_its_cost_and_its_off_switch() {
    for entry in std::fs::read_dir(root().join("kernels/patches")).unwrap().map(Result::unwrap) {
        let text = std::fs::read_to_string(entry.path()).unwrap().to_lowercase();
        for word in ["reason:", "cost:", "switch:"] {
            assert!(text.contains(word), "{:?} does not say its {word}", entry.file_name());
        }
    }
}
