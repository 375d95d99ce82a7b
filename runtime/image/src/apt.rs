//! Chooses and downloads Debian packages with the machine's own apt configuration: its mirrors, keys and
//! release, but as if nothing were installed. Everything written lies in our directory; apt checks all
//! signatures and digests. Nothing is installed on the machine, no package script runs.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Error;
use crate::packages::has_package_lists;
use crate::progress::Progress;
use crate::tool;

const MACHINE_LISTS: &str = "/var/lib/apt/lists";

/// One package of exactly one version, as apt takes it on the command line.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Choice {
    pub(crate) name: String,
    pub(crate) version: String,
}

impl std::fmt::Display for Choice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}={}", self.name, self.version)
    }
}

/// apt with a private state: no package installed, its own download directory.
#[derive(Debug)]
pub(crate) struct Apt {
    dir: PathBuf,
    lists: PathBuf,
    /// Why fetching lists failed: one unreachable source is enough for that, so it counts only if packages
    /// are missing.
    update_failure: Option<Error>,
}

impl Apt {
    /// An apt that writes only below `dir`. It reads the machine's package lists where there are any.
    pub(crate) fn in_dir(dir: &Path) -> Result<Self, Error> {
        if tool::find("apt-get").is_none() {
            return Err(Error::NotDebian {
                program: "apt-get",
                wanted: "the default image".to_owned(),
                instead: "give an EROFS image of your own",
            });
        }
        for below in ["lists/partial", "archives/partial"] {
            let path = dir.join(below);
            std::fs::create_dir_all(&path).map_err(Error::io("create", &path))?;
        }
        let status = dir.join("status");
        std::fs::write(&status, "").map_err(Error::io("write", &status))?;
        let machine = PathBuf::from(MACHINE_LISTS);
        let mut apt = Self { dir: dir.to_owned(), lists: machine, update_failure: None };
        if !has_package_lists(&apt.lists) {
            apt.update();
        }
        Ok(apt)
    }

    /// The packages and all they depend on, sorted by name.
    pub(crate) fn resolve(
        &mut self,
        packages: &[&str],
        progress: &mut dyn Progress,
    ) -> Result<Vec<Choice>, Error> {
        progress.begin("choose packages", None, "");
        let mut chosen = self.simulate(packages);
        if chosen.is_err() && self.uses_machine_lists() {
            // They may lack a whole component, or belong to a release before an upgrade.
            self.update();
            chosen = self.simulate(packages);
        }
        let chosen = chosen.map_err(|error| self.update_failure.take().unwrap_or(error))?;
        progress.end();
        Ok(chosen)
    }

    /// Downloads the packages; the files are in the returned directory. Fails where the lists are older than
    /// the mirror and name a version that is gone: then `update` and choose again.
    pub(crate) fn download(&self, choices: &[Choice], progress: &mut dyn Progress) -> Result<PathBuf, Error> {
        let debs = self.dir.join("debs");
        // An earlier try may have left some, of other versions.
        let _ = std::fs::remove_dir_all(&debs);
        std::fs::create_dir_all(&debs).map_err(Error::io("create", &debs))?;
        progress.begin("download packages", Some(choices.len() as u64), "packages");
        let mut done = 0;
        let mut command = self.apt_get();
        command.current_dir(&debs).arg("download").args(choices.iter().map(Choice::to_string));
        tool::run(&mut command, |line| {
            if line.starts_with("Get:") {
                done += 1;
                progress.advance(done);
            }
        })?;
        progress.end();
        Ok(debs)
    }

    /// Fetches package lists of our own, from the machine's sources.
    pub(crate) fn update(&mut self) {
        self.lists = self.dir.join("lists");
        self.update_failure = tool::run(self.apt_get().arg("update"), |_| {}).err();
    }

    /// Whether the lists in use are the machine's, which may be old, rather than just fetched.
    pub(crate) fn uses_machine_lists(&self) -> bool {
        self.lists == Path::new(MACHINE_LISTS)
    }

    fn simulate(&self, packages: &[&str]) -> Result<Vec<Choice>, Error> {
        let mut chosen = Vec::new();
        let mut command = self.apt_get();
        command.args(["--simulate", "--no-install-recommends", "install"]).args(packages);
        tool::run(&mut command, |line| chosen.extend(parse_inst(line)))?;
        chosen.sort();
        Ok(chosen)
    }

    fn apt_get(&self) -> Command {
        let mut command = Command::new("apt-get");
        let mut option = |name: &str, value: &std::ffi::OsStr| {
            let mut option = std::ffi::OsString::from(name);
            option.push("=");
            option.push(value);
            command.arg("-o").arg(option);
        };
        option("Dir::State::status", self.dir.join("status").as_os_str());
        option("Dir::State::extended_states", self.dir.join("extended_states").as_os_str());
        option("Dir::State::lists", self.lists.as_os_str());
        option("Dir::Cache", self.dir.as_os_str());
        option("Dir::Cache::archives", self.dir.join("archives").as_os_str());
        for (name, value) in [
            ("Dir::Cache::pkgcache", ""),
            ("Dir::Cache::srcpkgcache", ""),
            // The download user of apt cannot write into a private directory.
            ("APT::Sandbox::User", "root"),
            // Hooks of the machine's configuration are for the machine's state.
            ("APT::Update::Post-Invoke", ""),
            ("APT::Update::Post-Invoke-Success", ""),
            ("APT::Get::AllowUnauthenticated", "false"),
            ("Acquire::AllowInsecureRepositories", "false"),
            ("Acquire::Languages", "none"),
            ("Acquire::Retries", "3"),
            // Else `update` calls it a success when no source could be reached.
            ("APT::Update::Error-Mode", "any"),
        ] {
            option(name, value.as_ref());
        }
        command
    }
}

/// `Inst bash (5.2.15-2+b13 Debian:12.15/oldstable [amd64])`, as `apt-get --simulate` prints each chosen
/// package.
fn parse_inst(line: &str) -> Option<Choice> {
    let mut words = line.strip_prefix("Inst ")?.split(' ');
    let name = words.next()?;
    let version = words.next()?.strip_prefix('(')?;
    Some(Choice { name: name.to_owned(), version: version.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_packages_are_read_from_what_apt_prints() {
        let choice =
            parse_inst("Inst libcap2 (1:2.66-4+deb12u3+b1 Debian:12.15/oldstable [amd64]) []").unwrap();
        assert_eq!(choice.to_string(), "libcap2=1:2.66-4+deb12u3+b1");
        for line in ["Conf bash (5.2 Debian:12 [amd64])", "Inst", "Inst bash", "Inst bash [5.1] (5.2 x)", ""]
        {
            assert_eq!(parse_inst(line), None, "{line}");
        }
    }
}
