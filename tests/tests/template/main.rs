//! Templates and their clones, on real KVM. One template with one vCPU is made once and shared by all tests
//! of this binary; `busy` freezes a guest with two that has work to do.
#![allow(clippy::unwrap_used)]

mod busy;
mod catalogue;
mod refusals;

use guest_init::{ToGuest, ToHost};
use peregrine::artefacts::AGENT_ELF;
use peregrine::template;
use peregrine_image::{Silent, Store};
use peregrine_vmm::VmConfig;
use peregrine_vmm::agent::Command;
use peregrine_vmm::snapshot::{Stored, digest_memory};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tests::{Clone, config, kvm_or_skip, microvm_threads};

/// One microVM at a time: the counts of what a clone leaves behind are of the whole process.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The shared template, where it lies, and when it was frozen.
struct Shared {
    config: VmConfig,
    store: Store,
    stored: Stored,
    frozen: Instant,
}

impl Shared {
    fn clone(&self) -> Clone {
        Clone::of(&self.stored, &self.config)
    }
}

fn shared() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        let store = Store::at(&fresh_dir("template-store")).unwrap();
        let mut config = config(1, 192);
        config.disks[0].path = peregrine_image::agent_disk(&store, AGENT_ELF, &mut Silent).unwrap();
        let stored = template::prepare(&store, &config, &mut Silent).unwrap();
        Shared { config, store, stored, frozen: Instant::now() }
    })
}

/// An empty directory that stays until the next time.
fn fresh_dir(name: &str) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).unwrap();
    dir
}

fn unix_ns() -> i128 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos().cast_signed()
}

#[test]
fn a_clone_runs_commands_with_streams_and_exit_code() {
    if !kvm_or_skip("a_clone_runs_commands_with_streams_and_exit_code") {
        return;
    }
    let _turn = turn();
    let mut clone = shared().clone();
    let output =
        clone.run(&["bash", "-c", "read -r line; echo \"<$line>\"; echo no >&2; exit 42"], b"hello\n");
    assert_eq!((output.code(), output.stdout, output.stderr), (42, b"<hello>\n".to_vec(), b"no\n".to_vec()));
    assert_eq!(clone.said("nproc; seq 1 100 | grep 7 | tail -n 1; cat /proc/1/comm"), "1\n97\ninit");
    let hostname = clone.identity.hostname.clone();
    assert_eq!(clone.said("hostname; cat /proc/sys/kernel/hostname"), format!("{hostname}\n{hostname}"));
}

#[test]
fn a_clones_kernel_does_not_wake_for_housekeeping() {
    if !kvm_or_skip("a_clones_kernel_does_not_wake_for_housekeeping") {
        return;
    }
    let _turn = turn();
    let mut clone = shared().clone();
    let periods = "cat /proc/sys/vm/compaction_proactiveness /proc/sys/vm/stat_interval";
    assert_eq!(clone.said(periods), "0\n600");
}

#[test]
fn vector_registers_survive_context_switches_in_a_clone() {
    if !kvm_or_skip("vector_registers_survive_context_switches_in_a_clone") {
        return;
    }
    let _turn = turn();
    let program = std::fs::read(tests::program("registers")).unwrap();
    let mut clone = shared().clone();
    let install = clone.run(&["sh", "-c", "cat > /tmp/registers && chmod +x /tmp/registers"], &program);
    assert_eq!(install.code(), 0);
    let text = clone.said("/tmp/registers switch 300");
    let numbers: Vec<u64> = text.split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert!(numbers[0] >= 300, "{} context switches are too few", numbers[0]);
    assert_eq!(numbers[1], 0, "registers changed across a context switch");
}

/// By how much the guest's wall clock is outside the host's, at least: it is asked many times, and its answer
/// lies between question and reply if the clocks agree.
fn clock_off(clone: &mut Clone) -> Duration {
    let script = "while read -r _; do echo $EPOCHREALTIME; done";
    let mut command = Command::new(&["bash", "-c", script]);
    command.stdin = true;
    let stream = clone.agent.exec(&command).unwrap();
    let writer = clone.agent.writer();
    let ask = || {
        writer.send(stream, &ToGuest::Stdin(b"\n")).unwrap();
        unix_ns()
    };
    let (mut rounds, mut worst, mut tightest) = (0, 0, i128::MAX);
    let mut asked = ask();
    let off = clone.agent.pump(|from, message| match message {
        ToHost::Stdout(text) if from == stream => {
            let heard = unix_ns();
            let text = std::str::from_utf8(text).unwrap().trim().replace('.', "");
            let told = text.parse::<i128>().unwrap() * 1000;
            worst = worst.max(asked - told).max(told - heard);
            tightest = tightest.min(heard - asked);
            rounds += 1;
            if rounds == 10 {
                return Ok(ControlFlow::Break(worst));
            }
            asked = ask();
            Ok(ControlFlow::Continue(()))
        }
        _ => Ok(ControlFlow::Continue(())),
    });
    println!("tightest round trip {} us, clock off by {} us", tightest / 1000, worst / 1000);
    Duration::from_nanos(off.unwrap().try_into().unwrap())
}

