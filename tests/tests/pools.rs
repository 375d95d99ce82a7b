//! `peregrine pool` against a real daemon: what is set is kept ready, and by the next daemon too.
#![allow(clippy::unwrap_used)]

use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::process::{Command, Output};
use std::time::Duration;
use tests::daemon::Daemon;
use tests::{artefacts, kvm_or_skip, peregrine};

const CONFIG: &str = "[image_aliases]\n\"node:22-slim\" = \"default\"\n[defaults]\nmem_mib = 128\n\
    [[pools]]\nimage = \"peregrine/default\"\nvcpus = 2\nmem_mib = 128\nmin = 0\nmax = 1\n";

/// `peregrine pool ARGS`, its key in the environment as clients have it.
fn pool(daemon: &Daemon, args: &[&str]) -> Output {
    let mut command = Command::new(peregrine());
    command.arg("pool").args(args).env("ISORUN_API_URL", &daemon.url).env("ISORUN_API_KEY", &daemon.key);
    command.output().unwrap()
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn answer(daemon: &Daemon, args: &[&str]) -> Value {
    let output = pool(daemon, &[args, &["--json"]].concat());
    assert!(output.status.success(), "{args:?}: {}", said(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The pool of this id, once `ready` workers are.
fn once_ready(daemon: &Daemon, id: &str, ready: u64) -> Value {
    for _ in 0..1200 {
        let all = answer(daemon, &["list"]);
        let found = all["pools"].as_array().unwrap().iter().find(|pool| pool["id"] == id).cloned();
        if let Some(pool) = found.filter(|pool| pool["ready"].as_u64() >= Some(ready)) {
            return pool;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{id} never has {ready} ready: {}", said(&pool(daemon, &["list"])));
}

#[test]
fn a_pool_that_is_set_is_kept_by_this_daemon_and_by_the_next() {
    if !kvm_or_skip("a_pool_that_is_set_is_kept_by_this_daemon_and_by_the_next") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    let made = answer(&daemon, &["set", "node:22-slim", "--min", "1"]);
    assert_eq!((&made["mem_mib"], &made["min"], &made["max"]), (&128.into(), &1.into(), &2.into()));
    let changed = answer(&daemon, &["set", "node:22-slim", "--min", "3"]);
    assert_eq!((&changed["min"], &changed["max"]), (&3.into(), &3.into()), "max follows min");
    let id = changed["id"].as_str().unwrap().to_owned();
    once_ready(&daemon, &id, 3);
    // Over the configuration's, of which this is another change.
    answer(&daemon, &["set", "peregrine/default", "--vcpus", "2", "--max", "2"]);
    let table = said(&pool(&daemon, &["list"]));
    assert!(table.starts_with("IMAGE") && table.lines().count() == 3, "{table}");

    // Killed, not ended: what was acknowledged is there.
    let daemon = Daemon::start_in(daemon.crash(), &["--dev"]);
    let kept = once_ready(&daemon, &id, 3);
    assert_eq!((&kept["image"], &kept["max"]), (&"node:22-slim".into(), &3.into()));
    let configured = once_ready(&daemon, "peregrine-default.2.128", 0);
    assert_eq!(configured["max"], 2);

    // What is removed is not there any more; the configuration's own is again as it says.
    for of in ["node:22-slim", "peregrine/default"] {
        answer(&daemon, &["rm", of]);
    }
    assert!(answer(&daemon, &["list"])["pools"].as_array().unwrap().is_empty());
    let daemon = Daemon::start_in(daemon.end(), &["--dev"]);
    let all = answer(&daemon, &["list"]);
    assert_eq!(all["pools"].as_array().unwrap().len(), 1, "{all}");
    assert_eq!(all["pools"][0]["max"], 1);
}

#[test]
fn a_template_that_was_damaged_while_its_pool_ran_is_made_again() {
    if !kvm_or_skip("a_template_that_was_damaged_while_its_pool_ran_is_made_again") {
        return;
    }
    // A cache of its own, which has the others' kernel and images.
    let cache = tempfile::tempdir().unwrap();
    for kind in ["agent", "image", "kernel"] {
        std::os::unix::fs::symlink(artefacts().store.root().join(kind), cache.path().join(kind)).unwrap();
    }
    let home = tempfile::tempdir().unwrap();
    let (without_pools, _) = CONFIG.split_once("[[pools]]").unwrap();
    std::fs::write(home.path().join("config.toml"), without_pools).unwrap();
    let daemon = Daemon::start_in_with(home, &["--dev"], &[("PEREGRINE_CACHE", cache.path())]);
    let id = answer(&daemon, &["set", "node:22-slim", "--min", "1"])["id"].as_str().unwrap().to_owned();
    once_ready(&daemon, &id, 1);

    let templates = std::fs::read_dir(cache.path().join("template")).unwrap();
    let states = templates.map(|entry| entry.unwrap().path().join("state"));
    let damaged: Vec<_> = states.filter(|path| path.is_file()).collect();
    for path in &damaged {
        let whole = std::fs::metadata(path).unwrap().len();
        std::fs::File::options().write(true).open(path).unwrap().set_len(whole - 1).unwrap();
    }
    assert!(!damaged.is_empty());
    // Of a pool that changes all workers are new ones.
    answer(&daemon, &["set", "node:22-slim", "--min", "2"]);
    once_ready(&daemon, &id, 2);

    // Neither guest booted in the daemon's process: it never had one's memory.
    let peak = daemon.peak_bytes();
    assert!(peak < 32 << 20, "{peak}");
}

#[test]
fn workers_are_forked_from_one_process_and_from_the_next_when_it_is_gone() {
    if !kvm_or_skip("workers_are_forked_from_one_process_and_from_the_next_when_it_is_gone") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    let set = |min: &str| answer(&daemon, &["set", "node:22-slim", "--min", min, "--max", min]);
    let id = set("2")["id"].as_str().unwrap().to_owned();
    once_ready(&daemon, &id, 2);
    let zygotes = daemon.processes("zygote");
    assert_eq!(zygotes.len(), 1);
    let workers = daemon.workers();
    assert_eq!(workers.len(), 2);
    // Fields 4 and 5 of proc_pid_stat(5): the parent and the process group.
    let stat = |pid: u32| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let mut fields =
            stat.rsplit_once(") ").unwrap().1.split(' ').skip(1).map(|n| n.parse::<u32>().unwrap());
        (fields.next().unwrap(), fields.next().unwrap())
    };
    for worker in &workers {
        let (parent, group) = stat(*worker);
        assert_eq!(parent, zygotes[0]);
        assert_ne!(group, stat(daemon.pid()).1, "a terminal's Ctrl-C would end it");
        assert_eq!(std::fs::read(format!("/proc/{worker}/environ")).unwrap(), b"", "nothing of the daemon's");
    }

    tests::kill("KILL", zygotes[0]);
    while std::path::Path::new(&format!("/proc/{}/exe", zygotes[0])).exists() {
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(daemon.workers(), workers);
    // Of a pool that changes all workers are new ones.
    set("3");
    once_ready(&daemon, &id, 3);
    let next = daemon.processes("zygote");
    assert!(next.len() == 1 && next != zygotes, "{zygotes:?} {next:?}");
}

#[test]
fn a_template_is_not_made_for_nobody() {
    if !kvm_or_skip("a_template_is_not_made_for_nobody") {
        return;
    }
    let cache = tempfile::tempdir().unwrap();
    let (kernel, disks) = (&artefacts().kernel, [&artefacts().agent_disk, &artefacts().image]);
    let mut order = serde_json::json!({
        "cache": cache.path(), "kernel": kernel, "disks": disks, "vcpus": 1, "mem_mib": 128, "try_it": false,
    });
    let ask = |order: &Value| {
        let piped = std::process::Stdio::piped;
        let mut maker = Command::new(peregrine());
        let mut maker = maker.arg("make-template").stdin(piped()).stdout(piped()).spawn().unwrap();
        let mut input = maker.stdin.take().unwrap();
        writeln!(input, "{order}").unwrap();
        (maker, input)
    };
    let (maker, input) = ask(&order);
    // Whoever asked is gone.
    drop(input);
    let ended = maker.wait_with_output().unwrap();
    assert_eq!((ended.status.code(), ended.stdout.as_slice()), (Some(1), &b""[..]));

    order["kernel"] = "/nowhere/vmlinux".into();
    let (mut maker, input) = ask(&order);
    let mut said = String::new();
    maker.stdout.take().unwrap().read_to_string(&mut said).unwrap();
    drop(input);
    assert!(
        maker.wait().unwrap().success() && said.contains("Err") && said.contains("/nowhere/vmlinux"),
        "{said}"
    );
    // The one that nobody waited for may have begun: its lock and what it had of a template are left.
    let begun = std::fs::read_dir(cache.path().join("template")).into_iter().flatten().flatten();
    let made: Vec<_> = begun.filter(|entry| entry.path().join("state").exists()).collect();
    assert!(made.is_empty(), "{made:?}");
}

#[test]
fn what_a_pool_cannot_be_is_said_with_what_to_do() {
    if !kvm_or_skip("what_a_pool_cannot_be_is_said_with_what_to_do") {
        return;
    }
    let daemon = Daemon::start(CONFIG);
    answer(&daemon, &["set", "default", "--mem", "128", "--min", "0"]);
    answer(&daemon, &["set", "default", "--mem", "256", "--min", "0"]);
    for (args, words) in [
        (&["set", "default", "--min", "1"][..], &["vcpus and mem_mib"][..]),
        (&["set", "default", "--mem", "128", "--min", "5", "--max", "2"], &["min <= max"]),
        (&["set", "node:22-slim", "--mem", "128"], &["default.1.128", "delete it first"]),
        (&["rm", "none"], &["404", "no pool none"]),
        (&["list", "--key", "wrong"], &["401", "not valid"]),
        (&["list", "--url", "ftp://x"], &["--url", "http://"]),
        (&["list", "--url", "http://127.0.0.1:1"], &["does not answer", "peregrine serve"]),
    ] {
        let output = pool(&daemon, args);
        assert_eq!(output.status.code(), Some(125), "{args:?}: {}", said(&output));
        words.iter().for_each(|word| assert!(said(&output).contains(word), "{args:?}: {}", said(&output)));
    }
    let mut keyless = Command::new(peregrine());
    let keyless = keyless.args(["pool", "list"]).env_remove("ISORUN_API_KEY").output().unwrap();
    assert!(said(&keyless).contains("ISORUN_API_KEY"), "{}", said(&keyless));
}
