//! Bytes in quantity, and what is left behind: windows, interleaving, background processes, orphans.
#![allow(missing_docs, clippy::unwrap_used)]

mod host;

use std::collections::HashMap;
use std::time::Duration;

use guest_init::{EXEC_STDIN, ExecRequest, INITIAL_WINDOW_BYTES, Kind, Outcome, ToGuest, ToHost};
use host::{Agent, Ran};
use sha2::{Digest, Sha256};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// Bytes without a pattern that a lost or doubled piece would fit into.
fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes
}

#[test]
fn ten_megabytes_through_cat_come_back_the_same() {
    let mut agent = Agent::start();
    let input = noise(10 * 1024 * 1024 + 17);
    agent.line.exec(3, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    let mut ran = Ran::default();
    agent.line.feed(3, &input, &mut ran);
    assert_eq!(ran.code(), 0);
    assert_eq!(Sha256::digest(&ran.stdout), Sha256::digest(&input));
}

#[test]
fn twenty_megabytes_of_output_arrive_whole_through_windows() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &sh("yes 0123456789abcde | head -c 20000000"));
    assert_eq!(ran.stdout.len(), 20_000_000);
    assert!(ran.stdout.chunks(16).all(|line| b"0123456789abcde\n".starts_with(line)));
    assert_eq!(ran.code(), 0);
}

