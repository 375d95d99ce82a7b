//! Takes a tar stream apart: ustar, GNU long names, pax headers. Framing is our own, because what comes before
//! an entry (names, pax records) must be bounded before it is read, and a size must have one meaning only.
//! Header fields: POSIX.1-2017 pax, "ustar Interchange Format", and GNU tar's manual, "Basic Tar Format".

use std::io::{self, Read};

use tar::{EntryType, Header};

use super::tree::{Reason, Xattr};

const BLOCK_BYTES: u64 = 512;
/// A pax header or a long name; xattrs of 64 KiB and paths of 4 KiB fit many times.
const EXTENSION_MAX_BYTES: u64 = 1 << 20;
/// Linux has PATH_MAX 4096.
const PATH_MAX_BYTES: usize = 4096;
/// Of one file, names and values; EROFS stores lengths in 16 bits.
const XATTRS_MAX_BYTES: usize = 64 * 1024;

/// One entry, its extensions applied.
#[derive(Debug, Clone)]
pub(crate) struct Member {
    pub(crate) kind: EntryType,
    pub(crate) path: Vec<u8>,
    pub(crate) link: Vec<u8>,
    pub(crate) mode: u16,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime_s: u64,
    pub(crate) bytes: u64,
    pub(crate) major: u32,
    pub(crate) minor: u32,
    pub(crate) xattrs: Vec<Xattr>,
}

/// What can end a stream before its end.
#[derive(Debug)]
pub(crate) enum TarError {
    /// The stream itself.
    Io(io::Error),
    /// An entry, by name, and why.
    Entry(Vec<u8>, Reason),
}

impl From<io::Error> for TarError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// See the module. The contents of a member are read through [`Read`] before the next is asked for; what is
/// left is skipped.
#[derive(Debug)]
pub(crate) struct TarStream<R> {
    inner: R,
    contents_left: u64,
    padding: u64,
    ended: bool,
    position: u64,
}

/// What stands before an entry and changes it.
#[derive(Default)]
struct Extensions {
    path: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    size: Option<u64>,
    uid: Option<u64>,
    gid: Option<u64>,
    mtime: Option<u64>,
    xattrs: Vec<Xattr>,
}

impl<R: Read> TarStream<R> {
    pub(crate) fn new(inner: R) -> Self {
        Self { inner, contents_left: 0, padding: 0, ended: false, position: 0 }
    }

