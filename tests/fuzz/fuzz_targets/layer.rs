//! libFuzzer's entry to [`fuzz::images::layer`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::images::layer(data));
