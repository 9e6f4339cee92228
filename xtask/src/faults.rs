//! `faults daemon [--runs N] [--seed S] [--from K] [--short]`: a daemon with a real guest, killed inside every kind of
//! operation. What is random follows from the seed; a campaign that was cut short goes on `--from` the run it came to.

use crate::error::Failure;
use crate::figures;
use crate::rig::Rig;

/// Each cell twice, within two minutes on two cores.
const SHORT: [&str; 2] = ["--runs", "36"];

pub(crate) fn run(arguments: &[String]) -> Result<(), Failure> {
    let Some(("daemon", rest)) = arguments
        .split_first()
        .map(|(name, rest)| (name.as_str(), rest))
    else {
        return Err(Failure::Usage("faults takes 'daemon'".to_owned()));
    };
    let (mut passed, mut words) = (Vec::new(), rest.iter().map(String::as_str));
    while let Some(word) = words.next() {
        match word {
            "--short" => passed.extend(SHORT),
            "--runs" | "--seed" | "--from" => {
                let number = words.next().filter(|number| number.parse::<u64>().is_ok());
                let number =
                    number.ok_or_else(|| Failure::Usage(format!("{word} takes a number")))?;
                passed.extend([word, number]);
            }
            other => return Err(Failure::Usage(format!("faults does not know '{other}'"))),
        }
    }
    let mut campaign = Rig::prepare(None)?.cargo();
    campaign.args([
        "run",
        "--quiet",
        "--package",
        "tests",
        "--example",
        "faults",
        "--",
    ]);
    figures::collect(campaign.args(passed), "faults-daemon")
}
