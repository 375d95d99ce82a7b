//! `create`, pool hit: request decoded by a parked worker to the guest's first VM exit.

mod suite;

use bench::clone::{between, go};
use criterion::measurement::WallTime;

fn main() {
    suite::suite("create", WallTime, |_, template| {
        Ok(move || {
            let going = go(template.park()?)?;
            between(going.decoded_ns, going.first_exit_ns)
        })
    });
}