    /// The next entry; `None` at the end of the archive.
    pub(crate) fn next_member(&mut self) -> Result<Option<Member>, TarError> {
        let mut extensions = Extensions::default();
        let mut extended = false;
        loop {
            self.skip()?;
            let Some(header) = self.header()? else {
                return if extended {
                    Err(TarError::Io(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "an extended header with no entry",
                    )))
                } else {
                    Ok(None)
                };
            };
            let name = header.path_bytes().into_owned();
            let refuse = |reason: Reason| TarError::Entry(name.clone(), reason);
            let size = number(&header.as_old().size).map_err(refuse)?;
            let kind = header.entry_type();
            match kind {
                EntryType::XHeader => {
                    let text = self.extension(size, &name)?;
                    extensions.pax(&text).map_err(refuse)?;
                    extended = true;
                }
                // Of the whole archive; no builder uses it for what matters, and none honours it.
                EntryType::XGlobalHeader => drop(self.extension(size, &name)?),
                EntryType::GNULongName => {
                    extensions.path = Some(until_nul(self.extension(size, &name)?));
                    extended = true;
                }
                EntryType::GNULongLink => {
                    extensions.link = Some(until_nul(self.extension(size, &name)?));
                    extended = true;
                }
                _ => return self.member(&header, size, extensions).map(Some),
            }
        }
    }

    /// How many bytes of the stream are behind; after a member, where its contents begin.
    pub(crate) fn position(&self) -> u64 {
        self.position
    }

    /// Reads to the end of the stream, so that whoever counts or digests it has seen all.
    pub(crate) fn drain(mut self) -> io::Result<R> {
        let mut chunk = vec![0; 64 * 1024];
        while self.inner.read(&mut chunk)? > 0 {}
        Ok(self.inner)
    }

    fn member(&mut self, header: &Header, size: u64, extensions: Extensions) -> Result<Member, TarError> {
        let path = extensions.path.unwrap_or_else(|| header.path_bytes().into_owned());
        let refuse = |reason: &str| TarError::Entry(path.clone(), reason.to_owned());
        let size = extensions.size.unwrap_or(size);
        let kind = match header.entry_type() {
            // Before POSIX a directory was a regular file whose name ends in a slash.
            EntryType::Regular if header.as_old().linkflag == [0] && path.ends_with(b"/") => {
                EntryType::Directory
            }
            EntryType::Continuous => EntryType::Regular,
            kind => kind,
        };
        let link = extensions.link.or_else(|| header.link_name_bytes().map(|link| link.into_owned()));
        if path.len() > PATH_MAX_BYTES || link.as_ref().is_some_and(|link| link.len() >= PATH_MAX_BYTES) {
            return Err(refuse("has a name longer than any path may be"));
        }
        if kind != EntryType::Regular && size != 0 {
            // Readers of tar disagree whether contents follow, and then about all entries behind.
            return Err(refuse("says that it has contents, which its kind cannot"));
        }
        let old = header.as_old();
        let numbered = |field: &[u8]| number(field).map_err(|reason| TarError::Entry(path.clone(), reason));
        let id = |value: u64, what: &str| {
            u32::try_from(value).map_err(|_| refuse(&format!("has a {what} number of more than 32 bits")))
        };
        let uid = extensions.uid.map_or_else(|| numbered(&old.uid), Ok)?;
        let gid = extensions.gid.map_or_else(|| numbered(&old.gid), Ok)?;
        // One that cannot be read, or lies before 1970, harms nothing.
        let mtime_s = extensions.mtime.or_else(|| number(&old.mtime).ok()).unwrap_or(0);
        let device = |field: io::Result<Option<u32>>| field.ok().flatten().unwrap_or(0);
        let member = Member {
            kind,
            link: link.unwrap_or_default(),
            mode: (numbered(&old.mode)? & 0o7777) as u16,
            uid: id(uid, "user")?,
            gid: id(gid, "group")?,
            mtime_s,
            bytes: size,
            major: device(header.device_major()),
            minor: device(header.device_minor()),
            xattrs: extensions.xattrs,
            path: path.clone(),
        };
        self.contents_left = size;
        self.padding = size.next_multiple_of(BLOCK_BYTES) - size;
        Ok(member)
    }

    /// The next header whose checksum is right; `None` at the end.
    fn header(&mut self) -> Result<Option<Header>, TarError> {
        if self.ended {
            return Ok(None);
        }
        let mut header = Header::new_old();
        if !self.block(header.as_mut_bytes())? {
            self.ended = true;
            return Ok(None);
        }
        if header.as_bytes().iter().all(|&b| b == 0) {
            // Two of them end an archive; so does the end of the stream.
            self.ended = true;
            let mut second = [0; BLOCK_BYTES as usize];
            if self.block(&mut second)? && second.iter().any(|&b| b != 0) {
                return Err(TarError::Io(io::Error::other("one block of zeros amid the entries")));
            }
            return Ok(None);
        }
        let recorded = number(&header.as_old().cksum).unwrap_or(u64::MAX);
        let sum = |part: &[u8]| part.iter().map(|&b| u64::from(b)).sum::<u64>();
        let bytes = header.as_bytes();
        if recorded != sum(&bytes[..148]) + 8 * u64::from(b' ') + sum(&bytes[156..]) {
            return Err(TarError::Io(io::Error::other("a header's checksum is wrong")));
        }
        Ok(Some(header))
    }

    /// Fills a block; `false` where the stream ends before its first byte.
    fn block(&mut self, block: &mut [u8; BLOCK_BYTES as usize]) -> io::Result<bool> {
        let mut filled = 0;
        while filled < block.len() {
            match self.inner.read(&mut block[filled..])? {
                0 if filled == 0 => return Ok(false),
                0 => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within a header")),
                read => filled += read,
            }
        }
        self.position += BLOCK_BYTES;
        Ok(true)
    }

    /// The contents of an extension, and the padding behind.
    fn extension(&mut self, size: u64, name: &[u8]) -> Result<Vec<u8>, TarError> {
        if size > EXTENSION_MAX_BYTES {
            return Err(TarError::Entry(name.to_vec(), format!("is an extended header of {size} bytes")));
        }
        let mut text = vec![0; size as usize];
        self.inner.read_exact(&mut text)?;
        self.position += size;
        self.padding = size.next_multiple_of(BLOCK_BYTES) - size;
        Ok(text)
    }

    /// Goes on to the next header.
    fn skip(&mut self) -> io::Result<()> {
        let skipped =
            self.contents_left.checked_add(self.padding).ok_or_else(|| io::Error::other("it has no end"))?;
        (self.contents_left, self.padding) = (0, 0);
        self.position += skipped;
        if io::copy(&mut self.inner.by_ref().take(skipped), &mut io::sink())? < skipped {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within an entry"));
        }
        Ok(())
    }
}

