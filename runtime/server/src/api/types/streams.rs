//! Bodies and messages of what flows: output of a command, terminals, shells.

use super::*;

/// The data of a server-sent event.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct StreamData {
    /// Rises by one from event to event.
    pub(crate) seq: u64,
    /// Output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data: Option<String>,
    /// Output that is not UTF-8.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) data_base64: Option<String>,
    /// Of `exit`: as a shell gives it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<u8>,
    /// Of `exit`: from the request to the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) duration_ms: Option<f64>,
    /// Of `error`: for programs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) code: Option<String>,
    /// Of `error`: for people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

/// A text frame of a terminal's client: `{"type":"resize","rows":24,"cols":80}`, or `{"resize":{...}}`.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub(crate) enum TerminalControl {
    /// By type.
    Tagged {
        /// `resize`, `input` or `signal`.
        #[serde(rename = "type")]
        kind: String,
        /// Lines.
        rows: Option<u16>,
        /// Characters in a line.
        cols: Option<u16>,
        /// What is typed.
        data: Option<String>,
    },
    /// By name.
    Named {
        /// The new size.
        resize: TerminalSize,
    },
}

/// The size of a terminal.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct TerminalSize {
    /// Lines.
    pub(crate) rows: u16,
    /// Characters in a line.
    pub(crate) cols: u16,
}

impl TerminalControl {
    pub(crate) async fn apply(&self, input: &Input) -> Result<(), Ended> {
        match self {
            Self::Named { resize } => input.resize(resize.rows, resize.cols),
            Self::Tagged { kind, rows: Some(rows), cols: Some(cols), .. } if kind == "resize" => {
                input.resize(*rows, *cols)
            }
            Self::Tagged { kind, data: Some(data), .. } if kind == "input" => {
                input.write(data.as_bytes()).await
            }
            // A newer client's.
            Self::Tagged { .. } => Ok(()),
        }
    }
}

/// What a shell session is asked.
#[derive(Debug, Deserialize, ToSchema)]
pub(crate) struct ShellAsk {
    /// The command.
    #[serde(alias = "command", alias = "cmd")]
    pub(crate) run: String,
    /// Comes back with the answer.
    #[schema(value_type = Option<Object>)]
    pub(crate) id: Option<serde_json::Value>,
}

/// What a shell session answers.
#[derive(Debug, Default, Serialize, ToSchema)]
pub(crate) struct ShellAnswer {
    /// The question's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    pub(crate) id: Option<serde_json::Value>,
    /// What the command wrote.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stdout: Option<String>,
    /// What it wrote to standard error.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) stderr: Option<String>,
    /// As bash gives it; of the bash itself, if the command ended it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) exit_code: Option<u8>,
    /// There was more.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) truncated: Option<bool>,
    /// Why there is nothing of this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl ShellAnswer {
    pub(crate) fn error(why: &str) -> Self {
        Self { error: Some(why.to_owned()), ..Self::default() }
    }
}

impl From<ShellReply> for ShellAnswer {
    fn from(reply: ShellReply) -> Self {
        let text = |bytes: Vec<u8>| Some(String::from_utf8_lossy(&bytes).into_owned());
        Self {
            stdout: text(reply.stdout),
            stderr: text(reply.stderr),
            exit_code: Some(reply.exit_code),
            truncated: reply.truncated.then_some(true),
            ..Self::default()
        }
    }
}
