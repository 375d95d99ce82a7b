//! What the guest says. Pure: it may touch only the bytes it is handed. The host must take
//! all of it as hostile: lengths are checked here, texts are bytes.

use super::decode::Frame;
use super::fields::{Reader, Writer, at_most};
use super::{Kind, WireError};
use crate::{BUILD_MAX_BYTES, STARTED_RESUMED, TEXT_MAX_BYTES};

/// A frame from the guest, taken apart; it borrows the frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ToHost<'a> {
    /// The first frame of a connection.
    Hello(Hello<'a>),
    /// A command runs.
    Started {
        /// Its process, as the guest numbers it.
        pid: u32,
        /// It runs since an earlier connection.
        resumed: bool,
    },
    /// Bytes of its stdout, or of its terminal.
    Stdout(&'a [u8]),
    /// Bytes of its stderr.
    Stderr(&'a [u8]),
    /// More credit for its stdin.
    StdinWindow {
        /// How much more.
        bytes: u32,
    },
    /// It is over, and all of its output was sent before this.
    Exited(Exited),
    /// It could not be started.
    ExecFailed(ExecFailed<'a>),
    /// Answer to `Ping`.
    Pong {
        /// The ping's.
        nonce: u64,
    },
    /// Answer to `Adopt`.
    Adopted {
        /// `ADOPT_FAILED_*` of what did not work.
        failed: u8,
    },
    /// The host broke the protocol, or asked for something that cannot be.
    Error {
        /// What it is about.
        code: ErrorCode,
        /// For people.
        text: &'a [u8],
    },
}

/// Who the agent is, and what its start has cost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello<'a> {
    /// The wire's version: compare it with [`crate::VERSION`] first.
    pub version: u16,
    /// CLOCK_BOOTTIME when PID 1 was entered.
    pub entered_ns: u64,
    /// CLOCK_BOOTTIME when this frame was made.
    pub now_ns: u64,
    /// PID 1's time in user space.
    pub user_us: u64,
    /// PID 1's time in the kernel.
    pub sys_us: u64,
    /// The agent's build.
    pub build: &'a str,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It exited with this code.
    Code(u8),
    /// This signal ended it.
    Signal(u8),
}

/// The last word about a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exited {
    /// How it ended.
    pub outcome: Outcome,
    /// Time in user space, of it and of the children it waited for.
    pub user_us: u64,
    /// Time in the kernel, likewise.
    pub sys_us: u64,
    /// Most memory any of them had resident.
    pub max_rss_kib: u64,
}

impl Exited {
    /// The exit code as a shell gives it: 128 and the signal's number for a killed command.
    #[must_use]
    pub fn shell_code(&self) -> u8 {
        match self.outcome {
            Outcome::Code(code) => code,
            Outcome::Signal(signo) => 128u8.saturating_add(signo),
        }
    }
}

macro_rules! numbers {
    ($(#[$doc:meta])* $name:ident: $int:ty { $($(#[$item:meta])* $variant:ident = $value:literal),* $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr($int)]
        pub enum $name { $($(#[$item])* $variant = $value),* }

        impl $name {
            /// Every value.
            pub const ALL: &[$name] = &[$($name::$variant),*];

            fn from_number(number: $int) -> Option<Self> {
                match number { $($value => Some($name::$variant),)* _ => None }
            }
        }
    };
}

numbers! {
    /// The step at which a command failed to start.
    Stage: u8 {
        /// Too many commands or strings at once.
        Limits = 1,
        /// Making its pipes.
        Pipes = 2,
        /// Making its terminal.
        Terminal = 3,
        /// Making its process.
        Clone = 4,
        /// Its own session.
        Session = 5,
        /// Putting stdin, stdout and stderr in place.
        Stdio = 6,
        /// Becoming the user.
        User = 7,
        /// Entering the working directory.
        Cwd = 8,
        /// Executing the program.
        Exec = 9,
    }
}

numbers! {
    /// What an `Error` is about.
    ErrorCode: u16 {
        /// Bytes that are no frame of this version; the connection is closed.
        Protocol = 1,
        /// More stdin than there was credit for; the connection is closed.
        StdinOverflow = 2,
        /// An `Exec` for a stream whose command still runs; that one is not touched.
        StreamInUse = 3,
        /// A `Signal` or `Resize` that the kernel refused, or an action that this agent may not do.
        Refused = 4,
    }
}

/// Why a command could not be started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExecFailed<'a> {
    /// Linux's error number.
    pub errno: u32,
    /// The step that failed.
    pub stage: Stage,
    /// The path it was about, cut to [`TEXT_MAX_BYTES`].
    pub text: &'a [u8],
}

impl ExecFailed<'_> {
    /// The exit code as a shell gives it: 127 if the program was not found, else 126.
    #[must_use]
    pub fn shell_code(&self) -> u8 {
        const ENOENT: u32 = 2;
        const ENOTDIR: u32 = 20;
        if self.stage == Stage::Exec && matches!(self.errno, ENOENT | ENOTDIR) { 127 } else { 126 }
    }
}

impl<'a> Hello<'a> {
    fn parse(reader: &mut Reader<'a>) -> Result<Self, WireError> {
        let (version, build_len) = (reader.u16()?, reader.u16()?);
        let (entered_ns, now_ns) = (reader.u64()?, reader.u64()?);
        let (user_us, sys_us) = (reader.u64()?, reader.u64()?);
        let build = at_most(reader.bytes(build_len.into())?, BUILD_MAX_BYTES)?;
        let build = str::from_utf8(build).map_err(|_| WireError::BadString { kind: Kind::Hello })?;
        Ok(Hello { version, entered_ns, now_ns, user_us, sys_us, build })
    }

    fn write(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        let build = at_most(self.build.as_bytes(), BUILD_MAX_BYTES)?;
        writer.u16(self.version)?;
        writer.u16(build.len() as u16)?;
        for number in [self.entered_ns, self.now_ns, self.user_us, self.sys_us] {
            writer.u64(number)?;
        }
        writer.bytes(build)
    }
}

impl Exited {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, WireError> {
        let (how, value) = (reader.u8()?, reader.u8()?);
        let outcome = match how {
            0 => Outcome::Code(value),
            1 => Outcome::Signal(value),
            _ => return Err(WireError::BadValue { kind: Kind::Exited, value: how.into() }),
        };
        Ok(Exited { outcome, user_us: reader.u64()?, sys_us: reader.u64()?, max_rss_kib: reader.u64()? })
    }

    fn write(&self, writer: &mut Writer<'_>) -> Result<(), WireError> {
        let (how, value) = match self.outcome {
            Outcome::Code(code) => (0, code),
            Outcome::Signal(signo) => (1, signo),
        };
        writer.bytes(&[how, value])?;
        for number in [self.user_us, self.sys_us, self.max_rss_kib] {
            writer.u64(number)?;
        }
        Ok(())
    }
}

impl<'a> ExecFailed<'a> {
    fn parse(reader: &mut Reader<'a>) -> Result<Self, WireError> {
        let (errno, stage) = (reader.u32()?, reader.u8()?);
        let stage = Stage::from_number(stage)
            .ok_or(WireError::BadValue { kind: Kind::ExecFailed, value: stage.into() })?;
        Ok(ExecFailed { errno, stage, text: at_most(reader.remainder(), TEXT_MAX_BYTES)? })
    }
}

fn parse_error<'a>(reader: &mut Reader<'a>) -> Result<ToHost<'a>, WireError> {
    let code = reader.u16()?;
    let code =
        ErrorCode::from_number(code).ok_or(WireError::BadValue { kind: Kind::Error, value: code.into() })?;
    Ok(ToHost::Error { code, text: at_most(reader.remainder(), TEXT_MAX_BYTES)? })
}

impl<'a> ToHost<'a> {
    /// Takes a frame apart, refusing flags, values and lengths that this version does not know.
    pub fn parse(frame: &Frame<'a>) -> Result<Self, WireError> {
        let kind = frame.kind;
        let known_flags = if kind == Kind::Started { STARTED_RESUMED } else { 0 };
        if frame.flags & !known_flags != 0 {
            return Err(WireError::BadFlags { kind, flags: frame.flags });
        }
        let mut reader = Reader::new(kind, frame.payload);
        let message = match kind {
            Kind::Hello => ToHost::Hello(Hello::parse(&mut reader)?),
            Kind::Started => {
                ToHost::Started { pid: reader.u32()?, resumed: frame.flags & STARTED_RESUMED != 0 }
            }
            Kind::Stdout => ToHost::Stdout(reader.remainder()),
            Kind::Stderr => ToHost::Stderr(reader.remainder()),
            Kind::StdinWindow => ToHost::StdinWindow { bytes: reader.u32()? },
            Kind::Exited => ToHost::Exited(Exited::parse(&mut reader)?),
            Kind::ExecFailed => ToHost::ExecFailed(ExecFailed::parse(&mut reader)?),
            Kind::Pong => ToHost::Pong { nonce: reader.u64()? },
            Kind::Adopted => ToHost::Adopted { failed: reader.u8()? },
            Kind::Error => parse_error(&mut reader)?,
            _ => return Err(WireError::WrongDirection { kind }),
        };
        reader.finish()?;
        Ok(message)
    }

    /// The kind of the frame that carries this.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            ToHost::Hello(_) => Kind::Hello,
            ToHost::Started { .. } => Kind::Started,
            ToHost::Stdout(_) => Kind::Stdout,
            ToHost::Stderr(_) => Kind::Stderr,
            ToHost::StdinWindow { .. } => Kind::StdinWindow,
            ToHost::Exited(_) => Kind::Exited,
            ToHost::ExecFailed(_) => Kind::ExecFailed,
            ToHost::Pong { .. } => Kind::Pong,
            ToHost::Adopted { .. } => Kind::Adopted,
            ToHost::Error { .. } => Kind::Error,
        }
    }

    /// Writes the frame about `stream` and says how long it is.
    pub fn encode(&self, stream: u32, out: &mut [u8]) -> Result<usize, WireError> {
        let mut writer = Writer::new(out);
        let mut flags = 0;
        match self {
            ToHost::Hello(hello) => hello.write(&mut writer)?,
            ToHost::Started { pid, resumed } => {
                flags = if *resumed { STARTED_RESUMED } else { 0 };
                writer.u32(*pid)?;
            }
            ToHost::Stdout(bytes) | ToHost::Stderr(bytes) => writer.bytes(bytes)?,
            ToHost::StdinWindow { bytes } => writer.u32(*bytes)?,
            ToHost::Exited(exited) => exited.write(&mut writer)?,
            ToHost::ExecFailed(failed) => {
                writer.u32(failed.errno)?;
                writer.u8(failed.stage as u8)?;
                writer.bytes(at_most(failed.text, TEXT_MAX_BYTES)?)?;
            }
            ToHost::Pong { nonce } => writer.u64(*nonce)?,
            ToHost::Adopted { failed } => writer.u8(*failed)?,
            ToHost::Error { code, text } => {
                writer.u16(*code as u16)?;
                writer.bytes(at_most(text, TEXT_MAX_BYTES)?)?;
            }
        }
        writer.finish(self.kind(), flags, stream)
    }
}
