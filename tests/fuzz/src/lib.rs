//! Fuzz targets: whatever a hostile guest, or whoever made a kernel or an image, can hand over.
//!
//! A target is one function of bytes. It panics when a promise is broken; guest memory lies between pages
//! that nobody may touch ([`guarded`]), so a stray access ends the process. The same functions serve three
//! drivers:
//!
//! - `cargo test -p fuzz`: a bounded number of executions of each, from fixed seeds;
//! - `cargo run --release -p fuzz --bin fuzz -- TARGET COUNT [SEED]`: as many as wanted, on any toolchain;
//! - `cargo fuzz run TARGET --fuzz-dir tests/fuzz --features libfuzzer -s none`: libFuzzer, guided by
//!   coverage.

pub mod assist;
pub mod bulk;
mod cpu;
pub mod devices;
pub mod doorbell;
pub mod guarded;
pub mod images;
mod oracle;
pub mod parsers;
pub mod ring0;
mod ring0_code;
mod tables;

/// A target: its name, its function, and the longest input that makes sense.
pub struct Target {
    /// As on the command line.
    pub name: &'static str,
    /// Panics if a promise is broken.
    pub run: fn(&[u8]),
    /// Inputs of the built-in driver are up to so long.
    pub most_bytes: usize,
}

const fn target(name: &'static str, run: fn(&[u8]), most_bytes: usize) -> Target {
    Target { name, run, most_bytes }
}

/// All of them.
pub const TARGETS: &[Target] = &[
    target("doorbell", doorbell::target, 512),
    target("bulk", bulk::target, 512),
    target("assist", assist::target, 512),
    target("ring0", ring0::target, 1536),
    target("ring0_doorbell", ring0::doorbell, 768),
    target("block", devices::block, 1024),
    target("vsock", devices::vsock, 1024),
    target("entropy", devices::entropy, 512),
    target("wire", parsers::wire, 512),
    target("kernel", parsers::kernel, 512),
    target("image", parsers::image, 512),
    target("reference", images::reference, 256),
    target("manifest", images::manifest, 512),
    target("layer", images::layer, 1024),
];

/// Runs executions `from` to `to` of a seed: an input depends on seed and number alone, so that a failure can
/// be repeated by its number. `before` is told each number.
pub fn drive(target: &Target, seed: u64, from: u64, to: u64, mut before: impl FnMut(u64)) {
    let mut data = vec![0; target.most_bytes];
    for number in from..to {
        before(number);
        let mut random = fastrand::Rng::with_seed(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let short = random.u8(0..8) == 0;
        let len = if short { random.usize(0..=target.most_bytes) } else { target.most_bytes };
        random.fill(&mut data[..len]);
        (target.run)(&data[..len]);
    }
}
