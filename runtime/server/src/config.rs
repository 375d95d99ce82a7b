//! The daemon's configuration: a TOML file, whose every field has a default, and flags that win over it.

use serde::Deserialize;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// All of it.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// Where the API is served.
    pub listen: SocketAddr,
    /// The region in keys and in answers: letters, digits and hyphens.
    pub region: String,
    /// This node in a fleet, in every id: 0 to 65535.
    pub node: u16,
    /// Hosts `<port>-<id>.<domain>` and `<id>.<domain>` are sandboxes' ports.
    pub domain: String,
    /// What a sandbox is when the request does not say.
    pub defaults: Defaults,
    /// What there may be at most.
    pub limits: Limits,
    /// What it costs.
    pub prices: Prices,
    /// Names that stand for other images.
    pub image_aliases: BTreeMap<String, String>,
    /// Named network policies.
    pub network_profiles: Vec<NetworkProfile>,
    /// What becomes of running sandboxes at SIGTERM and SIGINT.
    pub on_stop: OnStop,
    /// Templates that are kept ready from the start. What was set while a daemon ran wins over them.
    pub pools: Vec<PoolSpec>,
}

/// What becomes of running sandboxes when the daemon is stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnStop {
    /// They end.
    #[default]
    Destroy,
    /// They run on for the next daemon, as when this one is killed.
    Keep,
}

/// A sandbox when the request does not say.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Image.
    pub image: String,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory.
    pub mem_mib: u64,
    /// Disk.
    pub disk_mib: u64,
    /// Idleness after which it ends; 0 never.
    pub timeout_s: u64,
    /// Longest run of a command.
    pub exec_timeout_s: u64,
}

/// Bounds.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Sandboxes that run, of all tenants.
    pub sandboxes: usize,
    /// Sandboxes that run, of one tenant.
    pub sandboxes_per_tenant: usize,
    /// Guest memory of all that run; 0 is no bound (guests share what they do not write).
    pub mem_mib: u64,
    /// Virtual CPUs of one sandbox.
    pub vcpus_per_sandbox: u32,
    /// Memory of one sandbox.
    pub mem_mib_per_sandbox: u64,
    /// Requests a second of one tenant, in the long run; 0 is no bound.
    pub requests_per_s: f64,
    /// Requests that may come at once after a quiet time.
    pub request_burst: u32,
    /// Bytes of a JSON body.
    pub json_bytes: usize,
    /// Bytes of output that an answer (not a stream) holds, of each of stdout and stderr.
    pub output_bytes: usize,
    /// Seconds that a request's head may take from its first byte to its last.
    pub head_s: u64,
    /// Seconds that a body may take without a byte.
    pub body_s: u64,
    /// Seconds that a connection may be idle.
    pub idle_s: u64,
    /// Seconds after which a microVM's process that does not answer is called stuck: what is asked of it ends.
    pub watchdog_s: u64,
    /// Memory of the prewarm pool.
    pub pool_mib: u64,
    /// Seconds that a running sandbox waits for the next daemon when this one was killed; 0 ends it with the daemon.
    pub orphan_s: u64,
}

/// Money, in cents.
#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prices {
    /// One virtual CPU with 1 GiB of memory, for an hour.
    pub vcpu_hour_cents: f64,
    /// Each GiB more, for an hour.
    pub gib_hour_cents: f64,
}

/// A named network policy.
#[derive(Debug, Clone, Deserialize, serde::Serialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkProfile {
    /// Its name.
    pub name: String,
    /// For people.
    #[serde(default)]
    pub description: String,
    /// Hosts that may be reached.
    #[serde(default)]
    pub allow: Vec<String>,
    /// Hosts that may not, whatever `allow` says.
    #[serde(default)]
    pub deny: Vec<String>,
}

/// A template kept ready.
#[derive(Debug, Clone, PartialEq, Deserialize, serde::Serialize)]
#[serde(deny_unknown_fields)]
pub struct PoolSpec {
    /// Image.
    pub image: String,
    /// Virtual CPUs.
    #[serde(default = "one")]
    pub vcpus: u32,
    /// Memory.
    pub mem_mib: u64,
    /// Workers kept whatever the demand.
    pub min: usize,
    /// Workers that demand may raise it to.
    pub max: usize,
    /// Refill in the long run.
    #[serde(default = "hundred")]
    pub refill_per_s: f64,
}

fn one() -> u32 {
    1
}

fn hundred() -> f64 {
    100.0
}

