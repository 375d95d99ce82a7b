//! Templates that are damaged, foreign or old: each is refused with the reason, before a VM exists, and is
//! made again.

use super::{fresh_dir, left, shared, turn};
use peregrine::template;
use peregrine_image::{Progress, Silent, Store};
use peregrine_vmm::snapshot::{MEMORY_FILE, STATE_FILE, Stored, digest_memory};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;
use tests::{Clone, kvm_or_skip};

/// Copies what is in a directory, holes as holes.
pub(crate) fn copy(from: &Path, to: &Path) {
    let from = from.join(".");
    let status = Command::new("cp").arg("-a").arg("--sparse=always").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(path).unwrap();
    change(&mut bytes);
    std::fs::write(path, bytes).unwrap();
}

fn flip(path: &Path, at: u64) {
    let file = File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at).unwrap();
}

/// A byte of the memory image that is not in a hole.
fn data_at(path: &Path) -> u64 {
    let file = File::open(path).unwrap();
    let mut page = [0; 4096];
    (0..)
        .map(|n| n * 4096)
        .find(|at| {
            file.read_exact_at(&mut page, *at).unwrap();
            page.iter().any(|byte| *byte != 0)
        })
        .unwrap()
}

/// Changes the compatibility record and makes header and checksum right again.
fn edit_record(dir: &Path, field: &str, value: serde_json::Value) {
    edit(&dir.join(STATE_FILE), |bytes| {
        let len = u32::from_le_bytes(bytes[8..12].try_into().unwrap()) as usize;
        let mut record: serde_json::Value = serde_json::from_slice(&bytes[48..48 + len]).unwrap();
        assert!(record.get(field).is_some(), "no {field} in the record");
        record[field] = value;
        let record = serde_json::to_vec_pretty(&record).unwrap();
        let body = [record.as_slice(), &bytes[48 + len..]].concat();
        let mut header = bytes[..16].to_vec();
        header[8..12].copy_from_slice(&u32::try_from(record.len()).unwrap().to_le_bytes());
        let sum = Sha256::new().chain_update(&header).chain_update(&body).finalize();
        *bytes = [header.as_slice(), &sum, &body].concat();
    });
}

/// Opens and verifies a copy of the shared template that was changed, which must fail and leave nothing.
fn refused(change: impl FnOnce(&Path)) -> String {
    let dir = fresh_dir("refused");
    copy(&shared().stored.dir, &dir);
    change(&dir);
    let before = left();
    let reason = Stored::open(&dir).and_then(|stored| stored.verify_memory()).unwrap_err().to_string();
    // No VM was made: it would have been a file.
    assert_eq!(left(), before);
    reason
}

#[test]
fn damaged_files_are_refused_for_what_is_wrong_with_them() {
    if !kvm_or_skip("damaged_files_are_refused_for_what_is_wrong_with_them") {
        return;
    }
    let _turn = turn();
    let state = |dir: &Path, change: fn(&mut Vec<u8>)| edit(&dir.join(STATE_FILE), change);
    let cases = [
        (refused(|dir| state(dir, |b| b.truncate(20))), "20 bytes, its header says"),
        (refused(|dir| state(dir, |b| b.truncate(b.len() - 1))), "its header says"),
        (refused(|dir| state(dir, |b| b.push(0))), "its header says"),
        (refused(|dir| state(dir, |b| b[0] ^= 1)), "magic number"),
        (refused(|dir| state(dir, |b| *b.last_mut().unwrap() ^= 1)), "checksum"),
        (refused(|dir| state(dir, |b| b[60] ^= 1)), "checksum"),
        (refused(|dir| state(dir, Vec::clear)), "0 bytes"),
        (refused(|dir| std::fs::remove_file(dir.join(STATE_FILE)).unwrap()), "No such file"),
        (refused(|dir| std::fs::remove_file(dir.join(MEMORY_FILE)).unwrap()), "No such file"),
        (
            refused(|dir| {
                File::options().write(true).open(dir.join(MEMORY_FILE)).unwrap().set_len(1 << 20).unwrap()
            }),
            "memory image has 1048576 bytes",
        ),
        (refused(|dir| flip(&dir.join(MEMORY_FILE), data_at(&dir.join(MEMORY_FILE)))), "its memory image is"),
        // A page that was a hole.
        (refused(|dir| flip(&dir.join(MEMORY_FILE), (192 << 20) - 1)), "its memory image is"),
    ];
    for (reason, wanted) in cases {
        assert!(reason.contains(wanted), "{reason:?} does not say {wanted:?}");
    }
}

#[test]
fn another_snapshots_memory_or_state_is_refused() {
    if !kvm_or_skip("another_snapshots_memory_or_state_is_refused") {
        return;
    }
    let _turn = turn();
    // Another snapshot of the same size: this one, with a page of other contents and a state that says so.
    let other = fresh_dir("other");
    copy(&shared().stored.dir, &other);
    flip(&other.join(MEMORY_FILE), data_at(&other.join(MEMORY_FILE)));
    let digest = digest_memory(&File::open(other.join(MEMORY_FILE)).unwrap()).unwrap();
    edit_record(&other, "memory", serde_json::to_value(digest).unwrap());
    Stored::open(&other).unwrap().verify_memory().unwrap();
    for name in [MEMORY_FILE, STATE_FILE] {
        let reason = refused(|dir| {
            std::fs::copy(other.join(name), dir.join(name)).unwrap();
        });
        assert!(reason.contains("its memory image is"), "{name}: {reason}");
    }
}

