//! What only PID 1 does: mounts, the machine's names and clocks, and its end.

use core::ffi::{CStr, c_int};
use core::ptr;

use libc::timespec;

use super::raw::syscall;
use super::{Errno, Fd};

/// Flags of [`mount`].
#[derive(Clone, Copy)]
pub(crate) struct MountFlags(libc::c_ulong);

impl MountFlags {
    pub(crate) const NONE: MountFlags = MountFlags(0);
    pub(crate) const READ_ONLY: MountFlags = MountFlags(libc::MS_RDONLY);
    pub(crate) const NO_PROGRAMS: MountFlags = MountFlags(libc::MS_NOSUID | libc::MS_NODEV | libc::MS_NOEXEC);
    pub(crate) const NO_SETUID: MountFlags = MountFlags(libc::MS_NOSUID);
    pub(crate) const MOVE: MountFlags = MountFlags(libc::MS_MOVE);
    pub(crate) const BIND: MountFlags = MountFlags(libc::MS_BIND);
    pub(crate) const REMOUNT: MountFlags = MountFlags(libc::MS_REMOUNT);
}

/// mount(2).
pub(crate) fn mount(
    source: &CStr,
    target: &CStr,
    kind: &CStr,
    flags: MountFlags,
    options: &CStr,
) -> Result<(), Errno> {
    let [source, target, kind, options] =
        [source, target, kind, options].map(|string| string.as_ptr() as usize);
    // SAFETY: four NUL-terminated strings.
    unsafe { syscall(libc::SYS_mount, [source, target, kind, flags.0 as usize, options, 0]) }.map(drop)
}

