//! libFuzzer's entry to [`fuzz::doorbell::target`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::doorbell::target(data));
