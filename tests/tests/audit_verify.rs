//! `peregrine audit verify` and `peregrine key`: what they say and which code they exit with.

use peregrine_audit::{Log, SigningKey};
use serde_json::{Value, json};
use std::path::Path;
use std::process::{Command, Output};

fn peregrine(arguments: &[&str], state: &Path) -> Output {
    let mut command = Command::new(tests::peregrine());
    command.args(arguments).env("PEREGRINE_STATE", state).output().expect("peregrine runs")
}

fn verify(dir: &Path) -> (Option<i32>, Value) {
    let output = peregrine(&["audit", "verify", "--json", dir.to_str().expect("UTF-8")], dir);
    (output.status.code(), serde_json::from_slice(&output.stdout).expect("a JSON report"))
}

#[test]
fn audit_verify_tells_intact_tampered_and_torn_apart_by_its_exit_code() {
    let state = tempfile::tempdir().unwrap();
    let signer = SigningKey::random().unwrap();
    std::fs::write(state.path().join("signer.pub"), signer.verifying_key().to_hex()).unwrap();
    let dir = state.path().join("acme");
    let mut log = Log::open(&dir, "acme").unwrap();
    for code in 0..3 {
        log.append("run0000", "exec.exit", json!({ "code": code })).unwrap();
    }
    log.seal(&signer).unwrap().unwrap().commit().unwrap();
    log.append("run0000", "exec.exit", json!({ "code": 3 })).unwrap();
    drop(log);
    let (code, report) = verify(&dir);
    assert_eq!((code, &report["entries"], &report["checkpoints"]), (Some(0), &json!(4), &json!(1)));

    let path = dir.join("log.ndjson");
    let whole = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 10]).unwrap();
    let (code, report) = verify(&dir);
    assert_eq!((code, &report["verdict"]), (Some(2), &json!("torn")));

    std::fs::write(&path, whole.replace("\"code\":1", "\"code\":0")).unwrap();
    let (code, report) = verify(&dir);
    assert_eq!((code, &report["verdict"]), (Some(1), &json!("tampered")));
    assert!(report["reason"].as_str().unwrap().starts_with("entry 1: "), "{report}");

    std::fs::remove_file(&path).unwrap();
    let output = peregrine(&["audit", "verify", dir.to_str().unwrap()], &dir);
    assert_eq!(output.status.code(), Some(125));
}

#[test]
fn a_key_is_printed_once_and_can_be_revoked_by_its_id() {
    let state = tempfile::tempdir().unwrap();
    let output = peregrine(&["key", "create", "--tenant", "acme", "--json"], state.path());
    let made: Value = serde_json::from_slice(&output.stdout).unwrap();
    let keys = || peregrine::key::Keys::open(&state.path().join("keys")).unwrap();
    let key = made["key"].as_str().unwrap();
    assert_eq!(keys().check(key).unwrap().tenant, "acme");
    assert!(peregrine(&["key", "revoke", made["id"].as_str().unwrap()], state.path()).status.success());
    assert_eq!(keys().check(key), None);
    let refused = peregrine(&["key", "create", "--tenant", "A_B"], state.path());
    assert_eq!(refused.status.code(), Some(125));
    assert!(String::from_utf8_lossy(&refused.stderr).contains("1 to 32"));
}
