#![allow(clippy::unwrap_used)]

use super::*;

fn run(id: &str, tenant: &str, ended_us: Option<i64>) -> RunRow {
    RunRow {
        id: id.to_owned(),
        tenant: tenant.to_owned(),
        status: if ended_us.is_some() { "destroyed" } else { "running" }.to_owned(),
        reason: None,
        image: "default".to_owned(),
        root: crate::images::Image::default(),
        vcpus: 1,
        mem_mib: 2048,
        disk_mib: 0,
        create_ms: 1.5,
        timeout_s: Some(300),
        sleeps_when_idle: false,
        env: vec!["A=1".to_owned()],
        created_us: 5,
        ended_us,
        ran_ms: 1000,
        cpu_ms: 7,
        mem_peak_bytes: 9,
        cost_cents: 0.25,
        sleeps_in: None,
        found_at: None,
        running: None,
        made_with: None,
    }
}

#[test]
fn rows_outlive_the_registry_and_belong_to_their_tenant() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("registry.db");
    let registry = Registry::open(&path).unwrap();
    registry.put_run(&run("a", "one", None)).unwrap();
    registry.put_run_durably(&run("b", "two", Some(3))).unwrap();
    // As a killed daemon leaves it: nothing is closed or folded.
    let _ = std::mem::ManuallyDrop::new(registry);
    let registry = Registry::open(&path).unwrap();
    assert_eq!(registry.run("one", "a").unwrap(), Some(run("a", "one", None)));
    assert_eq!(registry.run("two", "a").unwrap(), None);
    assert_eq!(registry.unended().unwrap(), [run("a", "one", None)]);
}

#[test]
fn history_is_newest_first_and_paged_without_gaps() {
    let home = tempfile::tempdir().unwrap();
    let registry = Registry::open(&home.path().join("registry.db")).unwrap();
    for (id, ended_us) in [("c", 10), ("a", 30), ("b", 20), ("d", 20)] {
        registry.put_run(&run(id, "one", Some(ended_us))).unwrap();
    }
    registry.put_run(&run("x", "two", Some(40))).unwrap();
    let mut seen = Vec::new();
    let mut before: Option<(i64, String)> = None;
    loop {
        let page = registry.history("one", before.as_ref().map(|(at, id)| (*at, id.as_str())), 2).unwrap();
        let Some(last) = page.last() else { break };
        before = Some((last.ended_us.unwrap(), last.id.clone()));
        seen.extend(page.into_iter().map(|row| row.id));
    }
    assert_eq!(seen, ["a", "b", "d", "c"]);
    let totals = registry.totals("one").unwrap();
    assert_eq!((totals.sandboxes, totals.cost_cents, totals.cpu_ms, totals.gib_ms), (4, 1.0, 28.0, 8000.0));
}

#[test]
fn a_registry_of_a_newer_version_is_refused() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("registry.db");
    drop(Registry::open(&path).unwrap());
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    assert!(matches!(Registry::open(&path), Err(RegistryError::Newer { found: 99 })));
}

#[test]
fn pools_are_set_changed_and_forgotten_and_outlive_the_registry() {
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("registry.db");
    let registry = Registry::open(&path).unwrap();
    let of = |image: &str, min| crate::config::PoolSpec {
        image: image.to_owned(),
        vcpus: 1,
        mem_mib: 128,
        min,
        max: 4,
        refill_per_s: 2.5,
    };
    for (id, spec) in [("b", of("two", 1)), ("a", of("one", 1)), ("a", of("one", 3)), ("c", of("three", 1))] {
        registry.put_pool(id, &spec).unwrap();
    }
    registry.remove_pool("c").unwrap();
    registry.remove_pool("never there").unwrap();
    let _ = std::mem::ManuallyDrop::new(registry);
    assert_eq!(Registry::open(&path).unwrap().pools().unwrap(), [of("one", 3), of("two", 1)]);
}
