//! What an image says of how its commands run. Pure.

use serde::{Deserialize, Serialize};

use super::accounts::User;
use super::manifest::{Process, Words};

/// The configuration of an image: defaults for its commands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// `NAME=VALUE` each.
    pub env: Vec<String>,
    /// Absolute; it exists in the image.
    pub working_dir: String,
    /// Who runs commands.
    pub user: User,
    /// What a command that is not given begins with.
    pub entrypoint: Vec<String>,
    /// The rest of it.
    pub cmd: Vec<String>,
}

impl ImageConfig {
    pub(super) fn new(process: Process, working_dir: String, user: User) -> Self {
        // What is no assignment would be no variable in any process either.
        let env = process.env.unwrap_or_default().into_iter();
        Self {
            env: env.filter(|entry| entry.find('=').is_some_and(|at| at > 0)).collect(),
            working_dir,
            user,
            entrypoint: Words::argv(process.entrypoint),
            cmd: Words::argv(process.cmd),
        }
    }

    /// What runs where no command is given; empty if the image does not say.
    pub fn default_command(&self) -> Vec<String> {
        self.entrypoint.iter().chain(&self.cmd).cloned().collect()
    }

    /// The variables of a command: the image's, less those that `given` sets, then `given`, and HOME of its user
    /// if nobody sets it.
    pub fn env_with(&self, given: &[Vec<u8>], user: &User) -> Vec<Vec<u8>> {
        let name = |entry: &[u8]| entry.split(|&b| b == b'=').next().unwrap_or_default().to_vec();
        let given_names: Vec<Vec<u8>> = given.iter().map(|entry| name(entry)).collect();
        let kept = self
            .env
            .iter()
            .map(|entry| entry.as_bytes().to_vec())
            .filter(|entry| !given_names.contains(&name(entry)));
        let mut all: Vec<Vec<u8>> = kept.chain(given.iter().cloned()).collect();
        if !all.iter().any(|entry| entry.starts_with(b"HOME=")) {
            all.push(format!("HOME={}", user.home).into_bytes());
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_caller_sets_wins_over_the_image_and_home_is_the_users() {
        let process = Process {
            env: Some(vec!["PATH=/bin".to_owned(), "A=1".to_owned(), "broken".to_owned(), "=x".to_owned()]),
            entrypoint: Some(Words::List(vec!["/entry".to_owned()])),
            cmd: Some(Words::List(vec!["arg".to_owned()])),
            ..Process::default()
        };
        let user = User { uid: 7, gid: 7, home: "/home/seven".to_owned() };
        let config = ImageConfig::new(process, "/".to_owned(), user.clone());
        let text =
            |env: Vec<Vec<u8>>| env.into_iter().map(|e| String::from_utf8(e).unwrap()).collect::<Vec<_>>();
        assert_eq!(
            text(config.env_with(&[b"A=2".to_vec()], &user)),
            ["PATH=/bin", "A=2", "HOME=/home/seven"]
        );
        assert_eq!(text(config.env_with(&[b"HOME=/x".to_vec()], &user)), ["PATH=/bin", "A=1", "HOME=/x"]);
        assert_eq!(config.default_command(), ["/entry", "arg"]);
    }
}