#[test]
fn without_credit_no_more_than_the_window_is_sent() {
    let mut agent = Agent::start();
    agent.line.exec(1, &ExecRequest { argv: &sh("head -c 1000000 /dev/zero"), ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    let mut seen = 0;
    while seen < INITIAL_WINDOW_BYTES as usize {
        seen += agent.line.expect(Kind::Stdout).payload.len();
    }
    assert_eq!(seen, INITIAL_WINDOW_BYTES as usize);
    assert_eq!(agent.line.next_within(Duration::from_millis(200)), None);
    agent.line.grant(1, 1000);
    assert_eq!(agent.line.expect(Kind::Stdout).payload.len(), 1000);
    assert_eq!(agent.line.next_within(Duration::from_millis(100)), None);
    agent.line.grant(1, 10_000_000);
    assert_eq!(agent.line.finish(1).stdout.len(), 1_000_000 - seen - 1000);
}

#[test]
fn a_command_without_credit_does_not_hold_up_another() {
    let mut agent = Agent::start();
    let script = "head -c 3000000 /dev/zero; head -c 100000 /dev/zero >&2; exit";
    let mut first = Ran::default();
    agent.line.exec(1, &ExecRequest { argv: &sh(&format!("{script} 1")), ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    while first.stdout.len() < INITIAL_WINDOW_BYTES as usize {
        first.stdout.extend(agent.line.expect(Kind::Stdout).payload);
    }
    let second = agent.line.run(2, &sh(&format!("{script} 2")));
    assert_eq!((second.stdout.len(), second.stderr.len(), second.code()), (3_000_000, 100_000, 2));
    agent.line.grant(1, INITIAL_WINDOW_BYTES as usize);
    let rest = agent.line.finish(1);
    assert_eq!(
        (first.stdout.len() + rest.stdout.len(), rest.stderr.len(), rest.code()),
        (3_000_000, 100_000, 1)
    );
}

#[test]
fn two_commands_at_once_get_what_is_theirs() {
    let mut agent = Agent::start();
    for (stream, letter) in [(1, "a"), (2, "b")] {
        let script = format!("yes {letter} | head -c 2000000; exit {stream}");
        agent.line.exec(stream, &ExecRequest { argv: &sh(&script), ..ExecRequest::default() });
    }
    let mut rans: HashMap<u32, Ran> = HashMap::new();
    while rans.values().filter(|ran| ran.exited.is_some()).count() < 2 {
        let frame = agent.line.next().unwrap();
        agent.line.collect(&frame, rans.entry(frame.stream).or_default());
    }
    for (stream, letter) in [(1, b"a\n"), (2, b"b\n")] {
        let ran = &rans[&stream];
        assert_eq!((ran.stdout.len(), u32::from(ran.code())), (2_000_000, stream));
        assert!(ran.stdout.chunks(2).all(|line| line == letter));
    }
}

#[test]
fn stdin_waits_for_a_command_that_does_not_read() {
    let mut agent = Agent::start();
    let input = noise(INITIAL_WINDOW_BYTES as usize);
    let argv = sh("sleep 0.3; sha256sum");
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &argv, ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    for chunk in input.chunks(50_000) {
        agent.line.send(1, &ToGuest::Stdin(chunk));
    }
    agent.line.send(1, &ToGuest::StdinEof);
    let ran = agent.line.finish(1);
    let digest: String = Sha256::digest(&input).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(ran.text(), format!("{digest}  -\n"));
}

#[test]
fn a_command_that_closes_its_stdin_does_not_stop_the_host() {
    let mut agent = Agent::start();
    let argv = sh("sleep 0.3; exec 0<&-; exec sleep 1000");
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &argv, ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    // The first window fills pipe and ring; all of it must come back as credit when stdin is closed.
    let mut credit = INITIAL_WINDOW_BYTES as usize;
    for _ in 0..100 {
        while credit < 32_768 {
            let ToHost::StdinWindow { bytes } = agent.line.expect(Kind::StdinWindow).message() else {
                panic!()
            };
            credit += bytes as usize;
        }
        agent.line.send(1, &ToGuest::Stdin(&[7; 32_768]));
        credit -= 32_768;
    }
    agent.line.send(1, &ToGuest::Signal { signo: 9 });
    assert_eq!(agent.line.finish(1).code(), 137);
}

#[test]
fn stdin_that_one_command_left_is_not_the_next_ones() {
    let mut agent = Agent::start();
    agent
        .line
        .exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &["sleep", "1000"], ..ExecRequest::default() });
    for _ in 0..4 {
        agent.line.send(1, &ToGuest::Stdin(&[b'x'; 60_000]));
    }
    agent.line.send(1, &ToGuest::Signal { signo: 9 });
    agent.line.finish(1);
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    agent.line.send(1, &ToGuest::Stdin(b"mine"));
    agent.line.send(1, &ToGuest::StdinEof);
    assert_eq!(agent.line.finish(1).text(), "mine");
}

#[test]
fn more_stdin_than_the_window_ends_the_connection() {
    let mut agent = Agent::start_listening("overflow");
    let request = ExecRequest { flags: EXEC_STDIN, argv: &["sleep", "1000"], ..ExecRequest::default() };
    agent.line.exec(1, &request);
    agent.line.expect(Kind::Started);
    // The window (4 frames), and what the pipe holds (1), and then some: the agent hangs up at the sixth,
    // maybe before the seventh is sent.
    let heard = (0..7).take_while(|_| agent.line.send_if_heard(1, &ToGuest::Stdin(&[0; 65536]))).count();
    assert!(heard >= 6, "hung up after {heard} frames");
    // What went into the pipe was credited.
    let credit = agent.line.expect(Kind::StdinWindow);
    assert_eq!(credit.message(), ToHost::StdinWindow { bytes: 65536 });
    let error = agent.line.expect(Kind::Error);
    assert!(matches!(error.message(), ToHost::Error { code: guest_init::ErrorCode::StdinOverflow, .. }));
    assert_eq!(agent.line.next(), None);
    // The command is still there.
    let mut line = agent.reconnect();
    line.expect(Kind::Started);
    line.send(1, &ToGuest::Signal { signo: 9 });
    while line.next().unwrap().kind != Kind::Exited {}
}

#[test]
fn background_processes_neither_hold_up_the_exit_nor_lose_what_was_written() {
    let mut agent = Agent::start();
    let script = "head -c 50000 /dev/zero; (while :; do echo background; sleep 0.01; done) & exit 5";
    let ran = agent.line.run(1, &sh(script));
    assert_eq!(ran.code(), 5);
    assert!(ran.stdout.len() >= 50_000);
    // It goes on: its writes are thrown away and do not kill it.
    std::thread::sleep(Duration::from_millis(100));
    let pid = "pgrep -f 'echo backgroun[d]'";
    assert_eq!(agent.line.run(2, &sh(&format!("{pid} >/dev/null"))).code(), 0);
    assert_eq!(agent.line.run(3, &sh(&format!("kill -9 $({pid})"))).code(), 0);
}

#[test]
fn a_background_process_that_writes_without_end_does_not_hold_up_the_exit() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &sh("yes & echo $!; exit 6"));
    assert_eq!(ran.code(), 6);
    let pid = ran.text().lines().find(|line| *line != "y").unwrap().to_owned();
    assert_eq!(agent.line.run(2, &["kill", "-9", &pid]).code(), 0);
}

