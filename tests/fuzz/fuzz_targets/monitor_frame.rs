//! The monitor's parser: the same objects however the stream is cut, and none beyond the limits.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    monitor_qmp::fuzzing::frame(input);
});
