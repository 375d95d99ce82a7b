//! libFuzzer's entry to [`fuzz::images::reference`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::images::reference(data));
