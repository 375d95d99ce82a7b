//! The agent's program as a command of the sandbox: reads, writes and lists files, connects to ports. So any
//! image will do, and the windows of an ordinary command bound what either side holds.
//!
//! It may touch files, its stdin and stdout, and loopback. It is a process like any other in the guest: paths
//! lead where the guest's own root leads them. See [`guest_init::TOOL_ARGV`] for what it says.

use core::ffi::CStr;

use guest_init::{BULK_MAX_BYTES, BULK_WORTH_BYTES};

use crate::sys::{
    Arguments, Bulk, Errno, Fd, Looked, Moved, TakeOnce, Watched, connect_loopback, exit, make_new_directory,
    nap, open_directory, open_for_reading, open_for_writing, poll, stdio,
};

const BUFFER_BYTES: usize = 64 * 1024;
const NAME_MAX_BYTES: usize = 4096;
/// A sleep while the other side of a bulk stream has nothing, or takes nothing: doubled from the least to the most.
const NAP_LEAST_MS: u32 = 1;
const NAP_MOST_MS: u32 = 64;
/// For so long a bulk stream may not be there yet.
const ABSENT_MOST_MS: u32 = 5000;

static BUFFERS: TakeOnce<[[u8; BUFFER_BYTES]; 2]> = TakeOnce::new([[0; BUFFER_BYTES]; 2]);
static BULK_BUFFER: TakeOnce<[u8; BULK_MAX_BYTES]> = TakeOnce::new([0; BULK_MAX_BYTES]);

/// Does one verb; the exit code is the error number.
pub(crate) fn run(mut arguments: Arguments) -> ! {
    let (verb, argument) = (arguments.next(), arguments.next());
    let (Some(verb), Some(argument), Some(buffers)) = (verb, argument, BUFFERS.take()) else {
        exit(Errno::INVAL.0 as u8)
    };
    let result = match verb.to_bytes() {
        b"read" => read(argument, None, buffers),
        b"write" => write(argument, None, buffers),
        b"get" => read(argument, arguments.next(), buffers),
        b"put" => write(argument, arguments.next(), buffers),
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

/// A bulk stream and the memory for it, if the host has named one and the machine has it.
fn bulk(stream: Option<&CStr>) -> Option<(Bulk, &'static mut [u8])> {
    let number = stream?.to_str().ok()?.parse().ok()?;
    Some((Bulk::open(number).ok()?, BULK_BUFFER.take()?))
}

fn read(path: &CStr, stream: Option<&CStr>, [buffer, _]: &mut [[u8; BUFFER_BYTES]; 2]) -> Result<(), Errno> {
    let file = open_for_reading(path)?;
    let looked = file.look()?;
    if !looked.is_regular() {
        return Err(if looked.is_directory() { Errno::ISDIR } else { Errno::INVAL });
    }
    let stdout = stdio(1);
    let bulk = if looked.size < BULK_WORTH_BYTES { None } else { bulk(stream) };
    let mut head = [0; guest_init::TOOL_STAT_BYTES + 1];
    head[..guest_init::TOOL_STAT_BYTES].copy_from_slice(&stat_bytes(looked));
    head[guest_init::TOOL_STAT_BYTES] = u8::from(bulk.is_some());
    write_all(&stdout, if stream.is_some() { &head } else { &head[..guest_init::TOOL_STAT_BYTES] })?;
    let Some((bulk, buffer)) = bulk else {
        return copy(&file, &stdout, buffer);
    };
    loop {
        let len = fill(buffer, |rest| file.read(rest))?;
        let mut at = 0;
        while at < len {
            match moved(|| bulk.send(&mut buffer[at..len]))? {
                0 => return Err(Errno::PIPE),
                taken => at += taken,
            }
        }
        if len < buffer.len() {
            bulk.end();
            return Ok(());
        }
    }
}

/// Asks the VMM until it has moved something, or there is nothing more to come.
fn moved(mut ask: impl FnMut() -> Moved) -> Result<usize, Errno> {
    let (mut nap_ms, mut absent_ms) = (NAP_LEAST_MS, 0);
    loop {
        match ask() {
            Moved::Bytes(bytes) => return Ok(bytes),
            Moved::Wait => {}
            Moved::None if absent_ms >= ABSENT_MOST_MS => return Err(Errno::PIPE),
            Moved::None => absent_ms += nap_ms,
        }
        nap(nap_ms);
        nap_ms = (2 * nap_ms).min(NAP_MOST_MS);
    }
}

fn write(
    path: &CStr,
    stream: Option<&CStr>,
    [buffer, name]: &mut [[u8; BUFFER_BYTES]; 2],
) -> Result<(), Errno> {
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
    if stream.is_some() {
        let bulk = bulk(stream);
        write_all(&stdio(1), &[u8::from(bulk.is_some())])?;
        if let Some((bulk, buffer)) = bulk {
            return write_from(&file, buffer, |rest| moved(|| bulk.receive(rest)));
        }
    }
    let stdin = stdio(0);
    write_from(&file, buffer, |rest| stdin.read(rest))
}

/// Writes all that `read` gives. A buffer at a time, whatever the pieces are that it comes in: what is written at once
/// lies in one folio.
fn write_from(
    file: &Fd,
    buffer: &mut [u8],
    mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>,
) -> Result<(), Errno> {
    loop {
        let len = fill(buffer, &mut read)?;
        write_all(file, &buffer[..len])?;
        if len < buffer.len() {
            return Ok(());
        }
    }
}

/// Reads until the buffer is full or there is no more; how much there was.
fn fill(buffer: &mut [u8], mut read: impl FnMut(&mut [u8]) -> Result<usize, Errno>) -> Result<usize, Errno> {
    let mut len = 0;
    while len < buffer.len() {
        match read(&mut buffer[len..]) {
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
