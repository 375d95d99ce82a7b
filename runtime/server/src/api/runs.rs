//! Sandboxes: made, listed, looked at, used, ended.

use super::body::Body;
use super::error::ApiError;
use super::once::{KEY_MAX_BYTES, made_with};
use super::types::{
    CommandLine, CreateBody, DestroyedRun, ExecAnswer, ExecBody, History, IdleAction, Number, PatchBody, Run,
    Runs, UsageAnswer, time,
};
use super::{Answer, Asked, json, json_with, request};
use crate::executor;
use crate::service::{CreateRequest, ExecRequest, Finished, Sandbox, ServiceError, idleness, millis};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use hyper::{Response, StatusCode};
use serde::de::DeserializeOwned;
use std::rc::Rc;
use std::time::Duration;
use tokio::sync::oneshot;

/// Entries on a page of the history, if the request does not say; and at most.
const PAGE: usize = 100;
const MOST_ON_A_PAGE: usize = 1000;

impl Asked {
    /// The body as JSON.
    pub(crate) async fn json<T: DeserializeOwned>(self) -> Result<(super::Caller, T), ApiError> {
        self.json_and_bytes().await.map(|(caller, value, _)| (caller, value))
    }

    /// The body as JSON, and as it came.
    pub(crate) async fn json_and_bytes<T: DeserializeOwned>(
        self,
    ) -> Result<(super::Caller, T, Bytes), ApiError> {
        let limits = &self.app.service.config.limits;
        let patience = Duration::from_secs(limits.body_s);
        let (value, bytes) = request::json(self.body, limits.json_bytes, patience).await?;
        Ok((super::Caller { app: self.app, tenant: self.tenant }, value, bytes))
    }

    /// What the client calls this request, so that it may send it again.
    pub(crate) fn idempotency_key(&self) -> Result<Option<String>, ApiError> {
        let Some(value) = self.parts.headers.get("idempotency-key") else { return Ok(None) };
        let key = value.to_str().ok().filter(|key| (1..=KEY_MAX_BYTES).contains(&key.len()));
        let key = key.ok_or_else(|| {
            ApiError::bad(format!("Idempotency-Key: must be 1 to {KEY_MAX_BYTES} visible characters"))
        })?;
        Ok(Some(key.to_owned()))
    }

    pub(crate) fn sandbox(&self, id: &str) -> Result<Rc<Sandbox>, ApiError> {
        Ok(self.app.service.sandbox(&self.tenant, id)?)
    }

    fn run(&self, sandbox: &Sandbox) -> Run {
        Run::of(sandbox, &self.app.service.config.region)
    }
}

pub(crate) async fn create(asked: Asked) -> Answer {
    let (key, app, asker) = (asked.idempotency_key()?, Rc::clone(&asked.app), Rc::clone(&asked.tenant));
    let (caller, body, bytes) = asked.json_and_bytes::<CreateBody>().await?;
    let request = CreateRequest {
        image: body.image,
        vcpus: body.vcpus,
        mem_mib: body.mem_mib,
        disk_mib: body.disk_mib,
        timeout_s: number("timeout", body.timeout.as_ref())?,
        env: body.env.unwrap_or_default().into_iter().collect(),
        sleeps_when_idle: body.idle_action == Some(IdleAction::Hibernate),
        network_profile: body.network_profile,
        made_with: made_with(key, "create", &bytes),
    };
    let with = request.made_with.clone();
    let (service, tenant) = (Rc::clone(&caller.app.service), caller.tenant);
    let region = service.config.region.clone();
    let making = whole(async move {
        let result = service.create(&tenant, &request).await;
        let undo = result.as_ref().ok().map(|sandbox| (Rc::clone(&service), Rc::clone(sandbox)));
        (result, undo)
    });
    let making = async {
        let sandbox = making.await?;
        app.metrics.borrow_mut().created(sandbox.create.get());
        Ok(json_with(StatusCode::CREATED, &Run::of(&sandbox, &region)))
    };
    let region = app.service.config.region.clone();
    let again = |made: &[Rc<Sandbox>]| {
        made.first().map_or_else(|| json(&()), |made| json_with(StatusCode::CREATED, &Run::of(made, &region)))
    };
    app.once(&asker, with, again, making).await
}

/// Does what must not stop half-way when the client goes; what it made for a client that has gone is ended.
async fn whole<F>(making: F) -> Result<Rc<Sandbox>, ServiceError>
where
    F: Future<
            Output = (Result<Rc<Sandbox>, ServiceError>, Option<(Rc<crate::service::Service>, Rc<Sandbox>)>),
        > + 'static,
{
    let (done, made) = oneshot::channel();
    executor::spawn(async move {
        let (result, undo) = making.await;
        if done.send(result).is_err()
            && let Some((service, sandbox)) = undo
        {
            tracing::info!(id = %sandbox.id, "the client has gone while its sandbox was made");
            let _ = service.destroy(&sandbox.tenant, &sandbox.id).await;
        }
    });
    made.await.unwrap_or_else(|_| Err(ServiceError::Internal("the request was given up".to_owned())))
}

pub(crate) fn list(asked: &Asked) -> Response<Body> {
    let sandboxes = asked.app.service.sandboxes(&asked.tenant);
    json(&Runs { runs: sandboxes.iter().map(|sandbox| asked.run(sandbox)).collect() })
}

pub(crate) fn get(asked: &Asked, id: &str) -> Answer {
    let service = &asked.app.service;
    match service.sandbox(&asked.tenant, id) {
        Ok(sandbox) => Ok(json(&asked.run(&sandbox))),
        Err(error) => match service.lost(&asked.tenant, id)? {
            Some(row) => Ok(json(&Run::of_row(row, &service.config.region))),
            None => Err(error.into()),
        },
    }
}

