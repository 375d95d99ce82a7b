//! Requests that are meant for a server in a sandbox, passed on, WebSocket upgrades included.
//!
//! ```text
//! /v1/runs/{id}/proxy/{port}/{path}      with a key
//! <port>-<id>.<domain>/{path}            anonymous: the id is the credential
//! <id>.<domain>/sb/p/<port>/{path}       likewise
//! ```
//!
//! A connection into a sandbox costs a process there, so a few are kept for the next request.

use super::body::Body;
use super::error::ApiError;
use super::files::port as parse_port;
use super::{Answer, App, Asked};
use crate::executor;
use crate::service::Sandbox;
use hyper::body::{Body as _, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{
    AUTHORIZATION, CONNECTION, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING,
    UPGRADE,
};
use hyper::http::request::Parts;
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Idle connections that are kept for each port.
const KEPT: usize = 4;
/// How long.
const KEPT_FOR: Duration = Duration::from_secs(20);

type Sender = SendRequest<Incoming>;
type Key = (Rc<str>, u16);

/// Idle connections into sandboxes.
#[derive(Debug, Default)]
pub(crate) struct Idle(HashMap<Key, Vec<(Instant, Sender)>>);

impl Idle {
    fn take(&mut self, key: &Key) -> Option<Sender> {
        let kept = self.0.get_mut(key)?;
        kept.retain(|(since, sender)| !sender.is_closed() && since.elapsed() < KEPT_FOR);
        let ready = kept.iter().rposition(|(_, sender)| sender.is_ready())?;
        Some(kept.remove(ready).1)
    }

    fn put(&mut self, key: Key, sender: Sender) {
        self.0.retain(|_, kept| {
            kept.retain(|(since, sender)| !sender.is_closed() && since.elapsed() < KEPT_FOR);
            !kept.is_empty()
        });
        let kept = self.0.entry(key).or_default();
        if kept.len() < KEPT {
            kept.push((Instant::now(), sender));
        }
    }
}

/// Where an anonymous request goes: its sandbox, port and path; `None` if its host is not a sandbox's.
pub(crate) fn anonymous(parts: &Parts, domain: &str) -> Option<Result<(String, u16, String), ApiError>> {
    let host = parts.headers.get(HOST)?.to_str().ok()?.to_ascii_lowercase();
    let host = host.rsplit_once(':').map_or(host.as_str(), |(host, _)| host);
    let label = host.strip_suffix(domain)?.strip_suffix('.')?;
    let path = parts.uri.path_and_query().map_or("/", |path| path.as_str());
    if let Some((port, id)) = label.split_once('-') {
        return Some(parse_port(port).map(|port| (id.to_owned(), port, path.to_owned())));
    }
    if !label.starts_with("run") {
        return None;
    }
    let no_route = || ApiError::new(super::Code::NoRoute, "a sandbox's ports are under /sb/p/<port>/");
    let Some(rest) = path.strip_prefix("/sb/p/") else { return Some(Err(no_route())) };
    let end = rest.find(['/', '?']).unwrap_or(rest.len());
    let (port, rest) = rest.split_at(end);
    Some(parse_port(port).map(|port| (label.to_owned(), port, rooted(rest))))
}

fn rooted(rest: &str) -> String {
    if rest.starts_with('/') { rest.to_owned() } else { format!("/{rest}") }
}

/// With a key: the port is in the path.
pub(crate) async fn with_key(asked: Asked, id: &str, port: &str) -> Answer {
    let sandbox = asked.sandbox(id)?;
    let number = parse_port(port)?;
    let whole = asked.parts.uri.path_and_query().map_or("/", |path| path.as_str());
    let prefix = format!("/v1/runs/{id}/proxy/{port}");
    let path = rooted(whole.strip_prefix(&prefix).unwrap_or("/"));
    pass_on(&asked.app, &sandbox, number, &path, asked.parts, asked.body).await
}

pub(crate) async fn pass_on(
    app: &Rc<App>,
    sandbox: &Rc<Sandbox>,
    port: u16,
    path: &str,
    parts: Parts,
    body: Incoming,
) -> Answer {
    let key = (Rc::clone(&sandbox.id), port);
    let upgrade = upgrade_of(&parts.headers);
    let kept = if upgrade.is_none() { app.idle.borrow_mut().take(&key) } else { None };
    let mut sender = match kept {
        // It may have been closed since; what can be sent again is.
        Some(sender) if body.is_end_stream() && parts.method != Method::POST => sender,
        _ => open(app, sandbox, port).await?,
    };
    let request = outgoing(&parts, port, path, upgrade.as_ref())?;
    let failed = |error: hyper::Error| {
        ApiError::new(super::Code::NoPort, format!("port {port} answered no HTTP: {error}"))
    };
    let Some(upgrade) = upgrade else {
        let response = sender.send_request(request.map(|()| body)).await.map_err(failed)?;
        app.idle.borrow_mut().put(key, sender);
        return Ok(incoming(response, None));
    };
    let client = hyper::upgrade::on(Request::from_parts(parts, ()));
    let mut response = sender.send_request(request.map(|()| body)).await.map_err(failed)?;
    if response.status() != StatusCode::SWITCHING_PROTOCOLS {
        return Ok(incoming(response, None));
    }
    let server = hyper::upgrade::on(&mut response);
    let activity = sandbox.activity();
    executor::spawn(async move {
        if let (Ok(client), Ok(server)) = tokio::join!(client, server) {
            let (mut client, mut server) = (TokioIo::new(client), TokioIo::new(server));
            let _ = tokio::io::copy_bidirectional(&mut client, &mut server).await;
        }
        drop((activity, sender));
    });
    Ok(incoming(response, Some(&upgrade)))
}

async fn open(app: &App, sandbox: &Rc<Sandbox>, port: u16) -> Result<Sender, ApiError> {
    let stream = app.service.connect(sandbox, port).await?;
    let failed = |error: hyper::Error| ApiError::new(super::Code::NoPort, error.to_string());
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(failed)?;
    executor::spawn(async move {
        if let Err(error) = connection.with_upgrades().await {
            tracing::debug!(%error, "a connection into a sandbox");
        }
    });
    Ok(sender)
}

fn upgrade_of(headers: &HeaderMap) -> Option<HeaderValue> {
    let connection = headers.get(CONNECTION)?.to_str().ok()?;
    let asks = connection.split(',').any(|word| word.trim().eq_ignore_ascii_case("upgrade"));
    asks.then(|| headers.get(UPGRADE).cloned()).flatten()
}

/// What belongs to one connection only (RFC 9110, 7.6.1), and the key: it must not reach the sandbox.
fn leave_out(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|text| text.split(',').filter_map(|name| name.trim().parse().ok()))
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in [CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
    for name in ["keep-alive", "proxy-connection", "proxy-authenticate", "proxy-authorization"] {
        headers.remove(name);
    }
}

fn outgoing(
    parts: &Parts,
    port: u16,
    path: &str,
    upgrade: Option<&HeaderValue>,
) -> Result<Request<()>, ApiError> {
    let uri: Uri = without_token(path).parse().map_err(|_| ApiError::bad("path: cannot be passed on"))?;
    let mut request = Request::new(());
    *request.method_mut() = parts.method.clone();
    *request.uri_mut() = uri;
    let mut headers = parts.headers.clone();
    let ours = headers.get(AUTHORIZATION).and_then(|value| value.to_str().ok());
    if ours.is_some_and(|value| value.contains("isorun_live_")) {
        headers.remove(AUTHORIZATION);
    }
    leave_out(&mut headers);
    if let Some(host) = headers.remove(HOST) {
        headers.insert("x-forwarded-host", host);
    }
    headers.insert("x-forwarded-proto", HeaderValue::from_static("http"));
    // What development servers accept.
    if let Ok(host) = HeaderValue::from_str(&format!("localhost:{port}")) {
        headers.insert(HOST, host);
    }
    if let Some(upgrade) = upgrade {
        headers.insert(UPGRADE, upgrade.clone());
        headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    }
    *request.headers_mut() = headers;
    Ok(request)
}

/// The path without the parameter that held the key.
fn without_token(path: &str) -> String {
    let Some((path, query)) = path.split_once('?') else { return path.to_owned() };
    let rest: Vec<&str> = query.split('&').filter(|pair| !pair.starts_with("token=isorun_live_")).collect();
    if rest.is_empty() { path.to_owned() } else { format!("{path}?{}", rest.join("&")) }
}

fn incoming(response: Response<Incoming>, upgrade: Option<&HeaderValue>) -> Response<Body> {
    let (mut parts, body) = response.into_parts();
    leave_out(&mut parts.headers);
    match upgrade {
        Some(upgrade) => {
            parts.headers.insert(UPGRADE, upgrade.clone());
            parts.headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
            Response::from_parts(parts, Body::empty())
        }
        None => Response::from_parts(parts, Body::Proxied(body)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parts(host: &str, path: &str) -> Parts {
        Request::builder().uri(path).header(HOST, host).body(()).unwrap().into_parts().0
    }

    #[test]
    fn both_anonymous_forms_name_sandbox_port_and_path() {
        fn of(host: &str, path: &str) -> Option<(String, u16, String)> {
            anonymous(&parts(host, path), "sb.example").map(|to| to.unwrap())
        }
        let id = "run0000aaaabbbbccccdddd";
        let to = |port, path: &str| Some((id.to_owned(), port, path.to_owned()));
        assert_eq!(of(&format!("3000-{id}.sb.example:8700"), "/a?b=c"), to(3000, "/a?b=c"));
        assert_eq!(of(&format!("{}.SB.example", id.to_uppercase()), "/sb/p/80/x/y"), to(80, "/x/y"));
        assert_eq!(of(&format!("{id}.sb.example"), "/sb/p/80?q"), to(80, "/?q"));
        assert_eq!(of("sb.example", "/"), None);
        assert_eq!(of("other.example", "/"), None);
        for (host, path) in [("x-run1.sb.example", "/"), ("0-run1.sb.example", "/"), ("run1.sb.example", "/")]
        {
            assert!(anonymous(&parts(host, path), "sb.example").unwrap().is_err(), "{host}");
        }
    }

    #[test]
    fn the_key_and_what_belongs_to_one_connection_do_not_reach_the_sandbox() {
        let mut parts = parts("h", "/");
        for (name, value) in [
            ("authorization", "Bearer isorun_live_a_b_c"),
            ("connection", "keep-alive, x-private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("x-kept", "2"),
        ] {
            parts.headers.insert(name.parse::<HeaderName>().unwrap(), value.parse().unwrap());
        }
        let request = outgoing(&parts, 80, "/p?a=1&token=isorun_live_a_b_c", None).unwrap();
        let mut names: Vec<_> = request.headers().keys().map(HeaderName::as_str).collect();
        names.sort_unstable();
        assert_eq!(names, ["host", "x-forwarded-host", "x-forwarded-proto", "x-kept"]);
        assert_eq!(request.uri(), "/p?a=1");
        // The sandbox's own kind of authorization is its own business.
        parts.headers.insert(AUTHORIZATION, "Basic eDp5".parse().unwrap());
        assert!(outgoing(&parts, 80, "/", None).unwrap().headers().contains_key(AUTHORIZATION));
    }
}
