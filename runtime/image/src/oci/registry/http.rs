//! HTTP for registries: one request, its redirects, its status. Never sends credentials to another host, never
//! goes from HTTPS to HTTP, reads no answer without a bound.

use std::io::Read as _;
use std::time::Duration;

use ureq::http::{HeaderMap, StatusCode};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// A body that takes longer is asked for again from where it broke off.
const BODY_TIMEOUT: Duration = Duration::from_secs(60);
const REDIRECTS_MAX: usize = 5;
/// What is read of an error's body.
const ERROR_MAX_BYTES: u64 = 64 * 1024;

/// Why a request brought nothing. Whether it is worth another attempt is the caller's to know.
#[derive(Debug)]
pub(super) enum Failure {
    /// A status that is no success, and what the body says.
    Status { status: u16, text: String, challenge: Option<String>, retry_after: Option<Duration> },
    /// No answer, or a broken one.
    Broken(String),
    /// An answer that no registry gives; asking again would bring the same.
    Wrong(String),
}

impl Failure {
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Status { status, .. } => *status == 429 || *status == 408 || *status >= 500,
            Self::Broken(_) => true,
            Self::Wrong(_) => false,
        }
    }
}

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Status { status, text, .. } if text.is_empty() => write!(f, "it answers {status}"),
            Self::Status { status, text, .. } => write!(f, "it answers {status}: {text}"),
            Self::Broken(why) | Self::Wrong(why) => f.write_str(why),
        }
    }
}

/// A successful answer.
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Body,
}

impl Answer {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The whole body, if it is no longer than that.
    pub(super) fn bytes(self, most_bytes: u64) -> Result<Vec<u8>, Failure> {
        let mut bytes = Vec::new();
        let read = self.body.into_reader().take(most_bytes + 1).read_to_end(&mut bytes);
        read.map_err(|error| Failure::Broken(format!("its answer breaks off: {error}")))?;
        if bytes.len() as u64 > most_bytes {
            return Err(Failure::Wrong(format!("its answer has more than {most_bytes} bytes")));
        }
        Ok(bytes)
    }
}

/// The client.
#[derive(Debug)]
pub(super) struct Http {
    agent: Agent,
    direct: Agent,
}

impl Http {
    pub(super) fn new() -> Self {
        let config = || {
            Agent::config_builder()
                .http_status_as_error(false)
                .max_redirects(0)
                .max_redirects_will_error(false)
                .timeout_connect(Some(CONNECT_TIMEOUT))
                .timeout_recv_response(Some(RESPONSE_TIMEOUT))
                .timeout_recv_body(Some(BODY_TIMEOUT))
                .user_agent(concat!("peregrine/", env!("CARGO_PKG_VERSION")))
                // The machine's own roots: companies have theirs.
                .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
        };
        // A proxy of the environment is no way to this machine itself.
        Self {
            agent: Agent::new_with_config(config().build()),
            direct: Agent::new_with_config(config().proxy(None).build()),
        }
    }

    /// GETs with these headers; `authorization` goes to the first host only.
    pub(super) fn get(
        &self,
        url: &str,
        headers: &[(&str, &str)],
        authorization: Option<&str>,
    ) -> Result<Answer, Failure> {
        let (mut url, origin) = (url.to_owned(), origin(url).to_owned());
        for _ in 0..=REDIRECTS_MAX {
            let mut request = self.agent_for(&url).get(&url);
            for (name, value) in headers {
                request = request.header(*name, *value);
            }
            if let Some(authorization) = authorization.filter(|_| self::origin(&url) == origin) {
                request = request.header("authorization", authorization);
            }
            let response = request
                .call()
                .map_err(|error| Failure::Broken(format!("{}: {error}", self::origin(&url))))?;
            match redirect(&url, response.status(), response.headers())? {
                Some(next) => url = next,
                None => return answer(response),
            }
        }
        Err(Failure::Wrong("it redirects without end".to_owned()))
    }

