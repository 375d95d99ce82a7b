//! Unpacks Debian packages into a staging directory. Files only: maintainer scripts are not even read. Every
//! path is checked component by component against what is there, so that no entry, link or order of
//! entries leads outside the staging directory.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};
use std::process::Command;

use tar::EntryType;

use crate::error::Error;
use crate::recipe;
use crate::tool::Tool;

/// A directory that becomes the guest's root.
#[derive(Debug)]
pub(crate) struct Staging {
    root: PathBuf,
}

impl Staging {
    /// An empty root with the links of merged /usr, which packages of the time before lead through.
    pub(crate) fn new(root: &Path) -> Result<Self, Error> {
        let staging = Self { root: root.to_owned() };
        staging.directory("", 0o755)?;
        for name in recipe::MERGED {
            staging.directory(&format!("usr/{name}"), 0o755)?;
            let link = root.join(name);
            symlink(format!("usr/{name}"), &link).map_err(Error::io("link", &link))?;
        }
        Ok(staging)
    }

    /// Where it is on the host.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Unpacks one `.deb`, less what the recipe excludes.
    pub(crate) fn unpack_deb(&self, deb: &Path) -> Result<(), Error> {
        let package = deb.file_name().unwrap_or(deb.as_os_str()).to_string_lossy().into_owned();
        let mut dpkg_deb = Tool::start(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(deb))?;
        if let Some(stdout) = dpkg_deb.stdout() {
            let unpacked = self.unpack_tar(stdout, &package);
            if let Err(error) = unpacked {
                // If the stream broke, dpkg-deb knows why.
                return Err(dpkg_deb.finish().err().unwrap_or(error));
            }
        }
        dpkg_deb.finish()
    }

    /// Unpacks a tar stream to its end.
    pub(crate) fn unpack_tar(&self, mut stream: impl Read, package: &str) -> Result<(), Error> {
        let broken = |error: io::Error| refuse(package, "", format!("ends the archive: {error}"));
        let mut archive = tar::Archive::new(&mut stream);
        for entry in archive.entries().map_err(broken)? {
            let mut entry = entry.map_err(broken)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            self.unpack_entry(&mut entry, &name).map_err(|reason| refuse(package, &name, reason))?;
        }
        // Reading on to the end keeps dpkg-deb from failing on a closed pipe.
        io::copy(&mut stream, &mut io::sink()).map_err(broken)?;
        Ok(())
    }

    /// Makes a directory and its parents, or gives an existing one this mode.
    pub(crate) fn directory(&self, path: &str, mode: u32) -> Result<(), Error> {
        let path = self.root.join(path);
        fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(Error::io("set the mode of", &path))
    }

    /// One entry; the error is a reason in words.
    fn unpack_entry(&self, entry: &mut tar::Entry<'_, impl Read>, name: &str) -> Result<(), String> {
        let Some(path) = guest_path(name)? else { return Ok(()) };
        if recipe::is_excluded(&path) {
            return Ok(());
        }
        let words = |error: io::Error| format!("cannot be unpacked: {error}");
        let target = self.contained(&path)?;
        let mode = entry.header().mode().map_err(words)? & 0o7777;
        match entry.header().entry_type() {
            EntryType::Directory => {
                if !target.is_dir() {
                    fs::create_dir(&target).map_err(words)?;
                }
                fs::set_permissions(&target, Permissions::from_mode(mode)).map_err(words)
            }
            EntryType::Regular | EntryType::Continuous => {
                replace(&target).map_err(words)?;
                write_file(&target, entry, mode).map_err(words)
            }
            // Newer releases ship the links of merged /usr themselves; they are there already.
            EntryType::Symlink
                if target.is_dir()
                    && recipe::MERGED.iter().any(|name| target == self.root.join("usr").join(name)) =>
            {
                Ok(())
            }
            EntryType::Symlink => {
                let to = entry.link_name().map_err(words)?.ok_or("is a link to nowhere")?;
                replace(&target).map_err(words)?;
                symlink(to, &target).map_err(words)
            }
            EntryType::Link => {
                let to = entry.link_name_bytes().ok_or("is a link to nowhere")?;
                let to = guest_path(&String::from_utf8_lossy(&to))?.ok_or("is a link to the root")?;
                let existing = self.contained(&to)?;
                // A link to a symbolic link would be followed by what comes later.
                if !fs::symlink_metadata(&existing).map_err(words)?.is_file() {
                    return Err(format!("is a hard link to {to:?}, which is not a regular file"));
                }
                replace(&target).map_err(words)?;
                fs::hard_link(existing, &target).map_err(words)
            }
            other => Err(format!("is of a kind that a package should not hold ({other:?})")),
        }
    }

    /// The host path of a guest path, whose parents are all real directories of the staging tree (made if
    /// absent).
    fn contained(&self, path: &str) -> Result<PathBuf, String> {
        let mut host = self.root.clone();
        let mut components = path.split('/').peekable();
        while let Some(component) = components.next() {
            host.push(component);
            if components.peek().is_none() {
                break;
            }
            match fs::symlink_metadata(&host) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => return Err(format!("lies below {component:?}, which is not a directory")),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    fs::create_dir(&host).map_err(|error| format!("needs a directory: {error}"))?;
                }
                Err(error) => return Err(format!("cannot be placed: {error}")),
            }
        }
        Ok(host)
    }
}

