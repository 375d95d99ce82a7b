//! A guest that wants to be rid of its agent: it is PID 1 of its own namespace here, as in a microVM.
//! These need root and say so if they have it not.
#![allow(missing_docs, clippy::unwrap_used)]

mod host;

use std::os::unix::fs::MetadataExt;
use std::process::Command;

use guest_init::{ExecRequest, Kind, Stage, ToGuest, ToHost};
use host::{Agent, program};

const UNSHARE: [&str; 6] = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--mount-proc"];

fn is_root() -> bool {
    let root = std::fs::metadata("/proc/self").is_ok_and(|data| data.uid() == 0);
    if !root {
        eprintln!("skipped: only root may make a PID namespace");
    }
    root
}

fn ping(agent: &mut Agent) {
    agent.line.send(0, &ToGuest::Ping { nonce: 77 });
    loop {
        let frame = agent.line.next().unwrap();
        if frame.message() == (ToHost::Pong { nonce: 77 }) {
            return;
        }
    }
}

#[test]
fn killing_everybody_from_inside_leaves_the_agent() {
    if !is_root() {
        return;
    }
    let mut agent = Agent::start_command(Command::new(UNSHARE[0]).args(&UNSHARE[1..]).arg(program()));
    agent.line.exec(1, &ExecRequest { argv: &["sleep", "1000"], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    assert_eq!(agent.line.run(2, &["sh", "-c", "test $(cat /proc/1/comm) = guest-init"]).code(), 0);
    for signal in ["-9", "-15", "-1", "-2", "-11"] {
        agent.line.exec(
            3,
            &ExecRequest { argv: &["sh", "-c", &format!("kill {signal} 1")], ..ExecRequest::default() },
        );
        assert_eq!(agent.line.finish(3).code(), 0);
    }
    // The shell itself is spared by -1; the sleeper is not.
    agent.line.exec(3, &ExecRequest { argv: &["sh", "-c", "kill -9 -1; exit 4"], ..ExecRequest::default() });
    let mut codes = Vec::new();
    while codes.len() < 2 {
        let frame = agent.line.next().unwrap();
        if let ToHost::Exited(exited) = frame.message() {
            codes.push((frame.stream, exited.shell_code()));
        }
    }
    codes.sort_unstable();
    assert_eq!(codes, [(1, 137), (3, 4)]);
    assert_eq!(agent.line.run(4, &["true"]).code(), 0);
}

#[test]
fn a_fork_bomb_makes_commands_fail_and_not_the_agent() {
    if !is_root() {
        return;
    }
    // The limit is on the user, and so the agent is that user too.
    let mut agent = Agent::start_command(
        Command::new(UNSHARE[0])
            .args(&UNSHARE[1..])
            .args(["prlimit", "--nproc=40:40", "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"])
            .arg(program()),
    );
    let bomb = "bomb() { bomb | bomb & sleep 1000; }; bomb";
    agent.line.exec(1, &ExecRequest { argv: &["sh", "-c", bomb], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    // Until the bomb has all processes; meanwhile some commands still get one.
    let mut refused = None;
    for stream in 2..500 {
        ping(&mut agent);
        agent.line.exec(stream, &ExecRequest { argv: &["sleep", "1000"], ..ExecRequest::default() });
        let frame = loop {
            let frame = agent.line.next().unwrap();
            if frame.stream == stream {
                break frame;
            }
        };
        if frame.kind == Kind::ExecFailed {
            refused = Some(frame);
            break;
        }
    }
    let refused = refused.unwrap();
    let ToHost::ExecFailed(failed) = refused.message() else { panic!("{refused:?}") };
    assert!(
        (failed.errno, failed.stage) == (11, Stage::Clone) || failed.stage == Stage::Limits,
        "{failed:?}"
    );
    ping(&mut agent);
}
