//! What the suites of sandboxes share: one sandbox or one verb a sample. The tail is the report's.

use bench::boot;
use bench::clone::{self, Failure, Template};
use criterion::measurement::Measurement;
use criterion::{Criterion, SamplingMode};
use peregrine::artefacts::Artefacts;
use std::iter::Sum;
use std::time::Duration;

const MEM_MIB: u64 = 256;

/// Measures one verb, named as its suite. `prepare` makes the function that does it once and gives what it
/// took, which is not the whole of what it does.
pub(crate) fn suite<M, S>(
    name: &str,
    measurement: M,
    prepare: impl FnOnce(Artefacts, Template) -> Result<S, Failure>,
) where
    M: Measurement<Value: Sum> + 'static,
    S: FnMut() -> Result<M::Value, Failure>,
{
    clone::become_worker_if_asked();
    let prepared = boot::artefacts().map_err(Failure::from).and_then(|artefacts| {
        let template = Template::prepare(&artefacts, MEM_MIB)?;
        prepare(artefacts, template)
    });
    let mut once = prepared.unwrap_or_else(|e| panic!("{name}: {e}"));
    let mut criterion = Criterion::default().with_measurement(measurement).configure_from_args();
    let mut group = criterion.benchmark_group(format!("{name}/{MEM_MIB}MiB"));
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(1));
    group.bench_function(name, |bencher| {
        bencher.iter_custom(|iterations| {
            (0..iterations).map(|_| once().unwrap_or_else(|e| panic!("{name}: {e}"))).sum()
        });
    });
    group.finish();
    criterion.final_summary();
}
