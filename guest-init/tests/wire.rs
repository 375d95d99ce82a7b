//! The wire: its bytes as they are pinned for ever, and what must hold for any bytes.
#![allow(missing_docs, clippy::unwrap_used)]

use guest_init::{
    Adopt, Decoder, EXEC_PTY, EXEC_SELF, EXEC_USER, ErrorCode, ExecFailed, ExecRequest, Exited,
    FRAME_MAX_BYTES, Frame, HEADER_BYTES, Header, Hello, Kind, Outcome, PAYLOAD_MAX_BYTES, Stage, TOOL_ARGV,
    ToGuest, ToHost, VERSION, WireError, parse_user,
};
use proptest::prelude::*;

fn to_guest(stream: u32, message: &ToGuest<'_>) -> Vec<u8> {
    let mut buffer = vec![0xee; FRAME_MAX_BYTES];
    let len = message.encode(stream, &mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

fn to_host(stream: u32, message: &ToHost<'_>) -> Vec<u8> {
    let mut buffer = vec![0xee; FRAME_MAX_BYTES];
    let len = message.encode(stream, &mut buffer).unwrap();
    buffer.truncate(len);
    buffer
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn one_frame(bytes: &[u8]) -> Frame<'_> {
    let header = Header::from_bytes(bytes.first_chunk::<HEADER_BYTES>().unwrap()).unwrap();
    let Header { kind, flags, stream, .. } = header;
    Frame { kind, flags, stream, payload: &bytes[HEADER_BYTES..] }
}

#[test]
fn a_command_of_the_agents_own_program_is_a_flag_of_this_version() {
    let request = ExecRequest { flags: EXEC_SELF, argv: &TOOL_ARGV, ..ExecRequest::default() };
    let mut buffer = [0; 256];
    let len = request.encode(1, &mut buffer).unwrap();
    assert_eq!((VERSION, buffer[1]), (4, 0x20));
    let ToGuest::Exec(exec) = ToGuest::parse(&one_frame(&buffer[..len])).unwrap() else { panic!("no Exec") };
    assert_eq!((exec.flags, exec.argv.count()), (EXEC_SELF, 2));
    buffer[1] = 0x40;
    assert!(ToGuest::parse(&one_frame(&buffer[..len])).is_err());
}

#[test]
fn the_bytes_to_the_guest_are_these() {
    let request = ExecRequest {
        flags: EXEC_PTY,
        rows: 24,
        cols: 80,
        user: Some((1000, 100)),
        cwd: b"/w",
        argv: &["ls", "-l"],
        env: &["A=b"],
    };
    let mut buffer = [0; 256];
    let len = request.encode(0x0102_0304, &mut buffer).unwrap();
    assert_eq!(
        hex(&buffer[..len]),
        "010900000403020131000000180050\
         00e8030000640000000200000001000000\
         020000002f7700\
         020000006c7300020000002d6c00\
         03000000413d6200"
    );
    let adopt = Adopt {
        entropy: &[0xaa, 0xbb, 0xcc],
        wall_clock_ns: 0x1122_3344_5566_7788,
        hostname: b"vm",
        machine_id: [0x4d; 16],
        boot_id: [0xb0; 16],
    };
    let cases: [(ToGuest<'_>, &str); 11] = [
        (ToGuest::Stdin(b"hi"), "0200000007000000020000006869"),
        (ToGuest::StdinEof, "030000000700000000000000"),
        (ToGuest::Signal { signo: 15 }, "0400000007000000040000000f000000"),
        (ToGuest::Resize { rows: 50, cols: 132 }, "05000000070000000400000032008400"),
        (ToGuest::Window { bytes: 65536 }, "06000000070000000400000000000100"),
        (ToGuest::Ping { nonce: 1 }, "0700000007000000080000000100000000000000"),
        (ToGuest::Shutdown, "080000000700000000000000"),
        (
            ToGuest::Adopt(adopt),
            concat!(
                "090000000700000031000000887766554433221103000200",
                "4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d4d",
                "b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0",
                "aabbcc766d"
            ),
        ),
        (ToGuest::Close, "0a0000000700000000000000"),
        (ToGuest::Freeze, "0b0000000700000000000000"),
        (ToGuest::Rejoin, "0c0000000700000000000000"),
    ];
    for (message, bytes) in cases {
        assert_eq!(hex(&to_guest(7, &message)), bytes, "{message:?}");
    }
}

#[test]
fn the_bytes_to_the_host_are_these() {
    let hello = Hello { version: 1, entered_ns: 2, now_ns: 3, user_us: 4, sys_us: 5, build: "0.1" };
    let exited = |outcome| Exited { outcome, user_us: 1, sys_us: 2, max_rss_kib: 3 };
    let failed = ExecFailed { errno: 2, stage: Stage::Exec, text: b"x" };
    let cases: [(ToHost<'_>, &str); 12] = [
        (
            ToHost::Hello(hello),
            "8100000007000000270000000100030002000000000000000300000000000000\
             04000000000000000500000000000000302e31",
        ),
        (ToHost::Started { pid: 9, resumed: false }, "82000000070000000400000009000000"),
        (ToHost::Started { pid: 9, resumed: true }, "82010000070000000400000009000000"),
        (ToHost::Stdout(b"o"), "8300000007000000010000006f"),
        (ToHost::Stderr(b"e"), "84000000070000000100000065"),
        (ToHost::StdinWindow { bytes: 1 }, "85000000070000000400000001000000"),
        (
            ToHost::Exited(exited(Outcome::Code(3))),
            "86000000070000001a0000000003010000000000000002000000000000000300000000000000",
        ),
        (
            ToHost::Exited(exited(Outcome::Signal(9))),
            "86000000070000001a0000000109010000000000000002000000000000000300000000000000",
        ),
        (ToHost::ExecFailed(failed), "870000000700000006000000020000000978"),
        (ToHost::Pong { nonce: 1 }, "8800000007000000080000000100000000000000"),
        (ToHost::Adopted { failed: 5 }, "89000000070000000100000005"),
        (ToHost::Error { code: ErrorCode::Protocol, text: b"no" }, "8a000000070000000400000001006e6f"),
    ];
    for (message, bytes) in cases {
        assert_eq!(hex(&to_host(7, &message)), bytes, "{message:?}");
        assert_eq!(ToHost::parse(&one_frame(&to_host(7, &message))), Ok(message));
    }
}

#[test]
fn numbers_of_kinds_stages_and_errors_never_move() {
    let kinds: Vec<u8> = Kind::ALL.iter().map(|&kind| kind as u8).collect();
    assert_eq!(kinds, (1..=12).chain(0x81..=0x8a).collect::<Vec<u8>>());
    assert_eq!(
        Stage::ALL.iter().map(|&stage| stage as u8).collect::<Vec<u8>>(),
        (1..=9).collect::<Vec<u8>>()
    );
    assert_eq!(ErrorCode::ALL.iter().map(|&code| code as u16).collect::<Vec<u16>>(), [1, 2, 3, 4]);
}

#[test]
fn an_exec_is_read_where_it_lies() {
    let request =
        ExecRequest { flags: 0, user: None, cwd: b"", argv: &["a", ""], env: &["X=1"], rows: 0, cols: 0 };
    let mut buffer = [0; 128];
    let len = request.encode(1, &mut buffer).unwrap();
    let ToGuest::Exec(exec) = ToGuest::parse(&one_frame(&buffer[..len])).unwrap() else { panic!() };
    assert_eq!(exec.argv.iter().collect::<Vec<_>>(), [c"a", c""]);
    assert_eq!(exec.env.iter().collect::<Vec<_>>(), [c"X=1"]);
    assert_eq!((exec.argv.count(), exec.flags & EXEC_USER), (2, 0));
    assert_eq!(to_guest(1, &ToGuest::Exec(exec)), buffer[..len]);
}

#[test]
fn what_is_too_long_or_malformed_is_refused_with_the_reason() {
    let mut buffer = vec![0; 2 * FRAME_MAX_BYTES];
    let long = vec![b'x'; PAYLOAD_MAX_BYTES + 1];
    let too_long = WireError::TooLong { len: PAYLOAD_MAX_BYTES + 1, limit: PAYLOAD_MAX_BYTES };
    assert_eq!(ToGuest::Stdin(&long).encode(1, &mut buffer), Err(too_long));
    let no_room = ToGuest::Stdin(b"abc").encode(1, &mut buffer[..14]);
    assert_eq!(no_room, Err(WireError::NoRoom { needed: 15, room: 14 }));
    assert_eq!(ToGuest::Close.encode(1, &mut []), Err(WireError::NoRoom { needed: 12, room: 0 }));
    let nothing: [&str; 0] = [];
    let request = ExecRequest { argv: &nothing, ..ExecRequest::default() };
    assert_eq!(request.encode(1, &mut buffer), Err(WireError::EmptyArgv));
    let request = ExecRequest { argv: &["a\0b"], ..ExecRequest::default() };
    assert_eq!(request.encode(1, &mut buffer), Err(WireError::BadString { kind: Kind::Exec }));
    let parse = |bytes: &[u8]| ToGuest::parse(&one_frame(bytes)).map(drop);
    assert_eq!(
        parse(&[4, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 1, 2, 3]),
        Err(WireError::Truncated { kind: Kind::Signal })
    );
    let trailing = WireError::Trailing { kind: Kind::Close, bytes: 1 };
    assert_eq!(parse(&[10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1]), Err(trailing));
    assert_eq!(
        parse(&[0x82, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Err(WireError::WrongDirection { kind: Kind::Started })
    );
    assert_eq!(
        parse(&[2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        Err(WireError::BadFlags { kind: Kind::Stdin, flags: 1 })
    );
}

#[test]
fn a_count_of_strings_that_cannot_be_there_is_refused_at_once() {
    let mut bytes = [0; 256];
    let len = ExecRequest { argv: &["a"], ..ExecRequest::default() }.encode(1, &mut bytes).unwrap();
    bytes[HEADER_BYTES + 12..HEADER_BYTES + 16].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(ToGuest::parse(&one_frame(&bytes[..len])), Err(WireError::Truncated { kind: Kind::Exec }));
}

#[test]
fn a_decoder_stays_in_its_error() {
    let mut decoder = Decoder::new(vec![0; FRAME_MAX_BYTES]).unwrap();
    decoder.push(&[0x77; 12]);
    for _ in 0..3 {
        assert_eq!(decoder.next_frame(), Err(WireError::UnknownKind { kind: 0x77 }));
        decoder.push(&[0; 100]);
    }
    let short = Decoder::new([0; 100]).map(drop);
    assert_eq!(short, Err(WireError::NoRoom { needed: FRAME_MAX_BYTES, room: 100 }));
}

#[test]
fn a_user_is_two_numbers() {
    assert_eq!(parse_user("1000:100"), Some((1000, 100)));
    assert_eq!(parse_user("0"), Some((0, 0)));
    for text in ["", ":", "1:", ":1", "a:b", "-1:0", "1:2:3", "4294967295", "0:4294967295", "99999999999"] {
        assert_eq!(parse_user(text), None, "{text}");
    }
}

fn any_bytes(most: usize) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..most)
}

fn any_strings() -> impl Strategy<Value = Vec<Vec<u8>>> {
    prop::collection::vec(prop::collection::vec(1..=255u8, 0..40), 0..20)
}

fn any_frame() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any_bytes(3000).prop_map(|bytes| to_guest(1, &ToGuest::Stdin(&bytes))),
        any::<u64>().prop_map(|nonce| to_guest(2, &ToGuest::Ping { nonce })),
        Just(to_guest(3, &ToGuest::StdinEof)),
        Just(to_guest(4, &ToGuest::Stdin(&[7; PAYLOAD_MAX_BYTES]))),
    ]
}

fn frames_of(stream: &[u8], cuts: &[usize]) -> Vec<(Kind, u32, Vec<u8>)> {
    let mut decoder = Decoder::new(vec![0; FRAME_MAX_BYTES]).unwrap();
    let mut frames = Vec::new();
    let mut cuts = cuts.iter().cycle();
    let mut rest = stream;
    while !rest.is_empty() {
        let (mut piece, later) = rest.split_at(rest.len().min(*cuts.next().unwrap()));
        rest = later;
        while !piece.is_empty() {
            let taken = decoder.push(piece);
            assert!(taken > 0, "no frame and no room");
            piece = &piece[taken..];
            while let Some(frame) = decoder.next_frame().unwrap() {
                frames.push((frame.kind, frame.stream, frame.payload.to_vec()));
            }
        }
    }
    frames
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_frames_or_an_error_and_never_a_panic(bytes in any_bytes(2000)) {
        let mut decoder = Decoder::new(vec![0; FRAME_MAX_BYTES]).unwrap();
        let mut rest = &bytes[..];
        'stream: while !rest.is_empty() {
            rest = &rest[decoder.push(rest)..];
            loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => {
                        let _ = ToGuest::parse(&frame);
                        let _ = ToHost::parse(&frame);
                    }
                    Ok(None) => break,
                    Err(_) => break 'stream,
                }
            }
        }
    }

    #[test]
    fn any_payload_of_any_kind_is_parsed_or_refused(
        kind in 0..Kind::ALL.len(), flags in any::<u8>(), payload in any_bytes(300),
    ) {
        let frame = Frame { kind: Kind::ALL[kind], flags, stream: 1, payload: &payload };
        // What is understood is written back as it was.
        let mut whole = Header { kind: frame.kind, flags, stream: 1, len: payload.len() as u32 }.to_bytes().to_vec();
        whole.extend_from_slice(&payload);
        if let Ok(message) = ToGuest::parse(&frame) {
            prop_assert_eq!(to_guest(1, &message), &whole[..]);
        }
        if let Ok(message) = ToHost::parse(&frame) {
            prop_assert_eq!(to_host(1, &message), &whole[..]);
        }
    }

    #[test]
    fn frames_are_the_same_wherever_the_stream_is_cut(
        frames in prop::collection::vec(any_frame(), 1..8), cuts in prop::collection::vec(1..5000usize, 1..20),
    ) {
        let stream = frames.concat();
        let whole = frames_of(&stream, &[usize::MAX]);
        prop_assert_eq!(whole.len(), frames.len());
        prop_assert_eq!(frames_of(&stream, &cuts), whole);
    }

    #[test]
    fn an_exec_arrives_as_it_was_asked_for(
        argv in any_strings(), env in any_strings(), cwd in prop::collection::vec(1..=255u8, 0..40),
        rows in any::<u16>(), cols in any::<u16>(), user in any::<Option<(u32, u32)>>(),
    ) {
        let request = ExecRequest { flags: EXEC_PTY, rows, cols, user, cwd: &cwd, argv: &argv, env: &env };
        let mut buffer = vec![0; FRAME_MAX_BYTES];
        match request.encode(5, &mut buffer) {
            Err(error) => prop_assert!(error == WireError::EmptyArgv && argv.is_empty()),
            Ok(len) => {
                let frame = one_frame(&buffer[..len]);
                let ToGuest::Exec(exec) = ToGuest::parse(&frame).unwrap() else { panic!() };
                let bytes = |strings: guest_init::Strings<'_>| -> Vec<Vec<u8>> {
                    strings.iter().map(|string| string.to_bytes().to_vec()).collect()
                };
                prop_assert_eq!(bytes(exec.argv), argv);
                prop_assert_eq!(bytes(exec.env), env);
                prop_assert_eq!(exec.cwd.to_bytes(), &cwd[..]);
                prop_assert_eq!((exec.rows, exec.cols), (rows, cols));
                let found = (exec.flags & EXEC_USER != 0).then_some((exec.uid, exec.gid));
                prop_assert_eq!(found, user);
            }
        }
    }
}