/// What a clone knows is the time at which its identity was put together: a failure says how long it took to take it.
fn assert_clock_is_right(clone: &mut Clone) {
    let off = clock_off(clone);
    assert!(off <= Duration::from_millis(50), "{off:?}, and it was adopted in {:?}", clone.adopted_in);
}

#[test]
fn a_clones_wall_clock_is_within_fifty_milliseconds_of_the_hosts() {
    if !kvm_or_skip("a_clones_wall_clock_is_within_fifty_milliseconds_of_the_hosts") {
        return;
    }
    let _turn = turn();
    let mut clone = shared().clone();
    assert_clock_is_right(&mut clone);
}

/// Sleeps, timers and timeouts by the guest's own clocks.
fn assert_time_passes(clone: &mut Clone) {
    let script = "a=$EPOCHREALTIME; sleep 1; b=$EPOCHREALTIME; echo $((${b/./} - ${a/./})); \
                  timeout 0.3 sleep 60; echo $?; read -t 0.2 -r _ < <(sleep 60); echo $(($? > 128)); read -r u _ < /proc/uptime; sleep 0.5; \
                  read -r v _ < /proc/uptime; echo $((${v/./} - ${u/./}))";
    let text = clone.said(script);
    let numbers: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    let [slept_us, timed_out, read_timed_out, uptime_centiseconds] = numbers[..] else {
        panic!("{text}");
    };
    assert!((1_000_000..10_000_000).contains(&slept_us), "sleep 1 took {slept_us} us of the guest's time");
    assert_eq!((timed_out, read_timed_out), (124, 1), "{text}");
    assert!((49..1_000).contains(&uptime_centiseconds), "{text}");
}

#[test]
fn a_clones_timers_fire_after_what_they_were_set_to() {
    if !kvm_or_skip("a_clones_timers_fire_after_what_they_were_set_to") {
        return;
    }
    let _turn = turn();
    assert_time_passes(&mut shared().clone());
}

#[test]
fn a_clone_of_an_older_template_keeps_time() {
    if !kvm_or_skip("a_clone_of_an_older_template_keeps_time") {
        return;
    }
    const AGE: Duration = Duration::from_secs(45);
    drop(turn());
    let frozen = {
        let _turn = turn();
        shared().frozen
    };
    // Meanwhile others have their turns.
    std::thread::sleep(AGE.saturating_sub(frozen.elapsed()));
    let _turn = turn();
    let mut clone = shared().clone();
    assert_time_passes(&mut clone);
    assert_clock_is_right(&mut clone);
}

#[test]
fn two_clones_share_no_random_byte_and_no_name() {
    if !kvm_or_skip("two_clones_share_no_random_byte_and_no_name") {
        return;
    }
    let _turn = turn();
    let script = "cat /proc/sys/kernel/random/uuid /proc/sys/kernel/random/boot_id /etc/machine-id; hostname; echo $RANDOM$RANDOM$RANDOM; mktemp -u; \
                  python3 -c 'import os; print(os.urandom(512).hex(), id(object()))'; head -c 512 /dev/urandom | od -An -v -tx1 | tr -d ' \\n'";
    let said: Vec<String> = (0..2).map(|_| shared().clone().said(script)).collect();
    let words: Vec<Vec<&str>> = said.iter().map(|text| text.split_whitespace().collect()).collect();
    assert_eq!(words[0].len(), 9, "{}", said[0]);
    for (one, other) in words[0].iter().zip(&words[1]) {
        assert_ne!(one, other);
    }
    // Shifted streams would differ too, but share runs.
    let windows = |text: &str| -> Vec<String> {
        text.as_bytes().chunks(16).map(|chunk| String::from_utf8_lossy(chunk).into_owned()).collect()
    };
    for random in [6, 8] {
        assert_eq!(words[0][random].len(), 1024);
        let shared = windows(words[0][random]).iter().filter(|run| words[1][random].contains(*run)).count();
        assert_eq!(shared, 0, "random bytes of one clone are in the other's");
    }
}

