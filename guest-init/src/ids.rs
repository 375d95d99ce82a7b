//! Who the machine is, in the two files where programs look: /etc/machine-id and
//! /proc/sys/kernel/random/boot_id.
//!
//! Made once at boot and kept open, so that a clone's new identity is two small writes. The kernel's own
//! boot_id cannot be changed, and would be the same in all clones; so a file lies over it. What programs then
//! do with these files, root in the sandbox may: nothing here depends on it.

use core::ffi::CStr;

use guest_init::ID_BYTES;

use crate::sys::{Errno, Fd, MountFlags, make_directory, mount, remove};

/// On the writable layer's own file system, where no path of the sandbox leads.
const BOOT_ID: &CStr = c"/rw/boot_id";
const MACHINE_ID: &CStr = c"/etc/machine-id";

/// 32 digits and a line feed.
const MACHINE_BYTES: usize = 2 * ID_BYTES + 1;
/// Four hyphens more.
const BOOT_BYTES: usize = MACHINE_BYTES + 4;
/// Bytes after which Linux prints a hyphen.
const HYPHENS: [usize; 4] = [4, 6, 8, 10];

/// Both files.
pub(crate) struct Ids {
    machine: Fd,
    boot: Fd,
}

impl Ids {
    pub(crate) fn new(machine: Fd, boot: Fd) -> Ids {
        Ids { machine, boot }
    }

    /// Before the new root is entered.
    pub(crate) fn boot() -> Result<Fd, Errno> {
        let file = Fd::create(BOOT_ID, 0o444)?;
        mount(BOOT_ID, c"/newroot/proc/sys/kernel/random/boot_id", c"", MountFlags::BIND, c"")?;
        Ok(file)
    }

    /// In the new root. The image's own, if it has one, would be the same in all sandboxes; and it may be a
    /// link.
    pub(crate) fn machine() -> Result<Fd, Errno> {
        remove(MACHINE_ID);
        match Fd::create(MACHINE_ID, 0o444) {
            Err(Errno::NOENT) => {
                make_directory(c"/etc", 0o755)?;
                Fd::create(MACHINE_ID, 0o444)
            }
            result => result,
        }
    }

    /// Writes both.
    pub(crate) fn set(&self, machine: [u8; ID_BYTES], boot: [u8; ID_BYTES]) -> Result<(), Errno> {
        self.machine.write_start(&text::<MACHINE_BYTES>(machine, &[]))?;
        self.boot.write_start(&text::<BOOT_BYTES>(boot, &HYPHENS))
    }
}

/// Hexadecimal digits with hyphens before these bytes, and a line feed.
fn text<const LEN: usize>(id: [u8; ID_BYTES], hyphens: &[usize]) -> [u8; LEN] {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [b'\n'; LEN];
    let mut places = text.iter_mut();
    let mut put = |byte: u8| {
        if let Some(place) = places.next() {
            *place = byte;
        }
    };
    for (at, byte) in id.into_iter().enumerate() {
        if hyphens.contains(&at) {
            put(b'-');
        }
        put(DIGITS[usize::from(byte >> 4)]);
        put(DIGITS[usize::from(byte & 15)]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_are_written_as_linux_writes_them() {
        let id = [0xde, 0xad, 0xbe, 0xef, 0, 1, 0x42, 3, 0x84, 5, 6, 7, 8, 9, 10, 0xff];
        assert_eq!(&text::<MACHINE_BYTES>(id, &[]), b"deadbeef000142038405060708090aff\n");
        assert_eq!(&text::<BOOT_BYTES>(id, &HYPHENS), b"deadbeef-0001-4203-8405-060708090aff\n");
    }
}
