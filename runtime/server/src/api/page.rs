//! The status page at `/`, for people: one file, no build step, nothing from elsewhere. It shows what the key
//! that is typed into it may see, and asks again every second.

use super::body::Body;
use super::metrics::CREATE_BOUNDS_S;
use super::{App, Asked, json};
use hyper::Response;
use hyper::header::{CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue};
use serde::Serialize;

const PAGE: &str = include_str!("page.html");

/// The page itself; it holds no data.
pub(crate) fn page() -> Response<Body> {
    let mut response = Response::new(Body::from(PAGE.as_bytes().to_vec()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    // All that it may do: its own script and style, and asking this server.
    let policy =
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'";
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static(policy));
    response
}

/// What the page shows beside sandboxes, pools and usage.
#[derive(Debug, Serialize)]
struct Status {
    create_bounds_s: &'static [f64],
    create_counts: Vec<u64>,
    recent_errors: Vec<super::metrics::RecentError>,
    running: usize,
    hibernated: usize,
}

pub(crate) fn status(asked: &Asked) -> Response<Body> {
    let app: &App = &asked.app;
    let metrics = app.metrics.borrow();
    let [(_, running), (_, hibernated)] = app.service.count_by_state();
    json(&Status {
        create_bounds_s: &CREATE_BOUNDS_S,
        create_counts: metrics.create_buckets.to_vec(),
        recent_errors: metrics.recent.iter().rev().filter(|e| e.tenant == asked.tenant).cloned().collect(),
        running,
        hibernated,
    })
}
