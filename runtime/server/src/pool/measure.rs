//! Latencies, whole: every sample counts, none is trimmed.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// Longest that is told apart: a minute.
const MOST_US: u64 = 60_000_000;

/// A distribution's quantiles, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Percentiles {
    /// Median.
    pub p50: u64,
    /// 99 of 100 are no longer.
    pub p99: u64,
    /// 999 of 1,000 are no longer.
    pub p999: u64,
}

/// Samples since the start.
#[derive(Debug)]
pub(crate) struct Latencies(Option<Histogram<u64>>);

impl Default for Latencies {
    fn default() -> Self {
        // Three digits, from 1 us; only bounds that make no sense are refused.
        Self(Histogram::new_with_bounds(1, MOST_US, 3).ok())
    }
}

impl Latencies {
    pub(crate) fn add(&mut self, took: Duration) {
        if let Some(histogram) = &mut self.0 {
            histogram.saturating_record(u64::try_from(took.as_micros()).unwrap_or(MOST_US).max(1));
        }
    }

    pub(crate) fn percentiles(&self) -> Percentiles {
        let at = |q| self.0.as_ref().map_or(0, |histogram| histogram.value_at_quantile(q));
        Percentiles { p50: at(0.5), p99: at(0.99), p999: at(0.999) }
    }
}
