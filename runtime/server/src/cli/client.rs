//! The API as the command line asks it: a client like any other.

use super::CliError;
use clap::Args;
use serde_json::Value;
use std::io::Read as _;
use std::time::Duration;
use ureq::Agent;
use ureq::tls::{RootCerts, TlsConfig};

/// An image that a pool names may have to be pulled first.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// What is read of an answer.
const MOST_BYTES: u64 = 16 << 20;
const DEFAULT_URL: &str = "http://127.0.0.1:8700";

/// Which daemon is asked, and by whom.
#[derive(Debug, Args)]
pub(crate) struct ServerArgs {
    /// The daemon's address [default: $ISORUN_API_URL, else http://127.0.0.1:8700]
    #[arg(long, global = true, value_name = "URL")]
    url: Option<String>,
    /// An API key of its [default: $ISORUN_API_KEY]. Others on this machine see arguments: the variable is safer
    #[arg(long, global = true, value_name = "KEY")]
    key: Option<String>,
}

/// A refusal, as the API gives it.
#[derive(Debug, thiserror::Error)]
#[error("{url} answers {status}: {text}")]
pub(crate) struct Refusal {
    url: String,
    status: u16,
    /// For programs.
    pub(crate) code: String,
    text: String,
}

/// A client of one daemon.
pub(crate) struct Client {
    agent: Agent,
    url: String,
    key: String,
}

impl Client {
    /// One for these arguments and the environment.
    pub(crate) fn new(args: &ServerArgs) -> Result<Self, CliError> {
        let or_variable = |given: &Option<String>, name| {
            given.clone().or_else(|| std::env::var(name).ok()).filter(|text| !text.is_empty())
        };
        let url = or_variable(&args.url, "ISORUN_API_URL").unwrap_or_else(|| DEFAULT_URL.to_owned());
        if !["http://", "https://"].iter().any(|scheme| url.starts_with(scheme)) {
            let limit = "must begin with http:// or https://";
            return Err(CliError::Argument { what: "--url", given: url, limit });
        }
        let key = or_variable(&args.key, "ISORUN_API_KEY").ok_or(CliError::NoKey)?;
        let mut config = Agent::config_builder()
            .http_status_as_error(false)
            // The key goes to this daemon and nowhere else.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(ANSWER_TIMEOUT))
            .user_agent(concat!("peregrine/", env!("CARGO_PKG_VERSION")))
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build());
        if is_loopback(&url) {
            // A proxy of the environment is no way to this machine itself.
            config = config.proxy(None);
        }
        let url = url.trim_end_matches('/').to_owned();
        Ok(Self { agent: Agent::new_with_config(config.build()), url, key })
    }

    /// GETs a path.
    pub(crate) fn get(&self, path: &str) -> Result<Value, CliError> {
        self.send("GET", path, None)
    }

    /// Sends `body` and gives the answer.
    pub(crate) fn send(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Value, CliError> {
        let broken = |why: String| CliError::NoAnswer { url: self.url.clone(), why };
        let mut request = ureq::http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.url))
            .header("authorization", format!("Bearer {}", self.key));
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.map(Value::to_string).unwrap_or_default();
        let request = request.body(body).map_err(|error| broken(error.to_string()))?;
        let response = self.agent.run(request).map_err(|error| broken(error.to_string()))?;
        let status = response.status();
        let mut text = Vec::new();
        let read = response.into_body().into_reader().take(MOST_BYTES).read_to_end(&mut text);
        read.map_err(|error| broken(error.to_string()))?;
        let value: Value = serde_json::from_slice(&text).unwrap_or_default();
        if status.is_success() && value.is_object() {
            return Ok(value);
        }
        let field = |name: &str| value[name].as_str().map(str::to_owned);
        Err(Refusal {
            url: self.url.clone(),
            status: status.as_u16(),
            code: field("code").unwrap_or_default(),
            text: field("error").unwrap_or_else(|| "not what a runner says; is --url right?".to_owned()),
        }
        .into())
    }
}

fn is_loopback(url: &str) -> bool {
    let host = url.split_once("://").map_or(url, |(_, rest)| rest);
    let host = host.split('/').next().unwrap_or_default();
    ["127.", "localhost:", "[::1]"].iter().any(|name| host.starts_with(name)) || host == "localhost"
}