#[test]
fn a_clone_says_the_identity_it_was_given_and_its_owner_may_change_it() {
    if !kvm_or_skip("a_clone_says_the_identity_it_was_given_and_its_owner_may_change_it") {
        return;
    }
    let _turn = turn();
    let mut clone = shared().clone();
    let hex = |id: [u8; 16]| id.map(|byte| format!("{byte:02x}")).concat();
    let boot = hex(clone.identity.boot_id);
    let boot = [&boot[..8], &boot[8..12], &boot[12..16], &boot[16..20], &boot[20..]].join("-");
    assert!(boot[14..].starts_with('4'), "{boot} is no UUID of version 4");
    let look = "cat /etc/machine-id /proc/sys/kernel/random/boot_id; stat -c '%a %s' /etc/machine-id";
    assert_eq!(clone.said(look), format!("{}\n{boot}\n444 33", hex(clone.identity.machine_id)));
    // It is his: what he does with these files, PID 1 survives.
    let mut other = clone.identity.clone();
    (other.machine_id, other.boot_id) = ([0xab; 16], [0xcd; 16]);
    assert_eq!(clone.said(": > /etc/machine-id; wc -c < /etc/machine-id"), "0");
    clone.agent.adopt(&other).unwrap();
    assert_eq!(clone.said("cat /etc/machine-id"), "ab".repeat(16));
    assert_eq!(clone.said("rm /etc/machine-id; echo mine > /etc/machine-id; cat /etc/machine-id"), "mine");
    clone.agent.adopt(&clone.identity).unwrap();
    assert_eq!(clone.said("cat /etc/machine-id /proc/sys/kernel/random/boot_id"), format!("mine\n{boot}"));
}

#[test]
fn what_a_clone_writes_is_in_neither_its_sibling_nor_its_template() {
    if !kvm_or_skip("what_a_clone_writes_is_in_neither_its_sibling_nor_its_template") {
        return;
    }
    let _turn = turn();
    let template = shared();
    let before = digest_memory(&template.stored.memory).unwrap();
    assert_eq!(before, template.stored.snapshot.compat.memory);
    let disks: Vec<_> = template.config.disks.iter().map(|disk| disk.path.metadata().unwrap()).collect();
    let (mut one, mut other) = (template.clone(), template.clone());
    one.said("echo secret > /tmp/mine; echo x >> /etc/passwd; seq 1 200000 > /dev/shm/filler; sync; hostname changed");
    let look = "ls /tmp /dev/shm; tail -n 1 /etc/passwd; hostname";
    let seen = other.said(look);
    assert!(!seen.contains("mine") && !seen.contains("filler") && !seen.contains("\nx\n"), "{seen}");
    assert!(seen.ends_with(&other.identity.hostname), "{seen}");
    drop((one, other));
    assert_eq!(digest_memory(&template.stored.memory).unwrap(), before);
    assert_eq!(
        template.clone().said("ls /tmp /dev/shm; tail -n 1 /etc/passwd").lines().last(),
        seen.lines().rev().nth(1)
    );
    for (disk, was) in template.config.disks.iter().zip(disks) {
        let now = disk.path.metadata().unwrap();
        assert_eq!((now.len(), now.modified().unwrap()), (was.len(), was.modified().unwrap()), "{disk:?}");
    }
}

/// Threads of microVMs, open files, and mappings of the memory image or of KVM.
fn left() -> (usize, usize, usize) {
    let files = std::fs::read_dir("/proc/self/fd").unwrap().count();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let ours = ["/memory", "kvm", "io_uring"];
    let maps = maps.lines().filter(|line| ours.iter().any(|name| line.contains(name))).count();
    (microvm_threads(), files, maps)
}

#[test]
fn twenty_clones_leave_no_thread_no_file_and_no_mapping() {
    if !kvm_or_skip("twenty_clones_leave_no_thread_no_file_and_no_mapping") {
        return;
    }
    let _turn = turn();
    drop(shared().clone());
    let before = left();
    for _ in 0..20 {
        let clone = shared().clone();
        let (threads, files, maps) = left();
        assert!(threads >= 2 && files > before.1 && maps > before.2, "the counts count what there is");
        drop(clone);
    }
    assert_eq!(left(), before);
}

#[test]
fn a_clone_of_a_removed_template_goes_on() {
    if !kvm_or_skip("a_clone_of_a_removed_template_goes_on") {
        return;
    }
    let _turn = turn();
    let dir = fresh_dir("removed");
    refusals::copy(&shared().stored.dir, &dir);
    let stored = Stored::open(&dir).unwrap();
    let mut clone = Clone::of(&stored, &shared().config);
    drop(stored);
    std::fs::remove_dir_all(&dir).unwrap();
    assert_eq!(clone.said("python3 -c 'print(sum(range(1000)))'"), "499500");
}
