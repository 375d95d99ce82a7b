//! What becomes of a connection: garbage, loss, and the next one.
#![allow(missing_docs, clippy::unwrap_used)]

mod host;

use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use guest_init::{
    ADOPT_FAILED_CLOCK, ADOPT_FAILED_ENTROPY, ADOPT_FAILED_HOSTNAME, ADOPT_FAILED_IDS, Adopt, EXEC_STDIN,
    ErrorCode, ExecRequest, Kind, ToGuest, ToHost,
};
use host::{Agent, Line};

#[test]
fn garbage_is_answered_with_an_error_and_the_connection_closed() {
    let cases: [&[u8]; 6] = [
        &[0xff; 12],                                                      // no such kind
        &[1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0],                            // reserved bytes
        &[2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0],                            // longer than 64 KiB
        &[0x81, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],                         // the guest's own
        &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 9, 9],                      // an Exec cut short
        &[7, 0xff, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], // unknown flags
    ];
    let mut agent = Agent::start_listening("garbage");
    for case in cases {
        let mut line = agent.reconnect();
        line.send_raw(case);
        let error = line.expect(Kind::Error);
        assert!(matches!(error.message(), ToHost::Error { code: ErrorCode::Protocol, .. }), "{error:?}");
        assert_eq!(line.next(), None);
    }
    // And the next connection works.
    let mut line = agent.reconnect();
    assert_eq!(line.run(1, &["true"]).code(), 0);
    assert!(agent.process.try_wait().unwrap().is_none());
}

#[test]
fn random_bytes_never_end_the_agent() {
    let agent = Agent::start_listening("random");
    let mut state = 1u32;
    for round in 0..200 {
        let bytes: Vec<u8> = (0..200)
            .map(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Often a plausible header, so that also the payloads are reached. No Exec: it would
                // be run. Shutdown has a length here, and so is refused.
                match at % 20 {
                    0 => 2 + (state >> 16) as u8 % 9,
                    1..=3 | 9..=11 => 0,
                    8 => 8,
                    _ => (state >> 24) as u8,
                }
            })
            .map(|byte| if byte == 8 && round % 2 == 0 { 7 } else { byte })
            .collect();
        let mut line = agent.reconnect();
        line.send_raw(&bytes);
        line.hang_up();
    }
    let mut line = agent.reconnect();
    assert_eq!(line.run(1, &["true"]).code(), 0);
}

#[test]
fn frames_may_arrive_byte_by_byte() {
    let mut agent = Agent::start();
    let mut buffer = [0; 200];
    let request = ExecRequest { argv: &["echo", "slow"], ..ExecRequest::default() };
    let len = request.encode(1, &mut buffer).unwrap();
    for byte in &buffer[..len] {
        agent.line.send_raw(&[*byte]);
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(agent.line.finish(1).text(), "slow\n");
}

#[test]
fn a_thousand_pings_at_once_are_all_answered() {
    let mut agent = Agent::start();
    let mut bytes = Vec::new();
    for nonce in 0..5000 {
        let mut frame = [0; 32];
        let len = ToGuest::Ping { nonce }.encode(0, &mut frame).unwrap();
        bytes.extend_from_slice(&frame[..len]);
    }
    agent.line.send_raw(&bytes);
    for nonce in 0..5000 {
        assert_eq!(agent.line.expect(Kind::Pong).message(), ToHost::Pong { nonce });
    }
}

#[test]
fn answers_that_are_longer_than_their_questions_all_arrive() {
    let mut agent = Agent::start();
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    let mut frame = [0; 32];
    let len = ToGuest::Signal { signo: 4000 }.encode(1, &mut frame).unwrap();
    // One read's worth of questions, and more than one send's worth of answers.
    agent.line.send_raw(&frame[..len].repeat(4000));
    for _ in 0..4000 {
        agent.line.expect(Kind::Error);
    }
    agent.line.send(1, &ToGuest::StdinEof);
    assert_eq!(agent.line.finish(1).code(), 0);
}

#[test]
fn a_host_that_writes_and_does_not_read_is_answered_in_full_when_it_does() {
    let (mut socket, theirs) = UnixStream::pair().unwrap();
    let mut process =
        Command::new(host::program()).args(["--serve-fd", "0"]).stdin(OwnedFd::from(theirs)).spawn().unwrap();
    // Write until the agent takes no more, because it can send no more.
    socket.set_write_timeout(Some(Duration::from_millis(500))).unwrap();
    let mut sent = 0;
    loop {
        let mut frame = [0; 32];
        let len = ToGuest::Ping { nonce: sent }.encode(0, &mut frame).unwrap();
        match socket.write(&frame[..len]) {
            Ok(written) => assert_eq!(written, len, "a small frame is sent whole or not"),
            Err(error) => break assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        sent += 1;
    }
    assert!(sent > 1000, "{sent}");
    let mut line = Line::new(socket);
    line.expect(Kind::Hello);
    for nonce in 0..sent {
        assert_eq!(line.expect(Kind::Pong).message(), ToHost::Pong { nonce });
    }
    assert_eq!(line.run(1, &["true"]).code(), 0);
    line.hang_up();
    assert!(process.wait().unwrap().success());
}

#[test]
fn commands_outlive_a_connection_and_their_output_and_exit_wait_for_the_next() {
    let mut agent = Agent::start_listening("outlive");
    let argv = ["sh", "-c", "read x; echo got $x; head -c 100000 /dev/zero >&2; exit 11"];
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &argv, ..ExecRequest::default() });
    let started = agent.line.expect(Kind::Started);
    let ToHost::Started { pid, resumed: false } = started.message() else { panic!("{started:?}") };
    let mut line = agent.reconnect();
    assert_eq!(agent.line.next(), None);
    let started = line.expect(Kind::Started);
    assert_eq!(started.message(), ToHost::Started { pid, resumed: true });
    let credit = line.expect(Kind::StdinWindow);
    assert_eq!(credit.message(), ToHost::StdinWindow { bytes: guest_init::INITIAL_WINDOW_BYTES });
    line.send(1, &ToGuest::Stdin(b"it\n"));
    // Without credit nothing comes, on this connection or the next.
    assert_eq!(line.next_within(Duration::from_millis(200)), None);
    line.hang_up();
    let mut line = agent.reconnect();
    line.expect(Kind::Started);
    line.grant(1, 1_000_000);
    let ran = line.finish(1);
    assert_eq!((ran.text().as_str(), ran.stderr.len(), ran.code()), ("got it\n", 100_000, 11));
}

