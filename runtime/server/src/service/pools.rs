//! Pools: templates that are kept ready because an operator says so.

use super::templates::on_demand;
use super::{Service, ServiceError, Shape};
use crate::config::PoolSpec;
use crate::executor;
use crate::pool::PoolStats;
use prewarm::Policy;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

/// Workers of one template at most.
const MOST: usize = 1000;
/// When a pool that could not be made is tried again at first, and in the long run.
const FIRST_RETRY: Duration = Duration::from_secs(1);
const LAST_RETRY: Duration = Duration::from_secs(60);

/// A pool, and how it goes with it.
#[derive(Debug, Clone)]
pub struct PoolView {
    /// As it was asked for.
    pub spec: PoolSpec,
    /// Its name.
    pub id: String,
    /// Counts; `None` while its template is being made.
    pub stats: Option<PoolStats>,
    /// Why it has no template.
    pub error: Option<String>,
}

/// A pool that was asked for.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    spec: PoolSpec,
    /// `None` while its image is looked for.
    shape: Option<Shape>,
    error: Option<String>,
}

/// What distinguishes pools.
fn name(spec: &PoolSpec) -> String {
    let image: String = spec.image.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("{image}.{}.{}", spec.vcpus, spec.mem_mib)
}

fn check(spec: &PoolSpec) -> Result<(), ServiceError> {
    if spec.min > spec.max || spec.max == 0 || spec.max > MOST {
        let why =
            format!("min {} and max {}, but must be min <= max, 1 <= max <= {MOST}", spec.min, spec.max);
        return Err(ServiceError::bad("max", why));
    }
    if !spec.refill_per_s.is_finite() || spec.refill_per_s < 0.0 {
        return Err(ServiceError::bad("refill_per_s", "must be 0 or more"));
    }
    let size = peregrine_vmm::vm::check_size(spec.vcpus, spec.mem_mib);
    size.map(drop).map_err(|error| ServiceError::bad("mem_mib", error.to_string()))
}

