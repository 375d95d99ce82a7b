//! Pools that were set while the daemon ran.

use super::{Registry, RegistryError};
use crate::config::PoolSpec;
use rusqlite::params;

/// Begins the keys of pools among the other facts.
const PREFIX: &str = "pool ";

impl Registry {
    /// Writes a pool, new or changed; a power failure does not lose it.
    ///
    /// # Errors
    /// If it may not be on the disk.
    pub fn put_pool(&self, id: &str, spec: &PoolSpec) -> Result<(), RegistryError> {
        let value = serde_json::to_string(spec)?;
        self.durably(|| {
            let mut put = self.db.prepare_cached(
                "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
            )?;
            put.execute(params![format!("{PREFIX}{id}"), value])?;
            Ok(())
        })
    }

    /// All pools that were set and not given up.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn pools(&self) -> Result<Vec<PoolSpec>, RegistryError> {
        let mut get = self.db.prepare_cached("SELECT value FROM meta WHERE key GLOB ?1 ORDER BY key")?;
        let texts = get.query_map(params![format!("{PREFIX}*")], |row| row.get::<_, String>(0))?;
        texts.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
    }

    /// Forgets a pool.
    ///
    /// # Errors
    /// If it may come back after a power failure.
    pub fn remove_pool(&self, id: &str) -> Result<(), RegistryError> {
        self.durably(|| {
            let mut remove = self.db.prepare_cached("DELETE FROM meta WHERE key = ?1")?;
            remove.execute(params![format!("{PREFIX}{id}")])?;
            Ok(())
        })
    }
}
