//! The HTTP API: HTTP and JSON are here and nowhere else. What a route means is the service's.
//!
//! ```text
//! listener -> one task a connection -> route -> handler -> service
//!                                        `-> error (error.rs: status and code)
//! ```

mod body;
mod clones;
mod error;
mod files;
mod metrics;
mod once;
mod openapi;
mod pace;
mod page;
mod pools;
mod proxy;
mod rate;
mod request;
mod runs;
mod socket;
mod sse;
mod types;

pub use error::{Code, ErrorBody};

use crate::executor;
use crate::key::Keys;
use crate::service::{Service, Tenant};
use body::Body;
use error::ApiError;
use hyper::body::Incoming;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::http::request::Parts;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use pace::{Pace, Paced, lasting};
use serde::Serialize;
use std::cell::{Cell, RefCell};
use std::convert::Infallible;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// What handlers share.
#[derive(Debug)]
pub struct App {
    pub(crate) service: Rc<Service>,
    pub(crate) keys: RefCell<Keys>,
    pub(crate) given: RefCell<once::Given>,
    pub(crate) metrics: RefCell<metrics::Metrics>,
    pub(crate) rates: RefCell<rate::Buckets>,
    pub(crate) idle: RefCell<proxy::Idle>,
}

impl App {
    /// An API over a service.
    #[must_use]
    pub fn new(service: Rc<Service>, keys: Keys) -> Self {
        Self {
            service,
            keys: RefCell::new(keys),
            given: RefCell::default(),
            metrics: RefCell::default(),
            rates: RefCell::default(),
            idle: RefCell::default(),
        }
    }
}

pub(crate) type Answer = Result<Response<Body>, ApiError>;

/// Serves until `stop` turns true, then lets requests that are under way end.
///
/// # Errors
/// If the listener breaks.
pub async fn serve(
    app: Rc<App>,
    listener: TcpListener,
    mut stop: watch::Receiver<bool>,
) -> std::io::Result<()> {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stop.wait_for(|stop| *stop) => return Ok(()),
        };
        match accepted {
            Ok((stream, _)) => {
                executor::spawn(connection(Rc::clone(&app), stream, stop.clone()));
            }
            // No descriptors left, most likely: those who are connected go on, and free some.
            Err(error) => {
                tracing::warn!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
}

async fn connection(app: Rc<App>, stream: TcpStream, mut stop: watch::Receiver<bool>) {
    let idle = Duration::from_secs(app.service.config.limits.idle_s);
    // Ten thousand who say nothing must cost next to nothing: the buffers come with the first byte.
    let said_something = tokio::select! {
        readable = tokio::time::timeout(idle, stream.readable()) => matches!(readable, Ok(Ok(()))),
        _ = stop.wait_for(|stop| *stop) => false,
    };
    if said_something {
        Box::pin(converse(app, stream, stop, idle)).await;
    }
}

async fn converse(app: Rc<App>, stream: TcpStream, mut stop: watch::Receiver<bool>, idle: Duration) {
    // Answers are small and waited for.
    let _ = stream.set_nodelay(true);
    let head = Duration::from_secs(app.service.config.limits.head_s);
    let pace = Arc::new(Pace::default());
    let paced = Paced { stream, pace: Arc::clone(&pace) };
    let of_handler = Arc::clone(&pace);
    // Boxed: between requests a connection has no room for one.
    let handler = service_fn(move |request| {
        let (app, answering) = (Rc::clone(&app), of_handler.answering());
        Box::pin(async move { Ok::<_, Infallible>(lasting(answer(&app, request).await, answering)) })
    });
    let mut http = http1::Builder::new();
    // Not `pipeline_flush`: with it max_buf_size does not hold for an answer that is read slowly.
    http.timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(64 * 1024);
    let mut connection = std::pin::pin!(http.serve_connection(TokioIo::new(paced), handler).with_upgrades());
    let ended = tokio::select! {
        result = connection.as_mut() => result,
        () = pace.too_slow(head) => {
            tracing::debug!(?head, "a client's head took too long");
            return;
        }
        _ = stop.wait_for(|stop| *stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "connection");
    }
}

async fn answer(app: &Rc<App>, request: Request<Incoming>) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let (method, path) = (parts.method.clone(), parts.uri.path().to_owned());
    // Known once the key is.
    let asker = Cell::new(None);
    let response = route(app, parts, body, &asker).await.unwrap_or_else(|error| {
        tracing::debug!(%method, path, code = error.code().name(), error = error.text(), "refused");
        let tenant: Tenant = asker.take().unwrap_or_else(|| "".into());
        app.metrics.borrow_mut().refused(tenant, error.code(), error.text());
        error.into_response()
    });
    app.metrics.borrow().answered(&method, response.status().as_u16());
    tracing::trace!(%method, path, status = response.status().as_u16(), "answered");
    response
}

