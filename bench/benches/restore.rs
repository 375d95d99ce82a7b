//! `restore`: an empty worker asked for the template to its owner knowing that the guest stands complete.

mod suite;

use bench::clone::between;
use criterion::measurement::WallTime;
use peregrine_vmm::worker::monotonic_ns;

fn main() {
    suite::suite("restore", WallTime, |_, template| {
        Ok(move || {
            let parked = template.park()?;
            between(parked.decoded_ns(), monotonic_ns())
        })
    });
}
