//! libFuzzer's entry to [`fuzz::parsers::kernel`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::parsers::kernel(data));
