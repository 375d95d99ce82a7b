//! libFuzzer's entry to [`fuzz::assist::target`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::assist::target(data));