#[test]
fn a_host_that_rejoins_on_the_same_connection_misses_nothing_and_gets_nothing_twice() {
    let mut agent = Agent::start();
    // More than its window: it waits in the middle of its output.
    let count = ["sh", "-c", "seq 1 100000; exit 3"];
    agent.line.exec(1, &ExecRequest { argv: &count, ..ExecRequest::default() });
    agent.line.exec(2, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    let (mut text, mut hello, mut resumed) = (Vec::new(), false, Vec::new());
    agent.line.send(0, &ToGuest::Rejoin);
    let exited = loop {
        let frame = agent.line.next().unwrap();
        match frame.message() {
            ToHost::Hello(_) => hello = true,
            ToHost::Started { resumed: true, .. } => {
                assert!(hello);
                resumed.push(frame.stream);
                agent.line.grant(frame.stream, 1_000_000);
            }
            ToHost::Stdout(bytes) => text.extend_from_slice(bytes),
            ToHost::Exited(exited) => break exited,
            _ => {}
        }
    };
    assert_eq!((exited.shell_code(), resumed), (3, vec![1, 2]));
    let expected: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(text == expected.as_bytes(), "{} bytes of {}", text.len(), expected.len());
}

#[test]
fn an_exit_while_nobody_is_there_is_told_later() {
    let mut agent = Agent::start_listening("later");
    agent.line.exec(4, &ExecRequest { argv: &["sh", "-c", "sleep 0.2; exit 12"], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    let second = agent.reconnect();
    second.hang_up();
    std::thread::sleep(Duration::from_millis(500));
    let mut line = agent.reconnect();
    assert_eq!(line.finish(4).code(), 12);
    assert_eq!(line.run(4, &["true"]).code(), 0);
}

#[test]
fn a_stream_in_use_is_not_touched_by_a_second_exec() {
    let mut agent = Agent::start();
    let request = ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() };
    agent.line.exec(1, &request);
    agent.line.expect(Kind::Started);
    agent.line.exec(1, &request);
    let error = agent.line.expect(Kind::Error);
    assert!(matches!(error.message(), ToHost::Error { code: ErrorCode::StreamInUse, .. }));
    agent.line.send(1, &ToGuest::StdinEof);
    assert_eq!(agent.line.finish(1).code(), 0);
}

#[test]
fn frames_about_unknown_streams_are_ignored() {
    let mut agent = Agent::start();
    agent.line.send(9, &ToGuest::Stdin(b"x"));
    agent.line.send(9, &ToGuest::Signal { signo: 9 });
    agent.line.send(9, &ToGuest::Window { bytes: u32::MAX });
    agent.line.send(9, &ToGuest::Close);
    assert_eq!(agent.line.run(1, &["true"]).code(), 0);
}

#[test]
fn an_agent_that_is_not_pid_1_adopts_nothing() {
    let mut agent = Agent::start();
    let adopt = Adopt {
        entropy: &[1; 32],
        wall_clock_ns: 1,
        hostname: b"not-this-machine",
        machine_id: [1; 16],
        boot_id: [2; 16],
    };
    agent.line.send(0, &ToGuest::Adopt(adopt));
    let failed = ADOPT_FAILED_CLOCK | ADOPT_FAILED_ENTROPY | ADOPT_FAILED_HOSTNAME | ADOPT_FAILED_IDS;
    assert_eq!(agent.line.expect(Kind::Adopted).message(), ToHost::Adopted { failed });
}

#[test]
fn a_host_that_takes_nothing_holds_up_nobodys_death() {
    let mut agent = Agent::start_listening("stuck");
    for stream in 0..8 {
        agent.line.exec(stream, &ExecRequest { argv: &["yes"], ..ExecRequest::default() });
        agent.line.grant(stream, 1 << 30);
    }
    // The reader thread of this test takes all, so stop it from being the one: hang up while it flows.
    std::thread::sleep(Duration::from_millis(200));
    let mut line = agent.reconnect();
    for stream in 0..8 {
        line.send(stream, &ToGuest::Signal { signo: 9 });
        line.send(stream, &ToGuest::Close);
    }
    let mut exits = 0;
    while exits < 8 {
        exits += u32::from(line.next().unwrap().kind == Kind::Exited);
    }
}