#[test]
fn many_background_holders_do_not_use_up_the_places() {
    let mut agent = Agent::start();
    for round in 0..150 {
        let ran = agent.line.run(round, &sh("sleep 1000 & echo $!"));
        assert_eq!(ran.code(), 0, "round {round}");
    }
    agent.line.run(1, &["pkill", "-f", "^sleep 1000$", "-P", &agent.process.id().to_string()]);
}

#[test]
fn the_sixty_fifth_command_at_once_is_refused_and_the_others_go_on() {
    let mut agent = Agent::start();
    for stream in 0..64 {
        agent.line.exec(stream, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
        agent.line.expect(Kind::Started);
    }
    let failed = agent.line.run(64, &["true"]).failed.unwrap();
    assert_eq!((failed.0, failed.1), (11, guest_init::Stage::Limits as u8));
    for stream in 0..64 {
        agent.line.send(stream, &ToGuest::Stdin(b"still here"));
        agent.line.send(stream, &ToGuest::StdinEof);
        let ran = agent.line.finish(stream);
        assert_eq!((ran.text().as_str(), ran.code()), ("still here", 0));
    }
}

#[test]
fn closed_output_is_thrown_away_and_the_exit_still_told() {
    let mut agent = Agent::start();
    agent
        .line
        .exec(1, &ExecRequest { argv: &sh("head -c 30000000 /dev/zero; exit 9"), ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    agent.line.send(1, &ToGuest::Close);
    let mut seen = 0;
    loop {
        let frame = agent.line.next().unwrap();
        match frame.message() {
            ToHost::Stdout(bytes) => seen += bytes.len(),
            ToHost::Exited(exited) => break assert_eq!(exited.outcome, Outcome::Code(9)),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen <= INITIAL_WINDOW_BYTES as usize);
}

#[test]
fn a_hundred_orphans_are_reaped() {
    let mut agent = Agent::start();
    let script = "for i in $(seq 100); do (sh -c 'sleep 0.2 >/dev/null 2>&1 &' &) ; done; exit 0";
    assert_eq!(agent.line.run(1, &sh(script)).code(), 0);
    let children = format!("/proc/{0}/task/{0}/children", agent.process.id());
    // The kernel hands the orphans over and the agent reaps them: in the end it has no children.
    for _ in 0..600 {
        if std::fs::read_to_string(&children).unwrap().is_empty() {
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("children left: {}", std::fs::read_to_string(&children).unwrap());
}

#[test]
fn open_files_do_not_grow_with_commands() {
    let mut agent = Agent::start();
    let fds = format!("/proc/{}/fd", agent.process.id());
    let count = || std::fs::read_dir(&fds).unwrap().count();
    agent.line.run(1, &["true"]);
    let before = count();
    for stream in 0..300 {
        agent.line.run(stream, &["true"]);
        agent.line.run(stream, &["/no/such"]);
    }
    // The last pipes are closed in the turn that has sent the exit.
    agent.line.send(0, &ToGuest::Ping { nonce: 0 });
    agent.line.expect(Kind::Pong);
    assert_eq!(count(), before);
}
