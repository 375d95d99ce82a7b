//! libFuzzer's entry to [`fuzz::parsers::wire`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| fuzz::parsers::wire(data));
