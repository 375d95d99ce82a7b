//! What is counted, for Prometheus (OpenMetrics text) and the status page. No names of tenants or sandboxes.

use super::body::Body;
use super::{App, Code};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Response};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

/// Errors that are remembered for the status page.
const RECENT_ERRORS: usize = 50;
/// Upper bounds of the create-latency histogram, in seconds.
pub(crate) const CREATE_BOUNDS_S: [f64; 12] =
    [0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064, 0.128, 0.5, 2.0, 30.0];

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Answered {
    method: String,
    status: u16,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Refused {
    code: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct InState {
    state: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct OfPool {
    pool: String,
}

/// An error that was answered.
#[derive(Debug, Clone, serde::Serialize)]
pub(crate) struct RecentError {
    /// Whose request it was.
    #[serde(skip)]
    pub(crate) tenant: Rc<str>,
    at: String,
    code: &'static str,
    error: String,
}

/// All that is counted.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    errors: Family<Refused, Counter>,
    create: Histogram,
    /// The same samples by bucket, for the status page.
    pub(crate) create_buckets: [u64; CREATE_BOUNDS_S.len() + 1],
    sandboxes: Family<InState, Gauge>,
    pool_ready: Family<OfPool, Gauge>,
    pool_hits: Family<OfPool, Gauge>,
    pool_misses: Family<OfPool, Gauge>,
    pub(crate) recent: VecDeque<RecentError>,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::with_prefix("peregrine");
        let create = Histogram::new(CREATE_BOUNDS_S);
        let (requests, errors) = (Family::default(), Family::default());
        let sandboxes = Family::default();
        let (pool_ready, pool_hits, pool_misses) = (Family::default(), Family::default(), Family::default());
        registry.register("http_requests", "Requests answered", Family::clone(&requests));
        registry.register("http_errors", "Requests refused, by code", Family::clone(&errors));
        registry.register("create_seconds", "From the request to a running guest", create.clone());
        registry.register("sandboxes", "Sandboxes that are there", Family::clone(&sandboxes));
        registry.register("pool_ready", "Idle workers", Family::clone(&pool_ready));
        registry.register("pool_hits", "Checkouts answered at once", Family::clone(&pool_hits));
        registry.register("pool_misses", "Checkouts that had to wait", Family::clone(&pool_misses));
        Self {
            registry,
            requests,
            errors,
            create,
            create_buckets: [0; CREATE_BOUNDS_S.len() + 1],
            sandboxes,
            pool_ready,
            pool_hits,
            pool_misses,
            recent: VecDeque::new(),
        }
    }
}

impl Metrics {
    pub(crate) fn answered(&self, method: &Method, status: u16) {
        // Clients may invent methods; labels must not grow with them.
        let method = match method.as_str() {
            known @ ("GET" | "POST" | "PUT" | "PATCH" | "DELETE") => known,
            _ => "other",
        };
        self.requests.get_or_create(&Answered { method: method.to_owned(), status }).inc();
    }

    pub(crate) fn refused(&mut self, tenant: Rc<str>, code: Code, error: &str) {
        self.errors.get_or_create(&Refused { code: code.name() }).inc();
        if self.recent.len() == RECENT_ERRORS {
            self.recent.pop_front();
        }
        let at = super::types::time(jiff::Timestamp::now().as_microsecond());
        self.recent.push_back(RecentError { tenant, at, code: code.name(), error: error.to_owned() });
    }

    pub(crate) fn created(&mut self, took: Duration) {
        let seconds = took.as_secs_f64();
        self.create.observe(seconds);
        let bucket = CREATE_BOUNDS_S.iter().position(|bound| seconds <= *bound);
        self.create_buckets[bucket.unwrap_or(CREATE_BOUNDS_S.len())] += 1;
    }
}

/// The metrics as of now.
pub(crate) async fn scrape(app: &App) -> Response<Body> {
    let pools = app.service.pool_views().await;
    let metrics = app.metrics.borrow();
    for (state, count) in app.service.count_by_state() {
        metrics.sandboxes.get_or_create(&InState { state }).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    let whole = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
    for pool in pools {
        let Some(stats) = pool.stats else { continue };
        let label = OfPool { pool: pool.id };
        metrics
            .pool_ready
            .get_or_create(&label)
            .set(whole((stats.counts.ready + stats.counts.parked) as u64));
        metrics.pool_hits.get_or_create(&label).set(whole(stats.counts.hits));
        metrics.pool_misses.get_or_create(&label).set(whole(stats.counts.misses));
    }
    let mut text = String::new();
    // Writing to a string does not fail.
    let _ = encode(&mut text, &metrics.registry);
    let mut response = Response::new(Body::from(text.into_bytes()));
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
