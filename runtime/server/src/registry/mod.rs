//! What the daemon remembers: sandboxes, snapshots, what they cost. An embedded database (SQLite, WAL).
//!
//! A row is in the file before its action is acknowledged, so a killed daemon finds it. Rows that a power
//! failure must not lose either (snapshots, hibernated sandboxes, bills) are synced; those of running
//! sandboxes are not, because a power failure ends the sandboxes too.
//!
//! May touch: its file. Must not: know what a row means beyond its columns.

mod pools;
mod rows;

pub use rows::{MadeWith, RunRow, RunningRow, SnapshotRow, Totals};

use rusqlite::{Connection, OptionalExtension as _, params};
use std::path::Path;
use std::time::Duration;

/// How the tables are laid out; bumped with every change, and older ones are brought up to it.
const SCHEMA_VERSION: i64 = 1;
const SCHEMA: &str = "
    CREATE TABLE run (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, status TEXT NOT NULL,
        created_us INTEGER NOT NULL, ended_us INTEGER, record TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX run_of_tenant ON run (tenant, ended_us DESC, id);
    CREATE TABLE snapshot (
        id TEXT PRIMARY KEY, tenant TEXT NOT NULL, created_us INTEGER NOT NULL, record TEXT NOT NULL
    ) WITHOUT ROWID;
    CREATE INDEX snapshot_of_tenant ON snapshot (tenant, created_us DESC);
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
";
/// How often the log is folded into the file, beside the requests' way.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(20);

/// Why the registry failed.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The database did.
    #[error("the registry: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// A row is not what this version writes.
    #[error("a row of the registry is damaged: {0}")]
    Row(#[from] serde_json::Error),
    /// A newer daemon has written it.
    #[error("the registry was written by a newer version ({found}; this one knows {SCHEMA_VERSION})")]
    Newer {
        /// Its version.
        found: i64,
    },
}

/// The registry.
#[derive(Debug)]
pub struct Registry {
    db: Connection,
}

impl Registry {
    /// Opens the file, or makes it.
    ///
    /// # Errors
    /// Why it cannot be used.
    pub fn open(path: &Path) -> Result<Self, RegistryError> {
        let db = Connection::open(path)?;
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "NORMAL")?;
        db.pragma_update(None, "wal_autocheckpoint", 0)?;
        db.set_prepared_statement_cache_capacity(32);
        let found: i64 = db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match found {
            0 => {
                db.execute_batch(&format!("BEGIN; {SCHEMA} PRAGMA user_version = {SCHEMA_VERSION}; COMMIT;"))?
            }
            SCHEMA_VERSION => {}
            found => return Err(RegistryError::Newer { found }),
        }
        fold_beside(path);
        Ok(Self { db })
    }

    /// Writes a sandbox's row, new or changed.
    ///
    /// # Errors
    /// If it is not in the file.
    pub fn put_run(&self, row: &RunRow) -> Result<(), RegistryError> {
        let mut put = self.db.prepare_cached(
            "INSERT INTO run (id, tenant, status, created_us, ended_us, record)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6) ON CONFLICT (id) DO UPDATE
             SET status = excluded.status, ended_us = excluded.ended_us, record = excluded.record",
        )?;
        let record = serde_json::to_string(row)?;
        put.execute(params![row.id, row.tenant, row.status, row.created_us, row.ended_us, record])?;
        Ok(())
    }

    /// As [`Registry::put_run`], all of them or none.
    ///
    /// # Errors
    /// If they are not in the file.
    pub fn put_runs(&self, rows: &[RunRow]) -> Result<(), RegistryError> {
        // One statement is a transaction by itself.
        if let [row] = rows {
            return self.put_run(row);
        }
        let all = self.db.unchecked_transaction()?;
        rows.iter().try_for_each(|row| self.put_run(row))?;
        Ok(all.commit()?)
    }

    /// Forgets a sandbox that nobody was told of.
    ///
    /// # Errors
    /// If it is still in the file.
    pub fn forget_run(&self, id: &str) -> Result<(), RegistryError> {
        self.db.prepare_cached("DELETE FROM run WHERE id = ?1")?.execute(params![id])?;
        Ok(())
    }

    /// As [`Registry::put_run`], and a power failure does not lose it.
    ///
    /// # Errors
    /// If it may not be on the disk.
    pub fn put_run_durably(&self, row: &RunRow) -> Result<(), RegistryError> {
        self.durably(|| self.put_run(row))
    }

    /// A sandbox's row, of this tenant.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn run(&self, tenant: &str, id: &str) -> Result<Option<RunRow>, RegistryError> {
        let mut get = self.db.prepare_cached("SELECT record FROM run WHERE id = ?1 AND tenant = ?2")?;
        let text: Option<String> = get.query_row(params![id, tenant], |row| row.get(0)).optional()?;
        Ok(text.map(|text| serde_json::from_str(&text)).transpose()?)
    }

    /// All sandboxes that had not ended, of all tenants: for the daemon's start.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn unended(&self) -> Result<Vec<RunRow>, RegistryError> {
        let mut get = self.db.prepare_cached("SELECT record FROM run WHERE ended_us IS NULL")?;
        let texts = get.query_map([], |row| row.get::<_, String>(0))?;
        texts.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
    }

    /// A tenant's sandboxes that have ended, newest first, from after `(ended_us, id)` on.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn history(
        &self,
        tenant: &str,
        before: Option<(i64, &str)>,
        limit: usize,
    ) -> Result<Vec<RunRow>, RegistryError> {
        let (ended_us, id) = before.unwrap_or((i64::MAX, ""));
        let mut get = self.db.prepare_cached(
            "SELECT record FROM run WHERE tenant = ?1 AND ended_us IS NOT NULL
             AND (ended_us < ?2 OR (ended_us = ?2 AND id > ?3))
             ORDER BY ended_us DESC, id LIMIT ?4",
        )?;
        let limit = i64::try_from(limit).unwrap_or(i64::MAX);
        let texts = get.query_map(params![tenant, ended_us, id, limit], |row| row.get::<_, String>(0))?;
        texts.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
    }

    /// What a tenant's ended sandboxes have cost together.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn totals(&self, tenant: &str) -> Result<Totals, RegistryError> {
        let mut get = self.db.prepare_cached(
            "SELECT count(*), total(record ->> 'cost_cents'), total(record ->> 'cpu_ms'),
                    total((record ->> 'ran_ms') * (record ->> 'mem_mib') / 1024.0)
             FROM run WHERE tenant = ?1 AND ended_us IS NOT NULL",
        )?;
        Ok(get.query_row(params![tenant], |row| {
            Ok(Totals {
                sandboxes: u64::try_from(row.get::<_, i64>(0)?).unwrap_or_default(),
                cost_cents: row.get(1)?,
                cpu_ms: row.get(2)?,
                gib_ms: row.get(3)?,
            })
        })?)
    }

    /// Writes a snapshot's row; a power failure does not lose it.
    ///
    /// # Errors
    /// If it may not be on the disk.
    pub fn put_snapshot(&self, row: &SnapshotRow) -> Result<(), RegistryError> {
        self.durably(|| {
            let mut put = self.db.prepare_cached(
                "INSERT INTO snapshot (id, tenant, created_us, record) VALUES (?1, ?2, ?3, ?4)",
            )?;
            put.execute(params![row.id, row.tenant, row.created_us, serde_json::to_string(row)?])?;
            Ok(())
        })
    }

    /// A snapshot's row, of this tenant.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn snapshot(&self, tenant: &str, id: &str) -> Result<Option<SnapshotRow>, RegistryError> {
        let mut get = self.db.prepare_cached("SELECT record FROM snapshot WHERE id = ?1 AND tenant = ?2")?;
        let text: Option<String> = get.query_row(params![id, tenant], |row| row.get(0)).optional()?;
        Ok(text.map(|text| serde_json::from_str(&text)).transpose()?)
    }

    /// A tenant's snapshots, newest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn snapshots(&self, tenant: &str) -> Result<Vec<SnapshotRow>, RegistryError> {
        let mut get = self
            .db
            .prepare_cached("SELECT record FROM snapshot WHERE tenant = ?1 ORDER BY created_us DESC, id")?;
        let texts = get.query_map(params![tenant], |row| row.get::<_, String>(0))?;
        texts.map(|text| Ok(serde_json::from_str(&text?)?)).collect()
    }

    /// The ids of all snapshots, of all tenants: for the daemon's start.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn snapshot_ids(&self) -> Result<Vec<String>, RegistryError> {
        let mut get = self.db.prepare_cached("SELECT id FROM snapshot")?;
        let ids = get.query_map([], |row| row.get(0))?;
        Ok(ids.collect::<Result<_, _>>()?)
    }

    /// Forgets a snapshot. False: there was none.
    ///
    /// # Errors
    /// If it may come back after a power failure.
    pub fn remove_snapshot(&self, tenant: &str, id: &str) -> Result<bool, RegistryError> {
        self.durably(|| {
            let mut remove = self.db.prepare_cached("DELETE FROM snapshot WHERE id = ?1 AND tenant = ?2")?;
            Ok(remove.execute(params![id, tenant])? > 0)
        })
    }

    fn durably<T>(&self, write: impl FnOnce() -> Result<T, RegistryError>) -> Result<T, RegistryError> {
        self.db.pragma_update(None, "synchronous", "FULL")?;
        let result = write();
        self.db.pragma_update(None, "synchronous", "NORMAL")?;
        result
    }
}

/// Folds the log into the file now and then, on a thread of its own: it syncs, and a request must not wait for
/// that. The thread ends with the process; a checkpoint may be cut off at any point.
fn fold_beside(path: &Path) {
    let path = path.to_owned();
    let folding = move || {
        // Nobody waits for it.
        let _ = peregrine_vmm::priority::equal();
        loop {
            std::thread::sleep(CHECKPOINT_EVERY);
            if let Err(error) = fold(&path) {
                tracing::warn!(%error, "the registry's log cannot be folded");
            }
        }
    };
    if let Err(error) = std::thread::Builder::new().name("registry-fold".to_owned()).spawn(folding) {
        tracing::warn!(%error, "the registry's log will not be folded");
    }
}

fn fold(path: &Path) -> rusqlite::Result<()> {
    let db = Connection::open(path)?;
    db.pragma_update(None, "synchronous", "NORMAL")?;
    db.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
    // The first write after that begins the log anew and syncs its head, 5 ms: let it be this one.
    db.pragma_update(None, "user_version", SCHEMA_VERSION)
}

#[cfg(test)]
mod tests;
