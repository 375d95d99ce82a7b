//! What a tenant's sandboxes cost, those that are there and those that were.

use super::{Service, ServiceError};
use crate::registry::{RunRow, Totals};

impl Service {
    /// Sandboxes that have ended, newest first, from after `(ended_us, id)` on.
    ///
    /// # Errors
    /// If the registry fails.
    pub fn history(
        &self,
        tenant: &str,
        after: Option<(i64, &str)>,
        limit: usize,
    ) -> Result<Vec<RunRow>, ServiceError> {
        Ok(self.registry.history(tenant, after, limit)?)
    }

    /// Whether there is, or was, such a sandbox of this tenant.
    ///
    /// # Errors
    /// If not.
    pub fn known(&self, tenant: &str, id: &str) -> Result<(), ServiceError> {
        if self.sandbox(tenant, id).is_ok() || self.registry.run(tenant, id)?.is_some() {
            return Ok(());
        }
        Err(ServiceError::no_sandbox(id))
    }

    /// Sums over the sandboxes that are there, and over those that were.
    ///
    /// # Errors
    /// If the registry fails.
    pub fn usage(&self, tenant: &str) -> Result<(Totals, Totals), ServiceError> {
        let mut active = Totals::default();
        for sandbox in self.sandboxes(tenant) {
            let row = self.row(&sandbox);
            // A lost one is in the history already.
            if row.ended_us.is_none() {
                active.sandboxes += 1;
                active.cost_cents += row.cost_cents;
                #[allow(clippy::cast_precision_loss)]
                {
                    active.cpu_ms += row.cpu_ms as f64;
                    active.gib_ms += row.ran_ms as f64 * row.mem_mib as f64 / 1024.0;
                }
            }
        }
        Ok((active, self.registry.totals(tenant)?))
    }
}
