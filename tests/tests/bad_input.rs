//! Bad input to `peregrine run`: each is a clear error, and none costs a microVM.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::process::{Command, Output};
use tests::{artefacts, bare, kvm_or_skip, peregrine};

fn run(args: &[&str]) -> Output {
    Command::new(peregrine()).arg("run").args(args).output().unwrap()
}

/// The command must fail with 125 (or 2 from the parser) and say each of `words`, on one line.
fn refused(args: &[&str], words: &[&str]) {
    let output = run(args);
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(matches!(output.status.code(), Some(125 | 2)), "{args:?}: {:?} {text}", output.status);
    for word in words {
        assert!(text.contains(word), "{args:?}: {word:?} is missing in: {text}");
    }
    assert!(output.stdout.is_empty());
}

fn write(dir: &Path, name: &str, bytes: &[u8]) -> String {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn sizes_out_of_range_name_the_field_and_the_limit() {
    if !kvm_or_skip("sizes_out_of_range_name_the_field_and_the_limit") {
        return;
    }
    refused(&["--vcpus", "0", "--", "true"], &["vcpus is 0", "1 to 32"]);
    refused(&["--vcpus", "1000", "--", "true"], &["vcpus is 1000", "1 to 32"]);
    refused(&["--vcpus", "many", "--", "true"], &["--vcpus", "many"]);
    refused(&["--mem", "63", "--", "true"], &["memory", "63", "64 to "]);
    refused(&["--mem", "999999999", "--", "true"], &["memory", "999999999", "what this host has"]);
}

#[test]
fn bad_environment_and_paths_name_what_was_given() {
    if !kvm_or_skip("bad_environment_and_paths_name_what_was_given") {
        return;
    }
    refused(&["--env", "NOVALUE", "--", "true"], &["--env", "NOVALUE", "NAME=VALUE"]);
    refused(&["--env", "=x", "--", "true"], &["--env", "NAME=VALUE"]);
    refused(&["--cwd", "relative", "--", "true"], &["--cwd", "absolute"]);
    refused(&["--network", "all", "--", "true"], &["--network", "none"]);
    refused(&[], &["CMD"]);
}

#[test]
fn a_bad_kernel_is_named_with_what_is_wrong() {
    if !kvm_or_skip("a_bad_kernel_is_named_with_what_is_wrong") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no-such-kernel");
    refused(&["--kernel", missing.to_str().unwrap(), "--", "true"], &["no-such-kernel"]);
    let text =
        write(dir.path(), "text", b"#!/bin/sh\necho I am not a kernel, I am a script, and long enough\n");
    refused(&["--kernel", &text, "--", "true"], &["text", "ELF"]);
    let whole = bare::elf(&[0x90; 4096]);
    let cut = write(dir.path(), "cut", &whole[..whole.len() - 1000]);
    refused(&["--kernel", &cut, "--", "true"], &["cut", "truncated"]);
    let mut other = whole;
    other[18] = 0xb7;
    let other = write(dir.path(), "arm", &other);
    refused(&["--kernel", &other, "--", "true"], &["arm", "x86-64"]);
}

#[test]
fn a_bad_image_is_named_with_what_is_wrong() {
    if !kvm_or_skip("a_bad_image_is_named_with_what_is_wrong") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("no-such-image");
    refused(&["--image", missing.to_str().unwrap(), "--", "true"], &["no-such-image"]);
    let zeros = write(dir.path(), "zeros", &[0; 1 << 20]);
    refused(&["--image", &zeros, "--", "true"], &["zeros", "EROFS"]);
    let image = std::fs::read(&artefacts().image).unwrap();
    let cut = write(dir.path(), "cut", &image[..image.len() / 2]);
    refused(&["--image", &cut, "--", "true"], &["cut"]);
}

#[test]
fn without_dev_kvm_the_error_says_what_to_do() {
    // A process that cannot see /dev/kvm: an empty directory is bound over it in a mount namespace of its
    // own.
    let dir = tempfile::tempdir().unwrap();
    let script =
        format!("mount --bind {0} /dev && exec {1} run -- true", dir.path().display(), peregrine().display());
    let output = Command::new("unshare").args(["--mount", "sh", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(125), "{text}");
    assert!(text.contains("/dev/kvm") && text.contains("doctor"), "{text}");
}
