//! create: a clone of a template, from the pool or made now.

use super::sandbox::{Running, Sandbox, Spec, State, Tenant};
use super::templates::{Shape, Template};
use super::{Service, ServiceError, Usage, ids};
use crate::conversation::{Conversation, HUNG_UP};
use crate::executor;
use crate::images::{self, Image};
use crate::pool::{Begun, CheckedOut, Shell, Source};
use crate::registry::MadeWith;
use jiff::Timestamp;
use peregrine_vmm::agent::Identity;
use peregrine_vmm::priority;
use peregrine_vmm::worker::{Worker, WorkerError};
use serde_json::json;
use std::cell::Cell;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};

/// A guest may take this long to accept its identity: it has nothing else to do.
const ADOPT_TIMEOUT: Duration = Duration::from_secs(60);
/// Workers that a create may find dead before it gives up.
const MOST_DEAD_WORKERS: usize = 32;
/// Longest environment, all variables together.
const MOST_ENV_BYTES: usize = 32 * 1024;

/// What is asked for; `None` is the configuration's default.
#[derive(Debug, Clone, Default)]
pub struct CreateRequest {
    /// Image.
    pub image: Option<String>,
    /// Virtual CPUs.
    pub vcpus: Option<u32>,
    /// Memory.
    pub mem_mib: Option<u64>,
    /// Disk.
    pub disk_mib: Option<u64>,
    /// Idleness in seconds after which it ends; 0 or less never.
    pub timeout_s: Option<f64>,
    /// Environment of its commands.
    pub env: Vec<(String, String)>,
    /// Idle for its timeout, it hibernates and does not end.
    pub sleeps_when_idle: bool,
    /// A named network policy.
    pub network_profile: Option<String>,
    /// The request as its client will know it again.
    pub made_with: Option<MadeWith>,
}

/// Counts a sandbox that is being made.
struct Making<'s>(&'s Cell<usize>);

impl<'s> Making<'s> {
    fn new(count: &'s Cell<usize>) -> Self {
        count.set(count.get() + 1);
        Self(count)
    }
}

impl Drop for Making<'_> {
    fn drop(&mut self) {
        self.0.set(self.0.get() - 1);
    }
}

impl Service {
    /// Makes a sandbox: when this returns its guest runs.
    ///
    /// # Errors
    /// Why not; then there is none.
    pub async fn create(
        self: &Rc<Self>,
        tenant: &Tenant,
        request: &CreateRequest,
    ) -> Result<Rc<Sandbox>, ServiceError> {
        let begun = Instant::now();
        let spec = self.spec(request).await?;
        self.admit(tenant, 1, &spec.shape)?;
        let _making = Making::new(&self.making);
        let template = self.templates.get(&spec.shape, &self.pool).await?;
        let id = ids::run_id(self.config.node)?;
        let mut recorded = false;
        let settle = |guest, hit| {
            let sandbox = self.settle(&id, tenant, spec.clone(), guest)?;
            // For the row, until that is written again.
            sandbox.create.set(begun.elapsed());
            sandbox.made_with.replace(request.made_with.clone());
            if !recorded {
                let data = json!({
                    "image": sandbox.spec.shape.image.name, "vcpus": sandbox.spec.shape.vcpus,
                    "mem_mib": sandbox.spec.shape.mem_mib, "pool_hit": hit,
                });
                self.journal.append(tenant, &id, "sandbox.created", data)?;
                recorded = true;
            }
            self.register(std::slice::from_ref(&sandbox))?;
            Ok(sandbox)
        };
        match self.begin(&template, &id, settle).await {
            Ok(sandbox) => {
                sandbox.create.set(begun.elapsed());
                self.know(&sandbox);
                Ok(sandbox)
            }
            Err(error) => {
                if recorded {
                    self.unmake(tenant, &id, &error);
                }
                Err(error)
            }
        }
    }

