//! The agent's parser: an answer is the same wherever its stream was cut, and no stream fills the memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| {
    agent_qga::fuzzing::lines(input);
});
