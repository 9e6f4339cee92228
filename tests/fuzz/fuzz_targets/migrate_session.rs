//! The session between two daemons under every order of acts, and a peer's bytes straight into it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    remote_migrate::fuzzing::session(input);
});