/// Whose key came with the request.
fn tenant(app: &App, parts: &Parts) -> Result<Tenant, ApiError> {
    let unauthorized = |why: &str| ApiError::new(Code::Unauthorized, why);
    let token = request::token(parts);
    let token =
        token.ok_or_else(|| unauthorized("no API key: send `Authorization: Bearer isorun_live_...`"))?;
    let mut keys = app.keys.borrow_mut();
    if let Err(error) = keys.refresh() {
        // Who was revoked cannot be known, so nobody is let in.
        tracing::error!(%error, "the list of revoked keys");
        return Err(ApiError::new(Code::Unavailable, "the list of revoked keys cannot be read"));
    }
    let caller =
        keys.check(&token).ok_or_else(|| unauthorized("this API key is not valid, or was revoked"))?;
    Ok(caller.tenant.into())
}

/// A request that came with a valid key.
pub(crate) struct Asked {
    pub(crate) app: Rc<App>,
    pub(crate) tenant: Tenant,
    pub(crate) parts: Parts,
    pub(crate) body: Incoming,
}

/// Who asks.
pub(crate) struct Caller {
    pub(crate) app: Rc<App>,
    pub(crate) tenant: Tenant,
}

async fn route(app: &Rc<App>, parts: Parts, body: Incoming, asker: &Cell<Option<Tenant>>) -> Answer {
    if let Some(target) = proxy::anonymous(&parts, &app.service.config.domain) {
        let (id, port, path) = target?;
        let sandbox = app.service.sandbox_of_port(&id)?;
        let passing = proxy::pass_on(app, &sandbox, port, &path, parts, body);
        return app.service.unless_stuck(&sandbox, Box::pin(passing)).await;
    }
    let path = parts.uri.path().to_owned();
    let segments: Vec<&str> = path.split('/').skip(1).collect();
    match (&parts.method, segments.as_slice()) {
        (&Method::GET, [""]) => return Ok(page::page()),
        (&Method::GET, ["healthz"]) => return Ok(json(&serde_json::json!({ "status": "ok" }))),
        (&Method::GET, ["openapi.json"]) => return Ok(json(&openapi::document())),
        (&Method::GET, ["metrics"]) => return Ok(metrics::scrape(app).await),
        (_, ["v1", ..]) => {}
        _ => return Err(no_route(&parts)),
    }
    let tenant = tenant(app, &parts)?;
    asker.set(Some(Rc::clone(&tenant)));
    let limits = &app.service.config.limits;
    let (per_s, burst) = (limits.requests_per_s, limits.request_burst);
    app.rates.borrow_mut().take(&tenant, per_s, burst, Instant::now())?;
    let watched = watched(&segments[1..]).and_then(|id| app.service.sandbox(&tenant, id).ok());
    let asked = Asked { app: Rc::clone(app), tenant, parts, body };
    let answering = with_key(asked, &segments[1..]);
    match watched {
        // Boxed: most requests are short, and their sandboxes well.
        Some(sandbox) => app.service.unless_stuck(&sandbox, Box::pin(answering)).await,
        None => answering.await,
    }
}

/// The sandbox without whose microVM this cannot be answered. Verbs that go on without their client end by themselves,
/// and their answer is what became of them: one that was said to be given up must not be done after that.
fn watched<'s>(segments: &[&'s str]) -> Option<&'s str> {
    match segments {
        ["runs", _, "audit" | "fork" | "snapshot" | "hibernate" | "resume"] => None,
        ["runs", id, _, ..] => Some(id),
        _ => None,
    }
}

