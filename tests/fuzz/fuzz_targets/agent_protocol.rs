//! The agent's protocol machine under every order of acts.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    agent_qga::fuzzing::protocol(input);
});