#[test]
fn another_version_kvm_cpu_or_size_is_refused_by_name() {
    if !kvm_or_skip("another_version_kvm_cpu_or_size_is_refused_by_name") {
        return;
    }
    let _turn = turn();
    let cases = [
        ("version", serde_json::json!(99), "snapshot version"),
        ("kvm", serde_json::json!("quantum"), "kind of KVM"),
        ("cpu", serde_json::json!("00"), "the CPU here is"),
        ("vcpus", serde_json::json!(2), "1 vCPU states, not 2"),
        ("mem_mib", serde_json::json!(256), "bytes, not"),
        ("tsc_khz", serde_json::json!("fast"), "does not decode"),
    ];
    for (field, value, wanted) in cases {
        let reason = refused(|dir| edit_record(dir, field, value));
        assert!(reason.contains(wanted), "{field}: {reason}");
    }
}

#[test]
fn another_tsc_frequency_is_refused_before_a_vcpu_runs() {
    if !kvm_or_skip("another_tsc_frequency_is_refused_before_a_vcpu_runs") {
        return;
    }
    let _turn = turn();
    let dir = fresh_dir("refused");
    copy(&shared().stored.dir, &dir);
    edit_record(&dir, "tsc_khz", serde_json::json!(1_000_000));
    drop(shared().clone());
    let stored = Stored::open(&dir).unwrap();
    let before = left();
    let reason = Clone::restore(&stored, &shared().config).map(|_| ()).unwrap_err().to_string();
    assert!(reason.contains("TSC runs at") && reason.contains("1000000 kHz"), "{reason}");
    assert_eq!(left(), before);
}

#[test]
fn a_template_for_another_tsc_frequency_is_made_again() {
    if !kvm_or_skip("a_template_for_another_tsc_frequency_is_made_again") {
        return;
    }
    let _turn = turn();
    let root = fresh_dir("other-tsc");
    copy(shared().store.root(), &root);
    let store = Store::at(&root).unwrap();
    let dir = root.join("template").join(template::key(&shared().config).unwrap().as_str());
    let length = dir.join(STATE_FILE).metadata().unwrap().len();
    // As many digits as its own, and the record as long as it was: nothing else is wrong with it.
    let khz = shared().stored.snapshot.compat.tsc_khz.to_string();
    edit_record(&dir, "tsc_khz", serde_json::Value::from(10_u64.pow(khz.len() as u32 - 1)));
    assert_eq!(dir.join(STATE_FILE).metadata().unwrap().len(), length);
    let mut told = Told::default();
    let vm = template::restore(&store, &shared().config, &mut told).unwrap();
    assert!(told.0[0].contains("again") && told.0[0].contains("TSC"), "{:?}", told.0);
    assert_eq!(vm.stop_reason(), None);
    assert!(Stored::open(&dir).is_ok_and(|made| made.snapshot.compat.tsc_khz.to_string() == khz));
}

/// Keeps what it is told.
#[derive(Default)]
struct Told(Vec<String>);

impl Progress for Told {
    fn begin(&mut self, step: &str, _: Option<u64>, _: &str) {
        self.0.push(step.to_owned());
    }
    fn advance(&mut self, _: u64) {}
    fn message(&mut self, text: &str) {
        self.0.push(text.to_owned());
    }
    fn end(&mut self) {}
}

#[test]
fn a_damaged_template_is_made_again_and_a_sound_one_is_not() {
    if !kvm_or_skip("a_damaged_template_is_made_again_and_a_sound_one_is_not") {
        return;
    }
    let _turn = turn();
    let shared = shared();
    let mut told = Told::default();
    let again = template::prepare(&shared.store, &shared.config, &mut told).unwrap();
    assert_eq!((again.snapshot.compat.memory, told.0.len()), (shared.stored.snapshot.compat.memory, 0));

    let root = fresh_dir("damaged-store");
    copy(shared.store.root(), &root);
    let store = Store::at(&root).unwrap();
    let key = template::key(&shared.config).unwrap();
    let memory = root.join("template").join(key.as_str()).join(MEMORY_FILE);
    flip(&memory, data_at(&memory));
    let made = template::prepare(&store, &shared.config, &mut told).unwrap();
    assert!(
        told.0[0].contains("building this template again") && told.0[0].contains("memory image"),
        "{told:?}",
        told = told.0
    );
    assert!(told.0[1].starts_with("template: boot"), "{:?}", told.0);
    made.verify_memory().unwrap();
    assert_eq!(Clone::of(&made, &shared.config).said("echo sound"), "sound");
    drop(template::prepare(&store, &shared.config, &mut Silent).unwrap());
}
