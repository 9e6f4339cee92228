//! The monitor's protocol machine under every order of acts, and hostile bytes straight into it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    monitor_qmp::fuzzing::protocol(input);
});
