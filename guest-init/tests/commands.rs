//! What becomes of one command: its end, its environment, its terminal, its signals.
#![allow(missing_docs, clippy::unwrap_used)]

mod host;

use guest_init::{
    EXEC_CLEAN_ENV, EXEC_LAZY_STARTED, EXEC_PTY, EXEC_STDIN, ErrorCode, ExecFailed, ExecRequest, Kind,
    Outcome, Stage, ToGuest, ToHost,
};
use host::{Agent, Ran};

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

#[test]
fn exit_codes_arrive_as_they_are() {
    let mut agent = Agent::start();
    for code in [0, 1, 42, 127, 255] {
        let ran = agent.line.run(1, &sh(&format!("exit {code}")));
        assert_eq!(ran.exited.unwrap().outcome, Outcome::Code(code));
    }
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let mut agent = Agent::start();
    let ran = agent.line.run(7, &sh("echo out; echo err >&2; echo more"));
    assert_eq!(ran.text(), "out\nmore\n");
    assert_eq!(ran.stderr, b"err\n");
    assert_eq!(ran.code(), 0);
}

#[test]
fn a_command_that_is_not_there_is_127_and_one_that_cannot_run_is_126() {
    let mut agent = Agent::start();
    let cases: [(&[&str], Stage, u8); 6] = [
        (&["no-such-program-anywhere"], Stage::Exec, 127),
        (&["/no/such/path"], Stage::Exec, 127),
        (&[""], Stage::Exec, 127),
        (&["/etc/passwd/x"], Stage::Exec, 127),
        (&["/etc/passwd"], Stage::Exec, 126),
        (&["/etc"], Stage::Exec, 126),
    ];
    for (argv, stage, code) in cases {
        let (errno, found_stage, text) = agent.line.run(1, argv).failed.expect("a failure");
        assert_eq!(found_stage, stage as u8);
        assert_eq!(text, argv[0].as_bytes());
        assert_eq!(ExecFailed { errno, stage, text: b"" }.shell_code(), code, "{argv:?}: errno {errno}");
    }
    // And the agent goes on.
    assert_eq!(agent.line.run(1, &["true"]).code(), 0);
}

#[test]
fn a_program_on_the_path_that_may_not_be_executed_is_126_unless_a_later_one_may() {
    let directory = std::env::temp_dir().join(format!("guest-init-path-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::write(directory.join("true"), "not executable").unwrap();
    let only = format!("PATH={}:/no/such", directory.display());
    let more = format!("{only}:/usr/bin:/bin");
    let mut agent = Agent::start();
    let mut run = |path: &str| {
        agent.line.run_request(1, &ExecRequest { argv: &["true"], env: &[path], ..ExecRequest::default() })
    };
    assert_eq!(run(&only).failed.unwrap().0, 13);
    assert_eq!(run(&more).code(), 0);
    std::fs::remove_dir_all(directory).unwrap();
}

#[test]
fn a_directory_that_is_not_there_fails_before_the_program() {
    let mut agent = Agent::start();
    let request = ExecRequest { cwd: b"/no/such", argv: &["true"], ..ExecRequest::default() };
    let (errno, stage, text) = agent.line.run_request(1, &request).failed.unwrap();
    assert_eq!((errno, stage, text), (2, Stage::Cwd as u8, b"/no/such".to_vec()));
    let request = ExecRequest { cwd: b"/usr/bin", argv: &["pwd"], ..ExecRequest::default() };
    assert_eq!(agent.line.run_request(1, &request).text(), "/usr/bin\n");
    let request = ExecRequest { argv: &["pwd"], ..ExecRequest::default() };
    assert_eq!(agent.line.run_request(1, &request).text(), "/\n");
}

#[test]
fn a_killed_command_is_128_and_the_signal() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &sh("kill -SEGV $$"));
    assert_eq!(ran.exited.unwrap().outcome, Outcome::Signal(11));
    assert_eq!(ran.code(), 139);
    for (signo, code) in [(9, 137), (15, 143), (2, 130)] {
        agent.line.exec(2, &ExecRequest { argv: &["sleep", "1000"], ..ExecRequest::default() });
        agent.line.expect(Kind::Started);
        agent.line.send(2, &ToGuest::Signal { signo });
        assert_eq!(agent.line.finish(2).code(), code);
    }
}

