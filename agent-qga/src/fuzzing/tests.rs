//! The properties on random bytes, on the committed corpus, and on as many hostile strings as one has time for. The
//! campaign of the protocol machine has an oracle of its own, in its tests.

use std::{fs, path::Path};

use proptest::prelude::*;

use super::{lines, protocol};
use crate::hostile::Campaign;

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

/// The folder of its inputs, and what runs one.
type Target = (&'static str, fn(&[u8]));

#[test]
fn the_committed_corpus_holds() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus");
    let targets: [Target; 2] = [
        ("agent_lines", |input| {
            lines(input);
        }),
        ("agent_protocol", protocol),
    ];
    for (target, run) in targets {
        let mut count = 0;
        for entry in fs::read_dir(corpus.join(target)).unwrap() {
            run(&fs::read(entry.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 3, "{target} has {count} inputs");
    }
}

#[test]
fn a_campaign_of_hostile_strings_is_parsed_the_same_however_they_are_cut() {
    let Campaign {
        strings,
        mut dice,
        began,
        ..
    } = Campaign::told();
    let mut steps = 0;
    let mut input = Vec::new();
    for _ in 0..strings {
        let cuts = dice.below(8);
        input.clear();
        input.push(u8::try_from(cuts).unwrap());
        input.extend((0..cuts).map(|_| u8::try_from(dice.below(64)).unwrap()));
        for _ in 0..dice.below(3) {
            input.extend(dice.bytes());
        }
        steps += lines(&input) as u64;
    }
    // A campaign in which nothing ever comes of the bytes would prove little.
    assert!(steps > strings / 4, "{steps} steps in {strings}");
    println!("{steps} steps");
    Campaign::ended("hostile-agent-lines", strings, strings, began);
}
