//! This process's own terminal: is there one, how large is it, and raw mode that is undone on every way out.

use rustix::termios::{self, OptionalActions, Termios};
use std::io::{IsTerminal as _, stdin, stdout};

/// Size of a terminal in character cells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) rows: u16,
    pub(crate) cols: u16,
}

/// Are both ends of this process's standard streams a terminal?
pub(crate) fn is_terminal() -> bool {
    stdin().is_terminal() && stdout().is_terminal()
}

/// The terminal's size, 24 by 80 where it does not say.
pub(crate) fn size() -> Size {
    match termios::tcgetwinsize(stdout()) {
        Ok(w) if w.ws_row > 0 && w.ws_col > 0 => Size { rows: w.ws_row, cols: w.ws_col },
        _ => Size { rows: 24, cols: 80 },
    }
}

/// The terminal in raw mode for as long as this value lives.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts the terminal of standard input into raw mode.
    pub(crate) fn enter() -> std::io::Result<Self> {
        let before = termios::tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal may be gone already; there is nobody left to tell.
        let _ = termios::tcsetattr(stdin(), OptionalActions::Drain, &self.before);
    }
}