impl Service {
    /// Keeps the pools of the configuration, and those that were set while an earlier daemon ran, which win. Their
    /// images and templates come beside: a registry that is away keeps nobody from starting.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn keep_pools(self: &Rc<Self>) -> Result<(), ServiceError> {
        let given = self.config.pools.iter().cloned().chain(self.registry.pools()?);
        let pools: BTreeMap<String, PoolSpec> = given.map(|spec| (name(&spec), spec)).collect();
        for (id, spec) in pools {
            let error = check(&spec).err().map(|error| error.to_string());
            if let Some(error) = &error {
                tracing::error!(pool = id, error, "a pool is not kept");
            }
            let begin = error.is_none();
            self.pools.borrow_mut().insert(id.clone(), Kept { spec: spec.clone(), shape: None, error });
            if begin {
                executor::spawn(Rc::clone(self).keep_at_last(id, spec));
            }
        }
        Ok(())
    }

    /// Keeps a pool from now on, or changes it; its template is made beside. The next daemon keeps it too.
    ///
    /// # Errors
    /// If it cannot be.
    pub async fn set_pool(self: &Rc<Self>, spec: PoolSpec) -> Result<PoolView, ServiceError> {
        check(&spec)?;
        let id = name(&spec);
        let shape = self.pool_shape(&id, &spec).await?;
        self.registry.put_pool(&id, &spec)?;
        let kept = Kept { spec: spec.clone(), shape: Some(shape), error: None };
        self.pools.borrow_mut().insert(id.clone(), kept);
        executor::spawn(Rc::clone(self).keep_at_last(id.clone(), spec));
        self.pool_view(&id).await
    }

    async fn pool_shape(&self, id: &str, spec: &PoolSpec) -> Result<Shape, ServiceError> {
        let shape = Shape { image: self.image(&spec.image).await?, vcpus: spec.vcpus, mem_mib: spec.mem_mib };
        let same = |kept: &Kept| kept.shape.as_ref().is_some_and(|other| other.content() == shape.content());
        if let Some((other, _)) = self.pools.borrow().iter().find(|(other, kept)| *other != id && same(kept))
        {
            let why = format!("the pool {other} is of the same image: change that one, or delete it first");
            return Err(ServiceError::bad("image", why));
        }
        Ok(shape)
    }

    /// Makes what a pool needs, however often that takes, unless it was given up or changed meanwhile.
    async fn keep_at_last(self: Rc<Self>, id: String, spec: PoolSpec) {
        let service = Rc::downgrade(&self);
        drop(self);
        let mut wait = FIRST_RETRY;
        loop {
            let Some(service) = service.upgrade() else { return };
            let wanted =
                |pools: &BTreeMap<String, Kept>| pools.get(&id).is_some_and(|kept| kept.spec == spec);
            if !wanted(&service.pools.borrow()) {
                return;
            }
            let result = service.keep(&id, &spec).await;
            if let Some(kept) = service.pools.borrow_mut().get_mut(&id).filter(|kept| kept.spec == spec) {
                kept.error = result.as_ref().err().map(ToString::to_string);
            }
            match result {
                Ok(()) => return,
                Err(error) => tracing::error!(pool = id, %error, ?wait, "a pool is not kept; tried again"),
            }
            drop(service);
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(LAST_RETRY);
        }
    }

    async fn keep(&self, id: &str, spec: &PoolSpec) -> Result<(), ServiceError> {
        let shape = self.pool_shape(id, spec).await?;
        let template = self.templates.get(&shape, &self.pool).await?;
        let policy = Policy {
            low: spec.min,
            high: spec.max,
            max: spec.max.max(spec.min + 1),
            parked: spec.max,
            refill_per_s: spec.refill_per_s,
            ..Policy::default()
        };
        // Nothing is waited for between this look and the order to the pool.
        match self.pools.borrow_mut().get_mut(id).filter(|kept| kept.spec == *spec) {
            Some(kept) => kept.shape = Some(shape),
            None => return Ok(()),
        }
        Ok(self.pool.add(Rc::clone(&template.key), template.source.clone(), policy).await?)
    }

    /// A pool by its name.
    ///
    /// # Errors
    /// If there is none.
    pub async fn pool_view(&self, id: &str) -> Result<PoolView, ServiceError> {
        let kept = self.pools.borrow().get(id).cloned();
        let kept = kept.ok_or_else(|| ServiceError::NotFound { what: "pool", name: id.to_owned() })?;
        let stats = match kept.shape.as_ref().and_then(|shape| self.templates.made(shape)) {
            Some(template) => self.pool.stats(Rc::clone(&template.key)).await,
            None => None,
        };
        Ok(PoolView { spec: kept.spec, id: id.to_owned(), stats, error: kept.error })
    }

    /// All pools, by name.
    pub async fn pool_views(&self) -> Vec<PoolView> {
        let ids: Vec<String> = self.pools.borrow().keys().cloned().collect();
        let mut views = Vec::with_capacity(ids.len());
        for id in ids {
            views.extend(self.pool_view(&id).await.ok());
        }
        views
    }

    /// Keeps a pool no longer: its idle workers end. One of the configuration comes back with the next daemon.
    ///
    /// # Errors
    /// If there is none.
    pub async fn remove_pool(&self, id: &str) -> Result<(), ServiceError> {
        let none = || ServiceError::NotFound { what: "pool", name: id.to_owned() };
        if !self.pools.borrow().contains_key(id) {
            return Err(none());
        }
        self.registry.remove_pool(id)?;
        let kept = self.pools.borrow_mut().remove(id).ok_or_else(none)?;
        if let Some(template) = kept.shape.and_then(|shape| self.templates.made(&shape)) {
            // On demand it is still there for whoever asks.
            self.pool.add(Rc::clone(&template.key), template.source.clone(), on_demand()).await?;
        }
        Ok(())
    }
}
