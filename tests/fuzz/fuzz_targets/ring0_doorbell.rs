//! libFuzzer's entry to [`fuzz::ring0::doorbell`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::ring0::doorbell(data));
