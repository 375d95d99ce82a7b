//! libFuzzer's entry to [`fuzz::images::manifest`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::images::manifest(data));
