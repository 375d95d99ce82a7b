//! Builds the real things with the machine's own tools and package mirrors, once for all tests here, and
//! looks inside.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use peregrine_image::{
    ImageArtifact, Kind, Lines, Store, agent_disk, default_image, ensure_tools, inspect_image,
};

/// The default image in a cache of its own, and the same files again as `fsck.erofs` takes them out.
struct Built {
    _dir: tempfile::TempDir,
    store: Store,
    image: ImageArtifact,
    root: PathBuf,
}

static BUILT: LazyLock<Built> = LazyLock::new(|| {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Store::at(&dir.path().join("cache")).unwrap();
    let image = default_image(&store, &mut Lines::new(std::io::stderr())).unwrap();
    let root = dir.path().join("root");
    extract(&image.path, &root);
    Built { _dir: dir, store, image, root }
});

/// Also checks the whole file system: every directory, every inode.
fn extract(image: &Path, to: &Path) {
    ensure_tools(&["erofs-utils"], &mut Lines::new(std::io::stderr())).unwrap();
    let output = Command::new("fsck.erofs")
        .arg(format!("--extract={}", to.display()))
        .args(["--preserve-perms", "--no-preserve-owner"])
        .arg(image)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

fn python(code: &str) -> String {
    let libraries = BUILT.root.join("usr/lib/x86_64-linux-gnu");
    let output = Command::new(libraries.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(BUILT.root.join("usr/bin/python3"))
        .args(["-c", code])
        .env_clear()
        .env("PYTHONHOME", BUILT.root.join("usr"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let kind = path.symlink_metadata().unwrap();
        if kind.is_dir() {
            files_below(&path, found);
        } else if kind.is_file() {
            found.push(path);
        }
    }
}

fn contains(file: &Path, needle: &str) -> bool {
    let grep = Command::new("grep")
        .args(["--quiet", "--fixed-strings", "--text", needle])
        .arg(file)
        .status()
        .unwrap();
    assert!(grep.code().is_some_and(|code| code < 2));
    grep.success()
}

#[test]
fn the_default_image_has_what_a_guest_and_its_programs_need() {
    let root = &BUILT.root;
    for program in
        ["bash", "sh", "python3", "python", "awk", "which", "ps", "tar", "grep", "env", "mount", "openssl"]
    {
        let path = root.join("usr/bin").join(program);
        assert!(path.metadata().unwrap().permissions().mode() & 0o111 == 0o111, "{program}");
    }
    for (link, target) in
        [("bin", "usr/bin"), ("sbin", "usr/sbin"), ("lib", "usr/lib"), ("lib64", "usr/lib64")]
    {
        assert_eq!(fs::read_link(root.join(link)).unwrap(), Path::new(target));
    }
    let modes = [
        ("", 0o755),
        ("tmp", 0o1777),
        ("var/tmp", 0o1777),
        ("root", 0o700),
        ("usr/bin/su", 0o4755),
        ("proc", 0o755),
    ];
    for (path, mode) in modes {
        assert_eq!(root.join(path).metadata().unwrap().permissions().mode() & 0o7777, mode, "/{path}");
    }
    let passwd = fs::read_to_string(root.join("etc/passwd")).unwrap();
    assert!(passwd.starts_with("root:") && passwd.contains("\nnobody:"), "{passwd}");
    for path in
        ["etc/group", "etc/nsswitch.conf", "etc/hosts", "etc/ld.so.cache", "etc/os-release", "etc/profile"]
    {
        assert!(root.join(path).metadata().unwrap().len() > 0, "{path}");
    }
    for path in [
        "usr/share/doc",
        "usr/share/man",
        "var/lib/dpkg",
        "usr/bin/dpkg",
        "usr/bin/perl",
        "var/cache/ldconfig",
    ] {
        assert!(!root.join(path).exists(), "{path}");
    }
}

#[test]
fn everything_in_the_image_belongs_to_root_and_has_the_fixed_time() {
    let image = BUILT.image.path.display().to_string();
    let dump = Command::new("dump.erofs").args(["--path=/usr/bin/bash", &image]).output().unwrap();
    let text = String::from_utf8_lossy(&dump.stdout).into_owned();
    assert!(text.contains("Uid: 0   Gid: 0  "), "{text}");
    assert!(text.contains("Timestamp: 2025-01-01"), "{text}");
}

#[test]
fn python_of_the_image_imports_the_modules_that_need_libraries() {
    let code = "import asyncio, bz2, ctypes, curses, dbm.ndbm, decimal, hashlib, json, lzma, readline, sqlite3, ssl, \
                uuid, venv, zlib; print(sum(range(10**7)))";
    assert_eq!(python(code), "49999995000000\n");
}

#[test]
fn python_reads_bytecode_that_is_valid_without_a_look_at_the_source_and_names_guest_paths() {
    let library = BUILT.root.join("usr/lib").read_dir().unwrap().map(|entry| entry.unwrap().path());
    let library = library.into_iter().find(|path| path.to_string_lossy().contains("/python3.")).unwrap();
    let mut files = Vec::new();
    files_below(&library, &mut files);
    let with = |extension| {
        files.iter().filter(move |path: &&PathBuf| path.extension().is_some_and(|found| found == extension))
    };
    assert!(with("pyc").count() > 400);
    assert!(with("pyc").count() >= with("py").count());
    for path in with("pyc") {
        // PEP 552: bit 0 of the second word says hash-based, bit 1 says to check the source.
        assert_eq!(fs::read(path).unwrap()[4..8], [1, 0, 0, 0], "{}", path.display());
    }
    let argparse = with("pyc").find(|path| path.to_string_lossy().contains("__pycache__/argparse.")).unwrap();
    assert!(contains(argparse, "/usr/lib/python3"));
}

#[test]
fn no_path_of_the_building_machine_is_in_the_image() {
    assert!(!contains(&BUILT.image.path, BUILT.store.root().to_str().unwrap()));
}

#[test]
fn openssl_finds_a_root_of_trust_by_its_hash() {
    let certs = BUILT.root.join("etc/ssl/certs");
    let hashed = fs::read_dir(&certs).unwrap().map(|entry| entry.unwrap().path());
    let hashed: Vec<_> =
        hashed.filter(|path| path.extension().is_some_and(|extension| extension == "0")).collect();
    assert!(hashed.len() > 50);
    for link in hashed {
        assert!(fs::read_to_string(&link).unwrap().contains("BEGIN CERTIFICATE"), "{}", link.display());
    }
    assert!(certs.join("ca-certificates.crt").metadata().unwrap().len() > 100_000);
}

#[test]
fn the_same_packages_give_the_same_bytes_in_another_directory() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Store::at(&dir.path().join("a/cache/elsewhere")).unwrap();
    let again = default_image(&store, &mut Lines::new(std::io::stderr())).unwrap();
    assert_eq!(again.key, BUILT.image.key);
    assert!(fs::read(&again.path).unwrap() == fs::read(&BUILT.image.path).unwrap());
}

#[test]
fn a_second_use_finds_the_image_without_a_step_and_it_verifies() {
    let before = BUILT.image.path.metadata().unwrap();
    let mut said = Vec::new();
    let again = default_image(&BUILT.store, &mut Lines::new(&mut said)).unwrap();
    assert_eq!(again, BUILT.image);
    assert_eq!(String::from_utf8(said).unwrap(), "");
    assert_eq!(again.path.metadata().unwrap().ino(), before.ino());
    assert!(BUILT.store.verify(Kind::Image, &again.key).unwrap());
    let info = inspect_image(&again.path).unwrap();
    assert!(info.has_checksum && info.inodes > 1000 && info.feature_incompat == 0, "{info:?}");
}

#[test]
fn the_agent_disk_holds_init_and_its_mount_points_and_is_repaired_when_cut() {
    let dir = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = Store::at(&dir.path().join("cache")).unwrap();
    let mut said = Vec::new();
    let agent: Vec<u8> = (0..100_000u32).flat_map(u32::to_le_bytes).collect();
    let disk = agent_disk(&store, &agent, &mut Lines::new(&mut said)).unwrap();
    assert_eq!(disk, agent_disk(&store, &agent, &mut Lines::new(&mut said)).unwrap());
    assert_ne!(disk, agent_disk(&store, b"another", &mut Lines::new(&mut said)).unwrap());

    let root = dir.path().join("root");
    extract(&disk, &root);
    assert_eq!(fs::read(root.join("init")).unwrap(), agent);
    assert_eq!(root.join("init").metadata().unwrap().permissions().mode() & 0o7777, 0o755);
    for name in ["dev", "proc", "sys", "lower", "rw", "newroot", "tmp"] {
        assert_eq!(fs::read_dir(root.join(name)).unwrap().count(), 0, "{name}");
    }

    let whole = fs::read(&disk).unwrap();
    fs::write(&disk, &whole[..whole.len() / 2]).unwrap();
    let refused = inspect_image(&disk).unwrap_err().to_string();
    assert!(refused.contains("it is truncated"), "{refused}");
    said.clear();
    agent_disk(&store, &agent, &mut Lines::new(&mut said)).unwrap();
    assert!(String::from_utf8(said).unwrap().contains("building this agent again"));
    assert!(fs::read(&disk).unwrap() == whole);
}
