//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one has time for. The
//! campaign of the protocol machine has an oracle of its own, in its tests.

use proptest::prelude::*;
use tests::hostile::{Campaign, corpus};

use super::{lines, protocol};
use crate::hostile::bytes;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_parsed_the_same_however_they_are_cut(
        cuts in prop::collection::vec(any::<u8>(), 0..8),
        said in "[{}\\[\\]\":,a\\\\1 \n\u{ff}]{0,300}",
    ) {
        lines(&[&[cuts.len() as u8], &cuts[..], said.as_bytes()].concat());
    }

    #[test]
    fn any_order_of_acts_answers_nobody_wrongly(acts in prop::collection::vec(any::<u8>(), 0..300)) {
        protocol(&acts);
    }
}

#[test]
fn the_committed_corpus_holds() {
    corpus("agent_lines", |input| {
        lines(input);
    });
    corpus("agent_protocol", protocol);
}

#[test]
fn a_campaign_of_hostile_strings_is_parsed_the_same_however_they_are_cut() {
    let mut campaign = Campaign::told();
    let (strings, dice) = (campaign.strings, &mut campaign.dice);
    let mut steps = 0;
    let mut input = Vec::new();
    for _ in 0..strings {
        let cuts = dice.below(8);
        input.clear();
        input.push(u8::try_from(cuts).unwrap());
        input.extend((0..cuts).map(|_| u8::try_from(dice.below(64)).unwrap()));
        for _ in 0..dice.below(3) {
            input.extend(bytes(dice));
        }
        steps += lines(&input) as u64;
    }
    // A campaign in which nothing ever comes of the bytes would prove little.
    assert!(steps > strings / 4, "{steps} steps in {strings}");
    println!("{steps} steps");
    campaign.ended("hostile-agent-lines", strings);
}
