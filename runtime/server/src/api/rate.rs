//! How many requests a key may send: a token bucket for each tenant.

use super::error::{ApiError, Code};
use std::collections::HashMap;
use std::rc::Rc;
use std::time::{Duration, Instant};

/// Tenants that are remembered; a full bucket need not be.
const MOST: usize = 10_000;

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at: Instant,
}

/// All buckets.
#[derive(Debug, Default)]
pub(crate) struct Buckets(HashMap<Rc<str>, Bucket>);

impl Buckets {
    /// Takes a token, or says when there will be one.
    pub(crate) fn take(
        &mut self,
        tenant: &Rc<str>,
        per_s: f64,
        burst: u32,
        now: Instant,
    ) -> Result<(), ApiError> {
        if per_s <= 0.0 {
            return Ok(());
        }
        let most = f64::from(burst.max(1));
        if self.0.len() >= MOST {
            self.0.retain(|_, bucket| {
                bucket.tokens + now.saturating_duration_since(bucket.at).as_secs_f64() * per_s < most
            });
        }
        let bucket = self.0.entry(Rc::clone(tenant)).or_insert_with(|| Bucket { tokens: most, at: now });
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        bucket.tokens = (bucket.tokens + since * per_s).min(most);
        bucket.at = now;
        if bucket.tokens < 1.0 {
            let after = Duration::from_secs_f64(((1.0 - bucket.tokens) / per_s).min(3600.0));
            let text = format!("requests are exhausted: {per_s} a second, {burst} at once");
            return Err(ApiError::new(Code::RateLimited, text).retry_after(after));
        }
        bucket.tokens -= 1.0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_and_then_one_at_a_time_and_tenants_do_not_matter_to_each_other() {
        let (mut buckets, now) = (Buckets::default(), Instant::now());
        let (one, two): (Rc<str>, Rc<str>) = ("one".into(), "two".into());
        let mut take =
            |tenant: &Rc<str>, ms| buckets.take(tenant, 2.0, 3, now + Duration::from_millis(ms)).is_ok();
        assert_eq!([take(&one, 0), take(&one, 0), take(&one, 0), take(&one, 0)], [true, true, true, false]);
        assert!(take(&two, 0));
        assert_eq!([take(&one, 499), take(&one, 501), take(&one, 502)], [false, true, false]);
    }
}
