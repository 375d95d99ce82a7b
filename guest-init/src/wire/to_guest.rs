//! What the host says. Pure: it may touch only the bytes it is handed.

use core::ffi::CStr;

use super::decode::Frame;
use super::fields::{Reader, Strings, Writer, at_most};
use super::{Kind, WireError};
use crate::{
    ENTROPY_MAX_BYTES, EXEC_CLEAN_ENV, EXEC_LAZY_STARTED, EXEC_PTY, EXEC_SELF, EXEC_STDIN, EXEC_USER,
    HOSTNAME_MAX_BYTES, ID_BYTES,
};

const EXEC_FLAGS: u8 = EXEC_PTY | EXEC_STDIN | EXEC_CLEAN_ENV | EXEC_USER | EXEC_LAZY_STARTED | EXEC_SELF;

/// A frame from the host, taken apart; it borrows the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToGuest<'a> {
    /// Start a command.
    Exec(Exec<'a>),
    /// Bytes for its stdin.
    Stdin(&'a [u8]),
    /// No more stdin.
    StdinEof,
    /// Send a signal to its process group.
    Signal {
        /// The signal's number.
        signo: u32,
    },
    /// Its terminal has a new size.
    Resize {
        /// Lines.
        rows: u16,
        /// Characters in a line.
        cols: u16,
    },
    /// More credit for its output.
    Window {
        /// How much more.
        bytes: u32,
    },
    /// Answer with `Pong`.
    Ping {
        /// Comes back.
        nonce: u64,
    },
    /// Stop the microVM.
    Shutdown,
    /// Take a new identity.
    Adopt(Adopt<'a>),
    /// Discard its further output.
    Close,
    /// Stop at the gate.
    Freeze,
    /// Begin again, as on a new connection.
    Rejoin,
}

/// A command to start, as it lies in its frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exec<'a> {
    /// `EXEC_*`.
    pub flags: u8,
    /// Lines of its terminal.
    pub rows: u16,
    /// Characters in a line of it.
    pub cols: u16,
    /// With [`EXEC_USER`], who runs it.
    pub uid: u32,
    /// With [`EXEC_USER`], its only group.
    pub gid: u32,
    /// Where it runs; empty is `/`.
    pub cwd: &'a CStr,
    /// Program and arguments; never empty.
    pub argv: Strings<'a>,
    /// `KEY=value` each.
    pub env: Strings<'a>,
}

/// A command to start, as a host asks for it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExecRequest<'a, S> {
    /// `EXEC_*`; [`EXEC_USER`] follows from `user`.
    pub flags: u8,
    /// Lines of its terminal.
    pub rows: u16,
    /// Characters in a line of it.
    pub cols: u16,
    /// uid and gid, if not root.
    pub user: Option<(u32, u32)>,
    /// Where it runs; empty is `/`.
    pub cwd: &'a [u8],
    /// Program and arguments.
    pub argv: &'a [S],
    /// `KEY=value` each.
    pub env: &'a [S],
}

/// The identity of a sandbox, given after every boot, restore and fork.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopt<'a> {
    /// Random bytes from the host.
    pub entropy: &'a [u8],
    /// Nanoseconds since 1970; 0 leaves the clock alone.
    pub wall_clock_ns: u64,
    /// The host name; empty leaves it alone.
    pub hostname: &'a [u8],
    /// What /etc/machine-id then says; zero leaves it and the boot's alone.
    pub machine_id: [u8; ID_BYTES],
    /// What /proc/sys/kernel/random/boot_id then says.
    pub boot_id: [u8; ID_BYTES],
}

impl<S: AsRef<[u8]>> ExecRequest<'_, S> {
    /// Writes the `Exec` frame of `stream` and says how long it is.
    pub fn encode(&self, stream: u32, out: &mut [u8]) -> Result<usize, WireError> {
        if self.argv.is_empty() {
            return Err(WireError::EmptyArgv);
        }
        let (uid, gid) = self.user.unwrap_or((0, 0));
        let mut writer = Writer::new(out);
        writer.u16(self.rows)?;
        writer.u16(self.cols)?;
        writer.u32(uid)?;
        writer.u32(gid)?;
        writer.u32(self.argv.len() as u32)?;
        writer.u32(self.env.len() as u32)?;
        writer.string(Kind::Exec, self.cwd)?;
        for string in self.argv.iter().chain(self.env) {
            writer.string(Kind::Exec, string.as_ref())?;
        }
        let user = if self.user.is_some() { EXEC_USER } else { 0 };
        writer.finish(Kind::Exec, (self.flags & !EXEC_USER) | user, stream)
    }
}

impl<'a> Exec<'a> {
    fn parse(frame: &Frame<'a>, reader: &mut Reader<'a>) -> Result<Self, WireError> {
        let (rows, cols) = (reader.u16()?, reader.u16()?);
        let (uid, gid) = (reader.u32()?, reader.u32()?);
        let (argc, envc) = (reader.u32()?, reader.u32()?);
        let cwd = reader.string()?;
        let argv = reader.strings(argc)?;
        let env = reader.strings(envc)?;
        if argc == 0 {
            return Err(WireError::EmptyArgv);
        }
        Ok(Exec { flags: frame.flags, rows, cols, uid, gid, cwd, argv, env })
    }