async fn with_key(asked: Asked, segments: &[&str]) -> Answer {
    if let ["runs", id, "proxy", port, ..] = segments {
        return proxy::with_key(asked, id, port).await;
    }
    match (asked.parts.method.clone(), segments) {
        (Method::POST, ["runs"]) => runs::create(asked).await,
        (Method::GET, ["runs"]) => Ok(runs::list(&asked)),
        (Method::GET, ["runs", "history"]) => runs::history(&asked),
        (Method::GET, ["runs", id]) => runs::get(&asked, id),
        (Method::PATCH, ["runs", id]) => runs::patch(asked, id).await,
        (Method::DELETE, ["runs", id]) => runs::destroy(&asked, id).await,
        (Method::POST, ["runs", "restore"]) => clones::restore(asked).await,
        (Method::POST, ["runs", id, "exec"]) => runs::exec(asked, id).await,
        (Method::POST, ["runs", id, "exec", "stream"]) => sse::exec_stream(asked, id).await,
        (Method::GET, ["runs", id, "terminal"]) => socket::terminal(asked, id),
        (Method::GET, ["runs", id, "shell"]) => socket::shell(asked, id).await,
        (Method::POST | Method::PUT, ["runs", id, "files", "upload"]) => files::upload(asked, id).await,
        (Method::GET, ["runs", id, "files", "download"]) => files::download(asked, id).await,
        (Method::GET, ["runs", id, "files"]) => files::list(asked, id).await,
        (Method::POST, ["runs", id, "snapshot"]) => clones::snapshot(asked, id).await,
        (Method::POST, ["runs", id, "fork"]) => clones::fork(asked, id).await,
        (Method::POST, ["runs", id, "hibernate"]) => clones::hibernate(asked, id).await,
        (Method::POST, ["runs", id, "resume"]) => clones::resume(asked, id).await,
        (Method::GET, ["runs", id, "audit"]) => files::audit(&asked, id),
        (Method::GET, ["snapshots"]) => clones::snapshots(&asked),
        (Method::DELETE, ["snapshots", id]) => clones::delete_snapshot(&asked, id),
        (Method::GET, ["pools"]) => pools::list(&asked).await,
        (Method::POST, ["pools"]) => pools::create(asked).await,
        (Method::PATCH, ["pools"]) => pools::change(asked, None).await,
        (Method::DELETE, ["pools"]) => pools::remove(asked, None).await,
        (Method::GET, ["pools", id]) => pools::get(&asked, id).await,
        (Method::PATCH, ["pools", id]) => pools::change(asked, Some(id)).await,
        (Method::DELETE, ["pools", id]) => pools::remove(asked, Some(id)).await,
        (Method::GET, ["status"]) => Ok(page::status(&asked)),
        (Method::GET, ["usage"]) => runs::usage(&asked),
        (Method::GET, ["network-profiles"]) => Ok(json(&asked.app.service.config.network_profiles)),
        (method, segments) if is_route(segments) => {
            let text = format!("{method} is not a method of {}", asked.parts.uri.path());
            Err(ApiError::new(Code::Method, text))
        }
        _ => Err(no_route(&asked.parts)),
    }
}

/// Whether another method would be answered.
fn is_route(segments: &[&str]) -> bool {
    const OF_A_RUN: &[&str] =
        &["exec", "terminal", "shell", "files", "snapshot", "fork", "hibernate", "resume", "audit"];
    match segments {
        ["runs" | "snapshots" | "usage" | "network-profiles" | "pools" | "status"] => true,
        ["runs" | "snapshots" | "pools", _] => true,
        ["runs", _, verb] => OF_A_RUN.contains(verb),
        ["runs", _, "exec", "stream"] | ["runs", _, "files", "upload" | "download"] => true,
        _ => false,
    }
}

fn no_route(parts: &Parts) -> ApiError {
    ApiError::new(Code::NoRoute, format!("there is no route {} {}", parts.method, parts.uri.path()))
}

/// An answer of 200 with this JSON.
pub(crate) fn json<T: Serialize>(value: &T) -> Response<Body> {
    let mut response = Response::new(Body::from(serde_json::to_vec(value).unwrap_or_default()));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The same with another status.
pub(crate) fn json_with<T: Serialize>(status: StatusCode, value: &T) -> Response<Body> {
    let mut response = json(value);
    *response.status_mut() = status;
    response
}
