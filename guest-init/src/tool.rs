//! The agent's program as a command of the sandbox: reads, writes and lists files, connects to ports. So any
//! image will do, and the windows of an ordinary command bound what either side holds.
//!
//! It may touch files, its stdin and stdout, and loopback. It is a process like any other in the guest: paths
//! lead where the guest's own root leads them. See [`guest_init::TOOL_ARGV`] for what it says.

use core::ffi::CStr;

use crate::sys::{
    Arguments, Errno, Fd, Looked, TakeOnce, Watched, connect_loopback, exit, make_new_directory,
    open_directory, open_for_reading, open_for_writing, poll, stdio,
};

const BUFFER_BYTES: usize = 64 * 1024;
const NAME_MAX_BYTES: usize = 4096;

static BUFFERS: TakeOnce<[[u8; BUFFER_BYTES]; 2]> = TakeOnce::new([[0; BUFFER_BYTES]; 2]);

/// Does one verb; the exit code is the error number.
pub(crate) fn run(mut arguments: Arguments) -> ! {
    let (verb, argument) = (arguments.next(), arguments.next());
    let (Some(verb), Some(argument), Some(buffers)) = (verb, argument, BUFFERS.take()) else {
        exit(Errno::INVAL.0 as u8)
    };
    let result = match verb.to_bytes() {
        b"read" => read(argument, buffers),
        b"write" => write(argument, buffers),
        b"list" => list(argument, buffers),
        b"connect" => connect(argument, buffers),
        _ => Err(Errno::INVAL),
    };
    exit(result.err().map_or(0, |Errno(number)| number as u8))
}

fn stat_bytes(looked: Looked) -> [u8; guest_init::TOOL_STAT_BYTES] {
    let mut bytes = [0; guest_init::TOOL_STAT_BYTES];
    bytes[..8].copy_from_slice(&looked.size.to_le_bytes());
    bytes[8..12].copy_from_slice(&looked.mode.to_le_bytes());
    bytes[12..].copy_from_slice(&looked.mtime.to_le_bytes());
    bytes
}

fn read(path: &CStr, [buffer, _]: &mut [[u8; BUFFER_BYTES]; 2]) -> Result<(), Errno> {
    let file = open_for_reading(path)?;
    let looked = file.look()?;
    if !looked.is_regular() {
        return Err(if looked.is_directory() { Errno::ISDIR } else { Errno::INVAL });
    }
    let stdout = stdio(1);
    write_all(&stdout, &stat_bytes(looked))?;
    copy(&file, &stdout, buffer)
}

fn write(path: &CStr, [buffer, name]: &mut [[u8; BUFFER_BYTES]; 2]) -> Result<(), Errno> {
    let file = match open_for_writing(path) {
        Err(Errno::NOENT) => {
            make_parents(path, name)?;
            open_for_writing(path)
        }
        result => result,
    }?;
    if !file.look()?.is_regular() {
        return Err(Errno::INVAL);
    }
    let stdin = stdio(0);
    loop {
        // A buffer at a time, whatever the pieces are that it comes in: what is written at once lies in one folio.
        let len = fill(&stdin, buffer)?;
        write_all(&file, &buffer[..len])?;
        if len < buffer.len() {
            return Ok(());
        }
    }
}

