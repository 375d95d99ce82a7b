//! Reading requests: the path, the key, the body within its limits.

use super::error::{ApiError, Code};
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::header::AUTHORIZATION;
use hyper::http::request::Parts;
use serde::de::DeserializeOwned;
use std::borrow::Cow;
use std::time::Duration;

/// How many times the bound is read from a client that sends more.
const DRAINED: usize = 8;

/// Deepest nesting of a JSON body is serde_json's (128): deeper is an error, not a stack overflow.
///
/// A whole JSON body; an empty one is an empty object, whatever its content type.
pub(crate) async fn json<T: DeserializeOwned>(
    body: Incoming,
    most_bytes: usize,
    patience: Duration,
) -> Result<(T, Bytes), ApiError> {
    let bytes = whole(body, most_bytes, patience).await?;
    let text: &[u8] = if bytes.is_empty() { b"{}" } else { &bytes };
    // An array would be taken for the fields in their order.
    if text.iter().find(|byte| !byte.is_ascii_whitespace()) != Some(&b'{') {
        return Err(ApiError::bad("the body must be a JSON object"));
    }
    let value = serde_json::from_slice(text)
        .map_err(|error| ApiError::bad(format!("the body is not the JSON that is meant: {error}")))?;
    Ok((value, bytes))
}

/// A whole body.
pub(crate) async fn whole(
    mut body: Incoming,
    most_bytes: usize,
    patience: Duration,
) -> Result<Bytes, ApiError> {
    let mut all = BytesMut::new();
    while let Some(bytes) = portion(&mut body, patience).await? {
        if all.len() + bytes.len() > most_bytes {
            drain(&mut body, DRAINED * most_bytes, patience).await;
            return Err(ApiError::new(Code::TooLarge, format!("the body is over {most_bytes} bytes")));
        }
        all.extend_from_slice(&bytes);
    }
    Ok(all.freeze())
}

/// Reads on without keeping anything: a client that is still sending would not see an answer.
pub(crate) async fn drain(body: &mut Incoming, most_bytes: usize, patience: Duration) {
    let mut drained = 0;
    while let Ok(Some(bytes)) = portion(body, patience).await
        && drained < most_bytes
    {
        drained += bytes.len();
    }
}

/// The next bytes of a body; `None` at its end.
pub(crate) async fn portion(body: &mut Incoming, patience: Duration) -> Result<Option<Bytes>, ApiError> {
    loop {
        let frame = tokio::time::timeout(patience, body.frame()).await;
        let frame = frame.map_err(|_| {
            ApiError::new(Code::Timeout, format!("no byte of the body came within {patience:?}"))
        })?;
        match frame {
            None => return Ok(None),
            Some(Err(error)) => return Err(ApiError::bad(format!("the body broke off: {error}"))),
            Some(Ok(frame)) => match frame.into_data() {
                Ok(bytes) if bytes.is_empty() => {}
                Ok(bytes) => return Ok(Some(bytes)),
                // Trailers say nothing here.
                Err(_) => {}
            },
        }
    }
}

/// The key that came with a request: in its header, or where browsers can put one, in its query.
pub(crate) fn token(parts: &Parts) -> Option<Cow<'_, str>> {
    if let Some(value) = parts.headers.get(AUTHORIZATION) {
        let text = value.to_str().ok()?;
        let (scheme, token) = text.split_once(' ')?;
        return scheme.eq_ignore_ascii_case("bearer").then(|| Cow::Borrowed(token.trim()));
    }
    query(parts, "token")
}

/// A parameter of the query, decoded.
pub(crate) fn query<'p>(parts: &'p Parts, name: &str) -> Option<Cow<'p, str>> {
    let query = parts.uri.query()?;
    let value = query.split('&').find_map(|pair| {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        (key == name).then_some(value)
    })?;
    decode(value)
}

/// Percent-decoding, of UTF-8 only.
pub(crate) fn decode(text: &str) -> Option<Cow<'_, str>> {
    if !text.contains(['%', '+']) {
        return Some(Cow::Borrowed(text));
    }
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&first, tail)) = rest.split_first() {
        rest = tail;
        match first {
            b'+' => bytes.push(b' '),
            b'%' => {
                let digits = tail.get(..2)?;
                let digits = std::str::from_utf8(digits).ok()?;
                digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then_some(())?;
                bytes.push(u8::from_str_radix(digits, 16).ok()?);
                rest = tail.get(2..)?;
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8(bytes).ok().map(Cow::Owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_decoded_and_what_cannot_be_is_refused() {
        assert_eq!(decode("/a%20b+c%2Fd").as_deref(), Some("/a b c/d"));
        assert_eq!(decode("plain").as_deref(), Some("plain"));
        for bad in ["%", "%2", "%zz", "%ff%fe", "%+1"] {
            assert_eq!(decode(bad), None, "{bad}");
        }
    }
}
