//! What can go wrong at the command line, each with what to do about it.

use peregrine_vmm::{StopReason, VmmError};

/// A failed command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CliError {
    #[error(transparent)]
    Vmm(#[from] VmmError),
    #[error(transparent)]
    Image(#[from] peregrine_image::Error),
    #[error(transparent)]
    Template(#[from] peregrine::template::TemplateError),
    #[error(transparent)]
    Config(#[from] peregrine::config::ConfigError),
    #[error(transparent)]
    Serve(#[from] peregrine::serve::ServeError),
    #[error(transparent)]
    Key(#[from] peregrine::key::KeyError),
    #[error(transparent)]
    Audit(#[from] peregrine_audit::AuditError),
    #[error(transparent)]
    Refusal(#[from] super::client::Refusal),
    #[error("{url} does not answer: {why}; is `peregrine serve` running there?")]
    NoAnswer { url: String, why: String },
    #[error("no API key: give --key, or set ISORUN_API_KEY; `peregrine key create` makes one")]
    NoKey,
    #[error("{0}")]
    Stopped(StopReason),
    #[error("the guest's agent did not answer within {seconds} s{hint}")]
    NoAgent { seconds: u64, hint: String },
    #[error(transparent)]
    Agent(#[from] peregrine_vmm::agent::AgentError),
    #[error("{what}: {source}")]
    Io { what: &'static str, source: std::io::Error },
    #[error("image {name}: it is not here; `peregrine image list` shows those that are")]
    NoImage { name: String },
    #[error("no command: give one after `--`, or an image that has a default one")]
    NoCommand,
    #[error("--env {given:?}: must be NAME=VALUE, NAME without '=' or NUL and not empty")]
    Env { given: String },
    #[error("{what}: {given:?} {limit}")]
    Argument { what: &'static str, given: String, limit: &'static str },
}

impl CliError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}
