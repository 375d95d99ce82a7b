//! `hibernate`: owner's call to durable on disk.

mod suite;

use bench::clone::go;
use bench::hibernate::{Home, once};
use criterion::measurement::WallTime;

fn main() {
    suite::suite("hibernate", WallTime, |artefacts, template| {
        let going = go(template.park()?)?;
        let mut home = Home::make(&artefacts)?;
        Ok(move || {
            let snapshot = once(&going, &mut home)?;
            std::fs::remove_dir_all(&snapshot.dir)?;
            Ok(snapshot.durable)
        })
    });
}
