//! The daemon, from its start to its end.

use crate::api::{self, App};
use crate::artefacts::Artefacts;
use crate::config::Config;
use crate::executor;
use crate::key::{KeyError, Keys};
use crate::service::{Service, StartError};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// Why the daemon did not start, or broke off.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The service.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The keys.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// The host.
    #[error("{what}: {source}")]
    Io {
        /// What failed.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

/// What the daemon is started with.
#[derive(Debug)]
pub struct Start {
    /// Checked.
    pub config: Config,
    /// The state directory.
    pub state: PathBuf,
    /// Kernel, agent, default image.
    pub artefacts: Artefacts,
    /// This program, which is also the workers'.
    pub program: PathBuf,
    /// Make a key and say it.
    pub dev: bool,
}

/// Whose key `--dev` prints.
const DEV_TENANT: &str = "dev";

/// Serves until SIGTERM or SIGINT; `ready` is told the address and, with `dev`, the key.
///
/// # Errors
/// Why it did not start, or broke off.
pub fn run(start: Start, ready: impl FnOnce(SocketAddr, Option<&str>)) -> Result<(), ServeError> {
    // Before there are other threads.
    executor::come_first();
    executor::run(serve(start, ready)).map_err(failed("cannot start the runtime (io_uring)"))?
}

/// As many descriptors as the host lets this process have: one for each connection, three for each sandbox.
fn more_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "the number of open files stays as it is");
    }
}

async fn serve(start: Start, ready: impl FnOnce(SocketAddr, Option<&str>)) -> Result<(), ServeError> {
    more_descriptors();
    let address = start.config.listen;
    let listen = |source| ServeError::Listen { address, source };
    let listener = TcpListener::bind(address).await.map_err(listen)?;
    let address = listener.local_addr().map_err(listen)?;
    let region = start.config.region.clone();
    let service = Service::start(start.config, &start.state, start.artefacts, &start.program)?;
    // After the state directory was taken over: its files are this daemon's.
    let keys = Keys::open(&start.state.join("keys"))?;
    let key = start.dev.then(|| keys.mint(DEV_TENANT, &region)).transpose()?.map(|minted| minted.key);
    if start.dev
        && let Err(error) = service.journal.prepare(DEV_TENANT)
    {
        tracing::error!(%error, "the tenant's audit log");
    }
    if let Err(error) = service.keep_pools() {
        tracing::error!(%error, "the pools that were set");
    }
    let app = Rc::new(App::new(Rc::clone(&service), keys));
    let (stop, stopped) = watch::channel(false);
    let mut terminate = signal(SignalKind::terminate()).map_err(failed("SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed("SIGINT"))?;
    let serving = executor::spawn(api::serve(app, listener, stopped));
    ready(address, key.as_deref());
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down");
    let _ = stop.send(true);
    let _ = serving.await;
    service.shut_down().await;
    Ok(())
}
