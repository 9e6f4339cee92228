//! Counts what test programs print: libtest's lines, and libtest-mimic's, which differ in the
//! place of a skip's reason. Pure; the output may come in any pieces.

use std::collections::BTreeSet;
use std::fmt::Write;

/// What happened so far, over all test programs of a run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: u64,
    failed: u64,
    ignored: u64,
    failures: Vec<String>,
    skips: Vec<Skip>,
    partial: Vec<u8>,
}

#[derive(Debug, PartialEq)]
struct Skip {
    name: String,
    reason: String,
}

impl Tally {
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte == b'\n' {
                let line = std::mem::take(&mut self.partial);
                self.line(&String::from_utf8_lossy(&line));
            } else {
                self.partial.push(*byte);
            }
        }
    }

    pub(crate) fn failed(&self) -> u64 {
        self.failed
    }

    /// Whether no test ran, failed or was skipped.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed + self.failed + self.ignored == 0
    }

    /// Skipped tests that the list does not allow.
    pub(crate) fn unlisted_skips(&self, listed: &BTreeSet<String>) -> Vec<&str> {
        self.skips
            .iter()
            .map(|skip| skip.name.as_str())
            .filter(|name| !listed.contains(*name))
            .collect()
    }

    /// Each failed and each skipped test by name, one a line.
    pub(crate) fn report(&self) -> String {
        let mut text = String::new();
        for name in &self.failures {
            let _ = writeln!(text, "failed   {name}");
        }
        for Skip { name, reason } in &self.skips {
            let _ = writeln!(text, "skipped  {name}: {reason}");
        }
        text
    }

    pub(crate) fn closing_line(&self) -> String {
        format!(
            "{} passed, {} failed, {} skipped",
            self.passed, self.failed, self.ignored
        )
    }

    fn line(&mut self, line: &str) {
        if let Some(result) = line.strip_prefix("test result: ") {
            self.passed += count(result, " passed");
            self.failed += count(result, " failed");
            self.ignored += count(result, " ignored");
        } else if let Some(test) = line.strip_prefix("test ") {
            self.test(test);
        }
    }

    fn test(&mut self, test: &str) {
        // From the right: a doctest's name may hold dots, an outcome never does.
        let Some((name, outcome)) = test.rsplit_once(" ... ") else {
            return;
        };
        let name = name.trim_end().to_owned();
        if outcome.starts_with("FAILED") {
            self.failures.push(name);
        } else if let Some(reason) = outcome.strip_prefix("ignored") {
            // libtest: `ignored, REASON`; libtest-mimic: `ignored (REASON)`.
            let reason = reason.trim_start_matches(',').trim();
            let bare = reason
                .strip_prefix('(')
                .and_then(|rest| rest.strip_suffix(')'));
            let reason = bare.unwrap_or(reason);
            let reason = if reason.is_empty() {
                "no reason given"
            } else {
                reason
            }
            .to_owned();
            self.skips.push(Skip { name, reason });
        }
    }
}

/// The names in a skip list: the first word of each line that says something.
pub(crate) fn skip_list(text: &str) -> BTreeSet<String> {
    text.lines()
        .map(|line| line.split('#').next().unwrap_or_default())
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

/// The number before `label` in `ok. 3 passed; 0 failed; ...`.
fn count(result: &str, label: &str) -> u64 {
    let before = result.split(label).next().unwrap_or_default();
    before
        .rsplit(' ')
        .next()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIBTEST: &str = "
running 3 tests
test slots::tests::a ... ok
test real_guest ... ignored, needs /dev/kvm
test b ... FAILED

test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
    const MIMIC: &str = "
test real::saves       ... ok
test real::moves ... ignored (no second host)
test real::waits ... ignored
test src/lib.rs - (line 3) ... ok

test result: ok. 12 passed; 0 failed; 2 ignored; 0 measured; 4 filtered out; finished in 0.01s
";

    fn tally(text: &str, piece: usize) -> Tally {
        let mut tally = Tally::default();
        text.as_bytes()
            .chunks(piece)
            .for_each(|piece| tally.feed(piece));
        tally
    }

    #[test]
    fn sums_run_over_all_programs_however_the_output_is_cut() {
        let text = [LIBTEST, MIMIC].concat();
        for piece in [1, 7, 64, text.len()] {
            assert_eq!(
                tally(&text, piece).closing_line(),
                "13 passed, 1 failed, 3 skipped"
            );
        }
    }

    #[test]
    fn both_ways_to_give_a_reason_are_read() {
        assert_eq!(
            tally(&[LIBTEST, MIMIC].concat(), 9).report(),
            "failed   b\n\
             skipped  real_guest: needs /dev/kvm\n\
             skipped  real::moves: no second host\n\
             skipped  real::waits: no reason given\n"
        );
    }

    #[test]
    fn a_skip_is_allowed_only_by_its_whole_name() {
        let listed = skip_list("# why: below\n\nreal::moves  one host here\nreal::wait  another\n");
        let tally = tally(MIMIC, 100);
        assert_eq!(tally.unlisted_skips(&listed), ["real::waits"]);
        assert_eq!(
            tally.unlisted_skips(&BTreeSet::new()),
            ["real::moves", "real::waits"]
        );
    }

    #[test]
    fn chatter_of_tests_is_not_counted() {
        let tally = tally("test of the emergency system\ntests passed: 9 passed\n", 5);
        assert_eq!(tally.closing_line(), "0 passed, 0 failed, 0 skipped");
        assert_eq!(tally.report(), "");
    }
}
