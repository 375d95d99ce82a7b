//! `Idempotency-Key`: a request that is sent again gets the first one's answer, and is not done again.

use super::body::Body;
use super::error::{ApiError, Code};
use super::{Answer, App};
use crate::registry::MadeWith;
use crate::service::Sandbox;
use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use sha2::{Digest as _, Sha256};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::rc::Rc;
use tokio::sync::OnceCell;

/// Longest key.
pub(crate) const KEY_MAX_BYTES: usize = 256;
/// Answers that are remembered; the oldest go first.
const MOST: usize = 10_000;

type Key = (Rc<str>, String);

#[derive(Debug)]
struct Entry {
    request: String,
    answer: Rc<OnceCell<(StatusCode, Bytes)>>,
}

/// Answers that were given.
#[derive(Debug, Default)]
pub(crate) struct Given {
    entries: HashMap<Key, Entry>,
    order: VecDeque<Key>,
}

/// The request of a key, if it has one.
pub(crate) fn made_with(key: Option<String>, path: &str, body: &[u8]) -> Option<MadeWith> {
    let mut digest = Sha256::new();
    digest.update(path.as_bytes());
    digest.update([0]);
    digest.update(body);
    Some(MadeWith { key: key?, request: hex::encode(digest.finalize()) })
}

impl App {
    /// Does the request, or gives the answer that it was given before under the same key. Failures are not
    /// remembered: the next one tries again. Two at a time: the second waits for the first. What an earlier daemon
    /// made with the key is not made again: `again` answers with it.
    pub(crate) async fn once(
        &self,
        tenant: &Rc<str>,
        made_with: Option<MadeWith>,
        again: impl FnOnce(&[Rc<Sandbox>]) -> Response<Body>,
        work: impl Future<Output = Answer>,
    ) -> Answer {
        let Some(MadeWith { key, request }) = made_with else { return work.await };
        let made = self.service.made_with(tenant, &key);
        let cell = place(&self.given, (Rc::clone(tenant), key), &request)?;
        let answer = cell
            .get_or_try_init(|| async {
                if made.iter().any(|(_, with)| with.request != request) {
                    return Err(crate::service::ServiceError::KeyReused.into());
                }
                let made: Vec<_> = made.into_iter().map(|(sandbox, _)| sandbox).collect();
                let response = if made.is_empty() { work.await? } else { again(&made) };
                let status = response.status();
                match response.into_body() {
                    Body::Whole(bytes) => Ok((status, bytes.unwrap_or_default())),
                    _ => Err(ApiError::new(Code::Internal, "a streamed answer cannot be repeated")),
                }
            })
            .await?;
        let (status, bytes) = answer.clone();
        let mut response = Response::new(Body::Whole(Some(bytes)));
        *response.status_mut() = status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(response)
    }
}

fn place(
    given: &RefCell<Given>,
    key: Key,
    request: &str,
) -> Result<Rc<OnceCell<(StatusCode, Bytes)>>, ApiError> {
    let mut given = given.borrow_mut();
    if let Some(entry) = given.entries.get(&key) {
        if entry.request != request {
            return Err(crate::service::ServiceError::KeyReused.into());
        }
        return Ok(Rc::clone(&entry.answer));
    }
    if given.order.len() >= MOST
        && let Some(oldest) = given.order.pop_front()
    {
        given.entries.remove(&oldest);
    }
    let answer = Rc::new(OnceCell::new());
    given.order.push_back(key.clone());
    given.entries.insert(key, Entry { request: request.to_owned(), answer: Rc::clone(&answer) });
    Ok(answer)
}
