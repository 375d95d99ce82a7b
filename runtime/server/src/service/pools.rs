//! Pools: templates that are kept ready because an operator says so.

use super::templates::on_demand;
use super::{Service, ServiceError, Shape};
use crate::config::PoolSpec;
use crate::pool::PoolStats;
use prewarm::Policy;
use std::rc::Rc;

/// Workers of one template at most.
const MOST: usize = 1000;

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
    shape: Shape,
    error: Option<String>,
}

/// What distinguishes pools.
fn name(spec: &PoolSpec) -> String {
    let image: String = spec.image.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
    format!("{image}.{}.{}", spec.vcpus, spec.mem_mib)
}

impl Service {
    /// Keeps a pool from now on, or changes it; its template is made beside.
    ///
    /// # Errors
    /// If it cannot be.
    pub async fn set_pool(self: &Rc<Self>, spec: PoolSpec) -> Result<PoolView, ServiceError> {
        if spec.min > spec.max || spec.max == 0 || spec.max > MOST {
            let why =
                format!("min {} and max {}, but must be min <= max, 1 <= max <= {MOST}", spec.min, spec.max);
            return Err(ServiceError::bad("max", why));
        }
        if !spec.refill_per_s.is_finite() || spec.refill_per_s < 0.0 {
            return Err(ServiceError::bad("refill_per_s", "must be 0 or more"));
        }
        let shape = self.pool_shape(&spec).await?;
        let id = name(&spec);
        let same = |(other, kept): (&String, &Kept)| *other != id && kept.shape.content() == shape.content();
        if let Some((other, _)) = self.pools.borrow().iter().find(|pool| same(*pool)) {
            let why = format!("it is the image of the pool {other}: change that, or delete it first");
            return Err(ServiceError::bad("image", why));
        }
        let kept = Kept { spec: spec.clone(), shape: shape.clone(), error: None };
        self.pools.borrow_mut().insert(id.clone(), kept);
        let (service, of) = (Rc::clone(self), id.clone());
        crate::executor::spawn(async move {
            let result = service.keep(&spec, &shape).await;
            if let (Err(error), Some(kept)) = (result, service.pools.borrow_mut().get_mut(&of)) {
                tracing::error!(pool = of, %error, "a pool is not kept");
                kept.error = Some(error.to_string());
            }
        });
        self.pool_view(&id).await
    }

    async fn pool_shape(&self, spec: &PoolSpec) -> Result<Shape, ServiceError> {
        peregrine_vmm::vm::check_size(spec.vcpus, spec.mem_mib)
            .map_err(|error| ServiceError::bad("mem_mib", error.to_string()))?;
        Ok(Shape { image: self.image(&spec.image).await?, vcpus: spec.vcpus, mem_mib: spec.mem_mib })
    }

    async fn keep(&self, spec: &PoolSpec, shape: &Shape) -> Result<(), ServiceError> {
        let template = self.templates.get(shape, &self.pool).await?;
        let policy = Policy {
            low: spec.min,
            high: spec.max,
            max: spec.max.max(spec.min + 1),
            parked: spec.max,
            refill_per_s: spec.refill_per_s,
            ..Policy::default()
        };
        Ok(self.pool.add(Rc::clone(&template.key), template.source.clone(), policy).await?)
    }

    /// A pool by its name.
    ///
    /// # Errors
    /// If there is none.
    pub async fn pool_view(&self, id: &str) -> Result<PoolView, ServiceError> {
        let kept = self.pools.borrow().get(id).cloned();
        let kept = kept.ok_or_else(|| ServiceError::NotFound { what: "pool", name: id.to_owned() })?;
        let stats = match self.templates.made(&kept.shape) {
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

    /// Keeps a pool no longer: its idle workers end.
    ///
    /// # Errors
    /// If there is none.
    pub async fn remove_pool(&self, id: &str) -> Result<(), ServiceError> {
        let kept = self.pools.borrow_mut().remove(id);
        let kept = kept.ok_or_else(|| ServiceError::NotFound { what: "pool", name: id.to_owned() })?;
        if let Some(template) = self.templates.made(&kept.shape) {
            // On demand it is still there for whoever asks.
            self.pool.add(Rc::clone(&template.key), template.source.clone(), on_demand()).await?;
        }
        Ok(())
    }
}