    /// Lets a guest go in a worker of the pool, and has `settle` make and record a sandbox of it while the worker does so. A
    /// worker that has died in the pool is noticed now, and another is taken.
    async fn begin(
        &self,
        template: &Template,
        id: &str,
        mut settle: impl FnMut(Begun, bool) -> Result<Rc<Sandbox>, ServiceError>,
    ) -> Result<Rc<Sandbox>, ServiceError> {
        let identity = identity(id)?;
        let mut left = MOST_DEAD_WORKERS;
        loop {
            let CheckedOut { shell, hit } = self.pool.checkout(Rc::clone(&template.key)).await?;
            let begun = match self.parked(shell, &template.source).await {
                Ok(shell) => shell.begin(&identity),
                Err(error) => Err(error),
            };
            let error = match begun {
                Ok(guest) => {
                    let sandbox = settle(guest, hit)?;
                    match self.went(&sandbox).await {
                        Ok(()) => return Ok(sandbox),
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            match error {
                WorkerError::Io(error) if left > 0 => {
                    tracing::warn!(%error, "a worker of the pool is gone");
                    left -= 1;
                }
                WorkerError::Stuck if left > 0 => {
                    tracing::warn!(%error, "a worker of the pool is stuck");
                    // It took long to find out.
                    left = 0;
                }
                error => return Err(error.into()),
            }
        }
    }

    /// Waits until the guest of a sandbox that was told to go runs.
    async fn went(&self, sandbox: &Sandbox) -> Result<(), WorkerError> {
        let Ok(running) = sandbox.running() else { return Ok(()) };
        let hurry = || {
            // Where there are several, they wait for each other, and nothing is won.
            if self.making.get() == 1 {
                let _ = priority::bring(running.pid);
            }
        };
        running.went(self.config.limits.patience(), hurry).await
    }

    /// A sandbox that is recorded does not run after all, and nobody was told of it.
    fn unmake(&self, tenant: &str, id: &str, why: &ServiceError) {
        let data = json!({ "ran_ms": 0, "cpu_ms": 0, "why": why.to_string() });
        // Says itself that it failed.
        let _ = self.journal.append(tenant, id, "sandbox.destroyed", data);
        if let Err(error) = self.registry.forget_run(id) {
            // The next daemon finds a sandbox whose worker is gone.
            tracing::error!(id, %error, "a sandbox that does not run stays in the registry");
        }
    }

    /// A worker of the pool that stands ready: most do, the others are made so now.
    async fn parked(&self, shell: Shell, source: &Source) -> Result<Shell, WorkerError> {
        if shell.is_parked() {
            return Ok(shell);
        }
        let (source, places) = (source.clone(), self.places.clone());
        executor::blocking(move || shell.park(&source, &places)).await
    }

    /// The image of this name; one that is not here is pulled.
    pub(super) async fn image(&self, name: &str) -> Result<Image, ServiceError> {
        let (aliases, artefacts) = (&self.config.image_aliases, self.templates.artefacts());
        if let Some(image) = images::built_in(name, aliases, artefacts) {
            return Ok(image);
        }
        let (name, aliases, artefacts) = (name.to_owned(), aliases.clone(), artefacts.clone());
        Ok(executor::blocking(move || images::find_or_pull(&name, &aliases, &artefacts)).await?)
    }

    /// What is asked for, with the defaults, if it can be.
    async fn spec(&self, request: &CreateRequest) -> Result<Spec, ServiceError> {
        let (defaults, limits) = (&self.config.defaults, &self.config.limits);
        let name = request.image.as_deref().unwrap_or(&defaults.image);
        let vcpus = request.vcpus.unwrap_or(defaults.vcpus);
        let mem_mib = request.mem_mib.unwrap_or(defaults.mem_mib);
        if !(1..=limits.vcpus_per_sandbox).contains(&vcpus) {
            let why = format!("{vcpus}, but must be 1 to {}", limits.vcpus_per_sandbox);
            return Err(ServiceError::bad("vcpus", why));
        }
        if mem_mib > limits.mem_mib_per_sandbox {
            let why = format!("{mem_mib}, but must be at most {}", limits.mem_mib_per_sandbox);
            return Err(ServiceError::bad("mem_mib", why));
        }
        peregrine_vmm::vm::check_size(vcpus, mem_mib)
            .map_err(|error| ServiceError::bad("mem_mib", error.to_string()))?;
        if let Some(name) = &request.network_profile
            && !self.config.network_profiles.iter().any(|profile| profile.name == *name)
        {
            return Err(ServiceError::bad("network_profile", format!("there is no profile {name:?}")));
        }
        let timeout_s = request.timeout_s.unwrap_or(seconds(defaults.timeout_s));
        Ok(Spec {
            // Last: it may take long.
            shape: Shape { image: self.image(name).await?, vcpus, mem_mib },
            disk_mib: request.disk_mib.unwrap_or(defaults.disk_mib),
            timeout: idleness(timeout_s)?,
            sleeps_when_idle: request.sleeps_when_idle,
            env: environment(&request.env)?,
        })
    }

    /// Whether there may be `more` of this shape.
    pub(super) fn admit(&self, tenant: &str, more: usize, shape: &Shape) -> Result<(), ServiceError> {
        let limits = &self.config.limits;
        let sandboxes = self.sandboxes.borrow();
        let runs = |s: &&Rc<Sandbox>| matches!(*s.state.borrow(), State::Running(_));
        let making = self.making.get() + more;
        let exhausted =
            |what, limit| Err(ServiceError::Capacity { what, limit, retry_after: Duration::from_secs(2) });
        if sandboxes.values().filter(runs).count() + making > limits.sandboxes {
            return exhausted("sandboxes", format!("{} may run on this node", limits.sandboxes));
        }
        let theirs = sandboxes.values().filter(|s| &*s.tenant == tenant).filter(runs).count();
        if theirs + making > limits.sandboxes_per_tenant {
            return exhausted("sandboxes", format!("{} may run for this key", limits.sandboxes_per_tenant));
        }
        let mem_mib: u64 = sandboxes.values().filter(runs).map(|s| s.spec.shape.mem_mib).sum();
        if limits.mem_mib > 0 && mem_mib + shape.mem_mib * making as u64 > limits.mem_mib {
            return exhausted("MiB of memory", format!("{} may be given to sandboxes", limits.mem_mib));
        }
        Ok(())
    }

    /// A sandbox of a guest that has just begun to run; nobody knows it yet.
    pub(super) fn settle(
        &self,
        id: &str,
        tenant: &Tenant,
        spec: Spec,
        begun: Begun,
    ) -> Result<Rc<Sandbox>, ServiceError> {
        let sandbox = Sandbox::new(id, Rc::clone(tenant), spec, Timestamp::now(), Usage::default());
        sandbox.runs(begin_conversation(begun)?);
        Ok(Rc::new(sandbox))
    }

    /// Makes sandboxes known: to the audit log, to the registry (all or none), to their tenant. From then on their
    /// ends are noticed.
    #[allow(clippy::needless_pass_by_value)]
    pub(super) fn publish(
        self: &Rc<Self>,
        made: &[Rc<Sandbox>],
        event: &'static str,
        data: serde_json::Value,
    ) -> Result<(), ServiceError> {
        for sandbox in made {
            self.journal.append(&sandbox.tenant, &sandbox.id, event, data.clone())?;
        }
        self.register(made)?;
        made.iter().for_each(|sandbox| self.know(sandbox));
        Ok(())
    }

    fn register(&self, made: &[Rc<Sandbox>]) -> Result<(), ServiceError> {
        // They have used nothing yet: two files of /proc are not read for that.
        let rows: Vec<_> = made.iter().map(|sandbox| self.row_with(sandbox, Usage::default())).collect();
        Ok(self.registry.put_runs(&rows)?)
    }

    /// Makes a sandbox known to its tenant.
    fn know(self: &Rc<Self>, sandbox: &Rc<Sandbox>) {
        self.sandboxes.borrow_mut().insert(Rc::clone(&sandbox.id), Rc::clone(sandbox));
        self.watch(sandbox);
    }

    /// What a tenant's request with this key has made and is still there, in the order of its making.
    #[must_use]
    pub fn made_with(&self, tenant: &str, key: &str) -> Vec<(Rc<Sandbox>, MadeWith)> {
        let made = self.sandboxes(tenant).into_iter().filter_map(|sandbox| {
            let with = sandbox.made_with.borrow().clone().filter(|with| with.key == key)?;
            Some((sandbox, with))
        });
        made.collect()
    }

    /// Notices when the sandbox's present worker ends by itself.
    pub(super) fn watch(self: &Rc<Self>, sandbox: &Rc<Sandbox>) {
        let Ok(Running { conversation, pid, .. }) = sandbox.running() else { return };
        let (service, sandbox) = (Rc::downgrade(self), Rc::downgrade(sandbox));
        executor::spawn(async move {
            let adopted = tokio::time::timeout(ADOPT_TIMEOUT, conversation.adopted()).await;
            let why = match adopted {
                Err(_) => "it did not take its identity in time".into(),
                Ok(_) => {
                    // Held no longer than needed: the conversation ends when the sandbox lets go of it.
                    let ended = conversation.ended().await;
                    drop(conversation);
                    explained(&sandbox, pid, ended.0).await
                }
            };
            if let (Some(service), Some(sandbox)) = (service.upgrade(), sandbox.upgrade()) {
                service.lose(&sandbox, pid, &why);
            }
        });
    }
}

/// The end of the agent's connection is a symptom: why the microVM stopped is what its owner needs to know.
async fn explained(sandbox: &Weak<Sandbox>, pid: u32, why: Rc<str>) -> Rc<str> {
    let running = sandbox.upgrade().and_then(|sandbox| sandbox.running().ok());
    // What was destroyed, or runs elsewhere by now, is not asked.
    let Some(running) = running.filter(|running| running.pid == pid && &*why == HUNG_UP) else { return why };
    match running.with_worker(Worker::why).await {
        Ok(Some(reason)) => format!("{why}: {reason}").into(),
        Ok(None) => "its agent has ended".into(),
        Err(error) => format!("{why}: {error}").into(),
    }
}

/// The identity of a sandbox: its host name is its id.
pub(super) fn identity(id: &str) -> std::io::Result<Identity> {
    Ok(Identity { hostname: id.to_owned(), ..Identity::fresh()? })
}

/// From here on the guest is spoken to without blocking.
pub(super) fn begin_conversation(begun: Begun) -> Result<Running, ServiceError> {
    let Begun { worker, agent, pid, rendezvous } = begun;
    let (socket, state) = agent.into_parts();
    Ok(Running::new(worker, Conversation::start(socket, state)?, pid, rendezvous))
}

fn seconds(whole: u64) -> f64 {
    #[allow(clippy::cast_precision_loss)]
    let seconds = whole as f64;
    seconds
}

/// Seconds of idleness as clients give them: 0 and less disable.
pub fn idleness(seconds: f64) -> Result<Option<Duration>, ServiceError> {
    if !seconds.is_finite() {
        return Err(ServiceError::bad("timeout", "must be a number of seconds"));
    }
    // A century is for ever.
    Ok((seconds > 0.0).then(|| Duration::from_secs_f64(seconds.min(3.2e9))))
}

fn environment(env: &[(String, String)]) -> Result<Vec<String>, ServiceError> {
    let mut bytes = 0;
    let variable = |(name, value): &(String, String)| {
        bytes += name.len() + value.len() + 2;
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            let why = format!("{name:?} must not be empty, and hold neither '=' nor NUL");
            return Err(ServiceError::bad("env", why));
        }
        if bytes > MOST_ENV_BYTES {
            return Err(ServiceError::bad("env", format!("must be at most {MOST_ENV_BYTES} bytes in all")));
        }
        Ok(format!("{name}={value}"))
    };
    env.iter().map(variable).collect()
}
