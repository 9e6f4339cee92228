//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one
//! has time for.

use proptest::prelude::*;
use tests::hostile::{Campaign, Dice, corpus};

use super::{frame, protocol};

proptest! {
    #[test]
    fn any_bytes_are_parsed_the_same_however_they_are_cut(
        bytes in prop::collection::vec(any::<u8>(), 0..64),
        json in "[{}\\[\\]\":,a\\\\1 \n]{0,300}",
    ) {
        frame(&bytes);
        frame(&[&bytes[..], json.as_bytes()].concat());
    }

    #[test]
    fn any_order_of_acts_answers_nobody_wrongly(
        acts in prop::collection::vec(any::<u8>(), 0..300),
    ) {
        protocol(&acts);
    }
}

#[test]
fn the_committed_corpus_holds() {
    corpus("monitor_frame", |input| {
        frame(input);
    });
    corpus("monitor_protocol", |input| {
        protocol(input);
    });
}

#[test]
fn a_campaign_of_hostile_strings_is_parsed_the_same_however_they_are_cut() {
    let mut campaign = Campaign::told();
    let (strings, dice) = (campaign.strings, &mut campaign.dice);
    let (mut objects, mut most) = (0, 0);
    for _ in 0..strings {
        let mut input = vec![dice.byte()];
        input.extend((0..input[0] % 8).map(|_| dice.byte() % 64));
        for _ in 0..=dice.below(6) {
            speak(dice, &mut input);
        }
        let found = frame(&input);
        objects += found as u64;
        most = most.max(found);
    }
    // A campaign of which nothing is ever an object would prove little.
    assert!(objects > strings / 4, "{objects} objects in {strings}");
    println!("{objects} objects, at most {most} in one string");
    campaign.ended("hostile-monitor-frame", strings);
}

#[test]
fn a_campaign_of_hostile_strings_answers_nobody_wrongly() {
    let mut campaign = Campaign::told();
    let (strings, dice) = (campaign.strings, &mut campaign.dice);
    let (mut fed, mut answered) = (0, 0);
    let mut input = Vec::new();
    while fed < strings {
        input.clear();
        for _ in 0..dice.below(60) {
            // Acts of ours and answers that fit come as bytes below 7 modulo 8.
            input.push(dice.byte() / 8 * 8 + dice.byte() % 7);
            if dice.below(6) == 0 {
                let mut said = Vec::new();
                speak(dice, &mut said);
                said.truncate(255);
                input.extend([7, u8::try_from(said.len()).unwrap()]);
                input.extend(said);
            }
        }
        let heard = protocol(&input);
        fed += heard.strings;
        answered += heard.answered;
    }
    assert!(answered > strings / 20, "{answered} answered by {fed}");
    println!("{answered} callers answered");
    campaign.ended("hostile-monitor-protocol", fed);
}

/// Something of what a QEMU says, now and then torn, turned over or made up.
fn speak(dice: &mut Dice, out: &mut Vec<u8>) {
    const PIECES: [&[u8]; 18] = [
        b"{\"return\": {}, \"id\": 1}\r\n",
        b"{\"return\": {\"a\": [1, {\"b\": \"]}\"}]}, \"id\": 2}",
        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"\\ud800\"}, \"id\": 1}\r\n",
        b"{\"error\": {\"class\": \"GenericError\", \"desc\": \"JSON parse error\"}}\r\n",
        b"{\"timestamp\": {\"seconds\": 1, \"microseconds\": 2}, \"event\": \"STOP\"}\r\n",
        b"{\"event\": \"X\", \"data\": {}, \"new\": null}",
        b"{\"QMP\": {\"version\": {\"qemu\": {\"major\": 9, \"minor\": 0, \"micro\": 0}}}}",
        b"{\"return\": null, \"id\": \"libvirt-1\"}",
        b"{\"id\": 18446744073709551616, \"return\": 1}",
        b"{\"return\": 1, \"return\": 2, \"error\": {}}",
        b"{}",
        b"{\"a\":",
        b"}}",
        b"[[[[[[[[[[",
        b"\"\\\"",
        b"\r\n",
        b"\xFF\xC3",
        b"\0",
    ];
    let from = out.len();
    match dice.below(6) {
        0 => dice.noise(out),
        1 => {
            let length = dice.below(300);
            out.extend(b"{\"long\": \"");
            out.resize(out.len() + length, b'x');
            out.extend(b"\"}");
        }
        _ => out.extend(dice.pick(&PIECES)),
    }
    dice.spoil(out, from);
}
