//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one has time for.

use proptest::prelude::*;
use tests::hostile::{Campaign, Dice, corpus};

use super::{frames, session};

proptest! {
    #[test]
    fn any_bytes_are_the_same_frames_however_they_are_cut(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        short in prop::collection::vec(0_u8..9, 0..64),
    ) {
        frames(&bytes);
        frames(&[&short[..], &[0, 0, 0], &bytes].concat());
    }

    #[test]
    fn any_order_of_acts_is_refused_or_answered_by_its_own_ids(
        acts in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        session(&acts);
    }
}

#[test]
fn the_committed_corpus_holds() {
    corpus("migrate_frame", |input| {
        frames(input);
    });
    corpus("migrate_session", |input| {
        session(input);
    });
}

#[test]
fn a_campaign_of_hostile_strings_is_the_same_frames_however_it_is_cut() {
    let mut campaign = Campaign::told();
    let (strings, dice) = (campaign.strings, &mut campaign.dice);
    let mut whole = 0;
    for _ in 0..strings {
        let mut input = vec![dice.byte()];
        input.extend((0..input[0] % 8).map(|_| dice.byte() % 64));
        for _ in 0..=dice.below(6) {
            let mut said = Vec::new();
            speak(dice, &mut said);
            // A length that is true, now and then one that is not, or beyond all limits.
            let length = u32::try_from(said.len()).unwrap();
            let length = match dice.below(16) {
                0 => length + 1,
                1 => u32::MAX >> dice.below(32),
                _ => length,
            };
            input.extend(length.to_be_bytes());
            input.extend(said);
        }
        whole += frames(&input) as u64;
    }
    // A campaign of which nothing is ever a frame would prove little.
    assert!(whole > strings / 4, "{whole} frames in {strings}");
    println!("{whole} frames");
    campaign.ended("hostile-migrate-frame", strings);
}

#[test]
fn a_campaign_of_hostile_strings_is_refused_or_answered_by_its_own_ids() {
    let mut campaign = Campaign::told();
    let (strings, dice) = (campaign.strings, &mut campaign.dice);
    let (mut fed, mut handed_up) = (0, 0);
    let mut input = Vec::new();
    while fed < strings {
        input.clear();
        // One that never greets hears nothing: most do.
        input.extend([dice.byte(), dice.byte() / 8 * 8 + 4]);
        for _ in 0..dice.below(60) {
            // Acts of ours, and messages that fit, come as bytes below 7 modulo 8.
            input.push(dice.byte() / 8 * 8 + [0, 0, 1, 1, 2, 3, 5, 5, 5, 6][dice.below(10)]);
            if dice.below(12) == 0 {
                let mut said = Vec::new();
                speak(dice, &mut said);
                said.truncate(255);
                let framed = if dice.below(4) == 0 { 15 } else { 7 };
                input.extend([framed, u8::try_from(said.len()).unwrap()]);
                input.extend(said);
            }
        }
        let heard = session(&input);
        fed += heard.strings;
        handed_up += heard.handed_up;
    }
    assert!(handed_up > strings / 20, "{handed_up} handed up of {fed}");
    println!("{handed_up} requests and answers handed up");
    campaign.ended("hostile-migrate-session", fed);
}

/// Something of what a peer says, now and then torn, turned over or made up.
fn speak(dice: &mut Dice, out: &mut Vec<u8>) {
    const PIECES: [&[u8]; 16] = [
        br#"{"hello":{"magic":"vmwright-migrate","version":1,"features":["clock","run"]}}"#,
        br#"{"hello":{"magic":"vmwright-migrate","version":3}}"#,
        br#"{"hello":{"magic":"vmwright-migrate","version":70000}}"#,
        br#"{"request":{"id":1,"within_ms":9,"request":{"migration":"00000000-0000-0000-0000-000000000007","epoch":1,"domain":"00000000-0000-0000-0000-000000000007","call":"finish"}}}"#,
        br#"{"request":{"id":1,"within_ms":18446744073709551615,"request":{"migration":"00000000-0000-0000-0000-000000000007","epoch":0,"domain":"00000000-0000-0000-0000-000000000007","call":{"status":"source"}}}}"#,
        br#"{"answer":{"id":1,"answer":{"migration":"00000000-0000-0000-0000-000000000000","epoch":1,"reply":"owned"}}}"#,
        br#"{"answer":{"id":1,"answer":{"migration":"00000000-0000-0000-0000-000000000000","epoch":18446744073709551615,"reply":{"stale":{"seen":2}}}}}"#,
        br#"{"ping":{"id":1}}"#,
        br#"{"ping":{"id":2,"underway":null}}"#,
        br#"{"pong":{"id":1,"clock":-9223372036854775808}}"#,
        br#"{"fault":{"kind":"solar-flare","text":"too bright"}}"#,
        br#"{"pray":{}}"#,
        b"[[[[[[[[[[[[[[[[",
        b"{}",
        b"\xFF\xC3",
        b"",
    ];
    let from = out.len();
    if dice.below(6) == 0 {
        dice.noise(out);
    } else {
        out.extend(dice.pick(&PIECES));
    }
    dice.spoil(out, from);
}
