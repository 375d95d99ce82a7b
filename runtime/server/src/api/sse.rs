//! Server-sent events: a command's output while it runs, from any event on.
//!
//! Events are `stdout`, `stderr`, `exit`, `error`; each has the id `<command>-<seq>`. To go on after a broken
//! connection, the request is sent again with the last id as `Last-Event-ID`: the command is not run again.

use super::body::{Body, Sink};
use super::error::ApiError;
use super::runs::exec_request;
use super::types::{ExecBody, StreamData};
use super::{Answer, Asked};
use crate::executor;
use crate::service::{Stream, StreamEvent};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::Response;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use std::rc::Rc;
use std::time::Duration;

/// A silent connection is told so often that it is alive, and found out if it is not.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

pub(crate) async fn exec_stream(asked: Asked, id: &str) -> Answer {
    let sandbox = asked.sandbox(id)?;
    let last = asked.parts.headers.get("last-event-id");
    let last = last.map(|value| value.to_str().unwrap_or_default().to_owned());
    let (stream, after) = match last {
        Some(last) => {
            let parsed = last.split_once('-').and_then(|(name, seq)| Some((name, seq.parse().ok()?)));
            let (name, seq) =
                parsed.ok_or_else(|| ApiError::bad("Last-Event-ID: must be the id of an event"))?;
            (asked.app.service.stream(&sandbox, name)?, seq)
        }
        None => {
            let (caller, body) = asked.json::<ExecBody>().await?;
            (caller.app.service.exec_stream(&sandbox, &exec_request(body)?)?, 0)
        }
    };
    let (sink, body) = Body::stream();
    executor::spawn(follow(stream, after, sink));
    let mut response = Response::new(body);
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

async fn follow(stream: Rc<Stream>, mut after: u64, sink: Sink) {
    // The head of the answer goes out at once, whenever the first event comes.
    let mut text = Bytes::from_static(b": ok\n\n");
    loop {
        if sink.send(Ok(text)).await.is_err() {
            return;
        }
        let next = tokio::select! {
            next = stream.after(after) => next,
            () = tokio::time::sleep(KEEP_ALIVE) => {
                text = Bytes::from_static(b": alive\n\n");
                continue;
            }
            () = sink.closed() => return,
        };
        let last = match next {
            Ok((seq, event)) => {
                after = seq;
                text = frame(&stream.id, seq, &event).into();
                event.is_last()
            }
            Err(error) => {
                let broken = StreamEvent::Broken { code: "bad_input", why: error.to_string() };
                text = frame(&stream.id, after, &broken).into();
                true
            }
        };
        if last {
            let _ = sink.send(Ok(text)).await;
            return;
        }
    }
}

/// One event as it goes over the wire. JSON has no line feeds, so it is one line.
fn frame(stream: &str, seq: u64, event: &StreamEvent) -> String {
    let mut data = StreamData { seq, ..StreamData::default() };
    let name = match event {
        StreamEvent::Stdout(bytes) | StreamEvent::Stderr(bytes) => {
            match std::str::from_utf8(bytes) {
                Ok(text) => data.data = Some(text.to_owned()),
                Err(_) => data.data_base64 = Some(STANDARD.encode(bytes)),
            }
            if matches!(event, StreamEvent::Stdout(_)) { "stdout" } else { "stderr" }
        }
        StreamEvent::Exit { code, took_ms } => {
            (data.exit_code, data.duration_ms) = (Some(*code), Some(*took_ms));
            "exit"
        }
        StreamEvent::Broken { code, why } => {
            (data.code, data.error) = (Some((*code).to_owned()), Some(why.clone()));
            "error"
        }
    };
    let data = serde_json::to_string(&data).unwrap_or_default();
    format!("id: {stream}-{seq}\nevent: {name}\ndata: {data}\n\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_that_are_not_utf_8_survive_and_line_feeds_do_not_break_the_frame() {
        let text = frame("x1", 3, &StreamEvent::Stdout(Bytes::from_static(b"a\nb\n")));
        assert_eq!(text, "id: x1-3\nevent: stdout\ndata: {\"seq\":3,\"data\":\"a\\nb\\n\"}\n\n");
        let text = frame("x1", 4, &StreamEvent::Stderr(Bytes::from_static(b"\xff\xfe")));
        assert_eq!(text, "id: x1-4\nevent: stderr\ndata: {\"seq\":4,\"data_base64\":\"//4=\"}\n\n");
        let text = frame("x1", 5, &StreamEvent::Exit { code: 7, took_ms: 1.5 });
        assert_eq!(text, "id: x1-5\nevent: exit\ndata: {\"seq\":5,\"exit_code\":7,\"duration_ms\":1.5}\n\n");
    }
}
