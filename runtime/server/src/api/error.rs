//! Every error of the API, its status and its code: the one place where they meet.

use super::body::Body;
use crate::service::{FileProblem, ServiceError};
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What the body of an error says.
#[derive(Debug, Clone, Serialize, Deserialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// For people: what is wrong, and what to do.
    pub error: String,
    /// For programs.
    pub code: String,
}

/// An answer that is an error.
#[derive(Debug)]
pub(crate) struct ApiError {
    code: Code,
    text: String,
    retry_after: Option<Duration>,
}

macro_rules! codes {
    ($(#[doc = $doc:literal] $variant:ident = $name:literal, $status:ident;)*) => {
        /// What an error is called, one name for each cause.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Code { $(#[doc = $doc] $variant),* }

        impl Code {
            /// Every one there is.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// As the body has it.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// What leads to it.
            #[must_use]
            pub fn cause(self) -> &'static str {
                match self { $(Self::$variant => $doc.trim_ascii()),* }
            }

            /// The answer's status.
            #[must_use]
            pub fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status),* }
            }
        }
    };
}

codes! {
    /// A field, a parameter or the body makes no sense.
    BadInput = "bad_input", BAD_REQUEST;
    /// A file of the sandbox is not of the kind that is meant.
    BadFile = "bad_file", BAD_REQUEST;
    /// No key, or one that is not valid.
    Unauthorized = "unauthorized", UNAUTHORIZED;
    /// No such route.
    NoRoute = "no_route", NOT_FOUND;
    /// No such sandbox, or not this key's.
    NoSandbox = "sandbox_not_found", NOT_FOUND;
    /// No such snapshot, or not this key's.
    NoSnapshot = "snapshot_not_found", NOT_FOUND;
    /// No such image.
    NoImage = "image_not_found", NOT_FOUND;
    /// No such pool.
    NoPool = "pool_not_found", NOT_FOUND;
    /// No such command to go on with.
    NoStream = "stream_not_found", NOT_FOUND;
    /// No such file in the sandbox.
    NoFile = "file_not_found", NOT_FOUND;
    /// The image's registry does not give it to this runner.
    ImageRefused = "image_refused", FORBIDDEN;
    /// The route is there, the method is not.
    Method = "method_not_allowed", METHOD_NOT_ALLOWED;
    /// Not in the sandbox's present state.
    WrongState = "wrong_state", CONFLICT;
    /// The sandbox has ended by itself.
    Lost = "sandbox_lost", CONFLICT;
    /// The snapshot is damaged, or was made on another kind of host.
    SnapshotRefused = "snapshot_refused", CONFLICT;
    /// The key of an earlier, other request.
    KeyReused = "idempotency_key_reused", CONFLICT;
    /// More than a body may be.
    TooLarge = "too_large", PAYLOAD_TOO_LARGE;
    /// No room for more sandboxes.
    Capacity = "capacity", TOO_MANY_REQUESTS;
    /// Too many requests of this key.
    RateLimited = "rate_limited", TOO_MANY_REQUESTS;
    /// What should not be.
    Internal = "internal", INTERNAL_SERVER_ERROR;
    /// The image's registry cannot be reached, or gives what is no image.
    Registry = "registry_failed", BAD_GATEWAY;
    /// Nothing listens on the sandbox's port.
    NoPort = "port_not_open", BAD_GATEWAY;
    /// Not now.
    Unavailable = "unavailable", SERVICE_UNAVAILABLE;
    /// The audit log cannot be written, so nothing was done.
    Audit = "audit_unavailable", SERVICE_UNAVAILABLE;
    /// The sandbox's microVM stands still.
    Stuck = "sandbox_stuck", GATEWAY_TIMEOUT;
    /// It took too long.
    Timeout = "timeout", GATEWAY_TIMEOUT;
    /// A disk is full, the host's or the sandbox's.
    NoSpace = "no_space", INSUFFICIENT_STORAGE;
}

impl ApiError {
    pub(crate) fn new(code: Code, text: impl Into<String>) -> Self {
        Self { code, text: text.into(), retry_after: None }
    }

    pub(crate) fn bad(text: impl Into<String>) -> Self {
        Self::new(Code::BadInput, text)
    }

    pub(crate) fn retry_after(self, after: Duration) -> Self {
        Self { retry_after: Some(after), ..self }
    }

    pub(crate) fn code(&self) -> Code {
        self.code
    }

    pub(crate) fn text(&self) -> &str {
        &self.text
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let body = ErrorBody { error: self.text, code: self.code.name().to_owned() };
        let mut response = Response::new(Body::from(serde_json::to_vec(&body).unwrap_or_default()));
        *response.status_mut() = self.code.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let busy =
            matches!(self.code.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
        if let Some(after) = self.retry_after.or(busy.then_some(Duration::from_secs(1))) {
            // Whole seconds, and never "at once".
            headers.insert(RETRY_AFTER, HeaderValue::from(after.as_secs_f64().ceil().max(1.0) as u64));
        }
        response
    }
}

fn of_image(error: &peregrine_image::Error) -> Code {
    use peregrine_image::Error;
    match error {
        Error::Reference { .. } => Code::BadInput,
        Error::ImageNotFound { .. } => Code::NoImage,
        Error::ImageRefused { .. } => Code::ImageRefused,
        Error::Registry { .. } | Error::BadContent { .. } | Error::Layer { .. } => Code::Registry,
        _ => Code::Internal,
    }
}

impl From<ServiceError> for ApiError {
    fn from(error: ServiceError) -> Self {
        let text = error.to_string();
        let code = match &error {
            ServiceError::BadInput { .. } => Code::BadInput,
            ServiceError::NotFound { what: "snapshot", .. } => Code::NoSnapshot,
            ServiceError::NotFound { what: "image", .. } => Code::NoImage,
            ServiceError::NotFound { what: "pool", .. } => Code::NoPool,
            ServiceError::NotFound { what: "command", .. } => Code::NoStream,
            ServiceError::NotFound { .. } => Code::NoSandbox,
            ServiceError::Image(error) => of_image(error),
            ServiceError::WrongState { .. } => Code::WrongState,
            ServiceError::File { why: FileProblem::Missing, .. } => Code::NoFile,
            ServiceError::File { .. } => Code::BadFile,
            ServiceError::Lost { .. } => Code::Lost,
            ServiceError::SnapshotRefused(_) => Code::SnapshotRefused,
            ServiceError::Capacity { .. } => Code::Capacity,
            ServiceError::Unavailable { .. } => Code::Unavailable,
            ServiceError::Timeout { .. } => Code::Timeout,
            ServiceError::Stuck => Code::Stuck,
            ServiceError::NoSpace { .. } => Code::NoSpace,
            ServiceError::PortClosed { .. } => Code::NoPort,
            ServiceError::KeyReused => Code::KeyReused,
            ServiceError::Audit(_) => Code::Audit,
            ServiceError::Internal(_) => Code::Internal,
        };
        let retry_after = match &error {
            ServiceError::Capacity { retry_after, .. } | ServiceError::Unavailable { retry_after, .. } => {
                Some(*retry_after)
            }
            ServiceError::Audit(_) => Some(Duration::from_secs(5)),
            _ => None,
        };
        Self { code, text, retry_after }
    }
}
