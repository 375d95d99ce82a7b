//! Crashes and races of the cache, with real processes and locks.

use std::cell::Cell;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command};

use super::*;
use crate::digest::Inputs;

const CHILD_CACHE: &str = "PEREGRINE_TEST_CHILD_CACHE";

fn temp_store() -> (tempfile::TempDir, Store) {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::at(dir.path()).unwrap();
    (dir, store)
}

fn key() -> Key {
    Inputs::new("test").key()
}

/// Builds an entry with one file, or finds it; says whether it was built.
fn get(store: &Store, contents: &str, progress: &mut dyn Progress) -> Result<(PathBuf, bool), Error> {
    let built = Cell::new(false);
    let dir = store.get_or_build(
        Kind::Image,
        &key(),
        progress,
        |_| Ok(()),
        |place, _| {
            built.set(true);
            fs::write(place.out.join("file"), contents).unwrap();
            Ok(vec!["a test".to_owned()])
        },
    )?;
    Ok((dir, built.get()))
}

fn left_in_tmp(store: &Store) -> usize {
    names_in(&store.root().join("tmp")).unwrap().iter().filter(|name| *name != "gate").count()
}

/// Not a test of its own: the other process of the tests below. Starts a build and never ends.
#[test]
fn builder_that_hangs_half_way() {
    let Some(root) = std::env::var_os(CHILD_CACHE) else { return };
    let store = Store::at(Path::new(&root)).unwrap();
    let _: Result<_, Error> = store.get_or_build(
        Kind::Image,
        &key(),
        &mut Silent,
        |_| Ok(()),
        |place, _| {
            fs::write(place.out.join("file"), "half").unwrap();
            loop {
                std::thread::park();
            }
        },
    );
}

/// That process. Dropped, also by a failing test, it is killed.
struct Hanging(Child);