impl<R: Read> Read for TarStream<R> {
    /// The contents of the member at hand.
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.contents_left).unwrap_or(usize::MAX).min(buffer.len());
        if most == 0 {
            return Ok(0);
        }
        let read = self.inner.read(&mut buffer[..most])?;
        if read == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it ends within an entry"));
        }
        self.contents_left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}

impl Extensions {
    /// Records are `LENGTH KEY=VALUE\n`, the length counting itself.
    fn pax(&mut self, mut text: &[u8]) -> Result<(), Reason> {
        let broken = || "has a pax header that cannot be read".to_owned();
        while !text.is_empty() {
            let space = text.iter().take(20).position(|&b| b == b' ').ok_or_else(broken)?;
            let length = decimal(&text[..space]).and_then(|n| usize::try_from(n).ok()).ok_or_else(broken)?;
            if length <= space + 1 || length > text.len() || text[length - 1] != b'\n' {
                return Err(broken());
            }
            let (record, rest) = text.split_at(length);
            text = rest;
            let record = &record[space + 1..length - 1];
            let equals = record.iter().position(|&b| b == b'=').ok_or_else(broken)?;
            self.record(&record[..equals], &record[equals + 1..])?;
        }
        let size: usize = self.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 8).sum();
        if size > XATTRS_MAX_BYTES {
            return Err(format!("has {size} bytes of extended attributes"));
        }
        self.xattrs.sort();
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Result<(), Reason> {
        let seconds = value.split(|&b| b == b'.').next().unwrap_or_default();
        let numbered = |text: &[u8]| {
            decimal(text)
                .map(Some)
                .ok_or_else(|| format!("has a pax header with a bad {}", String::from_utf8_lossy(key)))
        };
        match key {
            b"path" => self.path = Some(value.to_vec()),
            b"linkpath" => self.link = Some(value.to_vec()),
            b"size" => self.size = numbered(value)?,
            b"uid" => self.uid = numbered(value)?,
            b"gid" => self.gid = numbered(value)?,
            // Before 1970 is 1970.
            b"mtime" => self.mtime = if value.starts_with(b"-") { Some(0) } else { numbered(seconds)? },
            _ if key.starts_with(b"GNU.sparse.") => {
                return Err("is a sparse file, which layers do not hold".to_owned());
            }
            _ => {
                if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.retain(|xattr| *xattr.name != *name);
                    self.xattrs.push(Xattr { name: name.into(), value: value.into() });
                }
            }
        }
        Ok(())
    }
}

/// A numeric field: octal digits, or GNU's base 256 where the first bit is set. An empty one is 0.
fn number(field: &[u8]) -> Result<u64, Reason> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        let start = u64::from(first & 0x7f);
        let value =
            rest.iter().try_fold(start, |value, &byte| value.checked_mul(256)?.checked_add(u64::from(byte)));
        // Bit 6 of the first byte is the sign, and nothing here is negative.
        return match value {
            Some(value) if first & 0x40 == 0 => Ok(value),
            _ => Err("has a number in its header that cannot be".to_owned()),
        };
    }
    let end = field.iter().position(|&b| b == 0).unwrap_or(field.len());
    let digits = field[..end].trim_ascii();
    digits
        .iter()
        .try_fold(0_u64, |value, &digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(u64::from(digit - b'0')),
            _ => None,
        })
        .ok_or_else(|| "has a number in its header that cannot be".to_owned())
}

fn decimal(digits: &[u8]) -> Option<u64> {
    if digits.is_empty() {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(digit - b'0')),
        _ => None,
    })
}

fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    let end = text.iter().position(|&b| b == 0).unwrap_or(text.len());
    text.truncate(end);
    text
}
