//! A sampling profiler of the guest: instruction pointers taken at fixed intervals, symbolised with the
//! kernel's `System.map` and written as folded stacks, the input of every flame graph tool.

use std::collections::BTreeMap;
use std::fmt::Write as _;

/// Samples of one microVM: how often each (privilege, instruction pointer) was seen.
#[derive(Debug, Default, Clone)]
pub struct Samples {
    counts: BTreeMap<(bool, u64), u64>,
}

impl Samples {
    /// Adds one sample.
    pub fn add(&mut self, kernel: bool, rip: u64) {
        *self.counts.entry((kernel, rip)).or_default() += 1;
    }

    /// Number of samples.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.counts.values().sum()
    }

    /// Folded stacks (`guest;kernel;symbol count`, one line each, most frequent first).
    #[must_use]
    pub fn folded(&self, symbols: &Symbols) -> String {
        let mut by_name: BTreeMap<&str, u64> = BTreeMap::new();
        let mut user = 0;
        for (&(kernel, rip), count) in &self.counts {
            if kernel {
                *by_name.entry(symbols.name(rip)).or_default() += count;
            } else {
                user += count;
            }
        }
        let mut rows: Vec<(String, u64)> =
            by_name.into_iter().map(|(n, c)| (format!("guest;kernel;{n}"), c)).collect();
        if user > 0 {
            rows.push(("guest;user".to_owned(), user));
        }
        rows.sort_by(|a, b| b.1.cmp(&a.1).then(a.0.cmp(&b.0)));
        rows.iter().fold(String::new(), |mut out, (name, count)| {
            let _ = writeln!(out, "{name} {count}");
            out
        })
    }
}

/// The kernel's text symbols by address.
#[derive(Debug, Default)]
pub struct Symbols {
    by_address: BTreeMap<u64, String>,
}

impl Symbols {
    /// Parses a `System.map`: `address type name` a line. Lines of another form are passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let by_address = text
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let address = u64::from_str_radix(words.next()?, 16).ok()?;
                let kind = words.next()?;
                let name = words.next()?;
                matches!(kind, "t" | "T" | "w" | "W").then(|| (address, name.to_owned()))
            })
            .collect();
        Self { by_address }
    }

    /// The symbol that `address` lies in.
    #[must_use]
    pub fn name(&self, address: u64) -> &str {
        self.by_address.range(..=address).next_back().map_or("[unknown]", |(_, name)| name.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_fold_by_symbol_most_frequent_first() {
        let symbols = Symbols::parse("ffffffff81000000 T start\nffffffff81000100 t middle\nx\n");
        let mut samples = Samples::default();
        samples.add(true, 0xffff_ffff_8100_0005);
        for i in 0..3 {
            samples.add(true, 0xffff_ffff_8100_0100 + i);
        }
        samples.add(false, 0x40_0000);
        assert_eq!(samples.folded(&symbols), "guest;kernel;middle 3\nguest;kernel;start 1\nguest;user 1\n");
        assert_eq!(samples.total(), 5);
    }
}
