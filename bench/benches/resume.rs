//! `resume`, hot: an empty worker asked for a hibernated sandbox to its guest's first VM exit.

mod suite;

use bench::clone::go;
use bench::hibernate::{Home, once, resume};
use criterion::measurement::WallTime;

fn main() {
    suite::suite("resume", WallTime, |artefacts, template| {
        let mut home = Home::make(&artefacts)?;
        let snapshot = once(&go(template.park()?)?, &mut home)?;
        Ok(move || {
            // It holds the snapshot until the last sample.
            let _home = &home;
            resume(&template, &snapshot.dir)
        })
    });
}
