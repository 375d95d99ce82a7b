//! Samples of one promise in an HDR histogram, and the row of the report that they become.

use crate::machine::Machine;
use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// What is promised, and to whom it is compared: a row's definition.
#[derive(Debug, Clone)]
pub struct Promise {
    /// Its name in the table of promises.
    pub name: String,
    /// From which moment to which, in words.
    pub definition: String,
    /// Goal for the median, in the row's unit; none where there is only a report.
    pub goal_p50: Option<f64>,
    /// Goal for the 99.9th percentile.
    pub goal_p999: Option<f64>,
}

/// Unit of a row's figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Milliseconds, kept as nanoseconds.
    Milliseconds,
    /// A count, such as emulated guest instructions, in thousands.
    Thousands,
    /// Memory in MiB, kept as KiB.
    Mebibytes,
    /// A rate, kept as thousandths. The more the better: its percentiles are those of the slowest.
    PerSecond,
}

/// What a promise's cost may grow with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Axis {
    /// Memory of the guest in MiB.
    MemoryMib,
    /// What the guest has written since its template, in MiB.
    DirtyMib,
    /// Children of one fork.
    Children,
    /// Clones alive at once.
    Clones,
}

impl Axis {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::MemoryMib, Self::DirtyMib, Self::Children, Self::Clones];

    /// Its name in words.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::MemoryMib => "guest memory, MiB",
            Self::DirtyMib => "written since the template, MiB",
            Self::Children => "children of one fork",
            Self::Clones => "clones",
        }
    }
}

impl Unit {
    /// Recorded numbers in one unit.
    fn scale(self) -> f64 {
        match self {
            Self::Milliseconds => 1e6,
            Self::Thousands | Self::PerSecond => 1e3,
            Self::Mebibytes => 1024.0,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Milliseconds => "ms",
            Self::Thousands => "thousand",
            Self::Mebibytes => "MiB",
            Self::PerSecond => "per s",
        }
    }
}

/// Samples of one promise in one variant.
#[derive(Debug)]
pub struct Recorder {
    promise: Promise,
    variant: String,
    unit: Unit,
    on: Option<(Axis, u64)>,
    // Three significant digits: durations in nanoseconds up to an hour, counts as they are.
    samples: Histogram<u64>,
}

const LARGEST: u64 = 3_600_000_000_000;

impl Recorder {
    /// An empty recorder.
    ///
    /// # Panics
    /// Never: the histogram's bounds are constants that it accepts.
    #[must_use]
    pub fn new(promise: Promise, variant: impl Into<String>, unit: Unit) -> Self {
        let samples = Histogram::new_with_bounds(1, LARGEST, 3).unwrap_or_else(|e| panic!("{e}"));
        Self { promise, variant: variant.into(), unit, on: None, samples }
    }

    /// Adds a duration.
    pub fn duration(&mut self, sample: Duration) {
        self.samples.saturating_record(u64::try_from(sample.as_nanos()).unwrap_or(LARGEST));
    }

    /// Adds a count.
    pub fn count(&mut self, sample: u64) {
        self.samples.saturating_record(sample);
    }

    /// Adds a rate per second.
    pub fn rate(&mut self, sample: f64) {
        self.samples.saturating_record((sample * 1e3) as u64);
    }

    /// Puts it on a scale axis.
    #[must_use]
    pub fn on(self, axis: Axis, at: u64) -> Self {
        Self { on: Some((axis, at)), ..self }
    }

    fn at(&self, quantile: f64) -> f64 {
        let quantile = if self.unit == Unit::PerSecond { 1.0 - quantile } else { quantile };
        self.samples.value_at_quantile(quantile) as f64 / self.unit.scale()
    }

