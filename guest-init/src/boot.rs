//! From the kernel's hand-over to the sandbox's root file system. Runs once, in PID 1 only; it may
//! touch mounts, directories, names and /sys.
//!
//! ```text
//! /dev/vda  EROFS  /         the agent's disk: this program as /init, and the empty directories
//!                            dev lower rw newroot
//! /dev/vdb  EROFS  /lower    the user's image, read only
//!           tmpfs  /rw       upper and work directory of ...
//!           overlay /newroot ... what becomes the root, with proc, sys, dev (shm, pts), run, tmp in it
//! ```
//!
//! Every system call here is a quarter of a millisecond on software KVM and each mount several, so: no
//! file system for what a directory does. /tmp and /run lie in the overlay, which is tmpfs already;
//! /dev/shm is a directory of devtmpfs, which is a tmpfs.
//!
//! Two small files say who the machine is, /etc/machine-id in the overlay and a file of /rw that is mounted
//! over /proc/sys/kernel/random/boot_id; they stay open, because every clone writes them ([`crate::ids`]).
//!
//! Kernel parameters: `peregrine.thp=1` switches big folios on, which the kernel leaves off in small
//! machines; `peregrine.batch=1` makes the agent yield to commands, which pays where a context switch is dear
//! (see [`crate::sys::be_patient`]); `peregrine.rw=SIZE` limits what the sandbox may write (tmpfs syntax,
//! default `50%`).

use core::ffi::CStr;

use crate::ids::Ids;
use crate::sys::{
    Errno, MountFlags, be_patient, chroot_here, enter, loopback_up, make_directory, make_link, mount,
    raise_file_limit, read_file, set_hostname, set_umask, write_file,
};

const OVERLAY_OPTIONS: &CStr = c"lowerdir=/lower,upperdir=/rw/upper,workdir=/rw/work";
const CMDLINE_MAX_BYTES: usize = 2048;
const THP_FILES: [&CStr; 3] = [
    c"/sys/kernel/mm/transparent_hugepage/enabled",
    c"/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled",
    // For what is too short or not aligned for the others: heaps, stacks.
    c"/sys/kernel/mm/transparent_hugepage/hugepages-16kB/enabled",
];

/// What wakes an idle kernel for nothing: the search for fragmented memory twice a second (most of what an idle
/// sandbox costs where ring 0 is emulated), and the folding of statistics once a second.
const QUIET: [(&CStr, &[u8]); 2] =
    [(c"/proc/sys/vm/compaction_proactiveness", b"0"), (c"/proc/sys/vm/stat_interval", b"600")];

/// The step that failed; nothing is undone, the machine ends.
pub(crate) struct BootFailed {
    pub(crate) step: &'static str,
    pub(crate) errno: Errno,
}

