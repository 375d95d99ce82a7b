//! libFuzzer's entry to [`fuzz::devices::entropy`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::devices::entropy(data));
