//! libFuzzer's entry to [`fuzz::parsers::image`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::parsers::image(data));
