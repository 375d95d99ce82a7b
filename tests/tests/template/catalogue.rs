//! What `template list` and `template rm` say of templates: whether anything can use them, and why not.

use super::refusals::copy;
use super::{Shared, fresh_dir, shared, turn};
use peregrine::template::{self, Listed};
use peregrine_image::{Kind, Store};
use peregrine_vmm::snapshot::STATE_FILE;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};
use tests::kvm_or_skip;

/// The one template of a store.
fn only(store: &Store) -> Listed {
    let mut listed = template::list(store).unwrap();
    assert_eq!(listed.len(), 1);
    listed.remove(0)
}

/// A copy of the shared store, and its template's directory.
fn copied() -> (Store, PathBuf) {
    // As long as the other's name: the record says how long each file is.
    let root = fresh_dir("template-other");
    copy(shared().store.root(), &root);
    let key = template::key(&shared().config).unwrap();
    (Store::at(&root).unwrap(), root.join("template").join(key.as_str()))
}

#[test]
fn a_template_that_run_would_restore_is_listed_as_fitting_with_what_it_takes_of_the_disk() {
    if !kvm_or_skip("a_template_that_run_would_restore_is_listed_as_fitting_with_what_it_takes_of_the_disk") {
        return;
    }
    let _turn = turn();
    let Shared { config, store, .. } = shared();
    let one = only(store);
    assert_eq!((one.stale, &one.key), (None, &template::key(config).unwrap()));
    assert_eq!(one.made_from[0], "1 vCPUs, 192 MiB");
    assert_eq!(one.made_from[1], config.kernel.display().to_string());
    let apparent = 192 << 20;
    assert!((1 << 20..apparent / 2).contains(&one.disk_bytes), "{} bytes are not its blocks", one.disk_bytes);
}

#[test]
fn using_a_template_is_noted() {
    if !kvm_or_skip("using_a_template_is_noted") {
        return;
    }
    let _turn = turn();
    let Shared { config, store, .. } = shared();
    let record = shared().stored.dir.join("record.json");
    let long_ago = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    std::fs::File::open(record).unwrap().set_modified(long_ago).unwrap();
    assert_eq!(only(store).last_use, Some(long_ago));
    template::prepare(store, config, &mut peregrine_image::Silent).unwrap();
    assert!(only(store).last_use.unwrap() > long_ago);
}

#[test]
fn templates_that_nothing_can_use_are_listed_with_the_reason_and_can_be_removed() {
    if !kvm_or_skip("templates_that_nothing_can_use_are_listed_with_the_reason_and_can_be_removed") {
        return;
    }
    let _turn = turn();
    type Change = fn(&std::path::Path);
    let inputs = |dir: &std::path::Path, from: &str, to: &str| {
        let path = dir.join("inputs.json");
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from));
        std::fs::write(path, text.replace(from, to)).unwrap();
    };
    // The copy's agent lies elsewhere, as another build's does.
    let (store, dir) = copied();
    assert_eq!(only(&store).stale.as_deref(), Some("its agent is another build's"));
    let theirs = shared().store.root().join("agent").display().to_string();
    let ours = store.root().join("agent").display().to_string();
    inputs(&dir, &theirs, &ours);
    let changed = only(&store).stale.unwrap();
    assert!(changed.contains("has changed"), "{changed}");

    let cases: [(Change, &str); 3] = [
        (|dir| std::fs::write(dir.join(STATE_FILE), "").unwrap(), "state"),
        (|dir| std::fs::remove_file(dir.join("memory")).unwrap(), "memory"),
        (|dir| std::fs::write(dir.join("record.json"), "{").unwrap(), "record.json"),
    ];
    for (change, wanted) in cases {
        let (store, dir) = copied();
        change(&dir);
        let one = only(&store);
        let why = one.stale.unwrap();
        assert!(why.contains(wanted), "{why}");
        assert!(store.remove(Kind::Template, &one.key).unwrap());
        assert!(template::list(&store).unwrap().is_empty() && !dir.exists());
    }
}

#[test]
fn a_key_may_be_cut_short_but_must_mean_one_template() {
    if !kvm_or_skip("a_key_may_be_cut_short_but_must_mean_one_template") {
        return;
    }
    let _turn = turn();
    let (store, dir) = copied();
    let key = template::key(&shared().config).unwrap();
    let last = if key.as_str().ends_with('0') { "1" } else { "0" };
    let sibling = format!("{}{last}", &key.as_str()[..63]);
    std::fs::create_dir(dir.with_file_name(&sibling)).unwrap();
    let listed = template::list(&store).unwrap();
    assert_eq!(template::named(&listed, key.as_str()).unwrap().key, key);
    let said = |name: &str| template::named(&listed, name).map(|_| ()).unwrap_err().to_string();
    assert!(said(key.short()).contains("more than one"), "{}", said(key.short()));
    for name in ["", "../..", "g"] {
        assert!(said(name).contains("there is none"), "{name}");
    }
}
