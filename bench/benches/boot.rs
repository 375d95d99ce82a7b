//! Criterion's view of the boot suite: each stage of a whole boot, one boot a sample.

use bench::boot::{self, Boot};
use criterion::{Criterion, SamplingMode, criterion_group, criterion_main};
use std::time::Duration;

type Stage = (&'static str, fn(&Boot) -> Duration);

fn stages(c: &mut Criterion) {
    let artefacts = boot::artefacts().unwrap_or_else(|e| panic!("{e}"));
    let mut group = c.benchmark_group("boot/256MiB");
    group.sample_size(10).sampling_mode(SamplingMode::Flat).warm_up_time(Duration::from_millis(1));
    let stages: [Stage; 4] = [
        ("vm_start", |b| b.built),
        ("kernel_entry", |b| b.kernel_entry),
        ("pid1", |b| b.pid1),
        ("first_exec_exit", |b| b.first_exit),
    ];
    for (name, stage) in stages {
        group.bench_function(name, |bencher| {
            bencher.iter_custom(|iterations| {
                (0..iterations)
                    .map(|_| stage(&boot::once(&artefacts, 256).unwrap_or_else(|e| panic!("{e}"))))
                    .sum()
            });
        });
    }
    group.finish();
}

criterion_group!(benches, stages);
criterion_main!(benches);
