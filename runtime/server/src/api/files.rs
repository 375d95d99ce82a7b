//! Files of a sandbox, streamed both ways; the audit log of one.

use super::body::{Body, BrokeOff, Sink};
use super::error::{ApiError, Code};
use super::types::{FileDetails, Listing, Written};
use super::{Answer, Asked, json, request};
use crate::executor;
use crate::service::{FileStat, Reading, ServiceError};
use bytes::Bytes;
use hyper::Response;
use hyper::body::Body as _;
use hyper::header::{CONTENT_TYPE, HeaderValue};
use std::rc::Rc;
use std::time::Duration;

fn path(asked: &Asked) -> Result<String, ApiError> {
    let path = request::query(&asked.parts, "path");
    path.map(std::borrow::Cow::into_owned)
        .ok_or_else(|| ApiError::bad("path: must be given in the query, percent-encoded UTF-8"))
}

pub(crate) async fn upload(mut asked: Asked, id: &str) -> Answer {
    let (sandbox, path) = (asked.sandbox(id)?, path(&asked)?);
    let service = &asked.app.service;
    let patience = Duration::from_secs(service.config.limits.body_s);
    let mut writing = service.write_file(&sandbox, &path, asked.body.size_hint().exact()).await?;
    let mut size_bytes = 0;
    while let Some(bytes) = request::portion(&mut asked.body, patience).await? {
        size_bytes += bytes.len() as u64;
        if !writing.write(&bytes).await? {
            request::drain(&mut asked.body, usize::MAX, patience).await;
            break;
        }
    }
    writing.finish().await?;
    Ok(json(&Written { path, size_bytes }))
}

pub(crate) async fn download(asked: Asked, id: &str) -> Answer {
    let (sandbox, path) = (asked.sandbox(id)?, path(&asked)?);
    let service = Rc::clone(&asked.app.service);
    let mut reading = service.read_file(&sandbox, &path).await?;
    let FileStat { size_bytes, mode, mtime_s } = reading.stat;
    // The first bytes are waited for: an error then is a status and not a broken body.
    let first = reading.next().await?;
    let (sink, body) = Body::stream();
    executor::spawn(async move {
        let Some(first) = first else { return };
        if sink.send(Ok(first)).await.is_err() {
            return;
        }
        let end = tokio::select! {
            biased;
            end = pass_on(reading, &sink) => end,
            error = service.stuck(&sandbox) => Err(error),
        };
        if let Err(error) = end {
            tracing::debug!(%error, "a download broke off");
            let _ = sink.send(Err(BrokeOff)).await;
        }
    });
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
    // Not as Content-Length: a file of /proc has none, and one that is written to may change it.
    headers.insert("x-file-size", HeaderValue::from(size_bytes));
    headers.insert("x-file-mtime", HeaderValue::from(mtime_s));
    if let Ok(value) = HeaderValue::from_str(&format!("{:o}", mode & 0o7777)) {
        headers.insert("x-file-mode", value);
    }
    Ok(response)
}

/// Ends well when the client has gone, too.
async fn pass_on(mut reading: Reading, sink: &Sink) -> Result<(), ServiceError> {
    while let Some(bytes) = reading.next().await? {
        if sink.send(Ok(bytes)).await.is_err() {
            break;
        }
    }
    Ok(())
}

pub(crate) async fn list(asked: Asked, id: &str) -> Answer {
    let (sandbox, path) = (asked.sandbox(id)?, path(&asked)?);
    let entries = asked.app.service.list_files(&sandbox, &path).await?;
    let details = entries.iter().map(|entry| FileDetails {
        name: entry.name.clone(),
        kind: entry.stat.kind().to_owned(),
        size: entry.stat.size_bytes,
        mode: format!("{:o}", entry.stat.mode & 0o7777),
        mtime: super::types::time(entry.stat.mtime_s.saturating_mul(1_000_000)),
    });
    let details = details.collect();
    Ok(json(&Listing { entries: entries.into_iter().map(|entry| entry.name).collect(), details }))
}

pub(crate) fn audit(asked: &Asked, id: &str) -> Answer {
    asked.app.service.known(&asked.tenant, id)?;
    let entries = asked.app.service.journal.entries(&asked.tenant, id);
    let (sink, body) = Body::stream();
    executor::blocking_detached(move || {
        let end = entries(&mut |line| sink.blocking_send(Ok(Bytes::copy_from_slice(line))).is_ok());
        if let Err(error) = end {
            tracing::error!(%error, "the audit log cannot be read");
            let _ = sink.blocking_send(Err(BrokeOff));
        }
    });
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/x-ndjson"));
    Ok(response)
}

/// A parameter that must be a port.
pub(crate) fn port(text: &str) -> Result<u16, ApiError> {
    let port = text.parse().ok().filter(|port| *port != 0);
    port.ok_or_else(|| ApiError::new(Code::BadInput, format!("port: {text:?}, but must be 1 to 65535")))
}
