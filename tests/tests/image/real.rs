//! Three real images through a real registry: Debian's python, Debian with node from npm, and a static busybox;
//! pulled by name and run, and the second time never booted.

use super::{command, stdout_of, text};
use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use tests::oci::{Compression, Layer, Layout, busybox_layer, debian_tools};
use tests::registry::Registry;
use tests::{artefacts, kvm_or_skip};

const NODE: &str = "node@22.23.3";

/// A file system of Debian packages, python3 among them: the default image, taken apart again.
fn debian_layer(dir: &Path) -> Vec<u8> {
    debian_tools(&["erofs-utils"]);
    let root = dir.join("debian");
    let extract = format!("--extract={}", root.display());
    let fsck = Command::new("fsck.erofs").arg(extract).arg(&artefacts().image).output().unwrap();
    assert!(fsck.status.success(), "{}", text(&fsck.stderr));
    let mut archive = tar::Builder::new(Vec::new());
    archive.follow_symlinks(false);
    archive.append_dir_all(".", &root).unwrap();
    archive.into_inner().unwrap()
}

/// The node of the npm package, fetched once into the build's directory.
fn node() -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/npm").join(NODE);
    let program = dir.join("node_modules/node/bin/node");
    if !program.exists() {
        if Command::new("npm").arg("--version").output().is_err() {
            debian_tools(&["npm"]);
        }
        fs::create_dir_all(&dir).unwrap();
        let npm = Command::new("npm")
            .args(["install", "--no-audit", "--no-fund", "--loglevel=error", "--prefix"])
            .arg(&dir)
            .arg(NODE)
            .output()
            .unwrap();
        assert!(npm.status.success(), "npm: {}", text(&npm.stderr));
    }
    program
}

/// node and the one library of it that the base has not.
fn node_layer() -> Layer {
    let library = "usr/lib/x86_64-linux-gnu/libstdc++.so.6";
    debian_tools(&["libstdc++6"]);
    Layer::new()
        .program("usr/local/bin/node", &fs::read(node()).unwrap())
        .file(library, &fs::read(Path::new("/").join(library)).unwrap())
}

/// Writes, pushes and forgets the three.
fn push_images(registry: &Registry, dir: &Path) {
    let layout = Layout::new(&dir.join("layout"));
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let debian = layout.layer(&debian_layer(dir), Compression::Gzip);
    let python = serde_json::json!({ "Env": [path, "LANG=C.UTF-8"], "Cmd": ["python3"] });
    layout.image("python", &python, std::slice::from_ref(&debian));
    let node = layout.layer(&node_layer().tar(), Compression::Zstd);
    let config =
        serde_json::json!({ "Env": [path, "NODE_VERSION=22.23.3"], "Cmd": ["node"], "WorkingDir": "/app" });
    layout.image("node", &config, &[debian, node]);
    let applets = ["sh", "echo", "uname"];
    let busybox = layout.layer(&busybox_layer(&applets).tar(), Compression::Plain);
    layout.image("busybox", &serde_json::json!({ "Env": ["PATH=/bin"], "Cmd": ["sh"] }), &[busybox]);
    for (tag, name) in [
        ("python", "library/python:3.11-slim"),
        ("node", "library/node:22-slim"),
        ("busybox", "me/busybox:1"),
    ] {
        registry.push(&layout, tag, name, &[]);
    }
}

/// Runs a command in an image by its Docker Hub name, which the registry stands for.
fn run(cache: &Path, registry: &Registry, image: &str, argv: &[&str], stdin: &str) -> Output {
    let args = [&["run", "--image", image, "--mem", "512", "--json", "--"], argv].concat();
    let mut child = command(cache, &args)
        .env("PEREGRINE_REGISTRY_MIRRORS", format!("docker.io={}", registry.host()))
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

/// Whether the run booted its guest: only then PID 1 begins within it.
fn booted(output: &Output) -> bool {
    let stderr = text(&output.stderr);
    let outcome = stderr.lines().last().unwrap_or_default();
    let outcome: serde_json::Value =
        serde_json::from_str(outcome).unwrap_or_else(|e| panic!("{e}: {stderr}"));
    assert!(outcome["timing"]["first_exit_us"].is_u64(), "{outcome}");
    !outcome["timing"]["pid1_us"].is_null()
}

#[test]
fn python_node_and_busybox_are_pulled_run_and_never_booted_again() {
    if !kvm_or_skip("python_node_and_busybox_are_pulled_run_and_never_booted_again") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let cache = dir.path().join("cache");
    let registry = Registry::start(None);
    push_images(&registry, dir.path());

    let images: [(&str, &[&str], &str); 3] = [
        (
            "python:3.11-slim",
            &["python3", "-c", "import sys; print(sum(range(10**6)), sys.version_info[0])"],
            "499999500000 3\n",
        ),
        ("node:22-slim", &["node", "-v"], "v22.23.3\n"),
        ("me/busybox:1", &["sh", "-c", "echo $0 $PATH"], "sh /bin\n"),
    ];
    for (image, argv, wanted) in images {
        let first = run(&cache, &registry, image, argv, "");
        assert_eq!(stdout_of(&first), wanted, "{image}: {}", text(&first.stderr));
        for word in ["pull layers", "unpack layers", "template"] {
            assert!(
                text(&first.stderr).contains(word),
                "{image}: {word:?} is missing in {}",
                text(&first.stderr)
            );
        }
    }
    // The second time: no registry, no template, no boot.
    drop(registry);
    let registry = Registry::start(None);
    for (image, ..) in images {
        let second = run(&cache, &registry, image, &["sh"], "echo again\n");
        assert_eq!(stdout_of(&second), "again\n", "{image}: {}", text(&second.stderr));
        assert!(!booted(&second), "{image} was booted");
        for word in ["pull layers", "unpack layers", "template:"] {
            assert!(!text(&second.stderr).contains(word), "{image}: {}", text(&second.stderr));
        }
    }
    let templates = stdout_of(&command(&cache, &["template", "list", "--json"]).output().unwrap());
    let templates: serde_json::Value = serde_json::from_str(&templates).unwrap();
    assert_eq!(templates.as_array().unwrap().len(), 3, "one template for each image");
}
