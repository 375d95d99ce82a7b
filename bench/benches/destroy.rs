//! `destroy`: the owner drops a running sandbox to its process being gone.

mod suite;

use bench::clone::{between, go};
use criterion::measurement::WallTime;
use peregrine_vmm::worker::monotonic_ns;

fn main() {
    suite::suite("destroy", WallTime, |_, template| {
        Ok(move || {
            let going = go(template.park()?)?;
            let begun = monotonic_ns();
            drop(going);
            between(begun, monotonic_ns())
        })
    });
}