/// Reads until the buffer is full or there is no more; how much there was.
fn fill(from: &Fd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut len = 0;
    while len < buffer.len() {
        match from.read(&mut buffer[len..]) {
            Ok(0) => break,
            Ok(more) => len += more,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(len)
}

/// Makes the directories that a file's path names.
fn make_parents(path: &CStr, name: &mut [u8]) -> Result<(), Errno> {
    let bytes = path.to_bytes();
    for (at, _) in bytes.iter().enumerate().skip(1).filter(|(_, byte)| **byte == b'/') {
        let (Some(place), Some(part)) = (name.get_mut(..=at), bytes.get(..at)) else {
            return Err(Errno::TOOBIG);
        };
        place[..at].copy_from_slice(part);
        place[at] = 0;
        let directory = CStr::from_bytes_until_nul(place).map_err(|_| Errno::INVAL)?;
        match make_new_directory(directory) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn list(path: &CStr, [out, _]: &mut [[u8; BUFFER_BYTES]; 2]) -> Result<(), Errno> {
    let mut directory = open_directory(path)?;
    let stdout = stdio(1);
    let mut end = 0;
    while let Some((name, looked)) = directory.next()? {
        let name = name.to_bytes();
        let name = name.get(..NAME_MAX_BYTES).unwrap_or(name);
        let len = (name.len() as u16).to_le_bytes();
        for part in [&stat_bytes(looked)[..], &len, name] {
            if out.len() - end < part.len() {
                write_all(&stdout, &out[..end])?;
                end = 0;
            }
            out[end..end + part.len()].copy_from_slice(part);
            end += part.len();
        }
    }
    write_all(&stdout, &out[..end])
}

fn write_all(to: &Fd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(len) => bytes = &bytes[len..],
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// All that is left of `from`. Through this program's memory: where ring 0 is emulated the kernel has a fast way
/// for that (the bulk-memory doorbell), and none for moving bytes between its own pages.
fn copy(from: &Fd, to: &Fd, buffer: &mut [u8]) -> Result<(), Errno> {
    loop {
        match from.read(buffer) {
            Ok(0) => return Ok(()),
            Ok(len) => write_all(to, &buffer[..len])?,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
}

fn connect(port: &CStr, [up, down]: &mut [[u8; BUFFER_BYTES]; 2]) -> Result<(), Errno> {
    let port = port.to_str().ok().and_then(|text| text.parse().ok()).ok_or(Errno::INVAL)?;
    let socket = connect_loopback(port)?;
    let (stdin, stdout) = (stdio(0), stdio(1));
    write_all(&stdout, &[0])?;
    for fd in [&stdin, &stdout, &socket] {
        fd.stop_waiting()?;
    }
    let (mut up, mut down) = (Way::new(up), Way::new(down));
    // The guest's server has said its last word when it closes; what the client might still say is lost on
    // it.
    while !down.over() {
        let mut watched = [
            Watched { readable: up.wants_more(), writable: false },
            Watched { readable: down.wants_more(), writable: up.has_some() },
            Watched { readable: false, writable: down.has_some() },
        ];
        match poll([&stdin, &socket, &stdout], &mut watched) {
            Ok(()) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
        up.go(&stdin, watched[0].readable, &socket, watched[1].writable)?;
        if up.just_ended() {
            socket.end_writing();
        }
        down.go(&socket, watched[1].readable, &stdout, watched[2].writable)?;
    }
    Ok(())
}

/// Bytes on their way in one direction.
struct Way<'b> {
    buffer: &'b mut [u8],
    start: usize,
    end: usize,
    ended: bool,
    told: bool,
}

impl<'b> Way<'b> {
    fn new(buffer: &'b mut [u8]) -> Way<'b> {
        Way { buffer, start: 0, end: 0, ended: false, told: false }
    }

    fn wants_more(&self) -> bool {
        !self.ended && self.start == self.end
    }

    fn has_some(&self) -> bool {
        self.start < self.end
    }

    fn over(&self) -> bool {
        self.ended && !self.has_some()
    }

    /// Once, when all has been passed on.
    fn just_ended(&mut self) -> bool {
        let now = self.over() && !self.told;
        self.told |= now;
        now
    }

    fn go(&mut self, from: &Fd, readable: bool, to: &Fd, writable: bool) -> Result<(), Errno> {
        if readable {
            match from.read(self.buffer) {
                Ok(0) => self.ended = true,
                Ok(len) => (self.start, self.end) = (0, len),
                Err(Errno::AGAIN | Errno::INTR) => {}
                // Reset by the other side.
                Err(_) => self.ended = true,
            }
        }
        if (writable || readable) && self.has_some() {
            match to.write(&self.buffer[self.start..self.end]) {
                Ok(len) => self.start += len,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}
