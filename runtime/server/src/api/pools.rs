//! Pools: listed, kept, changed, given up. A pool is named by its id, or by image, vCPUs and memory.

use super::types::{Deleted, PoolAnswer, PoolBody, Pools};
use super::{Answer, Asked, json, json_with};
use crate::config::PoolSpec;
use crate::service::{PoolView, ServiceError};
use hyper::StatusCode;
use std::rc::Rc;

pub(crate) async fn list(asked: &Asked) -> Answer {
    let views = asked.app.service.pool_views().await;
    Ok(json(&Pools { pools: views.into_iter().map(PoolAnswer::from).collect() }))
}

pub(crate) async fn get(asked: &Asked, id: &str) -> Answer {
    Ok(json(&PoolAnswer::from(asked.app.service.pool_view(id).await?)))
}

pub(crate) async fn create(asked: Asked) -> Answer {
    let (caller, body) = asked.json::<PoolBody>().await?;
    let defaults = &caller.app.service.config.defaults;
    let min = body.target.or(body.min).unwrap_or(1);
    let spec = PoolSpec {
        image: body.image.unwrap_or_else(|| defaults.image.clone()),
        vcpus: body.vcpus.unwrap_or(defaults.vcpus),
        mem_mib: body.mem_mib.unwrap_or(defaults.mem_mib),
        min,
        max: body.max.unwrap_or((2 * min).max(1)),
        refill_per_s: body.refill_per_s.unwrap_or(100.0),
    };
    let view = Rc::clone(&caller.app.service).set_pool(spec).await?;
    Ok(json_with(StatusCode::CREATED, &PoolAnswer::from(view)))
}

/// Of the body's fields, those that say which pool; the id in the path wins.
async fn which(asked: &super::Caller, id: Option<&str>, body: &PoolBody) -> Result<PoolView, ServiceError> {
    let named = |spec: &PoolSpec| {
        body.image.as_ref().is_some_and(|image| *image == spec.image)
            && body.vcpus.is_none_or(|vcpus| vcpus == spec.vcpus)
            && body.mem_mib.is_none_or(|mem_mib| mem_mib == spec.mem_mib)
    };
    let service = &asked.app.service;
    if let Some(id) = id {
        return service.pool_view(id).await;
    }
    let mut found: Vec<_> = service.pool_views().await.into_iter().filter(|view| named(&view.spec)).collect();
    let name = || body.image.clone().unwrap_or_else(|| "without a name".to_owned());
    match (found.pop(), found.as_slice()) {
        (Some(view), []) => Ok(view),
        (None, _) => Err(ServiceError::NotFound { what: "pool", name: name() }),
        (Some(last), others) => {
            let ids: Vec<_> = others.iter().chain([&last]).map(|view| view.id.as_str()).collect();
            let why = format!("{} are pools of it: say vcpus and mem_mib too", ids.join(", "));
            Err(ServiceError::bad("image", why))
        }
    }
}

pub(crate) async fn change(asked: Asked, id: Option<&str>) -> Answer {
    let (caller, body) = asked.json::<PoolBody>().await?;
    let old = which(&caller, id, &body).await?.spec;
    let min = body.target.or(body.min).unwrap_or(old.min);
    let spec = PoolSpec {
        min,
        max: body.max.unwrap_or(old.max.max(min)),
        refill_per_s: body.refill_per_s.unwrap_or(old.refill_per_s),
        ..old
    };
    Ok(json(&PoolAnswer::from(Rc::clone(&caller.app.service).set_pool(spec).await?)))
}

pub(crate) async fn remove(asked: Asked, id: Option<&str>) -> Answer {
    let (caller, body) = asked.json::<PoolBody>().await?;
    let id = which(&caller, id, &body).await?.id;
    caller.app.service.remove_pool(&id).await?;
    Ok(json(&Deleted { status: "deleted".to_owned(), id }))
}