pub(crate) async fn patch(asked: Asked, id: &str) -> Answer {
    asked.sandbox(id)?;
    let (caller, body) = asked.json::<PatchBody>().await?;
    let seconds = number("timeout", body.timeout.as_ref())?
        .ok_or_else(|| ApiError::bad("timeout: seconds of idleness, 0 or -1 for never"))?;
    let service = &caller.app.service;
    let sandbox = service.set_timeout(&caller.tenant, id, idleness(seconds)?)?;
    Ok(json(&Run::of(&sandbox, &service.config.region)))
}

pub(crate) async fn destroy(asked: &Asked, id: &str) -> Answer {
    let (service, tenant, id) = (Rc::clone(&asked.app.service), Rc::clone(&asked.tenant), id.to_owned());
    // It goes on to its end also if the client does not wait for it.
    let destroying = executor::spawn(async move { service.destroy(&tenant, &id).await });
    let destroyed = destroying.await.map_err(|e| ServiceError::Internal(e.to_string()))??;
    Ok(json(&DestroyedRun::from(destroyed.row)))
}

pub(crate) fn history(asked: &Asked) -> Answer {
    let limit = match request::query(&asked.parts, "limit") {
        Some(text) => text
            .parse::<usize>()
            .ok()
            .filter(|limit| (1..=MOST_ON_A_PAGE).contains(limit))
            .ok_or_else(|| ApiError::bad(format!("limit: must be 1 to {MOST_ON_A_PAGE}")))?,
        None => PAGE,
    };
    let after = request::query(&asked.parts, "after");
    let after = after.as_deref().map(|text| {
        let (us, id) = text.split_once('.')?;
        Some((us.parse::<i64>().ok()?, id))
    });
    let after = match after {
        Some(None) => return Err(ApiError::bad("after: must be the `next` of an earlier answer")),
        other => other.flatten(),
    };
    let rows = asked.app.service.history(&asked.tenant, after, limit)?;
    let last = rows.last().filter(|_| rows.len() == limit);
    let next = last.map(|row| format!("{}.{}", row.ended_us.unwrap_or_default(), row.id));
    Ok(json(&History { sandboxes: rows.into_iter().map(Into::into).collect(), next }))
}

pub(crate) fn usage(asked: &Asked) -> Answer {
    let (active, past) = asked.app.service.usage(&asked.tenant)?;
    let seconds = |ms: f64| ms / 1000.0;
    Ok(json(&UsageAnswer {
        active_sandboxes: usize::try_from(active.sandboxes).unwrap_or(usize::MAX),
        history_sandboxes: past.sandboxes,
        active_cost_cents: active.cost_cents,
        history_cost_cents: past.cost_cents,
        total_cost_cents: active.cost_cents + past.cost_cents,
        cpu_seconds: seconds(active.cpu_ms + past.cpu_ms),
        mem_seconds: seconds(active.gib_ms + past.gib_ms),
        as_of: time(jiff::Timestamp::now().as_microsecond()),
    }))
}

pub(crate) async fn exec(asked: Asked, id: &str) -> Answer {
    let sandbox = asked.sandbox(id)?;
    let (caller, body) = asked.json::<ExecBody>().await?;
    let request = exec_request(body)?;
    let finished = caller.app.service.exec(&sandbox, &request).await?;
    Ok(json(&exec_answer(finished)))
}

pub(crate) fn exec_request(body: ExecBody) -> Result<ExecRequest, ApiError> {
    let command = body.command.ok_or_else(|| ApiError::bad("command: must be given"))?;
    let timeout = match number("timeout", body.timeout.as_ref())? {
        Some(seconds) if seconds > 0.0 => Some(Duration::from_secs_f64(seconds.min(1e9))),
        Some(_) => return Err(ApiError::bad("timeout: must be more than 0 seconds")),
        None => None,
    };
    let request = match command {
        CommandLine::Line(line) if line.is_empty() => {
            return Err(ApiError::bad("command: must not be empty"));
        }
        CommandLine::Line(line) => ExecRequest::shell(&line),
        CommandLine::Argv(argv) => ExecRequest { argv, ..ExecRequest::default() },
    };
    Ok(ExecRequest {
        env: body.env.into_iter().map(|(name, value)| format!("{name}={value}")).collect(),
        cwd: body.cwd.unwrap_or_default(),
        stdin: body.stdin.map(String::into_bytes),
        timeout,
        ..request
    })
}

fn exec_answer(finished: Finished) -> ExecAnswer {
    let text = |bytes: Vec<u8>| match String::from_utf8(bytes) {
        Ok(text) => (text, None),
        Err(error) => {
            let bytes = error.as_bytes();
            (String::from_utf8_lossy(bytes).into_owned(), Some(STANDARD.encode(bytes)))
        }
    };
    let ((stdout, stdout_base64), (stderr, stderr_base64)) = (text(finished.stdout), text(finished.stderr));
    ExecAnswer {
        exit_code: finished.exit_code,
        stdout,
        stderr,
        stdout_base64,
        stderr_base64,
        truncated: finished.truncated,
        duration_ms: millis(finished.took),
    }
}

fn number(field: &str, given: Option<&Number>) -> Result<Option<f64>, ApiError> {
    let value = given.map(|number| number.value().filter(|value| value.is_finite()));
    match value {
        Some(None) => Err(ApiError::bad(format!("{field}: must be a number"))),
        other => Ok(other.flatten()),
    }
}