trait Step<T> {
    fn step(self, step: &'static str) -> Result<T, BootFailed>;
}

impl<T> Step<T> for Result<T, Errno> {
    fn step(self, step: &'static str) -> Result<T, BootFailed> {
        self.map_err(|errno| BootFailed { step, errno })
    }
}

/// What the agent goes on with.
pub(crate) struct Booted {
    /// The kernel's command line asks for it, and the kernel can do it.
    pub(crate) patient: bool,
    pub(crate) ids: Ids,
}

/// Makes the sandbox's root and enters it.
pub(crate) fn boot() -> Result<Booted, BootFailed> {
    // Modes below are meant as written.
    set_umask(0);
    mount_image()?;
    mount_writable()?;
    mount_kernel_file_systems()?;
    let mut cmdline = [0; CMDLINE_MAX_BYTES];
    let cmdline = read_file(c"/newroot/proc/cmdline", &mut cmdline).unwrap_or(&[]);
    limit_writable(cmdline)?;
    let big_folios = parameter(cmdline, b"peregrine.thp=") == Some(b"1");
    if big_folios {
        // What is written at once lies in one folio, as far as the file is long. A kernel without them refuses.
        let _ = mount(c"rw", c"/rw", c"tmpfs", MountFlags::REMOUNT, c"huge=within_size");
    }
    let boot_id = Ids::boot().step("put a file over /proc/sys/kernel/random/boot_id")?;
    enter_root()?;
    let machine_id = Ids::machine().step("make /etc/machine-id")?;
    let ids = Ids::new(machine_id, boot_id);
    fill_dev()?;
    if big_folios {
        for file in THP_FILES {
            // The kernel may have none of them; it then works as usual.
            let _ = write_file(file, b"always");
        }
    }
    for (file, value) in QUIET {
        // A kernel that has no such thing is not woken by it.
        let _ = write_file(file, value);
    }
    // A kernel without IPv4 has no loopback, and a sandbox can do without.
    let _ = loopback_up();
    let _ = set_hostname(b"sandbox");
    raise_file_limit();
    set_umask(0o022);
    let patient = parameter(cmdline, b"peregrine.batch=") == Some(b"1") && be_patient().is_ok();
    Ok(Booted { patient, ids })
}

fn mount_image() -> Result<(), BootFailed> {
    let mount_lower = || mount(c"/dev/vdb", c"/lower", c"erofs", MountFlags::READ_ONLY, c"");
    match mount_lower() {
        Err(Errno::NOENT) => {
            // The kernel was built without CONFIG_DEVTMPFS_MOUNT.
            mount(c"dev", c"/dev", c"devtmpfs", MountFlags::NONE, c"")
                .step("mount devtmpfs on /dev of the agent's disk")?;
            mount_lower()
        }
        result => result,
    }
    .step("mount the image, /dev/vdb, as EROFS on /lower; has the VM a second disk with an EROFS image?")
}

fn mount_writable() -> Result<(), BootFailed> {
    mount(c"rw", c"/rw", c"tmpfs", MountFlags::NONE, c"mode=755")
        .step("mount tmpfs on /rw of the agent's disk")?;
    // The upper directory's mode is that of the sandbox's root directory.
    make_directory(c"/rw/upper", 0o755).step("make /rw/upper")?;
    make_directory(c"/rw/work", 0o755).step("make /rw/work")?;
    mount(c"root", c"/newroot", c"overlay", MountFlags::NONE, OVERLAY_OPTIONS)
        .step("mount the overlay on /newroot; has the kernel overlayfs?")
}

fn mount_kernel_file_systems() -> Result<(), BootFailed> {
    into(c"devtmpfs", c"/newroot/dev", MountFlags::NO_SETUID).step("mount devtmpfs on /dev")?;
    into(c"proc", c"/newroot/proc", MountFlags::NO_PROGRAMS).step("mount proc on /proc")?;
    into(c"sysfs", c"/newroot/sys", MountFlags::NO_PROGRAMS).step("mount sysfs on /sys")
}

/// Mounts a file system of the kernel on a directory, which is made if the image has none.
fn into(kind: &CStr, target: &CStr, flags: MountFlags) -> Result<(), Errno> {
    match mount(kind, target, kind, flags, c"") {
        Err(Errno::NOENT) => {
            make_directory(target, 0o755)?;
            mount(kind, target, kind, flags, c"")
        }
        result => result,
    }
}

fn limit_writable(cmdline: &[u8]) -> Result<(), BootFailed> {
    const KEY: &[u8] = b"size=";
    let Some(size) = parameter(cmdline, b"peregrine.rw=") else { return Ok(()) };
    let mut options = [0; 32];
    let text = options.get_mut(KEY.len()..KEY.len() + size.len());
    let step = "set the size of the writable layer; is peregrine.rw= a size that tmpfs knows?";
    let Some(text) = text else { return Err(Errno::TOOBIG).step(step) };
    text.copy_from_slice(size);
    options[..KEY.len()].copy_from_slice(KEY);
    let options = CStr::from_bytes_until_nul(&options).map_err(|_| Errno::TOOBIG).step(step)?;
    mount(c"rw", c"/rw", c"tmpfs", MountFlags::REMOUNT, options).step(step)
}

/// As switch_root does. The old root stays under the new one, where no path leads.
fn enter_root() -> Result<(), BootFailed> {
    enter(c"/newroot").step("enter /newroot")?;
    mount(c".", c"/", c"", MountFlags::MOVE, c"").step("move /newroot to /")?;
    chroot_here().step("make /newroot the root")
}

fn fill_dev() -> Result<(), BootFailed> {
    make_directory(c"/dev/pts", 0o755).step("make /dev/pts")?;
    // Without mode 666 on its ptmx, which /dev/ptmx leads to, only root could open terminals.
    mount(c"devpts", c"/dev/pts", c"devpts", MountFlags::NO_SETUID, c"mode=620,gid=5,ptmxmode=666")
        .step("mount devpts on /dev/pts")?;
    make_directory(c"/dev/shm", 0o1777).step("make /dev/shm")?;
    make_directory(c"/tmp", 0o1777).step("make /tmp")?;
    make_directory(c"/run", 0o755).step("make /run")?;
    make_link(c"/proc/self/fd", c"/dev/fd");
    make_link(c"/proc/self/fd/0", c"/dev/stdin");
    make_link(c"/proc/self/fd/1", c"/dev/stdout");
    make_link(c"/proc/self/fd/2", c"/dev/stderr");
    Ok(())
}

/// The value of a kernel parameter, given with its `=`.
fn parameter<'c>(cmdline: &'c [u8], name: &[u8]) -> Option<&'c [u8]> {
    cmdline.split(u8::is_ascii_whitespace).find_map(|word| word.strip_prefix(name))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_parameter_is_a_whole_word() {
        let cmdline = b"quiet xperegrine.thp=0 peregrine.thp=1 peregrine.rw=40%\n";
        assert_eq!(parameter(cmdline, b"peregrine.thp="), Some(&b"1"[..]));
        assert_eq!(parameter(cmdline, b"peregrine.rw="), Some(&b"40%"[..]));
        assert_eq!(parameter(cmdline, b"peregrine.no="), None);
    }
}
