//! Clients that send a request's head a byte at a time are cut. An idle connection costs no timer: it begins
//! with the first byte of a head and ends with its last.

use super::body::Body;
use hyper::Response;
use hyper::body::{Body as HttpBody, Frame, SizeHint};
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::Notify;

/// Where a connection stands. One thread serves it, but an upgraded connection has to be one that could move.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// A request is being answered: its body comes at another pace.
    answering: AtomicBool,
    /// The head that is coming, counted; 0 is none.
    head: AtomicU64,
    heads: AtomicU64,
    began: Notify,
}

/// The request is answered when this goes.
#[derive(Debug)]
pub(crate) struct Answering(Arc<Pace>);

impl Drop for Answering {
    fn drop(&mut self) {
        self.0.answering.store(false, Relaxed);
    }
}

impl Pace {
    /// The head was complete.
    pub(crate) fn answering(self: &Arc<Self>) -> Answering {
        self.head.store(0, Relaxed);
        self.answering.store(true, Relaxed);
        Answering(Arc::clone(self))
    }

    fn heard(&self) {
        if !self.answering.load(Relaxed) && self.head.load(Relaxed) == 0 {
            self.head.store(self.heads.fetch_add(1, Relaxed) + 1, Relaxed);
            self.began.notify_one();
        }
    }

    /// Returns when a head has taken longer than `limit`.
    pub(crate) async fn too_slow(&self, limit: Duration) {
        loop {
            self.began.notified().await;
            let head = self.head.load(Relaxed);
            if head == 0 {
                continue;
            }
            tokio::time::sleep(limit).await;
            if self.head.load(Relaxed) == head {
                return;
            }
            if self.head.load(Relaxed) != 0 {
                // Another one has begun meanwhile.
                self.began.notify_one();
            }
        }
    }
}

/// A connection whose pace is watched.
#[derive(Debug)]
pub(crate) struct Paced<S> {
    pub(crate) stream: S,
    pub(crate) pace: Arc<Pace>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(cx, buffer);
        if buffer.filled().len() > before {
            self.pace.heard();
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// A body with what must last as long as it.
#[derive(Debug)]
pub(crate) struct Lasting {
    body: Body,
    _answering: Answering,
}

/// The answer lasts until its body is out.
pub(crate) fn lasting(response: Response<Body>, answering: Answering) -> Response<Lasting> {
    response.map(|body| Lasting { body, _answering: answering })
}

impl HttpBody for Lasting {
    type Data = bytes::Bytes;
    type Error = super::body::BrokeOff;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<bytes::Bytes>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
