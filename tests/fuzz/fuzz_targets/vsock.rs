//! libFuzzer's entry to [`fuzz::devices::vsock`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::devices::vsock(data));
