//! A guest with two vCPUs, frozen in the middle of its work: every clone goes on with it.

use super::{fresh_dir, turn};
use peregrine_vmm::MicroVm;
use peregrine_vmm::agent::{Agent, Command};
use peregrine_vmm::snapshot::{MEMORY_FILE, Stored};
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tests::{BOOT_TIMEOUT, Clone, PATIENCE, config, kvm_or_skip};

/// What the guest does while it is frozen: vector work on its first CPU, a sleep, and a count that survives.
const WORK: &str =
    "echo begun > /tmp/work; /tmp/registers switch 1500 > /tmp/vectors 2>&1; echo done > /tmp/vectors.done";
const SLEEP: &str = "echo begun > /tmp/sleeper; sleep 10; echo woken > /tmp/sleeper";

/// A guest with two CPUs that has booted into what is to be its image.
struct Booted {
    dir: PathBuf,
    image: Arc<File>,
    vm: MicroVm,
    agent: Agent,
}

impl Booted {
    fn new() -> Self {
        let dir = fresh_dir("busy");
        let path = dir.join(MEMORY_FILE);
        let image = Arc::new(File::options().read(true).write(true).create_new(true).open(path).unwrap());
        let vm = MicroVm::boot_into(config(2, 192).check().unwrap(), &image).unwrap();
        let (mut agent, _) =
            vm.connect_agent(BOOT_TIMEOUT).unwrap_or_else(|e| panic!("{e}: {:?}", vm.stop_reason()));
        agent.set_timeout(Some(PATIENCE)).unwrap();
        Self { dir, image, vm, agent }
    }

    fn said(&mut self, argv: &[&str], stdin: &[u8]) -> String {
        let output = self.agent.output(&Command::new(argv), stdin).unwrap();
        assert_eq!(output.code(), 0, "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn freeze(self) -> Stored {
        let at_gate = self.vm.freeze_point(&self.agent, Duration::from_secs(30)).unwrap();
        println!("frozen at its gate: {at_gate}");
        self.vm.freeze(&self.agent, &self.image, &self.dir).unwrap();
        let stored = Stored::open(&self.dir).unwrap();
        stored.verify_memory().unwrap();
        stored
    }
}

/// Boots, starts the work, freezes.
fn freeze() -> Stored {
    let mut booted = Booted::new();
    let program = std::fs::read(tests::program("registers")).unwrap();
    booted.said(&["sh", "-c", "cat > /tmp/registers && chmod +x /tmp/registers"], &program);
    for script in [WORK, SLEEP] {
        booted.agent.exec(&Command::new(&["bash", "-c", script])).unwrap();
    }
    let wait = "until [ -s /tmp/sleeper ] && [ -s /tmp/work ]; do sleep 0.1; done; echo $(< /tmp/sleeper)";
    assert!(booted.said(&["bash", "-c", wait], b"").ends_with("begun\n"));
    booted.freeze()
}

#[test]
fn a_timer_runs_on_in_a_clone_though_the_agent_is_on_another_cpu() {
    if !kvm_or_skip("a_timer_runs_on_in_a_clone_though_the_agent_is_on_another_cpu") {
        return;
    }
    let _turn = turn();
    let mut booted = Booted::new();
    // The first CPU computes without end, so that its timer alone lets the sleeper in again.
    let sleeper = "import os, time\n\
                   os.sched_setaffinity(0, {0})\n\
                   if os.fork() == 0:\n\
                   \x20   while True: pass\n\
                   open('/tmp/sleeper', 'w').write('begun')\n\
                   time.sleep(6)\n\
                   open('/tmp/sleeper', 'w').write('woken')";
    booted.agent.exec(&Command::new(&["python3", "-c", sleeper])).unwrap();
    booted.said(&["python3", "-c", "import os; os.sched_setaffinity(1, {1})"], b"");
    let wait = "until [ -s /tmp/sleeper ]; do sleep 0.1; done; echo $(< /tmp/sleeper)";
    assert_eq!(booted.said(&["bash", "-c", wait], b""), "begun\n");
    let mut clone = Clone::of(&booted.freeze(), &config(2, 192));
    let looks = r#"for i in {1..100}; do [ "$(< /tmp/sleeper)" = woken ] && break; sleep 0.2; done; cat /tmp/sleeper"#;
    assert_eq!(clone.said(looks), "woken");
}

#[test]
fn a_guest_with_two_cpus_frozen_at_work_goes_on_in_every_clone() {
    if !kvm_or_skip("a_guest_with_two_cpus_frozen_at_work_goes_on_in_every_clone") {
        return;
    }
    let _turn = turn();
    let config = config(2, 192);
    let stored = freeze();
    for _ in 0..2 {
        let mut clone = Clone::of(&stored, &config);
        assert_eq!(
            clone.said("cat /tmp/sleeper; ls /tmp/vectors.done 2>/dev/null || true; nproc"),
            "begun\n2"
        );
        let both = "import os, sys\n\
                    pids = []\n\
                    for cpu in (0, 1):\n\
                    \x20   pid = os.fork()\n\
                    \x20   if pid == 0:\n\
                    \x20       os.sched_setaffinity(0, {cpu})\n\
                    \x20       total = sum(range(10**6))\n\
                    \x20       now = int(open('/proc/self/stat').read().rsplit(')')[1].split()[36])\n\
                    \x20       os._exit(0 if total == 499999500000 and now == cpu else 1)\n\
                    \x20   pids.append(pid)\n\
                    print([os.waitpid(pid, 0)[1] for pid in pids])";
        let output = clone.run(&["python3", "-c", both], b"");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "[0, 0]\n", "{output:?}");
        let done = clone.said("until [ -e /tmp/vectors.done ] && grep -q woken /tmp/sleeper; do sleep 0.2; done; cat /tmp/vectors");
        let numbers: Vec<u64> = done.split_whitespace().map(|n| n.parse().unwrap()).collect();
        assert!(numbers[0] >= 100, "{done}");
        assert_eq!(numbers[1], 0, "registers changed");
    }
}
