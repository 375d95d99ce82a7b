//! Bodies of answers: bytes that are there, or a bounded channel, so that a slow client slows the source down.

use bytes::Bytes;
use hyper::body::Frame;
use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Portions under way to a client that does not read.
const DEPTH: usize = 4;

/// The source of a streamed body broke off: the client must not take what it has for all.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the source of the body broke off")]
pub(crate) struct BrokeOff;

/// An answer's body.
#[derive(Debug)]
pub(crate) enum Body {
    /// All of it.
    Whole(Option<Bytes>),
    /// As it comes.
    Stream(mpsc::Receiver<Result<Bytes, BrokeOff>>),
    /// What another server sends.
    Proxied(hyper::body::Incoming),
}

/// Where a streamed body's bytes go in. Dropped without [`BrokeOff`], the body ends well.
pub(crate) type Sink = mpsc::Sender<Result<Bytes, BrokeOff>>;

impl Body {
    pub(crate) fn empty() -> Self {
        Self::Whole(None)
    }

    pub(crate) fn stream() -> (Sink, Self) {
        let (sink, source) = mpsc::channel(DEPTH);
        (sink, Self::Stream(source))
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Self::Whole(Some(bytes.into()))
    }
}

impl From<Infallible> for BrokeOff {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = BrokeOff;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BrokeOff>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|bytes| Ok(Frame::data(bytes)))),
            Self::Stream(source) => source.poll_recv(cx).map(|next| next.map(|bytes| bytes.map(Frame::data))),
            Self::Proxied(incoming) => {
                Pin::new(incoming).poll_frame(cx).map(|next| next.map(|frame| frame.map_err(|_| BrokeOff)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(bytes) => bytes.is_none(),
            Self::Stream(_) => false,
            Self::Proxied(incoming) => incoming.is_end_stream(),
        }
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => {
                hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |bytes| bytes.len() as u64))
            }
            Self::Stream(_) => hyper::body::SizeHint::default(),
            Self::Proxied(incoming) => incoming.size_hint(),
        }
    }
}
