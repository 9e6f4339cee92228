//! The agent's parser: an answer is the same wherever its stream was cut, is never older than its command, and no
//! stream fills the memory.
//!
//! The first byte says how often the stream is cut, the next ones where; the rest is the stream.
#![no_main]

use agent_qga::protocol::{Phase, Protocol, Step};
use libfuzzer_sys::fuzz_target;

const MAX_MESSAGE: usize = 256;

fuzz_target!(|input: &[u8]| {
    let Some((&cuts, rest)) = input.split_first() else {
        return;
    };
    let (cuts, stream) = rest.split_at(rest.len().min(usize::from(cuts % 8)));
    let whole = said(&[], stream);
    let pieces = said(cuts, stream);
    // A line that is too long is told as soon as that is known, also if a restart would have dropped it later: so only
    // what came before the first of them is the same.
    let same = [&whole, &pieces].map(|steps| {
        steps
            .iter()
            .position(|step| step.contains("TooLarge"))
            .unwrap_or(steps.len())
    });
    if whole.len() == same[0] && pieces.len() == same[1] {
        assert_eq!(whole, pieces, "cut at {cuts:?}");
    }
    let same = same[0].min(same[1]);
    assert_eq!(whole[..same], pieces[..same], "cut at {cuts:?}");
});

/// What a conversation makes of a stream that begins with the right nonce, a command having been sent as soon as one
/// may be.
fn said(cuts: &[u8], stream: &[u8]) -> Vec<String> {
    let mut protocol = Protocol::new(MAX_MESSAGE, 8);
    protocol.sync(7);
    protocol.receive(b"\xFF{\"return\": 7}\n");
    assert!(matches!(protocol.step(), Some(Step::Synced)));
    assert!(protocol.step().is_none());
    protocol.sent(false);
    let mut said = Vec::new();
    let mut rest = stream;
    let cuts = cuts.iter().map(|&cut| usize::from(cut)).chain([usize::MAX]);
    for cut in cuts {
        let (piece, after) = rest.split_at(cut.min(rest.len()));
        rest = after;
        protocol.receive(piece);
        while let Some(step) = protocol.step() {
            if let Step::Answer(Ok(value)) = &step {
                let text = value.get().as_bytes();
                assert!(stream.windows(text.len()).any(|window| window == text));
                assert!(text.len() <= MAX_MESSAGE);
            }
            said.push(format!("{step:?}"));
        }
        assert_ne!(protocol.phase(), Phase::Syncing);
    }
    said
}