/// The path in the guest, merged-/usr links already followed: `./bin/sh` is `usr/bin/sh`. `None` for the
/// root.
fn guest_path(name: &str) -> Result<Option<String>, String> {
    let mut parts = Vec::new();
    for component in Path::new(name).components() {
        match component {
            Component::Normal(part) => parts.push(part.to_str().ok_or("has a name that is not UTF-8")?),
            Component::CurDir | Component::RootDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err("leads outside the image".to_owned()),
        }
    }
    if name.contains('\u{fffd}') || name.contains('\0') {
        return Err("has a name that is not UTF-8".to_owned());
    }
    match parts.first() {
        None => Ok(None),
        Some(first) if recipe::MERGED.contains(first) => Ok(Some(format!("usr/{}", parts.join("/")))),
        Some(_) => Ok(Some(parts.join("/"))),
    }
}

/// Makes way for a file or link of the same name: later packages win, as with dpkg. Directories stay and make
/// it fail.
fn replace(target: &Path) -> io::Result<()> {
    match fs::remove_file(target) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        done => done,
    }
}

fn write_file(target: &Path, contents: &mut impl Read, mode: u32) -> io::Result<()> {
    // `create_new` does not follow links; private until the mode is set, which the umask must not change.
    let mut file: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(target)?;
    io::copy(contents, &mut file)?;
    file.set_permissions(Permissions::from_mode(mode))
}

fn refuse(package: &str, entry: &str, reason: String) -> Error {
    Error::Unpack { package: package.to_owned(), entry: entry.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// (path, kind, link target or contents)
    fn archive(entries: &[(&str, EntryType, &str)]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, kind, text) in entries {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(*kind);
            header.set_mode(0o644);
            // Written raw, because the crate's own setters refuse the paths that matter here.
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            let contents: &[u8] = if *kind == EntryType::Regular { text.as_bytes() } else { b"" };
            header.as_old_mut().linkname[..text.len()].copy_from_slice(text.as_bytes());
            header.set_size(contents.len() as u64);
            header.set_cksum();
            builder.append(&header, contents).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn unpack(entries: &[(&str, EntryType, &str)]) -> (tempfile::TempDir, Result<(), Error>) {
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(&dir.path().join("root")).unwrap();
        let result = staging.unpack_tar(archive(entries).as_slice(), "test.deb");
        (dir, result)
    }

    const FILE: EntryType = EntryType::Regular;
    const LINK: EntryType = EntryType::Symlink;
    const HARD: EntryType = EntryType::Link;
    const DIR: EntryType = EntryType::Directory;

    #[test]
    fn files_of_the_time_before_merged_usr_land_in_usr_and_the_links_stay() {
        let (dir, result) =
            unpack(&[("./bin/", DIR, ""), ("./bin/sh", FILE, "x"), ("./sbin/deep/er", FILE, "y")]);
        result.unwrap();
        let root = dir.path().join("root");
        assert_eq!(fs::read_link(root.join("bin")).unwrap(), Path::new("usr/bin"));
        assert_eq!(fs::read(root.join("usr/bin/sh")).unwrap(), b"x");
        assert_eq!(fs::read(root.join("usr/sbin/deep/er")).unwrap(), b"y");
    }

    #[test]
    fn no_entry_leads_outside_the_staging_directory() {
        let attacks: &[&[(&str, EntryType, &str)]] = &[
            &[("../escaped", FILE, "x")],
            &[("usr/../../escaped", FILE, "x")],
            &[("up", LINK, ".."), ("up/escaped", FILE, "x")],
            &[("abs", LINK, "/tmp"), ("abs/escaped", FILE, "x")],
            &[("usr/up", LINK, "../.."), ("usr/up/escaped", DIR, "")],
            &[("up", LINK, ".."), ("up/escaped", LINK, "x")],
            &[("hard", HARD, "../outside")],
            &[("up", LINK, "../outside"), ("hard", HARD, "up")],
            &[("device", EntryType::Char, "")],
            &[("fifo", EntryType::Fifo, "")],
        ];
        for attack in attacks {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("outside"), "secret").unwrap();
            let staging = Staging::new(&dir.path().join("root")).unwrap();
            let result = staging.unpack_tar(archive(attack).as_slice(), "evil.deb");
            assert!(matches!(result, Err(Error::Unpack { .. })), "{attack:?}: {result:?}");
            let mut names: Vec<_> =
                fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            names.sort();
            assert_eq!(names, ["outside", "root"], "{attack:?}");
        }
    }

    #[test]
    fn an_absolute_path_is_taken_below_the_staging_directory() {
        let (dir, result) = unpack(&[("/etc/absolute", FILE, "x")]);
        result.unwrap();
        assert!(dir.path().join("root/etc/absolute").exists());
    }

    #[test]
    fn a_file_over_a_link_replaces_the_link_and_leaves_its_target_alone() {
        let (dir, result) = unpack(&[("a", FILE, "old"), ("b", LINK, "a"), ("b", FILE, "new")]);
        result.unwrap();
        let root = dir.path().join("root");
        assert_eq!(fs::read(root.join("a")).unwrap(), b"old");
        assert_eq!(fs::read(root.join("b")).unwrap(), b"new");
    }

    #[test]
    fn a_stream_that_ends_early_is_an_error() {
        let whole = archive(&[("a", FILE, "contents")]);
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(&dir.path().join("root")).unwrap();
        let result = staging.unpack_tar(&whole[..515], "cut.deb");
        assert!(matches!(result, Err(Error::Unpack { .. })), "{result:?}");
    }

    #[test]
    fn modes_are_those_of_the_package_whatever_the_umask() {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o4777);
        header.set_size(0);
        builder.append_data(&mut header, "suid", io::empty()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let staging = Staging::new(dir.path()).unwrap();
        staging.unpack_tar(builder.into_inner().unwrap().as_slice(), "modes.deb").unwrap();
        assert_eq!(dir.path().join("suid").metadata().unwrap().permissions().mode() & 0o7777, 0o4777);
    }
}