/// Makes a directory; one that is there already is fine.
pub(crate) fn make_directory(path: &CStr, mode: u32) -> Result<(), Errno> {
    // SAFETY: a NUL-terminated string.
    match unsafe { syscall(libc::SYS_mkdir, [path.as_ptr() as usize, mode as usize, 0, 0, 0, 0]) } {
        Ok(_) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// Makes a symbolic link; failing is fine, the place is taken then.
pub(crate) fn make_link(target: &CStr, path: &CStr) {
    // SAFETY: two NUL-terminated strings.
    let _ =
        unsafe { syscall(libc::SYS_symlink, [target.as_ptr() as usize, path.as_ptr() as usize, 0, 0, 0, 0]) };
}

/// Removes a file, if it is there.
pub(crate) fn remove(path: &CStr) {
    // SAFETY: a NUL-terminated string.
    let _ = unsafe { syscall(libc::SYS_unlink, [path.as_ptr() as usize, 0, 0, 0, 0, 0]) };
}

/// Enters a directory.
pub(crate) fn enter(path: &CStr) -> Result<(), Errno> {
    // SAFETY: a NUL-terminated string.
    unsafe { syscall(libc::SYS_chdir, [path.as_ptr() as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

/// Makes the current directory the root.
pub(crate) fn chroot_here() -> Result<(), Errno> {
    // SAFETY: a NUL-terminated string.
    unsafe { syscall(libc::SYS_chroot, [c".".as_ptr() as usize, 0, 0, 0, 0, 0]) }.map(drop)
}

pub(crate) fn set_umask(mask: u32) {
    // SAFETY: takes no pointers.
    let _ = unsafe { syscall(libc::SYS_umask, [mask as usize, 0, 0, 0, 0, 0]) };
}

/// Brings the loopback interface up; the kernel then gives it 127.0.0.1.
pub(crate) fn loopback_up() -> Result<(), Errno> {
    let kind = (libc::SOCK_DGRAM | libc::SOCK_CLOEXEC) as usize;
    // SAFETY: takes no pointers.
    let socket =
        unsafe { syscall(libc::SYS_socket, [libc::AF_INET as usize, kind, 0, 0, 0, 0]) }.map(Fd::own)?;
    // SAFETY: all-zero is a valid ifreq.
    let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    let at = &raw const request as usize;
    // SAFETY: SIOCSIFFLAGS reads one ifreq.
    unsafe { syscall(libc::SYS_ioctl, [socket.raw(), libc::SIOCSIFFLAGS as usize, at, 0, 0, 0]) }.map(drop)
}

pub(crate) fn set_hostname(name: &[u8]) -> Result<(), Errno> {
    // SAFETY: the kernel reads `name.len()` bytes.
    unsafe { syscall(libc::SYS_sethostname, [name.as_ptr() as usize, name.len(), 0, 0, 0, 0]) }.map(drop)
}

/// CLOCK_BOOTTIME.
pub(crate) fn boottime_ns() -> u64 {
    let mut now = timespec { tv_sec: 0, tv_nsec: 0 };
    let at = &raw mut now as usize;
    // SAFETY: the kernel writes one timespec.
    let _ = unsafe { syscall(libc::SYS_clock_gettime, [libc::CLOCK_BOOTTIME as usize, at, 0, 0, 0, 0]) };
    (now.tv_sec as u64).saturating_mul(1_000_000_000).saturating_add(now.tv_nsec as u64)
}

pub(crate) fn set_wall_clock(ns: u64) -> Result<(), Errno> {
    let time = timespec { tv_sec: (ns / 1_000_000_000) as i64, tv_nsec: (ns % 1_000_000_000) as i64 };
    let at = &raw const time as usize;
    // SAFETY: the kernel reads one timespec.
    unsafe { syscall(libc::SYS_clock_settime, [libc::CLOCK_REALTIME as usize, at, 0, 0, 0, 0]) }.map(drop)
}

/// Mixes the host's random bytes in, counts them as entropy, and makes the generator use them now.
pub(crate) fn add_entropy(bytes: &[u8]) -> Result<(), Errno> {
    const RNDADDENTROPY: usize = 0x4008_5203;
    const RNDRESEEDCRNG: usize = 0x5207;
    #[repr(C)]
    struct PoolInfo {
        entropy_bits: c_int,
        buffer_bytes: c_int,
        buffer: [u8; guest_init::ENTROPY_MAX_BYTES],
    }
    let mut info = PoolInfo { entropy_bits: 0, buffer_bytes: 0, buffer: [0; guest_init::ENTROPY_MAX_BYTES] };
    let Some(buffer) = info.buffer.get_mut(..bytes.len()) else {
        return Err(Errno::TOOBIG);
    };
    buffer.copy_from_slice(bytes);
    info.buffer_bytes = bytes.len() as c_int;
    info.entropy_bits = info.buffer_bytes * 8;
    let device = Fd::open(c"/dev/urandom", libc::O_RDWR)?;
    let at = &raw const info as usize;
    // SAFETY: RNDADDENTROPY reads the header and `buffer_bytes` bytes behind it, which are there.
    let added = unsafe { syscall(libc::SYS_ioctl, [device.raw(), RNDADDENTROPY, at, 0, 0, 0]) };
    // SAFETY: takes no pointers.
    let reseeded = unsafe { syscall(libc::SYS_ioctl, [device.raw(), RNDRESEEDCRNG, 0, 0, 0, 0]) };
    // SAFETY: `info` is ours; a volatile write is not optimised away. The seed must not stay on the stack,
    // where a snapshot would keep it.
    unsafe { ptr::write_volatile(&raw mut info.buffer, [0; guest_init::ENTROPY_MAX_BYTES]) };
    added.and(reseeded).map(drop)
}

/// Orphans become this process's children, as PID 1's do.
pub(crate) fn become_subreaper() {
    // SAFETY: takes no pointers.
    let _ = unsafe { syscall(libc::SYS_prctl, [libc::PR_SET_CHILD_SUBREAPER as usize, 1, 0, 0, 0, 0]) };
}

/// From now on this process takes no processor away from another that still works (sched(7), SCHED_BATCH).
/// On one processor a command's write then does not switch to the agent at once: it goes on, often
/// to its end, and the agent finds bytes, end and exit together.
pub(crate) fn be_patient() -> Result<(), Errno> {
    set_policy(libc::SCHED_BATCH)
}

pub(super) fn set_policy(policy: c_int) -> Result<(), Errno> {
    let priority: c_int = 0;
    let at = &raw const priority as usize;
    // SAFETY: the kernel reads one sched_param, which is an int.
    unsafe { syscall(libc::SYS_sched_setscheduler, [0, policy as usize, at, 0, 0, 0]) }.map(drop)
}

/// Lets commands open as many files as programs expect to be able to ask for; the kernel gives PID 1
/// a hard limit of 4096. The soft limit stays, for programs that use select.
pub(crate) fn raise_file_limit() {
    let limit = libc::rlimit64 { rlim_cur: 1024, rlim_max: 524_288 };
    let at = &raw const limit as usize;
    // SAFETY: the kernel reads one rlimit64; null for "no old limit wanted".
    let _ = unsafe { syscall(libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE as usize, at, 0, 0, 0]) };
}

/// Writes disks out and resets the machine, which ends the microVM.
pub(crate) fn reboot() -> ! {
    // SAFETY: sync takes nothing; reboot takes magic numbers and a command.
    unsafe {
        let _ = syscall(libc::SYS_sync, [0; 6]);
        let magic = [libc::LINUX_REBOOT_MAGIC1 as usize, libc::LINUX_REBOOT_MAGIC2 as usize];
        let command = libc::LINUX_REBOOT_CMD_RESTART as usize;
        let _ = syscall(libc::SYS_reboot, [magic[0], magic[1], command, 0, 0, 0]);
    }
    super::exit(1)
}

/// Says what is wrong where the VMM sees it, the kernel's log, and on stderr if there is one.
pub(crate) fn report_fatal(message: &[u8]) {
    if let Ok(log) = Fd::open(c"/dev/kmsg", libc::O_WRONLY) {
        let _ = log.write(message);
    }
    let stderr = core::mem::ManuallyDrop::new(Fd::own(2));
    let _ = stderr.write(message);
}

/// Reads the beginning of a small file.
pub(crate) fn read_file<'b>(path: &CStr, into: &'b mut [u8]) -> Result<&'b [u8], Errno> {
    let len = Fd::open(path, libc::O_RDONLY)?.read(into)?;
    Ok(&into[..len])
}

/// Writes a small file of /sys or /proc.
pub(crate) fn write_file(path: &CStr, bytes: &[u8]) -> Result<(), Errno> {
    Fd::open(path, libc::O_WRONLY)?.write(bytes).map(drop)
}
