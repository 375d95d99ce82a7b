//! Progress of long work: bars on a terminal, plain lines elsewhere, always on standard error.

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use peregrine_image::{Lines, Progress};
use std::io::{IsTerminal as _, stderr};
use std::time::Duration;

/// The progress display that fits standard error.
pub(crate) fn for_stderr() -> Box<dyn Progress> {
    if stderr().is_terminal() {
        Box::new(Bars { all: MultiProgress::new(), bar: ProgressBar::hidden() })
    } else {
        Box::new(Lines::new(stderr()))
    }
}

struct Bars {
    all: MultiProgress,
    bar: ProgressBar,
}

/// A template that does not parse would be a mistake in this file; the default style is then good enough.
fn style(template: &str) -> ProgressStyle {
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

impl Progress for Bars {
    fn begin(&mut self, step: &str, total: Option<u64>, unit: &str) {
        let bar = match total {
            Some(total) => ProgressBar::new(total)
                .with_style(style("{msg:<28} [{bar:32}] {pos}/{len} {prefix} ({elapsed})")),
            None => ProgressBar::new_spinner().with_style(style("{msg:<28} {spinner} ({elapsed})")),
        };
        self.bar = self.all.add(bar);
        self.bar.set_message(step.to_owned());
        self.bar.set_prefix(unit.to_owned());
        self.bar.enable_steady_tick(Duration::from_millis(200));
    }

    fn advance(&mut self, done: u64) {
        self.bar.set_position(done);
    }

    fn message(&mut self, text: &str) {
        self.all.suspend(|| eprintln!("{text}"));
    }

    fn end(&mut self) {
        self.bar.finish();
    }

    fn beside(&mut self) -> Box<dyn Progress + Send> {
        Box::new(Self { all: self.all.clone(), bar: ProgressBar::hidden() })
    }
}
