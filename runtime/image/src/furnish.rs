//! What maintainer scripts would have done to an unpacked root, as far as programs need it: accounts, links,
//! the linker's cache, certificate hashes, compiled Python. Runs a few programs of the staging tree on the
//! host, as plain processes over plain files: they are the machine's own release, fetched and verified by its
//! apt.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::progress::Progress;
use crate::recipe;
use crate::tool;
use crate::unpack::Staging;

/// Completes the tree. The order matters: hashes need links, everything needs files.
pub(crate) fn furnish(staging: &Staging, progress: &mut dyn Progress) -> Result<(), Error> {
    progress.begin("complete the image", Some(4), "parts");
    for &(path, mode) in recipe::DIRECTORIES {
        staging.directory(path, mode)?;
    }
    write_files(staging.root())?;
    make_links(staging.root())?;
    progress.advance(1);
    certificates(staging)?;
    progress.advance(2);
    linker_cache(staging)?;
    progress.advance(3);
    compile_python(staging)?;
    progress.end();
    Ok(())
}

fn write_files(root: &Path) -> Result<(), Error> {
    for (from, to) in recipe::COPIES {
        let from = root.join(from);
        let text = fs::read(&from).map_err(Error::io("read", &from))?;
        write_file(&root.join(to), &text)?;
    }
    recipe::FILES.iter().try_for_each(|(path, text)| write_file(&root.join(path), text.as_bytes()))
}

fn make_links(root: &Path) -> Result<(), Error> {
    for (path, target) in recipe::LINKS {
        let path = root.join(path);
        // base-files has directories in the place of two of them.
        let _ = fs::remove_dir(&path);
        symlink(target, &path).map_err(Error::io("link", &path))?;
    }
    Ok(())
}

/// As update-ca-certificates: every root of trust in one file for programs that want that, and each under
/// its hash for OpenSSL.
fn certificates(staging: &Staging) -> Result<(), Error> {
    let root = staging.root();
    let (source, target) = (root.join("usr/share/ca-certificates/mozilla"), root.join("etc/ssl/certs"));
    let mut bundle = Vec::new();
    for name in names(&source)? {
        let path = source.join(&name);
        bundle.extend(fs::read(&path).map_err(Error::io("read", &path))?);
        let link = target.join(name).with_extension("pem");
        // Relative, so that it leads to the same file here and in the guest.
        let to = Path::new("../../../usr/share/ca-certificates/mozilla")
            .join(path.file_name().unwrap_or_default());
        symlink(to, &link).map_err(Error::io("link", &link))?;
    }
    tool::run(staged(root, "usr/bin/openssl")?.arg("rehash").arg(&target), |_| {})?;
    write_file(&target.join("ca-certificates.crt"), &bundle)
}

/// Without the cache every start of a program tries some 20 file names before it finds its first library.
fn linker_cache(staging: &Staging) -> Result<(), Error> {
    let root = staging.root();
    // A static program, so it runs without the tree's C library. -X: the packages bring their links.
    let mut ldconfig = Command::new(root.join("usr/sbin/ldconfig"));
    tool::run(ldconfig.env_clear().args(["-X", "-i", "-r"]).arg(root), |_| {})?;
    // Its own note of what it saw, with this tree's inode times in it.
    let notes = root.join("var/cache/ldconfig");
    fs::remove_dir_all(&notes).map_err(Error::io("remove", &notes))
}

/// Compiles the standard library with the image's own Python. Bytecode is marked as valid without a look at
/// the source ("unchecked hash", PEP 552): all files get one time stamp, which Python's usual check would
/// reject, and compile each module anew at every start.
fn compile_python(staging: &Staging) -> Result<(), Error> {
    let root = staging.root();
    for library in names(&root.join("usr/lib"))?.iter().filter_map(|name| name.to_str()) {
        if !library.starts_with("python3.") {
            continue;
        }
        let mut python = staged(root, &format!("usr/bin/{library}"))?;
        // One process and a fixed hash seed: the same input gives the same bytes.
        python.env("PYTHONHOME", root.join("usr")).env("PYTHONHASHSEED", "0").current_dir(root);
        python.args(["-B", "-S", "-m", "compileall", "-q", "-f", "--invalidation-mode", "unchecked-hash"]);
        // The compiled-in source path is the guest's, else each import would correct it.
        python.arg("-s").arg(root).args(["-p", "/"]).arg(root.join("usr/lib").join(library));
        tool::run(&mut python, |_| {})?;
    }
    Ok(())
}

/// A program of the staging tree with the tree's own loader and libraries, and no environment of ours.
fn staged(root: &Path, program: &str) -> Result<Command, Error> {
    let libraries = library_dir(root)?;
    let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
    command.env_clear().arg("--library-path").arg(&libraries).arg(root.join(program));
    Ok(command)
}

fn library_dir(root: &Path) -> Result<PathBuf, Error> {
    let dir = root.join("usr/lib/x86_64-linux-gnu");
    if dir.join("ld-linux-x86-64.so.2").is_file() {
        return Ok(dir);
    }
    Err(Error::Incomplete {
        program: "apt-get".to_owned(),
        missing: "its packages bring no x86-64 C library: Peregrine runs x86-64 guests only".to_owned(),
    })
}

/// Names in a directory, sorted, so that what is made from them is always the same.
fn names(dir: &Path) -> Result<Vec<std::ffi::OsString>, Error> {
    let listing = fs::read_dir(dir).map_err(Error::io("list", dir))?;
    let names: std::io::Result<Vec<_>> = listing.map(|entry| Ok(entry?.file_name())).collect();
    let mut names = names.map_err(Error::io("list", dir))?;
    names.sort();
    Ok(names)
}

fn write_file(path: &Path, contents: &[u8]) -> Result<(), Error> {
    fs::write(path, contents).map_err(Error::io("write", path))?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644)).map_err(Error::io("set the mode of", path))
}
