//! Snapshots, restore, fork, hibernate, resume.

use super::error::ApiError;
use super::once::made_with;
use super::types::{Deleted, ForkBody, Forks, RestoreBody, Run, SnapshotMade, Snapshots};
use super::{Answer, Asked, json, json_with};
use crate::executor;
use crate::service::{Sandbox, ServiceError};
use hyper::StatusCode;
use std::future::Future;
use std::rc::Rc;

/// Does what must not stop half-way, whether or not the client waits.
pub(crate) async fn to_the_end<T: 'static>(
    work: impl Future<Output = Result<T, ServiceError>> + 'static,
) -> Result<T, ServiceError> {
    let done = executor::spawn(work).await;
    done.unwrap_or_else(|error| Err(ServiceError::Internal(error.to_string())))
}

pub(crate) async fn snapshot(asked: Asked, id: &str) -> Answer {
    let (service, sandbox) = (Rc::clone(&asked.app.service), asked.sandbox(id)?);
    let row = to_the_end(async move { service.snapshot(&sandbox).await }).await?;
    Ok(json_with(StatusCode::CREATED, &SnapshotMade::from(row)))
}

pub(crate) fn snapshots(asked: &Asked) -> Answer {
    let rows = asked.app.service.snapshots(&asked.tenant)?;
    Ok(json(&Snapshots { snapshots: rows.into_iter().map(Into::into).collect() }))
}

pub(crate) fn delete_snapshot(asked: &Asked, id: &str) -> Answer {
    asked.app.service.delete_snapshot(&asked.tenant, id)?;
    Ok(json(&Deleted { status: "deleted".to_owned(), id: id.to_owned() }))
}

pub(crate) async fn restore(asked: Asked) -> Answer {
    let (caller, body) = asked.json::<RestoreBody>().await?;
    let id = body.snapshot_id.ok_or_else(|| ApiError::bad("snapshot_id: must be given"))?;
    let (service, tenant) = (Rc::clone(&caller.app.service), caller.tenant);
    let sandbox = to_the_end(async move { service.restore(&tenant, &id).await }).await?;
    Ok(json_with(StatusCode::CREATED, &Run::of(&sandbox, &caller.app.service.config.region)))
}

pub(crate) async fn fork(asked: Asked, id: &str) -> Answer {
    let sandbox = asked.sandbox(id)?;
    let (key, app, tenant) = (asked.idempotency_key()?, Rc::clone(&asked.app), Rc::clone(&asked.tenant));
    let (caller, body, bytes) = asked.json_and_bytes::<ForkBody>().await?;
    let count = body.count.unwrap_or(1);
    let region = caller.app.service.config.region.clone();
    let with = made_with(key, &format!("fork {}", sandbox.id), &bytes);
    let forks = |forks: &[Rc<Sandbox>], region: &str| {
        let forks = forks.iter().map(|fork| Run::of(fork, region)).collect();
        json_with(StatusCode::CREATED, &Forks { forks })
    };
    let again = |made: &[Rc<Sandbox>]| forks(made, &app.service.config.region);
    let with_it = with.clone();
    let forking = async move {
        let service = Rc::clone(&caller.app.service);
        let made = to_the_end(async move { service.fork(&sandbox, count, with_it).await }).await?;
        Ok(forks(&made, &region))
    };
    app.once(&tenant, with, again, forking).await
}

pub(crate) async fn hibernate(asked: Asked, id: &str) -> Answer {
    let (service, sandbox) = (Rc::clone(&asked.app.service), asked.sandbox(id)?);
    let asleep = Rc::clone(&sandbox);
    to_the_end(async move { service.hibernate(&asleep).await }).await?;
    Ok(json(&Run::of(&sandbox, &asked.app.service.config.region)))
}

pub(crate) async fn resume(asked: Asked, id: &str) -> Answer {
    let (service, sandbox) = (Rc::clone(&asked.app.service), asked.sandbox(id)?);
    let awake = Rc::clone(&sandbox);
    to_the_end(async move { service.resume(&awake).await }).await?;
    Ok(json(&Run::of(&sandbox, &asked.app.service.config.region)))
}