    fn write(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        writer.u16(self.rows)?;
        writer.u16(self.cols)?;
        writer.u32(self.uid)?;
        writer.u32(self.gid)?;
        writer.u32(self.argv.count() as u32)?;
        writer.u32(self.env.count() as u32)?;
        writer.string(Kind::Exec, self.cwd.to_bytes())?;
        writer.bytes(self.argv.raw())?;
        writer.bytes(self.env.raw())
    }
}

impl<'a> Adopt<'a> {
    fn parse(reader: &mut Reader<'a>) -> Result<Self, WireError> {
        let wall_clock_ns = reader.u64()?;
        let (entropy, hostname) = (reader.u16()?, reader.u16()?);
        Ok(Adopt {
            wall_clock_ns,
            machine_id: reader.array()?,
            boot_id: reader.array()?,
            entropy: at_most(reader.bytes(entropy.into())?, ENTROPY_MAX_BYTES)?,
            hostname: at_most(reader.bytes(hostname.into())?, HOSTNAME_MAX_BYTES)?,
        })
    }

    fn write(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        let entropy = at_most(self.entropy, ENTROPY_MAX_BYTES)?;
        let hostname = at_most(self.hostname, HOSTNAME_MAX_BYTES)?;
        writer.u64(self.wall_clock_ns)?;
        writer.u16(entropy.len() as u16)?;
        writer.u16(hostname.len() as u16)?;
        writer.bytes(&self.machine_id)?;
        writer.bytes(&self.boot_id)?;
        writer.bytes(entropy)?;
        writer.bytes(hostname)
    }
}

impl<'a> ToGuest<'a> {
    /// Takes a frame apart, refusing flags, values and lengths that this version does not know.
    pub fn parse(frame: &Frame<'a>) -> Result<Self, WireError> {
        let kind = frame.kind;
        let known_flags = if kind == Kind::Exec { EXEC_FLAGS } else { 0 };
        if frame.flags & !known_flags != 0 {
            return Err(WireError::BadFlags { kind, flags: frame.flags });
        }
        let mut reader = Reader::new(kind, frame.payload);
        let message = match kind {
            Kind::Exec => ToGuest::Exec(Exec::parse(frame, &mut reader)?),
            Kind::Stdin => ToGuest::Stdin(reader.remainder()),
            Kind::StdinEof => ToGuest::StdinEof,
            Kind::Signal => ToGuest::Signal { signo: reader.u32()? },
            Kind::Resize => ToGuest::Resize { rows: reader.u16()?, cols: reader.u16()? },
            Kind::Window => ToGuest::Window { bytes: reader.u32()? },
            Kind::Ping => ToGuest::Ping { nonce: reader.u64()? },
            Kind::Shutdown => ToGuest::Shutdown,
            Kind::Adopt => ToGuest::Adopt(Adopt::parse(&mut reader)?),
            Kind::Close => ToGuest::Close,
            Kind::Freeze => ToGuest::Freeze,
            Kind::Rejoin => ToGuest::Rejoin,
            _ => return Err(WireError::WrongDirection { kind }),
        };
        reader.finish()?;
        Ok(message)
    }

    /// The kind of the frame that carries this.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            ToGuest::Exec(_) => Kind::Exec,
            ToGuest::Stdin(_) => Kind::Stdin,
            ToGuest::StdinEof => Kind::StdinEof,
            ToGuest::Signal { .. } => Kind::Signal,
            ToGuest::Resize { .. } => Kind::Resize,
            ToGuest::Window { .. } => Kind::Window,
            ToGuest::Ping { .. } => Kind::Ping,
            ToGuest::Shutdown => Kind::Shutdown,
            ToGuest::Adopt(_) => Kind::Adopt,
            ToGuest::Close => Kind::Close,
            ToGuest::Freeze => Kind::Freeze,
            ToGuest::Rejoin => Kind::Rejoin,
        }
    }

    /// Writes the frame about `stream` and says how long it is. A new command is written from an
    /// [`ExecRequest`].
    pub fn encode(&self, stream: u32, out: &mut [u8]) -> Result<usize, WireError> {
        let mut writer = Writer::new(out);
        let mut flags = 0;
        match self {
            ToGuest::Exec(exec) => {
                flags = exec.flags;
                exec.write(&mut writer)?;
            }
            ToGuest::Stdin(bytes) => writer.bytes(bytes)?,
            ToGuest::Signal { signo } => writer.u32(*signo)?,
            ToGuest::Resize { rows, cols } => {
                writer.u16(*rows)?;
                writer.u16(*cols)?;
            }
            ToGuest::Window { bytes } => writer.u32(*bytes)?,
            ToGuest::Ping { nonce } => writer.u64(*nonce)?,
            ToGuest::Adopt(adopt) => adopt.write(&mut writer)?,
            ToGuest::StdinEof | ToGuest::Shutdown | ToGuest::Close | ToGuest::Freeze | ToGuest::Rejoin => {}
        }
        writer.finish(self.kind(), flags, stream)
    }
}

/// `1000:1000` as uid and gid; `1000` alone is both. Names are the image's and not known here.
#[must_use]
pub fn parse_user(text: &str) -> Option<(u32, u32)> {
    let (uid, gid) = text.split_once(':').unwrap_or((text, text));
    // u32::MAX is "leave it" in setuid(2)'s relatives, never a user.
    let id = |digits: &str| digits.parse().ok().filter(|&id| id != u32::MAX);
    Some((id(uid)?, id(gid)?))
}