#[test]
fn a_signal_reaches_the_whole_process_group() {
    let mut agent = Agent::start();
    // The shell waits for a grandchild that holds stdout: only if that dies too does the pipe end.
    agent
        .line
        .exec(1, &ExecRequest { argv: &sh("sh -c 'echo up; sleep 1000' & wait"), ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    agent.line.expect(Kind::Stdout);
    agent.line.send(1, &ToGuest::Signal { signo: 15 });
    assert_eq!(agent.line.finish(1).code(), 143);
    let left = agent.line.run(2, &sh("pgrep -f 'sleep 100[0]' -g 0 >/dev/null && echo left; true"));
    assert_eq!(left.text(), "");
}

#[test]
fn a_signal_that_does_not_exist_is_refused_and_the_command_goes_on() {
    let mut agent = Agent::start();
    agent.line.exec(1, &ExecRequest { flags: EXEC_STDIN, argv: &["cat"], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    agent.line.send(1, &ToGuest::Signal { signo: 4000 });
    let error = agent.line.expect(Kind::Error);
    assert!(matches!(error.message(), ToHost::Error { code: ErrorCode::Refused, .. }));
    agent.line.send(1, &ToGuest::StdinEof);
    assert_eq!(agent.line.finish(1).code(), 0);
}

#[test]
fn the_environment_is_the_agents_with_the_given_over_it_or_the_given_alone() {
    let mut agent = Agent::start();
    let mut request =
        ExecRequest { argv: &["env"], env: &["A=1", "HOME=/tmp", "A2=x=y"], ..ExecRequest::default() };
    let ran = agent.line.run_request(1, &request);
    let path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    assert_eq!(ran.text(), format!("A=1\nHOME=/tmp\nA2=x=y\n{path}\n"));
    request.flags = EXEC_CLEAN_ENV;
    assert_eq!(agent.line.run_request(1, &request).text(), "A=1\nHOME=/tmp\nA2=x=y\n");
    request.env = &["PATH=/nowhere:/no"];
    assert_eq!(agent.line.run_request(1, &request).failed.unwrap().0, 2);
    request.env = &["PATH=/nowhere::/usr/bin:/bin"];
    assert_eq!(agent.line.run_request(1, &request).code(), 0);
}

#[test]
fn a_child_begins_with_default_signals_no_blocked_ones_and_only_its_three_files() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &["cat", "/proc/self/status"]);
    let line = |text: &str, name: &str| text.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    for set in ["SigBlk", "SigCgt"] {
        assert_eq!(line(&ran.text(), set), format!("{set}:\t0000000000000000"));
    }
    // What this test's own parents ignore stays ignored (PID 1 has no parents), and the C library's own
    // signals, 32 and 33, by its posix_spawn; the agent adds nothing.
    let ours = std::fs::read_to_string("/proc/self/status").unwrap();
    let inherited = u64::from_str_radix(line(&ours, "SigIgn").split_at(8).1, 16).unwrap();
    let ignored = u64::from_str_radix(line(&ran.text(), "SigIgn").split_at(8).1, 16).unwrap();
    assert_eq!(ignored & !inherited & 0x7fff_ffff, 0);
    // Likewise files: what is open above 2 is `ls`'s own directory, or was open already in this test.
    let links = agent
        .line
        .run(1, &["sh", "-c", "ls -l /proc/self/fd | sed -n 's/.* \\([0-9]*\\) -> /\\1 /p'"])
        .text();
    let ours: Vec<_> = std::fs::read_dir("/proc/self/fd").unwrap().flatten().collect();
    let is_ours =
        |target: &str| ours.iter().any(|fd| fd.path().read_link().is_ok_and(|link| link == *target));
    for link in links.lines() {
        let (number, target) = link.split_once(' ').unwrap();
        let above = number.parse::<u32>().unwrap() > 2;
        assert!(!above || target.starts_with("/proc/") || is_ours(target), "{links}");
    }
    assert_eq!(agent.line.run(1, &["readlink", "/proc/self/fd/0"]).text(), "/dev/null\n");
}

#[test]
fn a_command_is_its_own_session_and_group() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &sh("set -- $(cat /proc/$$/stat); [ $1 = $5 ] && [ $1 = $6 ]"));
    assert_eq!(ran.code(), 0);
}

#[test]
fn a_user_without_names_runs_with_its_ids_and_no_groups() {
    if !std::fs::metadata("/proc/self").is_ok_and(|data| std::os::unix::fs::MetadataExt::uid(&data) == 0) {
        return; // Only root may become others.
    }
    let mut agent = Agent::start();
    let request = ExecRequest { user: Some((1234, 2345)), argv: &["id", "-u"], ..ExecRequest::default() };
    assert_eq!(agent.line.run_request(1, &request).text(), "1234\n");
    let request = ExecRequest { argv: &["id", "-G"], ..request };
    assert_eq!(agent.line.run_request(1, &request).text(), "2345\n");
    let request = ExecRequest { flags: EXEC_PTY, argv: &["sh", "-c", "echo hello > $(tty)"], ..request };
    assert_eq!(agent.line.run_request(1, &request).text(), "hello\r\n");
}