    /// The row of the report.
    #[must_use]
    pub fn row(&self, machine: &Machine) -> Row {
        let mut row = Row {
            promise: self.promise.name.clone(),
            definition: self.promise.definition.clone(),
            variant: self.variant.clone(),
            unit: self.unit.name().to_owned(),
            axis: self.on.map(|(axis, _)| axis),
            at: self.on.map(|(_, at)| at),
            n: self.samples.len(),
            p50: self.at(0.5),
            p99: self.at(0.99),
            p999: self.at(0.999),
            goal_p50: self.promise.goal_p50,
            goal_p999: self.promise.goal_p999,
            host_kind: machine.host_kind.clone(),
            cpu: machine.cpu.clone(),
            commit: machine.commit.clone(),
            date: machine.date.clone(),
            reason: None,
            would_close: None,
        };
        if let Some(miss) = row.misses().then(|| crate::missed::of(&row.promise)).flatten() {
            (row.reason, row.would_close) = (Some(miss.reason.to_owned()), Some(miss.would_close.to_owned()));
        }
        row
    }
}

/// One row of `bench/runs/latest.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Row {
    /// Name of the promise.
    pub promise: String,
    /// What is measured, from where to where.
    pub definition: String,
    /// Which point of its scale axis.
    pub variant: String,
    /// Unit of the figures.
    pub unit: String,
    /// Which scale axis it lies on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub axis: Option<Axis>,
    /// Where on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<u64>,
    /// Samples.
    pub n: u64,
    /// Median.
    pub p50: f64,
    /// 99th percentile.
    pub p99: f64,
    /// 99.9th percentile.
    pub p999: f64,
    /// Goal for the median.
    pub goal_p50: Option<f64>,
    /// Goal for the 99.9th percentile.
    pub goal_p999: Option<f64>,
    /// Kind of KVM.
    pub host_kind: String,
    /// The host's CPU.
    pub cpu: String,
    /// Commit of the code measured.
    pub commit: String,
    /// Day of the run.
    pub date: String,
    /// Why a goal is missed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// What would reach it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub would_close: Option<String>,
}

impl Row {
    /// Is one of its goals missed?
    #[must_use]
    pub fn misses(&self) -> bool {
        // Of a rate there should be more.
        let worse = |figure: f64, goal: f64| if self.unit == "per s" { figure < goal } else { figure > goal };
        let missed = |figure, goal: Option<f64>| self.n > 0 && goal.is_some_and(|goal| worse(figure, goal));
        missed(self.p50, self.goal_p50) || missed(self.p999, self.goal_p999)
    }
}

/// The report for people: a Markdown table, with the change against the run before where there is one.
#[must_use]
pub fn markdown(rows: &[Row], before: &[Row], machine: &Machine) -> String {
    let mut out = format!(
        "# Bench report\n\n{}; {}; load average {} before the run; commit {}; {}.\n\n",
        machine.host_kind, machine.cpu, machine.load, machine.commit, machine.date
    );
    out += "| promise | variant | unit | n | p50 | p99 | p99.9 | goal p50 / p99.9 | p50 before |\n";
    out += "|---|---|---|---|---|---|---|---|---|\n";
    for r in beside_each_other(rows) {
        let goal = match (r.goal_p50, r.goal_p999) {
            (Some(p50), Some(p999)) => format!("{p50} / {p999}"),
            (Some(p50), None) => format!("{p50}"),
            _ => "-".to_owned(),
        };
        let same = |b: &&Row| b.promise == r.promise && b.variant == r.variant && b.host_kind == r.host_kind;
        let previous = before.iter().find(same).map_or_else(|| "-".to_owned(), |b| format!("{:.3}", b.p50));
        out += &format!(
            "| {} | {} | {} | {} | {:.3} | {:.3} | {:.3} | {goal} | {previous} |\n",
            r.promise, r.variant, r.unit, r.n, r.p50, r.p99, r.p999
        );
    }
    out += "\nWith fewer than 1,000 samples p99.9 is the slowest sample seen, not an estimate.\n\n";
    out += &missed_goals(rows);
    let mut named = Vec::new();
    for r in rows {
        if !named.contains(&&r.promise) {
            out += &format!("- **{}**: {}.\n", r.promise, r.definition);
            named.push(&r.promise);
        }
    }
    out
}

