//! The status page at `/`, for people: one file, no build step, nothing from elsewhere. It shows what the key
//! that is typed into it may see, and asks again every second.

use super::body::Body;
use super::metrics::CREATE_BOUNDS_S;
use super::{App, Asked, json};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hyper::Response;
use hyper::header::{
    CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderValue, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use std::sync::OnceLock;

const PAGE: &str = include_str!("page.html");

/// The page itself; it holds no data.
pub(crate) fn page() -> Response<Body> {
    let mut response = Response::new(Body::from(PAGE.as_bytes().to_vec()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
    if let Ok(policy) = HeaderValue::from_str(policy()) {
        headers.insert(CONTENT_SECURITY_POLICY, policy);
    }
    response
}

/// All that it may do: this script and this style, its icon, and asking this server.
fn policy() -> &'static str {
    static POLICY: OnceLock<String> = OnceLock::new();
    POLICY.get_or_init(|| {
        let [script, style] = ["script", "style"].map(digest);
        format!(
            "default-src 'none'; script-src '{script}'; style-src '{style}'; img-src data:; connect-src 'self'; \
             base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
    })
}

/// What stands in the page's element of this name, as a policy names it (CSP 3, 2.3.1).
fn digest(name: &str) -> String {
    let (begin, end) = (format!("<{name}>"), format!("</{name}>"));
    let inside = PAGE.split_once(&begin).and_then(|(_, rest)| rest.split_once(&end));
    let inside = inside.map(|(inside, _)| inside).unwrap_or_default();
    format!("sha256-{}", STANDARD.encode(Sha256::digest(inside)))
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
