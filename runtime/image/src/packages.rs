//! The build tools' Debian packages: which are missing, and installing them on the machine.
//! The only file of this room that changes the machine outside the cache, and only as root.

use std::path::Path;
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use crate::error::Error;
use crate::progress::Progress;
use crate::tool;

const INSTALL: [&str; 3] = ["install", "-y", "--no-install-recommends"];

/// Makes sure that Debian packages are installed: as root installs the missing ones with apt-get and says so,
/// as a user fails with the command that root should run.
pub fn ensure_tools(packages: &[&str], progress: &mut dyn Progress) -> Result<(), Error> {
    /// Kernel and image are built at the same time, and each may lack something.
    static TURN: Mutex<()> = Mutex::new(());
    if packages.is_empty() {
        return Ok(());
    }
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let missing = missing(packages)?;
    if missing.is_empty() {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        let command = format!("sudo apt-get {} {}", INSTALL.join(" "), missing.join(" "));
        return Err(Error::PackagesMissing { packages: missing, command });
    }
    progress.message(&format!("installing build tools with apt-get: {}", missing.join(" ")));
    progress.begin("install build tools", None, "");
    // Without package lists nothing can be found; with old ones a download may be gone: then fresh lists
    // help.
    let mut updated = None;
    if !has_package_lists(Path::new("/var/lib/apt/lists")) {
        updated = Some(apt_get(&["update"]));
    }
    let mut installed = install(&missing);
    if installed.is_err() && updated.is_none() {
        updated = Some(apt_get(&["update"]));
        installed = install(&missing);
    }
    if let Err(error) = installed {
        // An update fails for any one unreachable source, so it counts only if the packages were not found
        // either.
        updated.unwrap_or(Ok(()))?;
        return Err(error);
    }
    progress.end();
    Ok(())
}

/// The path of `program`, its package installed first where it is missing.
pub(crate) fn ensure_program(
    program: &'static str,
    package: &str,
    progress: &mut dyn Progress,
) -> Result<std::path::PathBuf, Error> {
    if let Some(path) = tool::find(program) {
        return Ok(path);
    }
    ensure_tools(&[package], progress)?;
    tool::find(program).ok_or_else(|| Error::Incomplete {
        program: "apt-get".to_owned(),
        missing: format!("package {package} brought no {program}"),
    })
}

/// Whether apt's state directory holds any package list.
pub(crate) fn has_package_lists(lists: &Path) -> bool {
    let is_list = |name: &std::ffi::OsStr| name.to_string_lossy().contains("_Packages");
    std::fs::read_dir(lists)
        .is_ok_and(|mut dir| dir.any(|entry| entry.is_ok_and(|entry| is_list(&entry.file_name()))))
}

/// Those of `packages` that dpkg does not have as installed, in their order.
fn missing(packages: &[&str]) -> Result<Vec<String>, Error> {
    let Some(dpkg_query) = tool::find("dpkg-query") else {
        return Err(Error::NotDebian {
            program: "dpkg-query",
            wanted: packages.join(" "),
            instead: "install what they contain by this system's own means",
        });
    };
    let mut query = Command::new(dpkg_query);
    query.args(["--show", "--showformat=${db:Status-Status} ${Package}\n"]).args(packages);
    // Its exit code says that one is unknown; the listing says which.
    let (_, listing) = tool::ask(&mut query)?;
    let installed =
        |package: &str| listing.lines().any(|line| line.strip_prefix("installed ") == Some(package));
    Ok(packages.iter().filter(|package| !installed(package)).map(|&package| package.to_owned()).collect())
}

fn install(packages: &[String]) -> Result<(), Error> {
    let arguments: Vec<&str> = INSTALL.into_iter().chain(packages.iter().map(String::as_str)).collect();
    apt_get(&arguments)
}

fn apt_get(arguments: &[&str]) -> Result<(), Error> {
    let mut command = Command::new("apt-get");
    command
        // Another package operation may be running: wait for it rather than fail.
        .args(["-q", "-o", "DPkg::Lock::Timeout=120"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive");
    tool::run(&mut command, |_| {})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_packages_that_are_not_installed_are_missing() {
        let packages = ["dpkg", "no-such-package-anywhere", "bash"];
        assert_eq!(missing(&packages).unwrap(), ["no-such-package-anywhere"]);
    }

    #[test]
    fn an_empty_directory_and_a_missing_one_hold_no_package_lists() {
        let dir = tempfile::tempdir().unwrap();
        assert!(!has_package_lists(dir.path()));
        assert!(!has_package_lists(&dir.path().join("missing")));
        std::fs::write(dir.path().join("mirror_dists_main_binary-amd64_Packages.lz4"), "").unwrap();
        assert!(has_package_lists(dir.path()));
    }
}