impl Hanging {
    fn kill(&mut self) -> Option<i32> {
        let _ = self.0.kill();
        self.0.wait().unwrap().signal()
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Starts that process and returns when it is in the middle of its build.
fn hanging_builder(store: &Store) -> Hanging {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::builder_that_hangs_half_way"])
        .env(CHILD_CACHE, store.root())
        .stdout(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let half = store.root().join(format!("tmp/image-{}-0/out/file", child.id()));
    while !half.exists() {
        assert!(child.try_wait().unwrap().is_none(), "the other process ended before it was killed");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Hanging(child)
}

#[test]
fn an_entry_is_built_once_and_then_found() {
    let (_dir, store) = temp_store();
    let (path, built) = get(&store, "contents", &mut Silent).unwrap();
    assert!(built);
    assert_eq!(fs::read(path.join("file")).unwrap(), b"contents");
    assert_eq!(get(&store, "other", &mut Silent).unwrap(), (path, false));
    assert_eq!(left_in_tmp(&store), 0);
    let entries = store.entries(Kind::Image).unwrap();
    assert_eq!((entries.len(), entries[0].bytes, &entries[0].key), (1, 8, &key()));
    assert_eq!(entries[0].made_from, ["a test"]);
    assert!(store.entries(Kind::Kernel).unwrap().is_empty());
}

#[test]
fn a_builder_killed_half_way_leaves_no_entry_and_its_remains_are_swept() {
    let (_dir, store) = temp_store();
    assert_eq!(hanging_builder(&store).kill(), Some(9));
    assert!(store.lookup(Kind::Image, &key()).unwrap().is_none());
    assert!(left_in_tmp(&store) > 0);
    let (path, built) = get(&store, "whole", &mut Silent).unwrap();
    assert!(built);
    assert_eq!(fs::read(path.join("file")).unwrap(), b"whole");
    assert_eq!(left_in_tmp(&store), 0);
}

#[test]
fn the_directory_of_a_living_builder_is_not_swept() {
    let (_dir, store) = temp_store();
    let _living = hanging_builder(&store);
    drop(store.workplace(Kind::Kernel).unwrap());
    assert_eq!(left_in_tmp(&store), 2);
}

#[test]
fn a_second_process_says_that_it_waits_for_the_first() {
    struct KillOnMessage(Option<Hanging>, Vec<String>);
    impl Progress for KillOnMessage {
        fn begin(&mut self, _: &str, _: Option<u64>, _: &str) {}
        fn advance(&mut self, _: u64) {}
        fn message(&mut self, text: &str) {
            self.1.push(text.to_owned());
            self.0 = None;
        }
        fn end(&mut self) {}
    }
    let (_dir, store) = temp_store();
    let mut progress = KillOnMessage(Some(hanging_builder(&store)), Vec::new());
    // Ends only because the message came, since that is what ends the first builder.
    let (_, built) = get(&store, "whole", &mut progress).unwrap();
    assert!(built);
    assert_eq!(progress.1, ["another process is building this image; waiting for it"]);
}

#[test]
fn of_eight_threads_that_want_the_same_entry_one_builds_it() {
    let (_dir, store) = temp_store();
    let builds: usize = std::thread::scope(|scope| {
        let threads: Vec<_> =
            (0..8).map(|_| scope.spawn(|| get(&store, "x", &mut Silent).unwrap().1)).collect();
        threads.into_iter().map(|thread| usize::from(thread.join().unwrap())).sum()
    });
    assert_eq!(builds, 1);
}

#[test]
fn a_lock_is_given_back_while_a_forked_process_still_has_a_copy_of_it() {
    let (_dir, store) = temp_store();
    let lock = store.lock(Kind::Image, &key(), &mut Silent).unwrap();
    let _copy = lock.0.try_clone().unwrap();
    drop(lock);
    let mut out = Vec::new();
    store.lock(Kind::Image, &key(), &mut crate::progress::Lines::new(&mut out)).unwrap();
    assert_eq!(out, b"", "nobody was waited for");
}

#[test]
fn a_failed_build_leaves_nothing() {
    let (_dir, store) = temp_store();
    let result = store.get_or_build(
        Kind::Image,
        &key(),
        &mut Silent,
        |_| Ok(()),
        |place, _| {
            fs::write(place.out.join("file"), "half").unwrap();
            Err(Error::NoCacheDir)
        },
    );
    assert!(matches!(result, Err(Error::NoCacheDir)));
    assert_eq!(left_in_tmp(&store), 0);
    assert!(store.lookup(Kind::Image, &key()).unwrap().is_none());
}

#[test]
fn every_damage_to_sizes_or_record_is_noticed_and_repaired_with_a_message() {
    let (_dir, store) = temp_store();
    let (path, _) = get(&store, "contents", &mut Silent).unwrap();
    let damages: [&dyn Fn(); 5] = [
        &|| fs::write(path.join("file"), "content").unwrap(),
        &|| fs::remove_file(path.join("file")).unwrap(),
        &|| fs::write(path.join("record.json"), "{").unwrap(),
        &|| fs::write(path.join("record.json"), r#"{"format":99,"files":[],"made_from":[]}"#).unwrap(),
        &|| fs::remove_file(path.join("record.json")).unwrap(),
    ];
    for (number, damage) in damages.iter().enumerate() {
        damage();
        let error = store.lookup(Kind::Image, &key()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{number}: {error}");
        let mut out = Vec::new();
        let (_, built) = get(&store, "contents", &mut crate::progress::Lines::new(&mut out)).unwrap();
        assert!(built, "{number}");
        assert!(String::from_utf8(out).unwrap().starts_with("building this image again: "), "{number}");
        assert!(store.verify(Kind::Image, &key()).unwrap(), "{number}");
    }
}

#[test]
fn verify_reads_the_bytes_and_remove_removes() {
    let (_dir, store) = temp_store();
    assert!(!store.verify(Kind::Image, &key()).unwrap());
    let (path, _) = get(&store, "contents", &mut Silent).unwrap();
    assert!(store.verify(Kind::Image, &key()).unwrap());
    fs::write(path.join("file"), "c0ntents").unwrap();
    let error = store.verify(Kind::Image, &key()).unwrap_err().to_string();
    assert!(error.contains("is corrupt: its SHA-256 is") && error.contains("delete"), "{error}");
    assert!(store.remove(Kind::Image, &key()).unwrap());
    assert!(!path.exists());
    assert!(!store.remove(Kind::Image, &key()).unwrap());
    assert_eq!(left_in_tmp(&store), 0);
}