#[test]
fn a_terminal_has_the_given_size_and_takes_a_new_one() {
    let mut agent = Agent::start();
    let script = "stty size; trap 'stty size; exit 3' WINCH; echo ready; while :; do read x; done";
    let request =
        ExecRequest { flags: EXEC_PTY, rows: 33, cols: 77, argv: &sh(script), ..ExecRequest::default() };
    agent.line.exec(1, &request);
    agent.line.expect(Kind::Started);
    let mut seen = Vec::new();
    while !seen.ends_with(b"ready\r\n") {
        seen.extend(agent.line.expect(Kind::Stdout).payload);
    }
    assert_eq!(seen, b"33 77\r\nready\r\n");
    agent.line.send(1, &ToGuest::Resize { rows: 50, cols: 132 });
    // dash looks at its traps when the read returns.
    agent.line.send(1, &ToGuest::Stdin(b"\n"));
    let ran = agent.line.finish(1);
    assert!(ran.text().contains("50 132\r\n"), "{:?}", ran.text());
    assert_eq!(ran.code(), 3);
}

#[test]
fn a_terminal_is_the_controlling_one_and_its_interrupt_key_works() {
    let mut agent = Agent::start();
    let request = ExecRequest {
        flags: EXEC_PTY,
        argv: &sh("echo here > /dev/tty; tty; exec sleep 1000"),
        ..ExecRequest::default()
    };
    agent.line.exec(1, &request);
    agent.line.expect(Kind::Started);
    let mut seen = Vec::new();
    while !seen.windows(9).any(|bytes| bytes == b"/dev/pts/") || !seen.ends_with(b"\n") {
        seen.extend(agent.line.expect(Kind::Stdout).payload);
    }
    assert!(seen.starts_with(b"here\r\n"), "{seen:?}");
    agent.line.send(1, &ToGuest::Stdin(&[3]));
    assert_eq!(agent.line.finish(1).code(), 130);
}

#[test]
fn the_end_of_stdin_on_a_terminal_ends_a_reader() {
    let mut agent = Agent::start();
    agent.line.exec(1, &ExecRequest { flags: EXEC_PTY, argv: &["cat"], ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    agent.line.send(1, &ToGuest::Stdin(b"line\n"));
    agent.line.send(1, &ToGuest::StdinEof);
    let ran = agent.line.finish(1);
    assert_eq!(ran.text(), "line\r\nline\r\n");
    assert_eq!(ran.code(), 0);
}

#[test]
fn a_terminal_takes_more_stdin_than_it_holds() {
    let mut agent = Agent::start();
    let argv = sh("stty raw -echo; echo ready; sleep 0.2; head -c 600000 | cksum");
    agent.line.exec(1, &ExecRequest { flags: EXEC_PTY, argv: &argv, ..ExecRequest::default() });
    agent.line.expect(Kind::Started);
    assert_eq!(agent.line.expect(Kind::Stdout).payload, b"ready\n");
    let input: Vec<u8> =
        (0..600_000u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let mut ran = Ran::default();
    agent.line.feed(1, &input, &mut ran);
    // cksum's own algorithm is not worth having here: the same bytes through a pipe.
    let mut expected = Ran::default();
    let argv = ["cksum"];
    agent.line.exec(2, &ExecRequest { flags: EXEC_STDIN, argv: &argv, ..ExecRequest::default() });
    agent.line.feed(2, &input, &mut expected);
    assert_eq!(ran.text(), expected.text());
}

#[test]
fn the_last_output_of_a_terminal_is_not_lost() {
    let mut agent = Agent::start();
    for round in 0..50 {
        let request = ExecRequest { flags: EXEC_PTY, argv: &sh("seq 1 5000"), ..ExecRequest::default() };
        let ran = agent.line.run_request(round, &request);
        assert!(ran.text().ends_with("4999\r\n5000\r\n"), "round {round}");
    }
}

#[test]
fn a_lazy_start_is_told_with_the_first_output_or_the_end() {
    let mut agent = Agent::start();
    let request =
        |argv| ExecRequest { flags: EXEC_LAZY_STARTED | EXEC_STDIN, argv, ..ExecRequest::default() };
    agent.line.exec(1, &request(&["cat"]));
    agent.line.send(0, &ToGuest::Ping { nonce: 5 });
    assert_eq!(agent.line.expect(Kind::Pong).message(), ToHost::Pong { nonce: 5 });
    agent.line.send(1, &ToGuest::Stdin(b"x"));
    agent.line.expect(Kind::Started);
    agent.line.expect(Kind::Stdout);
    agent.line.send(1, &ToGuest::StdinEof);
    assert_eq!(agent.line.finish(1).code(), 0);
    agent.line.exec(2, &request(&["true"]));
    agent.line.expect(Kind::Started);
    agent.line.expect(Kind::Exited);
}

#[test]
fn resources_are_the_commands_own() {
    let mut agent = Agent::start();
    let ran = agent.line.run(1, &sh("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done"));
    let exited = ran.exited.unwrap();
    assert!(exited.user_us > 1000 && exited.max_rss_kib > 500, "{exited:?}");
}
