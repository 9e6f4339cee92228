//! What became of each run, kept beside the figures, and the sum of it.
//!
//! A campaign that was cut short goes on from the run it came to, with those before it as that very program left them. A run
//! that is not known counts as none that was good.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::cells::Cell;
use crate::judge::End;
use crate::{OFTEN, place};

pub(crate) struct Tally {
    path: PathBuf,
    pub(crate) kept: Kept,
}

#[derive(Deserialize, Serialize)]
pub(crate) struct Kept {
    /// Which program it is of, by the time of its making. What another one found shows nothing of this one.
    program: u128,
    /// By the numbers of the runs.
    runs: BTreeMap<u64, Result<End, String>>,
    /// Faults that came outside their phase.
    pub(crate) outside: u64,
}

impl Tally {
    /// Of the runs before `from`, as far as this program has done them with that seed.
    pub(crate) fn of(seed: u64, is_short: bool, from: u64) -> Result<Self, String> {
        let program = std::env::current_exe().map_err(|error| error.to_string())?;
        let made = fs::metadata(&program).and_then(|facts| facts.modified());
        let made = made.map_err(|error| error.to_string())?;
        let made = made.duration_since(UNIX_EPOCH).unwrap_or_default();
        // TARGET/debug/examples/PROGRAM
        let target = program.ancestors().nth(3);
        let folder = target
            .ok_or("this program is in no target folder")?
            .join("figures");
        fs::create_dir_all(&folder).map_err(|error| error.to_string())?;
        let form = if is_short { "short" } else { "long" };
        let path = folder.join(format!("faults-migrate-{form}-of-seed-{seed}.json"));
        let mut kept = Kept {
            program: made.as_nanos(),
            runs: BTreeMap::new(),
            outside: 0,
        };
        let earlier = fs::read(&path).ok();
        let earlier = earlier.and_then(|text| serde_json::from_slice::<Kept>(&text).ok());
        if let Some(mut earlier) = earlier.filter(|earlier| earlier.program == kept.program)
            && from > 0
        {
            earlier.runs.retain(|run, _| *run < from);
            kept = earlier;
        }
        let known = kept.runs.len() as u64;
        if known < from {
            println!(
                "{known} of the {from} runs before run {from} are known, and the others count as none"
            );
        }
        Ok(Self { path, kept })
    }

    pub(crate) fn note(&mut self, run: u64, end: Result<End, String>) -> Result<(), String> {
        self.kept.runs.insert(run, end);
        let text = serde_json::to_vec(&self.kept).map_err(|error| error.to_string())?;
        let draft = self.path.with_extension("draft");
        fs::write(&draft, text)
            .and_then(|()| fs::rename(&draft, &self.path))
            .map_err(|error| format!("write {}: {error}", self.path.display()))
    }

    pub(crate) fn print(&self, cells: &[Cell], runs: u64, took: Duration) -> Result<(), String> {
        let (mut hits, mut ends) = (vec![0; cells.len()], Vec::new());
        let mut failures = Vec::new();
        for (run, end) in &self.kept.runs {
            match end {
                Ok(end) => {
                    hits[place(*run, cells)] += 1;
                    ends.push(*end);
                }
                Err(failure) => failures.push(failure.as_str()),
            }
        }
        let outside = self.kept.outside;
        println!("\nhits of each cell; {outside} faults came outside their phase and do not count");
        for (cell, hits) in cells.iter().zip(&hits) {
            println!("{hits:>4}  {cell}");
        }
        println!();
        for (end, words) in End::ALL {
            let count = ends.iter().filter(|found| **found == end).count();
            println!("{count:>4}  {words}");
        }
        let good = ends.len() as u64;
        let verdict = |is_kept| if is_kept { "ok" } else { "short" };
        println!(
            "figure faults-migrate {good} runs bar >= {runs} {}",
            verdict(good == runs)
        );
        let least = hits.iter().min().copied().unwrap_or(0);
        let wanted = OFTEN.min(runs / cells.len() as u64);
        let is_kept = verdict(least >= wanted);
        println!("figure faults-migrate-least-hit {least} hits bar >= {wanted} {is_kept}");
        println!(
            "{good} of {runs} runs, the last of them in {:.0} s",
            took.as_secs_f64()
        );
        if failures.is_empty() {
            Ok(())
        } else {
            Err(format!("these failed:\n{}", failures.join("\n")))
        }
    }
}
