//! Criterion's view of the `create` and `fork` suites: one sandbox a sample. The tail is the report's.

use bench::boot;
use bench::clone::{self, Template, go};
use criterion::{Criterion, SamplingMode};
use std::time::Duration;

fn main() {
    clone::become_worker_if_asked();
    let mut criterion = Criterion::default().configure_from_args();
    suites(&mut criterion).unwrap_or_else(|e| panic!("{e}"));
    criterion.final_summary();
}

fn suites(c: &mut Criterion) -> Result<(), Box<dyn std::error::Error>> {
    let template = Template::prepare(&boot::artefacts()?, 256)?;
    let mut group = c.benchmark_group("clone/256MiB");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(1));
    group.bench_function("create_pool_hit", |bencher| {
        bencher.iter_custom(|iterations| {
            let sample = |_| {
                let going =
                    go(template.park().unwrap_or_else(|e| panic!("{e}"))).unwrap_or_else(|e| panic!("{e}"));
                Duration::from_nanos(going.first_exit_ns.saturating_sub(going.decoded_ns))
            };
            (0..iterations).map(sample).sum()
        });
    });
    let parent = go(template.park()?)?;
    group.bench_function("fork_pause", |bencher| {
        bencher.iter_custom(|iterations| {
            let sample = |_| {
                let fork = parent.worker.fork(&parent.agent, 1).unwrap_or_else(|e| panic!("{e}"));
                Duration::from_nanos(fork.resumed_ns.saturating_sub(fork.decoded_ns))
            };
            (0..iterations).map(sample).sum()
        });
    });
    group.finish();
    Ok(())
}
