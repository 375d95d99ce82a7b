//! `fuzz TARGET COUNT [SEED [FROM]]`: so many executions of one target; the number of the last one that began
//! is printed when a promise is broken, and `fuzz TARGET NUMBER+1 SEED NUMBER` repeats it.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: u64| args.get(at).map_or(Some(default), |n| n.parse().ok());
    let target = fuzz::TARGETS.iter().find(|t| args.first().is_some_and(|name| name == t.name));
    let (Some(target), Some(count), Some(seed), Some(from)) =
        (target, number(1, 100_000), number(2, 1), number(3, 0))
    else {
        let names: Vec<&str> = fuzz::TARGETS.iter().map(|t| t.name).collect();
        eprintln!("usage: fuzz {} [COUNT [SEED [FROM]]]", names.join("|"));
        return ExitCode::from(2);
    };
    let current = Arc::new(AtomicU64::new(from));
    let at = Arc::clone(&current);
    let say = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        eprintln!("execution {} of seed {seed}:", at.load(Ordering::Relaxed));
        say(info);
    }));
    let begun = Instant::now();
    let (mut last, mut slowest_us) = (begun, 0);
    fuzz::drive(target, seed, from, count.max(from), |number| {
        current.store(number, Ordering::Relaxed);
        let now = Instant::now();
        slowest_us = slowest_us.max(now.duration_since(last).as_micros());
        last = now;
        if number > from && number.is_multiple_of(1_000_000) {
            eprintln!("{} {number} executions, {} s", target.name, begun.elapsed().as_secs());
        }
    });
    println!(
        "{}: {} executions of seed {seed}, {} s, slowest {slowest_us} us, no promise broken",
        target.name,
        count.saturating_sub(from),
        begun.elapsed().as_secs()
    );
    ExitCode::SUCCESS
}
