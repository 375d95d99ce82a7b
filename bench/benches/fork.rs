//! `fork`: how long a running guest stands still for one.

mod suite;

use bench::clone::go;
use bench::fork::once;
use criterion::measurement::WallTime;

fn main() {
    suite::suite("fork", WallTime, |_, template| {
        let parent = go(template.park()?)?;
        Ok(move || Ok(once(&parent.worker, &parent.agent)?.pause))
    });
}