/// The goals that are missed, with the reason and what would close the gap; a line for each promise.
fn missed_goals(rows: &[Row]) -> String {
    let missed: Vec<&Row> = beside_each_other(rows).into_iter().filter(|row| row.misses()).collect();
    if missed.is_empty() {
        return "Every goal is met.\n\n## Definitions\n\n".to_owned();
    }
    let mut out =
        "## Missed goals\n\n| promise | variants | why | what would close it |\n|---|---|---|---|\n"
            .to_owned();
    for of_promise in missed.chunk_by(|a, b| a.promise == b.promise) {
        let variants: Vec<_> = of_promise.iter().map(|row| row.variant.as_str()).collect();
        let text = |text: &Option<String>| text.clone().unwrap_or_else(|| "not known".to_owned());
        let first = of_promise[0];
        out += &format!(
            "| {} | {} | {} | {} |\n",
            first.promise,
            variants.join(", "),
            text(&first.reason),
            text(&first.would_close)
        );
    }
    out += "\n## Definitions\n\n";
    out
}

/// The rows with all variants of a promise together, in the order in which promises first appear.
fn beside_each_other(rows: &[Row]) -> Vec<&Row> {
    let mut sorted: Vec<&Row> = rows.iter().collect();
    sorted.sort_by_key(|row| rows.iter().position(|first| first.promise == row.promise));
    sorted
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn promise() -> Promise {
        Promise {
            name: "boot to PID 1".to_owned(),
            definition: "a to b".to_owned(),
            goal_p50: Some(6000.0),
            goal_p999: None,
        }
    }

    #[test]
    fn a_row_gives_percentiles_in_its_unit() {
        let mut recorder = Recorder::new(promise(), "256 MiB", Unit::Milliseconds);
        for ms in 1..=1000 {
            recorder.duration(Duration::from_millis(ms));
        }
        let row = recorder.row(&Machine::of_this_host());
        assert_eq!(row.n, 1000);
        assert!((row.p50 - 500.0).abs() < 1.0, "{}", row.p50);
        assert!((row.p999 - 999.0).abs() < 2.0, "{}", row.p999);
    }

    #[test]
    fn the_report_names_every_definition_once_and_the_run_before() {
        let machine = Machine::of_this_host();
        let mut recorder = Recorder::new(promise(), "256 MiB", Unit::Milliseconds);
        recorder.duration(Duration::from_millis(5));
        let row = recorder.row(&machine);
        let text = markdown(&[row.clone(), row.clone()], &[Row { p50: 7.0, ..row }], &machine);
        assert_eq!(text.matches("a to b").count(), 1);
        assert!(text.contains("| 7.000 |"), "{text}");
    }

    #[test]
    fn a_missed_goal_stands_in_the_report_and_a_rate_is_missed_when_it_is_lower() {
        let machine = Machine::of_this_host();
        let of = |goal_p50, unit| {
            let promise = Promise { name: "hibernate".to_owned(), goal_p50: Some(goal_p50), ..promise() };
            let mut recorder = Recorder::new(promise, "16 MiB", unit);
            if unit == Unit::PerSecond {
                recorder.rate(5.0);
            } else {
                recorder.duration(Duration::from_millis(5));
            }
            recorder.row(&machine)
        };
        let (missed, met) = (of(4.0, Unit::Milliseconds), of(6.0, Unit::Milliseconds));
        assert!(missed.misses() && missed.reason.is_some() && missed.would_close.is_some());
        assert!(!met.misses() && met.reason.is_none());
        assert!(of(6.0, Unit::PerSecond).misses() && !of(4.0, Unit::PerSecond).misses());
        let text = markdown(std::slice::from_ref(&missed), &[], &machine);
        assert!(text.contains(&format!("| hibernate | 16 MiB | {} |", missed.reason.unwrap())), "{text}");
        assert!(markdown(&[met], &[], &machine).contains("Every goal is met"));
    }

    #[test]
    fn variants_of_a_promise_stand_beside_each_other() {
        let machine = Machine::of_this_host();
        let row = |name: &str, variant: &str| {
            let promise = Promise { name: name.to_owned(), ..promise() };
            Recorder::new(promise, variant, Unit::Milliseconds).row(&machine)
        };
        let rows = [row("b", "on"), row("a", "on"), row("b", "off"), row("a", "off")];
        let sorted: Vec<_> =
            beside_each_other(&rows).into_iter().map(|r| (&*r.promise, &*r.variant)).collect();
        assert_eq!(sorted, [("b", "on"), ("b", "off"), ("a", "on"), ("a", "off")]);
    }
}
