//! The agent's own program as a command: files and ports of the machine it runs on.
#![allow(clippy::unwrap_used)]

mod host;

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};

use guest_init::{EXEC_SELF, EXEC_STDIN, ExecRequest, TOOL_ARGV, TOOL_STAT_BYTES};
use host::{Agent, Ran};

const ENOENT: u8 = 2;
const ENXIO: u8 = 6;
const EISDIR: u8 = 21;
const EINVAL: u8 = 22;
const ECONNREFUSED: u8 = 111;

fn tool(agent: &mut Agent, stream: u32, verb: &str, argument: &str, input: Option<&[u8]>) -> Ran {
    let [name, tool] = TOOL_ARGV;
    let argv = [name, tool, verb, argument];
    let stdin = if input.is_some() { EXEC_STDIN } else { 0 };
    let request = ExecRequest { flags: EXEC_SELF | stdin, argv: &argv, ..ExecRequest::default() };
    agent.line.exec(stream, &request);
    let mut ran = Ran::default();
    match input {
        Some(input) => agent.line.feed(stream, input, &mut ran),
        None => ran = agent.line.finish(stream),
    }
    ran
}

fn home(name: &str) -> std::path::PathBuf {
    let home = std::env::temp_dir().join(format!("guest-init-tools-{}-{name}", std::process::id()));
    std::fs::create_dir_all(&home).unwrap();
    home
}

#[test]
fn what_is_written_is_read_again_and_directories_are_made() {
    let (mut agent, home) = (Agent::start(), home("files"));
    let path = home.join("a/b/file");
    let path = path.to_str().unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|n| ((n * 7) >> 3) as u8).collect();
    assert_eq!(tool(&mut agent, 1, "write", path, Some(&bytes)).code(), 0);
    assert!(std::fs::read(path).unwrap() == bytes);
    let ran = tool(&mut agent, 2, "read", path, None);
    assert_eq!(ran.code(), 0);
    let (stat, read) = ran.stdout.split_at(TOOL_STAT_BYTES);
    assert_eq!(stat[..8], (bytes.len() as u64).to_le_bytes());
    assert_eq!(stat[8..12], 0o100_644_u32.to_le_bytes());
    assert!(read == bytes);
    // Shorter than before: nothing of the old file is left.
    assert_eq!(tool(&mut agent, 3, "write", path, Some(b"short")).code(), 0);
    assert_eq!(std::fs::read(path).unwrap(), b"short");
    std::fs::remove_dir_all(home).unwrap();
}

#[test]
fn a_listing_has_every_name_once_and_says_what_it_is() {
    let (mut agent, home) = (Agent::start(), home("list"));
    std::fs::create_dir(home.join("directory")).unwrap();
    std::os::unix::fs::symlink("nowhere", home.join("link")).unwrap();
    for n in 0..1000 {
        std::fs::write(home.join(format!("file {n}")), vec![b'x'; n]).unwrap();
    }
    let ran = tool(&mut agent, 1, "list", home.to_str().unwrap(), None);
    assert_eq!(ran.code(), 0);
    let (mut rest, mut found) = (&ran.stdout[..], Vec::new());
    while !rest.is_empty() {
        let (stat, tail) = rest.split_at(TOOL_STAT_BYTES);
        let (len, tail) = tail.split_at(2);
        let (name, tail) = tail.split_at(u16::from_le_bytes([len[0], len[1]]).into());
        let size = u64::from_le_bytes(stat[..8].try_into().unwrap());
        let kind = u32::from_le_bytes(stat[8..12].try_into().unwrap()) >> 12;
        found.push((String::from_utf8(name.to_vec()).unwrap(), kind, size));
        rest = tail;
    }
    found.sort();
    assert_eq!(found.len(), 1002);
    assert_eq!(found.iter().find(|f| f.0 == "directory").unwrap().1, 4);
    assert_eq!(found.iter().find(|f| f.0 == "link").unwrap().1, 10);
    assert!((0..1000).all(|n| found.contains(&(format!("file {n}"), 8, n))));
    std::fs::remove_dir_all(home).unwrap();
}

#[test]
fn what_is_no_regular_file_is_refused_with_the_kernels_number_and_never_waited_for() {
    let (mut agent, home) = (Agent::start(), home("refused"));
    let fifo = home.join("fifo");
    assert!(std::process::Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let (fifo, home_path) = (fifo.to_str().unwrap(), home.to_str().unwrap());
    assert_eq!(tool(&mut agent, 1, "read", "/no/such/file", None).code(), ENOENT);
    assert_eq!(tool(&mut agent, 2, "read", home_path, None).code(), EISDIR);
    assert_eq!(tool(&mut agent, 3, "read", fifo, None).code(), EINVAL);
    assert_eq!(tool(&mut agent, 4, "read", "/dev/zero", None).code(), EINVAL);
    assert_eq!(tool(&mut agent, 5, "write", fifo, Some(b"x")).code(), ENXIO);
    assert_eq!(tool(&mut agent, 6, "write", "/dev/null", Some(b"x")).code(), EINVAL);
    assert_eq!(tool(&mut agent, 7, "write", home_path, Some(b"x")).code(), EISDIR);
    assert_eq!(tool(&mut agent, 8, "dance", home_path, None).code(), EINVAL);
    std::fs::remove_dir_all(home).unwrap();
}

#[test]
fn a_connection_carries_bytes_both_ways_at_once_and_each_end_by_itself() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Says all back, whatever its client's reading, and only then that this was all.
    let server = std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut back: TcpStream = stream.try_clone().unwrap();
        let mut buffer = [0; 65536];
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return,
                len => back.write_all(&buffer[..len]).unwrap(),
            }
        }
    });
    let mut agent = Agent::start();
    let bytes: Vec<u8> = (0..2_000_000_u32).map(|n| (n >> 5) as u8).collect();
    let ran = tool(&mut agent, 1, "connect", &port.to_string(), Some(&bytes));
    server.join().unwrap();
    assert_eq!(ran.code(), 0);
    assert_eq!(ran.stdout[0], 0);
    assert!(ran.stdout[1..] == bytes);
    // Nobody listens there any more.
    assert_eq!(tool(&mut agent, 2, "connect", &port.to_string(), Some(b"")).code(), ECONNREFUSED);
    assert_eq!(tool(&mut agent, 3, "connect", "many", None).code(), EINVAL);
}
