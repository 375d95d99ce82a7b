//! The wire between the host and PID 1 of a microVM.
//!
//! It may touch nothing but the bytes it is given: no I/O, no clock, no allocation, no dependency.
//! Both ends use it, and a snapshot keeps a guest that speaks it, so it is versioned and its
//! bytes are pinned by golden tests.
//!
//! # A frame
//!
//! Little endian, a header of 12 bytes and at most 64 KiB of payload:
//!
//! ```text
//! 0     1      2          4         8       12
//! kind  flags  reserved   stream    len     payload ...
//! u8    u8     u16 = 0    u32       u32     len bytes
//! ```
//!
//! # A connection
//!
//! ```text
//! guest                                   host
//!   Hello                           -->
//!   Started{RESUMED} per survivor   -->
//!                                   <--   Adopt                 (clock, names, entropy)
//!   Adopted                         -->
//!                                   <--   Exec(stream)          (the host picks the stream's number)
//!   Started | ExecFailed            -->
//!                                   <--   Stdin ... StdinEof    (within the stdin window)
//!   StdinWindow ...                 -->
//!   Stdout, Stderr ...              -->                         (within the stream's window)
//!                                   <--   Window ...
//!   Exited                          -->                         (last word about that stream)
//! ```
//!
//! **Windows.** A new stream has [`INITIAL_WINDOW_BYTES`] of credit for stdout and stderr together,
//! and as much for stdin. Payload bytes use credit up; `Window` and `StdinWindow` add to it. The
//! agent does not read a command's pipes without credit, and the host must not send stdin without:
//! more stdin than credit is a protocol error.
//!
//! **Reconnecting.** Commands outlive a connection. On the next one the agent names every
//! survivor with `Started` and [`STARTED_RESUMED`]; such a stream begins with *no* credit either way, so
//! a host grants `Window` if it wants the output, and the agent grants `StdinWindow` for the room it has.
//!
//! **Rejoining.** A host that takes over another's connection sends `Rejoin`, a whole frame after whole frames. What the
//! agent had sent before stands before its answer, which is that of a new connection: `Hello`, and `Started` with
//! [`STARTED_RESUMED`] per survivor, without credit. Nothing is lost and nothing comes twice.
//!
//! **Freezing.** `Freeze` is answered by no frame: once all it has to say is sent, the agent writes
//! [`GATE_FREEZE`] to [`GATE_REGISTER`], and every clone of the guest begins behind that instruction. It then
//! reads the register, takes as many bytes of frames from the mailbox, before any from its connection, and
//! writes [`GATE_TAKEN`]. A guest that cannot reach the register (a kernel without /dev/mem) goes on, and the host gives up waiting.
//!
//! **Bulk streams.** A long file does not go through this conversation, packet by packet through the guest's kernel:
//! the process in the guest that reads or writes it has the VMM move its bytes between its own memory and a socket of
//! the host. It maps the page of [`GATE_REGISTER`]; a 32-bit read of [`BULK_RECEIVE`] or [`BULK_SEND`] there moves up to
//! RSI bytes, [`BULK_MAX_BYTES`] at most, to or from the address in RDI, for the stream whose number is in RDX. It gives
//! how many bytes that were (0 from [`BULK_RECEIVE`] is the end, and to send 0 says that it was all), or [`BULK_WAIT`], [`BULK_NONE`] or [`BULK_FAULT`].
//! The host picks a stream's number, at random, and no other stream ever has it.
//!
//! **Errors.** A frame that cannot be understood is answered with `Error` and the connection is
//! closed; commands go on.
#![no_std]
#![forbid(unsafe_code)]

mod wire;

pub use wire::decode::{Decoder, Frame};
pub use wire::fields::Strings;
pub use wire::to_guest::{Adopt, Exec, ExecRequest, ToGuest, parse_user};
pub use wire::to_host::{ErrorCode, ExecFailed, Exited, Hello, Outcome, Stage, ToHost};
pub use wire::{Header, Kind, WireError};

/// Version of everything in this crate; the first two payload bytes of `Hello`, for ever.
pub const VERSION: u16 = 4;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 12;
/// Most payload bytes one frame may carry.
pub const PAYLOAD_MAX_BYTES: usize = 64 * 1024;
/// Most bytes of a whole frame.
pub const FRAME_MAX_BYTES: usize = HEADER_BYTES + PAYLOAD_MAX_BYTES;
/// Credit that a new stream starts with, for its output and for its stdin.
pub const INITIAL_WINDOW_BYTES: u32 = 256 * 1024;
/// The host's vsock address, which the agent connects to.
pub const HOST_CID: u32 = 2;
/// The vsock port of both: the agent connects to it on the host, and listens on it in the guest.
pub const AGENT_PORT: u32 = 1024;

