//! A byte stream to a port of the guest's loopback: the agent's own program connects there, and its standard
//! input and output are the stream. The guest needs no network for it.

use super::sandbox::Sandbox;
use super::{Service, ServiceError};
use crate::conversation::{Event, Process};
use crate::executor;
use std::rc::Rc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

/// Bytes under way each way, beside the windows of the stream.
const PIPE_BYTES: usize = 64 << 10;
/// The guest has nothing else to do.
const PATIENCE: Duration = Duration::from_secs(60);

impl Service {
    /// The sandbox of this id, whoever asks: the id is the credential of its ports.
    ///
    /// # Errors
    /// If there is none.
    pub fn sandbox_of_port(&self, id: &str) -> Result<Rc<Sandbox>, ServiceError> {
        self.sandboxes.borrow().get(id).cloned().ok_or_else(|| ServiceError::no_sandbox(id))
    }

    /// Connects to a port.
    ///
    /// # Errors
    /// [`ServiceError::PortClosed`] if nothing listens.
    pub async fn connect(
        self: &Rc<Self>,
        sandbox: &Rc<Sandbox>,
        port: u16,
    ) -> Result<DuplexStream, ServiceError> {
        let activity = sandbox.activity();
        let conversation = sandbox.running()?.conversation;
        let started = conversation.tool("connect", &[port.to_string().as_bytes()], true);
        let Process { mut output, input } = started.map_err(ServiceError::exec(&sandbox.id))?;
        let connecting = async {
            loop {
                match output.next().await.map_err(ServiceError::lost(&sandbox.id))? {
                    // The byte that says so; what follows is the server's.
                    Event::Stdout(bytes) => return Ok(bytes.slice(1..)),
                    Event::Stderr(_) => {}
                    Event::Exited(_) => return Err(ServiceError::PortClosed { port }),
                    Event::Failed { text, .. } => return Err(ServiceError::Internal(text)),
                }
            }
        };
        let first = tokio::time::timeout(PATIENCE, connecting).await;
        let first = first.unwrap_or(Err(ServiceError::Timeout { what: "the sandbox", limit: PATIENCE }))?;
        drop(activity);
        let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
        let (mut from_client, mut to_client) = tokio::io::split(theirs);
        let used = Rc::downgrade(sandbox);
        let touch = move || {
            if let Some(sandbox) = used.upgrade() {
                drop(sandbox.activity());
            }
        };
        let touch_down = touch.clone();
        let (service, watched) = (Rc::clone(self), Rc::clone(sandbox));
        executor::spawn(async move {
            let up = async {
                let mut buffer = vec![0; PIPE_BYTES / 4];
                while let Ok(len) = from_client.read(&mut buffer).await {
                    touch();
                    if len == 0 || input.write(&buffer[..len]).await.is_err() {
                        break;
                    }
                }
                let _ = input.end();
                // The server may still have something to say.
                std::future::pending::<()>().await;
            };
            let down = async {
                let mut bytes = first;
                loop {
                    if !bytes.is_empty() && to_client.write_all(&bytes).await.is_err() {
                        return;
                    }
                    touch_down();
                    bytes = match output.next().await {
                        Ok(Event::Stdout(bytes)) => bytes,
                        Ok(Event::Stderr(_)) => continue,
                        _ => break,
                    };
                }
                let _ = to_client.shutdown().await;
            };
            tokio::select! {
                () = up => {}
                () = down => {}
                // Whoever reads from it sees it break off.
                _ = service.stuck(&watched) => {}
            }
        });
        Ok(ours)
    }
}
