//! `exec`: request sent to a parked worker to the exit code of `/bin/true`.

mod suite;

use bench::clone::exec_once;
use criterion::measurement::WallTime;

fn main() {
    suite::suite("exec", WallTime, |_, template| Ok(move || Ok(exec_once(&template)?.0)));
}
