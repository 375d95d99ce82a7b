//! How a long build tells its caller what it is doing. Draws nothing itself but plain lines;
//! bars are the caller's. Must not read the clock or guess a terminal.

use std::io::Write;

/// Receives what a build does. Steps do not nest; `end` follows every `begin`, unless the build fails.
pub trait Progress {
    /// A step starts. `total` is in `unit`s; `None` where it cannot be known.
    fn begin(&mut self, step: &str, total: Option<u64>, unit: &str);
    /// The current step has done `done` units in all (not: since the last call).
    fn advance(&mut self, done: u64);
    /// One line the user should see: something installed, waited for, rebuilt.
    fn message(&mut self, text: &str);
    /// The current step is complete.
    fn end(&mut self);
    /// Receives what another build does at the same time.
    fn beside(&mut self) -> Box<dyn Progress + Send> {
        Box::new(Lines::new(std::io::stderr()))
    }
}

/// Says nothing.
#[derive(Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _step: &str, _total: Option<u64>, _unit: &str) {}
    fn advance(&mut self, _done: u64) {}
    fn message(&mut self, _text: &str) {}
    fn end(&mut self) {}
    fn beside(&mut self) -> Box<dyn Progress + Send> {
        Box::new(Self)
    }
}

/// Plain lines, for logs and pipes: one when a step begins, one per quarter of it.
#[derive(Debug)]
pub struct Lines<W: Write> {
    out: W,
    step: String,
    unit: String,
    total: u64,
    quarter: u64,
}

impl<W: Write> Lines<W> {
    /// Writes to `out`; its errors are ignored, because a full log must not stop a build.
    pub fn new(out: W) -> Self {
        Self { out, step: String::new(), unit: String::new(), total: 0, quarter: 0 }
    }
}

impl<W: Write> Progress for Lines<W> {
    fn begin(&mut self, step: &str, total: Option<u64>, unit: &str) {
        let _ = match total {
            Some(total) => writeln!(self.out, "{step}: {total} {unit}"),
            None => writeln!(self.out, "{step}"),
        };
        self.step = step.to_owned();
        self.unit = unit.to_owned();
        self.total = total.unwrap_or(0);
        self.quarter = 0;
    }

    fn advance(&mut self, done: u64) {
        let quarter = done.saturating_mul(4).checked_div(self.total).unwrap_or(0).min(4);
        if quarter > self.quarter {
            self.quarter = quarter;
            let _ = writeln!(self.out, "{}: {done} of {} {}", self.step, self.total, self.unit);
        }
    }

    fn message(&mut self, text: &str) {
        let _ = writeln!(self.out, "{text}");
    }

    fn end(&mut self) {
        self.step.clear();
        self.total = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_of_a_thousand_advances_prints_one_line_per_quarter() {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out);
        lines.begin("compile", Some(1000), "objects");
        (1..=1000).for_each(|done| lines.advance(done));
        lines.end();
        let text = String::from_utf8(out).unwrap();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            [
                "compile: 1000 objects",
                "compile: 250 of 1000 objects",
                "compile: 500 of 1000 objects",
                "compile: 750 of 1000 objects",
                "compile: 1000 of 1000 objects"
            ]
        );
    }

    #[test]
    fn a_step_without_a_total_takes_advances_without_dividing_by_it() {
        let mut out = Vec::new();
        let mut lines = Lines::new(&mut out);
        lines.begin("resolve", None, "");
        lines.advance(7);
        assert_eq!(String::from_utf8(out).unwrap(), "resolve\n");
    }
}
