//! WebSockets: the terminal and the shell session.

use super::body::Body;
use super::error::{ApiError, Code};
use super::types::{ShellAnswer, ShellAsk, TerminalControl};
use super::{Answer, Asked, request};
use crate::conversation::{Event, Process};
use crate::executor;
use crate::service::{Activity, ExecRequest, Sandbox, Service, ServiceError, ShellSession};
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::header::{CONNECTION, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE};
use hyper::upgrade::Upgraded;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use std::rc::Rc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::handshake::derive_accept_key;
use tokio_tungstenite::tungstenite::protocol::{Role, WebSocketConfig};

/// Longest message of a client: a command or a paste.
const MESSAGE_BYTES: usize = 1 << 20;

type Socket = WebSocketStream<TokioIo<Upgraded>>;

/// Answers the handshake (RFC 6455, 4.2.2); the socket is there when the answer is out.
fn upgrade(asked: Asked) -> Result<(Response<Body>, impl Future<Output = Option<Socket>>), ApiError> {
    let headers = &asked.parts.headers;
    let named = |name, word: &str| {
        let value = headers.get(name).and_then(|value: &HeaderValue| value.to_str().ok());
        value.is_some_and(|text| text.split(',').any(|part| part.trim().eq_ignore_ascii_case(word)))
    };
    let key = headers.get(SEC_WEBSOCKET_KEY);
    let (Some(key), true, true) = (key, named(UPGRADE, "websocket"), named(CONNECTION, "upgrade")) else {
        return Err(ApiError::bad("this route is a WebSocket: upgrade the connection"));
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    let accept = HeaderValue::from_str(&derive_accept_key(key.as_bytes()))
        .map_err(|_| ApiError::new(Code::BadInput, "Sec-WebSocket-Key: cannot be"))?;
    let headers = response.headers_mut();
    headers.insert(SEC_WEBSOCKET_ACCEPT, accept);
    headers.insert(UPGRADE, HeaderValue::from_static("websocket"));
    headers.insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    let request = Request::from_parts(asked.parts, asked.body);
    let socket = async move {
        let upgraded = hyper::upgrade::on(request).await.ok()?;
        let config = WebSocketConfig::default()
            .max_message_size(Some(MESSAGE_BYTES))
            .max_frame_size(Some(MESSAGE_BYTES));
        let io = TokioIo::new(upgraded);
        Some(WebSocketStream::from_raw_socket(io, Role::Server, Some(config)).await)
    };
    Ok((response, socket))
}

fn text<T: serde::Serialize>(value: &T) -> Message {
    Message::text(serde_json::to_string(value).unwrap_or_default())
}

pub(crate) fn terminal(asked: Asked, id: &str) -> Answer {
    let (service, sandbox) = (Rc::clone(&asked.app.service), asked.sandbox(id)?);
    let size = |name, usual| match request::query(&asked.parts, name) {
        Some(text) => text.parse::<u16>().map_err(|_| ApiError::bad(format!("{name}: must be 0 to 65535"))),
        None => Ok(usual),
    };
    let terminal = Some((size("rows", 24)?, size("cols", 80)?));
    let line = request::query(&asked.parts, "command").map(std::borrow::Cow::into_owned);
    let login = "command -v bash >/dev/null && exec bash -l || exec sh -l";
    let request = ExecRequest { terminal, ..ExecRequest::shell(line.as_deref().unwrap_or(login)) };
    let (response, socket) = upgrade(asked)?;
    let process = service.command(&sandbox, &request, true)?;
    let activity = sandbox.activity();
    executor::spawn(async move {
        if let Some(socket) = socket.await {
            serve_terminal(&service, &sandbox, socket, process).await;
        }
        drop::<Activity>(activity);
    });
    Ok(response)
}

async fn serve_terminal(service: &Service, sandbox: &Rc<Sandbox>, socket: Socket, process: Process) {
    let Process { mut output, input } = process;
    let (mut to_client, mut from_client): (SplitSink<Socket, Message>, SplitStream<Socket>) = socket.split();
    let up = async {
        while let Some(Ok(message)) = from_client.next().await {
            let sent = match message {
                Message::Binary(bytes) => input.write(&bytes).await,
                Message::Text(control) => match serde_json::from_str::<TerminalControl>(&control) {
                    Ok(control) => control.apply(&input).await,
                    // What is not control is typed.
                    Err(_) => input.write(control.as_bytes()).await,
                },
                Message::Close(_) => return,
                _ => Ok(()),
            };
            if sent.is_err() {
                return;
            }
        }
    };
    let down = async {
        let code = loop {
            match output.next().await {
                Ok(Event::Stdout(bytes) | Event::Stderr(bytes)) => {
                    if to_client.send(Message::Binary(bytes)).await.is_err() {
                        return None;
                    }
                }
                Ok(Event::Exited(exited)) => break exited.shell_code(),
                Ok(Event::Failed { code, .. }) => break code,
                Err(error) => {
                    let gone = serde_json::json!({ "type": "error", "error": error.to_string() });
                    let _ = to_client.send(text(&gone)).await;
                    return None;
                }
            }
        };
        let _ = to_client.send(text(&serde_json::json!({ "type": "exit", "exit_code": code }))).await;
        let _ = to_client.close().await;
        Some(code)
    };
    let (code, stuck) = tokio::select! {
        () = up => (None, None),
        code = down => (code, None),
        error = service.stuck(sandbox) => (None, Some(error)),
    };
    if let Some(error) = stuck {
        let gone = serde_json::json!({ "type": "error", "error": error.to_string() });
        let _ = to_client.send(text(&gone)).await;
    }
    // The terminal goes with its connection: what still runs on it is killed.
    drop(output);
    let _ = service.exited(sandbox, code);
}

pub(crate) async fn shell(asked: Asked, id: &str) -> Answer {
    let (service, sandbox) = (Rc::clone(&asked.app.service), asked.sandbox(id)?);
    let conversation = sandbox.running()?.conversation;
    let (response, socket) = upgrade(asked)?;
    executor::spawn(async move {
        let Some(mut socket) = socket.await else { return };
        let served = match service.unless_stuck(&sandbox, service.shell(&sandbox)).await {
            // A session ends with its sandbox, though its client says nothing.
            Ok(session) => tokio::select! {
                () = serve_shell(session, &mut socket) => Ok(()),
                _ = conversation.ended() => Ok(()),
                error = service.stuck(&sandbox) => Err(error),
            },
            Err(error) => Err(error),
        };
        if let Err(error) = served {
            let _ = socket.send(text(&ShellAnswer::error(&error.to_string()))).await;
        }
        let _ = socket.close(None).await;
        let _ = service.exited(&sandbox, None);
    });
    Ok(response)
}

async fn serve_shell(mut session: ShellSession, socket: &mut Socket) {
    while let Some(Ok(message)) = socket.next().await {
        let asked: Result<ShellAsk, _> = match &message {
            Message::Text(words) => serde_json::from_str(words),
            Message::Binary(bytes) => serde_json::from_slice(bytes),
            Message::Close(_) => return,
            _ => continue,
        };
        let answer = match asked {
            Err(error) => ShellAnswer::error(&format!("must be {{\"run\": command}}: {error}")),
            Ok(_) if session.is_closed() => ShellAnswer::error("Shell is closed"),
            Ok(ask) => {
                let id = ask.id.clone();
                let answer = match session.run(&ask.run).await {
                    Ok(reply) => ShellAnswer::from(reply),
                    Err(ServiceError::BadInput { field, why }) => {
                        ShellAnswer::error(&format!("{field}: {why}"))
                    }
                    Err(error) => {
                        let _ = socket.send(text(&ShellAnswer::error(&error.to_string()))).await;
                        return;
                    }
                };
                ShellAnswer { id, ..answer }
            }
        };
        if socket.send(text(&answer)).await.is_err() {
            return;
        }
    }
}
