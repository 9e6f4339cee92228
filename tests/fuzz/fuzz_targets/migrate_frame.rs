//! The frames between two daemons: the same however the stream is cut, and no length costs memory before its bytes come.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    remote_migrate::fuzzing::frames(input);
});
