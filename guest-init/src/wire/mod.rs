//! Kinds, header and errors of the wire. Pure: it may touch only the bytes it is handed.

pub(crate) mod decode;
pub(crate) mod fields;
pub(crate) mod to_guest;
pub(crate) mod to_host;

use core::fmt;

use crate::{HEADER_BYTES, PAYLOAD_MAX_BYTES};

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $value:literal),* $(,)?) => {
        /// What a frame is. Numbers below 0x80 go to the guest, the others to the host.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $value),* }

        impl Kind {
            /// Every kind, in the order of their numbers.
            pub const ALL: &[Kind] = &[$(Kind::$name),*];

            fn from_byte(byte: u8) -> Option<Kind> {
                match byte { $($value => Some(Kind::$name),)* _ => None }
            }
        }
    };
}

kinds! {
    /// Start a command.
    Exec = 0x01,
    /// Bytes for a command's stdin.
    Stdin = 0x02,
    /// No more stdin; on a terminal, the end-of-file character.
    StdinEof = 0x03,
    /// Send a signal to a command's process group.
    Signal = 0x04,
    /// A new size of a command's terminal.
    Resize = 0x05,
    /// Credit for a command's output.
    Window = 0x06,
    /// Are you there?
    Ping = 0x07,
    /// Stop the microVM.
    Shutdown = 0x08,
    /// Take a new identity.
    Adopt = 0x09,
    /// The host wants no more of a command's output: discard it, and still report the exit.
    Close = 0x0a,
    /// Stop at the gate, to be cloned.
    Freeze = 0x0b,
    /// Another host reads this connection now, and does not know what the one before it was told.
    Rejoin = 0x0c,
    /// First frame of a connection.
    Hello = 0x81,
    /// A command runs.
    Started = 0x82,
    /// Bytes of a command's stdout, or of its terminal.
    Stdout = 0x83,
    /// Bytes of a command's stderr.
    Stderr = 0x84,
    /// Credit for a command's stdin.
    StdinWindow = 0x85,
    /// A command is over and all of its output was sent.
    Exited = 0x86,
    /// A command could not be started.
    ExecFailed = 0x87,
    /// I am here.
    Pong = 0x88,
    /// The new identity is in place.
    Adopted = 0x89,
    /// The other side broke the protocol, or asked for something that cannot be.
    Error = 0x8a,
}

/// The twelve bytes before every payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Flags, by kind.
    pub flags: u8,
    /// The command it is about; 0 where there is none.
    pub stream: u32,
    /// Payload bytes that follow.
    pub len: u32,
}

impl Header {
    /// The header's bytes.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let [s0, s1, s2, s3] = self.stream.to_le_bytes();
        let [l0, l1, l2, l3] = self.len.to_le_bytes();
        [self.kind as u8, self.flags, 0, 0, s0, s1, s2, s3, l0, l1, l2, l3]
    }

    /// Reads a header, refusing whatever this version does not know.
    pub fn from_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<Header, WireError> {
        let [kind, flags, r0, r1, s0, s1, s2, s3, l0, l1, l2, l3] = *bytes;
        let kind = Kind::from_byte(kind).ok_or(WireError::UnknownKind { kind })?;
        let reserved = u16::from_le_bytes([r0, r1]);
        if reserved != 0 {
            return Err(WireError::Reserved { value: reserved });
        }
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        if len as usize > PAYLOAD_MAX_BYTES {
            return Err(WireError::TooLong { len: len as usize, limit: PAYLOAD_MAX_BYTES });
        }
        Ok(Header { kind, flags, stream: u32::from_le_bytes([s0, s1, s2, s3]), len })
    }
}

/// What is wrong with bytes of the wire, or with a request to write some.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WireError {
    /// No frame has this number in this version: the other side is newer, or it is not this protocol.
    UnknownKind {
        /// The number.
        kind: u8,
    },
    /// The reserved bytes of a header are not zero.
    Reserved {
        /// What they are.
        value: u16,
    },
    /// Something is longer than the protocol lets it be: send less, or split it.
    TooLong {
        /// Its length.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The payload ends before its fields do.
    Truncated {
        /// The frame's kind.
        kind: Kind,
    },
    /// The payload goes on after its fields.
    Trailing {
        /// The frame's kind.
        kind: Kind,
        /// How many bytes too many.
        bytes: usize,
    },
    /// A flag that this version does not know.
    BadFlags {
        /// The frame's kind.
        kind: Kind,
        /// The flags.
        flags: u8,
    },
    /// A number that stands for nothing in this version.
    BadValue {
        /// The frame's kind.
        kind: Kind,
        /// The number.
        value: u32,
    },
    /// A string without its NUL at the end, with another inside, or not UTF-8 where it must be.
    BadString {
        /// The frame's kind.
        kind: Kind,
    },
    /// An `Exec` without a program.
    EmptyArgv,
    /// A frame that only the other side may send.
    WrongDirection {
        /// The frame's kind.
        kind: Kind,
    },
    /// The buffer given is too small.
    NoRoom {
        /// Bytes that were needed.
        needed: usize,
        /// Bytes that there are.
        room: usize,
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::UnknownKind { kind } => {
                write!(f, "unknown frame kind {kind:#04x}; is the other side of another version?")
            }
            Self::Reserved { value } => write!(f, "reserved header bytes are {value:#06x}, not zero"),
            Self::TooLong { len, limit } => write!(f, "{len} bytes where at most {limit} are allowed"),
            Self::Truncated { kind } => write!(f, "a {kind:?} frame ends within its fields"),
            Self::Trailing { kind, bytes } => {
                write!(f, "a {kind:?} frame has {bytes} bytes after its fields")
            }
            Self::BadFlags { kind, flags } => write!(f, "a {kind:?} frame has unknown flags {flags:#04x}"),
            Self::BadValue { kind, value } => write!(f, "a {kind:?} frame has the unknown value {value}"),
            Self::BadString { kind } => write!(
                f,
                "a {kind:?} frame has a malformed string (NUL inside, none at the end, or not UTF-8)"
            ),
            Self::EmptyArgv => f.write_str("the command is empty; name a program"),
            Self::WrongDirection { kind } => write!(f, "a {kind:?} frame goes the other way"),
            Self::NoRoom { needed, room } => write!(f, "the buffer has {room} bytes, {needed} are needed"),
        }
    }
}

impl core::error::Error for WireError {}