/// Guest-physical address of the gate's register: a page of its own, where there is no RAM. Writing
/// [`GATE_FREEZE`] to it stops a guest that was asked to freeze; reading it gives the bytes in the mailbox.
pub const GATE_REGISTER: u64 = 0xd00f_f000;
/// What the agent writes to [`GATE_REGISTER`].
pub const GATE_FREEZE: u32 = 1;
/// What the agent writes to [`GATE_REGISTER`] when it has read the mailbox.
pub const GATE_TAKEN: u32 = 2;
/// Guest-physical address of the mailbox: RAM that the kernel is told to leave alone.
pub const GATE_MAILBOX: u64 = 0x5_0000;
/// Size of the mailbox, a multiple of the page size. What the host leaves there are whole frames.
pub const GATE_MAILBOX_BYTES: usize = 64 * 1024;

/// Guest-physical address of the register that receives from a bulk stream, in the page of [`GATE_REGISTER`].
pub const BULK_RECEIVE: u64 = GATE_REGISTER + 0x800;
/// Guest-physical address of the register that sends to a bulk stream.
pub const BULK_SEND: u64 = BULK_RECEIVE + 4;
/// Most bytes that a read of one of them moves.
pub const BULK_MAX_BYTES: usize = 1024 * 1024;
/// A shorter file is faster through the conversation.
pub const BULK_WORTH_BYTES: u64 = 256 * 1024;
/// Nothing to receive, or no room to send, at present.
pub const BULK_WAIT: u32 = u32::MAX - 1;
/// No such stream, or its other end is gone. It is what a register reads as that nobody has.
pub const BULK_NONE: u32 = u32::MAX;
/// The calling process cannot access the first byte: touch it and try again.
pub const BULK_FAULT: u32 = u32::MAX - 2;

/// Most bytes of a text in `ExecFailed` and `Error`.
pub const TEXT_MAX_BYTES: usize = 256;
/// Most bytes of the build version in `Hello`.
pub const BUILD_MAX_BYTES: usize = 64;
/// Most bytes of entropy in `Adopt`.
pub const ENTROPY_MAX_BYTES: usize = 256;
/// Bytes of the machine's identity, and of the boot's.
pub const ID_BYTES: usize = 16;
/// Most bytes of the host name in `Adopt` (Linux's `__NEW_UTS_LEN`).
pub const HOSTNAME_MAX_BYTES: usize = 64;

/// `Exec`: a pseudo-terminal is the command's stdin, stdout and stderr.
pub const EXEC_PTY: u8 = 1 << 0;
/// `Exec`: stdin comes from the host (else it is `/dev/null`). Implied by [`EXEC_PTY`].
pub const EXEC_STDIN: u8 = 1 << 1;
/// `Exec`: the environment is exactly the given one, without the agent's PATH, HOME and TERM.
pub const EXEC_CLEAN_ENV: u8 = 1 << 2;
/// `Exec`: run as the given uid and gid (else as root).
pub const EXEC_USER: u8 = 1 << 3;
/// `Exec`: `Started` need not be sent at once, it may travel with the first output or the exit.
/// A short command then costs one packet instead of two or three.
pub const EXEC_LAZY_STARTED: u8 = 1 << 4;
/// `Exec`: the program is the agent's own, whatever the image holds; argv is [`TOOL_ARGV`] and what follows.
pub const EXEC_SELF: u8 = 1 << 5;

/// How an argv for [`EXEC_SELF`] begins. Then comes one of
///
/// ```text
/// read PATH         a regular file: TOOL_STAT_BYTES (size u64, mode u32, mtime i64), then its bytes to stdout
/// write PATH        stdin becomes the file; its directories are made
/// list PATH         per entry: size u64, mode u32, mtime i64, length of the name u16, the name
/// connect PORT      a TCP connection to the guest's loopback: one byte 0, then both ways until both ends close
/// get PATH STREAM   as read; before the file's bytes comes a byte: 1 if they go through that bulk stream, 0 if not
/// put PATH STREAM   as write; first says such a byte
/// ```
///
/// An older agent ends with EINVAL for a verb that it does not know.
///
/// The exit code is Linux's error number, 0 for none.
pub const TOOL_ARGV: [&str; 2] = ["peregrine-tool", "--tool"];
/// What comes before a file's bytes and, with a name's length, before each name.
pub const TOOL_STAT_BYTES: usize = 20;

/// `Started`: the command runs since an earlier connection.
pub const STARTED_RESUMED: u8 = 1 << 0;

/// `Adopted`: the wall clock could not be set.
pub const ADOPT_FAILED_CLOCK: u8 = 1 << 0;
/// `Adopted`: the host name could not be set.
pub const ADOPT_FAILED_HOSTNAME: u8 = 1 << 1;
/// `Adopted`: the entropy could not be added.
pub const ADOPT_FAILED_ENTROPY: u8 = 1 << 2;
/// `Adopted`: the machine or boot identity could not be set.
pub const ADOPT_FAILED_IDS: u8 = 1 << 3;

const _: () = assert!(HEADER_BYTES == 12 && FRAME_MAX_BYTES == 65_548);
