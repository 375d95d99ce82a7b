//! `density`: memory of an idle clone, everything included (MemAvailable before and after some).

mod suite;

use bench::density::each_kib;
use criterion::Throughput;
use criterion::measurement::{Measurement, ValueFormatter};

/// Clones of a sample.
const CLONES: u32 = 20;

/// KiB.
struct Memory;

impl Measurement for Memory {
    type Intermediate = ();
    type Value = u64;

    fn start(&self) {}

    fn end(&self, (): ()) -> u64 {
        0
    }

    fn add(&self, a: &u64, b: &u64) -> u64 {
        a + b
    }

    fn zero(&self) -> u64 {
        0
    }

    fn to_f64(&self, value: &u64) -> f64 {
        *value as f64
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        self
    }
}

impl ValueFormatter for Memory {
    fn scale_values(&self, _: f64, values: &mut [f64]) -> &'static str {
        values.iter_mut().for_each(|kib| *kib /= 1024.0);
        "MiB"
    }

    fn scale_throughputs(&self, _: f64, _: &Throughput, _: &mut [f64]) -> &'static str {
        "KiB"
    }

    fn scale_for_machines(&self, _: &mut [f64]) -> &'static str {
        "KiB"
    }
}

fn main() {
    suite::suite("density", Memory, |_, template| Ok(move || each_kib(&template, CLONES)));
}
