//! What the default image consists of, as data, each item with its reason. No code that builds: see
//! `default_image`. This file's text is part of the image's key, so that a change here makes a new image.

/// Packages that are asked for; what they depend on follows.
pub(crate) const PACKAGES: &[&str] = &[
    // The main job: shells, the standard commands, Python with its standard library.
    "bash",
    "coreutils",
    "dash",
    "python3-minimal",
    "libpython3-stdlib",
    // What shell scripts take for granted.
    "diffutils",
    "findutils",
    "grep",
    "gzip",
    "hostname",
    "mawk",
    "sed",
    "tar",
    // Looking at a sandbox from inside: ps, top, free; mount, lsblk, setsid, flock, script-like tools.
    "mount",
    "procps",
    "util-linux",
    // TLS from Python and others needs roots of trust; openssl hashes them at build time and holds the
    // configuration.
    "ca-certificates",
    "openssl",
    // The C.UTF-8 locale, getent, ldconfig.
    "libc-bin",
    // Users, groups, release information, terminal types for PTYs, time zones.
    "base-files",
    "base-passwd",
    "ncurses-base",
    "tzdata",
    // Satisfies a dependency that is otherwise met by usrmerge, which needs all of Perl.
    "usr-is-merged",
];

/// Dependencies that only maintainer scripts use, which never run here; leaving them out saves 17 MB.
pub(crate) const NOT_UNPACKED: &[&str] = &[
    "cdebconf",
    "debconf",
    "dpkg",
    "gcc-12-base",
    "init-system-helpers",
    "libdebconfclient0",
    "perl-base",
    "usr-is-merged",
];

/// Trees that are not unpacked. A component may hold one `*`.
pub(crate) const EXCLUDED: &[&str] = &[
    // For readers, not for programs.
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/doc-base",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/man",
    "usr/share/menu",
    // Translations. C.UTF-8 is in usr/lib/locale and stays.
    "usr/share/locale",
    // Leap-second and duplicate views of the time zones.
    "usr/share/zoneinfo/posix",
    "usr/share/zoneinfo/right",
    // Converters between old character sets: 8 MB, and with them each start of a program in a UTF-8 locale
    // parses their index. UTF-8, -16, -32 and ASCII are built into the C library, Python has its own.
    "usr/lib/*/gconv",
    // The distribution's own integration: services, package scripts, device rules.
    "etc/dpkg",
    "etc/init.d",
    "etc/update-motd.d",
    "usr/lib/binfmt.d",
    "usr/lib/systemd",
    "usr/lib/udev",
    "usr/share/bash-completion",
    "usr/share/binfmts",
    "usr/share/python3",
    "usr/bin/py3*",
    "var/backups",
    "var/lib/dpkg",
    // Debian's crash-report hook for Python: a file to find, open and run at each start, for a program that
    // is not here.
    "etc/python3*",
    "usr/lib/python3*/sitecustomize.py",
    // Python's self-tests.
    "usr/lib/python3*/test",
    // With this file OpenSSL reads and parses all 140 root certificates for each TLS context;
    // without it, it opens the one it needs by its hash in /etc/ssl/certs.
    "usr/lib/ssl/cert.pem",
    // Not for a guest: kernels, games.
    "boot",
    "usr/games",
];

/// Directories made first; `/bin` and its like lead into `/usr`, as on every Debian since 12.
pub(crate) const MERGED: &[&str] = &["bin", "lib", "lib64", "sbin"];

/// Directories that must exist, with their modes.
pub(crate) const DIRECTORIES: &[(&str, u32)] = &[
    ("dev", 0o755),
    ("home", 0o755),
    ("mnt", 0o755),
    ("opt", 0o755),
    ("proc", 0o755),
    ("root", 0o700),
    ("run", 0o755),
    ("srv", 0o755),
    ("sys", 0o755),
    ("tmp", 0o1777),
    ("usr/local/bin", 0o755),
    ("var/tmp", 0o1777),
];

/// Files that maintainer scripts copy from a template in the image: (from, to).
pub(crate) const COPIES: &[(&str, &str)] = &[
    ("usr/share/base-files/dot.bashrc", "root/.bashrc"),
    ("usr/share/base-files/dot.profile", "root/.profile"),
    ("usr/share/base-files/profile", "etc/profile"),
    ("usr/share/base-passwd/group.master", "etc/group"),
    ("usr/share/base-passwd/passwd.master", "etc/passwd"),
    ("usr/share/libc-bin/nsswitch.conf", "etc/nsswitch.conf"),
];

/// Files that maintainer scripts or the installer write.
pub(crate) const FILES: &[(&str, &str)] = &[
    ("etc/hostname", "peregrine\n"),
    ("etc/hosts", "127.0.0.1\tlocalhost\n127.0.1.1\tperegrine\n::1\tlocalhost ip6-localhost ip6-loopback\n"),
    ("etc/shells", "/bin/sh\n/usr/bin/sh\n/bin/bash\n/usr/bin/bash\n/bin/dash\n/usr/bin/dash\n"),
];

/// Symbolic links that maintainer scripts make, and a few for comfort: (path, target).
pub(crate) const LINKS: &[(&str, &str)] = &[
    ("etc/mtab", "../proc/self/mounts"),
    ("usr/bin/awk", "mawk"),
    ("usr/bin/nawk", "mawk"),
    // What most people type.
    ("usr/bin/python", "python3"),
    ("usr/bin/which", "which.debianutils"),
    // Spares each start in a C.UTF-8 locale one failed lookup: the C library asks for this spelling first.
    ("usr/lib/locale/C.UTF-8", "C.utf8"),
    ("var/lock", "/run/lock"),
    ("var/run", "/run"),
];

/// Options of mkfs.erofs. Uncompressed, because a guest page fault is dear enough; one owner, one time and
/// one identity, so that the same packages give the same bytes; no extended attributes, which the packages do
/// not use.
pub(crate) const MKFS_OPTIONS: &[&str] =
    &["--quiet", "--all-root", "-x-1", "-T1735689600", "-U5e7e6c1e-0000-4000-8000-000000000001"];

/// Whether `path` (relative, no leading `./`) lies in an excluded tree.
pub(crate) fn is_excluded(path: &str) -> bool {
    EXCLUDED.iter().any(|tree| {
        let mut components = path.split('/');
        tree.split('/').all(|pattern| components.next().is_some_and(|component| matches(pattern, component)))
    })
}

fn matches(pattern: &str, component: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == component,
        Some((start, end)) => {
            component.len() >= start.len() + end.len()
                && component.starts_with(start)
                && component.ends_with(end)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn excluded_trees_are_matched_by_whole_components() {
        for path in
            ["usr/share/doc", "usr/share/doc/bash/copyright", "usr/lib/python3.11/test/support/__init__.py"]
        {
            assert!(is_excluded(path), "{path}");
        }
        for path in
            ["usr/share", "usr/share/docs", "usr/lib/python3.11/unittest", "usr/lib/python3.11/email/test"]
        {
            assert!(!is_excluded(path), "{path}");
        }
    }

    #[test]
    fn a_star_matches_within_one_component_only() {
        assert!(is_excluded("usr/lib/x86_64-linux-gnu/gconv/IBM037.so"));
        assert!(!is_excluded("usr/lib/x86_64-linux-gnu/python/gconv"));
        assert!(is_excluded("usr/bin/py3compile"));
        assert!(!is_excluded("usr/bin/python3"));
    }
}