    /// POSTs a form.
    pub(super) fn post(&self, url: &str, form: &[(&str, &str)]) -> Result<Answer, Failure> {
        let sent = self.agent_for(url).post(url).send_form(form.iter().copied());
        answer(sent.map_err(|error| Failure::Broken(format!("{}: {error}", origin(url))))?)
    }

    fn agent_for(&self, url: &str) -> &Agent {
        if is_loopback(authority(url)) { &self.direct } else { &self.agent }
    }
}

fn answer(response: ureq::http::Response<Body>) -> Result<Answer, Failure> {
    let (parts, mut body) = response.into_parts();
    if parts.status.is_success() {
        return Ok(Answer { status: parts.status, headers: parts.headers, body });
    }
    let mut text = Vec::new();
    let _ = body.as_reader().take(ERROR_MAX_BYTES).read_to_end(&mut text);
    let seconds = header(&parts.headers, "retry-after").and_then(|text| text.parse().ok());
    Err(Failure::Status {
        status: parts.status.as_u16(),
        text: error_text(&text),
        challenge: challenge(&parts.headers),
        retry_after: seconds.map(Duration::from_secs),
    })
}

/// Where a redirect leads; `None` for what is none.
fn redirect(url: &str, status: StatusCode, headers: &HeaderMap) -> Result<Option<String>, Failure> {
    if !matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308) {
        return Ok(None);
    }
    let location = header(headers, "location").unwrap_or_default();
    let next = if location.starts_with('/') && !location.starts_with("//") {
        format!("{}{location}", origin(url))
    } else {
        location.to_owned()
    };
    let safe = next.starts_with("https://") || (next.starts_with("http://") && url.starts_with("http://"));
    if safe { Ok(Some(next)) } else { Err(Failure::Wrong(format!("it redirects to {location:?}"))) }
}

/// Bearer is preferred where both are offered.
fn challenge(headers: &HeaderMap) -> Option<String> {
    let all: Vec<&str> =
        headers.get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok()).collect();
    let bearer = all.iter().find(|value| value.to_ascii_lowercase().starts_with("bearer "));
    bearer.or(all.first()).map(|value| (*value).to_owned())
}

/// The message of a registry's error, else nothing: pages of HTML help nobody.
fn error_text(body: &[u8]) -> String {
    let json: serde_json::Value = serde_json::from_slice(body).unwrap_or_default();
    let first = &json["errors"][0];
    let text = first["message"]
        .as_str()
        .or(json["details"].as_str())
        .or(json["message"].as_str())
        .unwrap_or_default();
    text.chars().filter(|c| !c.is_control()).take(200).collect()
}

fn header<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// `https://host:port`.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

fn authority(url: &str) -> &str {
    let origin = origin(url);
    let start = origin.find("://").map_or(0, |at| at + 3);
    &origin[start..]
}

/// Whether a host, with or without a port, is this machine.
pub(super) fn is_loopback(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || address.parse::<std::net::IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_machine_is_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:5000", "127.8.9.1", "[::1]:5000", "[::1]"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["localhost.example", "127.0.0.1.example:5000", "128.0.0.1", "example:80", "[::2]:1"] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_redirect_never_leaves_https() {
        let to = |url: &str, location: &str| {
            let mut headers = HeaderMap::new();
            headers.insert("location", location.parse().unwrap());
            redirect(url, StatusCode::TEMPORARY_REDIRECT, &headers)
        };
        assert_eq!(to("https://a.b:1/x?y", "/z").unwrap().unwrap(), "https://a.b:1/z");
        assert_eq!(to("https://a.b/x", "https://c.d/z").unwrap().unwrap(), "https://c.d/z");
        assert_eq!(to("http://a.b/x", "http://c.d/z").unwrap().unwrap(), "http://c.d/z");
        for location in ["http://c.d/z", "file:///etc/passwd", "//c.d/z", "", "ftp://c.d"] {
            assert!(to("https://a.b/x", location).is_err(), "{location}");
        }
    }
}
