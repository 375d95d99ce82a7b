//! libFuzzer's entry to [`fuzz::bulk::target`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::bulk::target(data));
