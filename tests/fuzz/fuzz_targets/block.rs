//! libFuzzer's entry to [`fuzz::devices::block`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::devices::block(data));
