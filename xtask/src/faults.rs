//! `faults daemon|migrate [--runs N] [--seed S] [--from K] [--short]`: a daemon with a real guest, killed inside every kind
//! of operation, and two daemons with a guest on its way between them. What is random follows from the seed; a campaign that
//! was cut short goes on `--from` the run it came to.

use crate::error::Failure;
use crate::rig::Rig;
use crate::{figures, needs};

/// A campaign: its name, and the program that is it. Which cells are those of its short form is the campaign's own.
const CAMPAIGNS: [(&str, &str); 2] = [("daemon", "faults"), ("migrate", "faults-migrate")];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let named = arguments.split_first().and_then(|(name, rest)| {
        let campaign = CAMPAIGNS.iter().find(|campaign| campaign.0 == name)?;
        Some((campaign, rest))
    });
    let Some(((name, example), rest)) = named else {
        return Err(Failure::Usage(
            "faults takes 'daemon' or 'migrate'".to_owned(),
        ));
    };
    let (mut passed, mut words) = (Vec::new(), rest.iter().map(String::as_str));
    while let Some(word) = words.next() {
        match word {
            "--short" => passed.push(word),
            "--runs" | "--seed" | "--from" => {
                let number = words.next().filter(|number| number.parse::<u64>().is_ok());
                let number =
                    number.ok_or_else(|| Failure::Usage(format!("{word} takes a number")))?;
                passed.extend([word, number]);
            }
            other => return Err(Failure::Usage(format!("faults does not know '{other}'"))),
        }
    }
    if *name == "migrate"
        && let Err(failure) = needs::network()
    {
        // The campaign says by name what it is skipped for.
        eprintln!("xtask: {}", failure.summary());
    }
    let mut campaign = Rig::prepare(None)?.cargo();
    campaign.args([
        "run",
        "--quiet",
        "--package",
        "tests",
        "--example",
        example,
        "--",
    ]);
    figures::collect(campaign.args(passed), &format!("faults-{name}"))
}