impl Default for Config {
    fn default() -> Self {
        // More are the operator's: which hosts a package comes from is not for this program to say.
        let none = NetworkProfile {
            name: "none".to_owned(),
            description: "no network".to_owned(),
            allow: Vec::new(),
            deny: Vec::new(),
        };
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 8700)),
            region: "local".to_owned(),
            node: 0,
            domain: "localhost".to_owned(),
            defaults: Defaults::default(),
            limits: Limits::default(),
            prices: Prices::default(),
            image_aliases: BTreeMap::new(),
            network_profiles: vec![none],
            on_stop: OnStop::default(),
            pools: Vec::new(),
        }
    }
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            image: "node:22-slim".to_owned(),
            vcpus: 1,
            mem_mib: 1024,
            disk_mib: 4096,
            timeout_s: 300,
            exec_timeout_s: 30,
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sandboxes: 1000,
            sandboxes_per_tenant: 1000,
            mem_mib: 0,
            vcpus_per_sandbox: 32,
            mem_mib_per_sandbox: 32 * 1024,
            requests_per_s: 0.0,
            request_burst: 1000,
            json_bytes: 1 << 20,
            output_bytes: 8 << 20,
            head_s: 10,
            body_s: 60,
            idle_s: 300,
            watchdog_s: 30,
            pool_mib: 1024,
            orphan_s: 600,
        }
    }
}

impl Limits {
    /// How long a sandbox goes unobserved while something is asked of it.
    pub(crate) fn look_every(&self) -> Duration {
        Duration::from_secs(self.watchdog_s) / 3
    }

    /// How long its process may then take to answer: with the look before it, as long as the watchdog waits.
    pub(crate) fn patience(&self) -> Duration {
        Duration::from_secs(self.watchdog_s) * 2 / 3
    }
}

impl Default for Prices {
    fn default() -> Self {
        Self { vcpu_hour_cents: 4.1, gib_hour_cents: 0.0 }
    }
}

impl Prices {
    /// What a sandbox of this size costs for this time.
    #[must_use]
    pub fn cents(&self, vcpus: u32, mem_mib: u64, ran: Duration) -> f64 {
        let hours = ran.as_secs_f64() / 3600.0;
        #[allow(clippy::cast_precision_loss)]
        let more_gib = (mem_mib as f64 / 1024.0 - f64::from(vcpus)).max(0.0);
        hours * (f64::from(vcpus) * self.vcpu_hour_cents + more_gib * self.gib_hour_cents)
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("cannot read the configuration {path}: {source}")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What is in it.
    #[error("the configuration {path}: {source}")]
    Parse {
        /// Which.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// A value.
    #[error("the configuration: {field} {problem}")]
    Value {
        /// Which.
        field: &'static str,
        /// What is wrong.
        problem: &'static str,
    },
}

impl Config {
    /// Reads a file.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        toml::from_str(&text)
            .map_err(|source| ConfigError::Parse { path: path.to_owned(), source: Box::new(source) })
    }

    /// Whether its values can be.
    ///
    /// # Errors
    /// The first that cannot.
    pub fn check(&self) -> Result<(), ConfigError> {
        let need = |holds, field, problem| {
            if holds { Ok(()) } else { Err(ConfigError::Value { field, problem }) }
        };
        let word = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        };
        need(word(&self.region), "region", "must be lower-case letters, digits and hyphens")?;
        need(!self.domain.is_empty(), "domain", "must not be empty")?;
        need(self.limits.json_bytes >= 1024, "limits.json_bytes", "must be 1024 or more")?;
        need(self.limits.head_s >= 1, "limits.head_s", "must be 1 or more")?;
        need(self.limits.body_s >= 1, "limits.body_s", "must be 1 or more")?;
        need(self.limits.idle_s >= 1, "limits.idle_s", "must be 1 or more")?;
        need(self.limits.watchdog_s >= 3, "limits.watchdog_s", "must be 3 or more")?;
        need(self.limits.requests_per_s >= 0.0, "limits.requests_per_s", "must be 0 or more")?;
        need(self.prices.vcpu_hour_cents >= 0.0, "prices.vcpu_hour_cents", "must be 0 or more")?;
        need(self.prices.gib_hour_cents >= 0.0, "prices.gib_hour_cents", "must be 0 or more")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_with_a_gib_costs_the_price_and_more_memory_only_if_it_has_one() {
        let hour = Duration::from_secs(3600);
        let prices = Prices { vcpu_hour_cents: 4.0, gib_hour_cents: 1.0 };
        assert!((prices.cents(1, 1024, hour) - 4.0).abs() < 1e-9);
        assert!((prices.cents(2, 4096, hour / 2) - 5.0).abs() < 1e-9);
        assert!((Prices::default().cents(1, 8192, hour) - 4.1).abs() < 1e-9);
    }

    #[test]
    fn a_misspelt_field_is_an_error_that_names_it() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("c.toml");
        std::fs::write(&path, "[limits]\nsandboxs = 3\n").unwrap();
        let text = Config::read(&path).unwrap_err().to_string();
        assert!(text.contains("sandboxs"), "{text}");
        std::fs::write(&path, "region = \"Nope!\"\n").unwrap();
        assert!(Config::read(&path).unwrap().check().is_err());
    }
}
