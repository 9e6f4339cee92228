//! How the demo tells what it saw: for a person as it happens, or one JSON object a step.
//!
//! Knows nothing of guests. A claim that does not hold is told like any other, and remembered.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Map, Value, json};

/// Everything that is told in one run.
pub(crate) struct Report {
    is_json: bool,
    began: Instant,
    steps: usize,
    failed: usize,
}

/// One step: what is claimed, what was observed, and whether the one follows from the other.
pub(crate) struct Step<'a> {
    report: &'a mut Report,
    title: &'static str,
    began: Instant,
    observed: Map<String, Value>,
    failures: Vec<String>,
}

impl Report {
    pub(crate) fn new(is_json: bool) -> Self {
        Self {
            is_json,
            began: Instant::now(),
            steps: 0,
            failed: 0,
        }
    }

    pub(crate) fn step(&mut self, title: &'static str) -> Step<'_> {
        self.steps += 1;
        if !self.is_json {
            println!(
                "\n{:2}. {title}  [{:.1}s]",
                self.steps,
                self.began.elapsed().as_secs_f64()
            );
        }
        Step {
            report: self,
            title,
            began: Instant::now(),
            observed: Map::new(),
            failures: Vec::new(),
        }
    }

    /// Lines that belong to no step.
    pub(crate) fn text(&self, lines: impl IntoIterator<Item = String>) {
        if !self.is_json {
            for line in lines {
                println!("{line}");
            }
        }
    }

    /// The last line, and whether all went as claimed.
    pub(crate) fn end(self) -> bool {
        let seconds = self.began.elapsed().as_secs_f64();
        if self.is_json {
            println!(
                "{}",
                json!({"steps": self.steps, "failed": self.failed, "seconds": seconds})
            );
        } else if self.failed == 0 {
            println!(
                "\nAll {} steps went as claimed, in {seconds:.1}s.",
                self.steps
            );
        } else {
            println!(
                "\n{} of {} steps did not go as claimed.",
                self.failed, self.steps
            );
        }
        self.failed == 0
    }
}

impl Step<'_> {
    /// A fact that was observed.
    pub(crate) fn saw(&mut self, what: &str, value: impl Into<Value>) {
        let value = value.into();
        if !self.report.is_json {
            let text = value
                .as_str()
                .map_or_else(|| value.to_string(), str::to_owned);
            println!("      {what}: {text}");
        }
        self.observed.insert(what.to_owned(), value);
    }

    /// A time that was measured.
    pub(crate) fn took(&mut self, what: &str, time: Duration) {
        let milliseconds = (time.as_secs_f64() * 10_000.0).round() / 10.0;
        if !self.report.is_json {
            println!("      {what}: {milliseconds} ms");
        }
        self.observed
            .insert(format!("{what}, ms"), json!(milliseconds));
    }

    /// What is claimed. Told only if it does not hold.
    pub(crate) fn claim(&mut self, what: &str, holds: bool) {
        if !holds {
            self.fail(format!("not as claimed: {what}"));
        }
    }

    pub(crate) fn fail(&mut self, why: String) {
        if !self.report.is_json {
            println!("      FAILED: {why}");
        }
        self.failures.push(why);
    }

    /// The value, or a failure of this step.
    pub(crate) fn must<T, E: std::fmt::Display>(
        &mut self,
        what: &str,
        result: Result<T, E>,
    ) -> Option<T> {
        result
            .map_err(|error| self.fail(format!("{what}: {error:#}")))
            .ok()
    }

    /// A bar on a terminal; elsewhere a plain line now and then.
    pub(crate) fn bar(&self) -> Bar {
        let style = ProgressStyle::with_template("      {prefix} {bar:32} {percent:>3}%  {msg}");
        let bar = ProgressBar::new(1000).with_style(style.expect("the template is well formed"));
        let is_drawn = !self.report.is_json && std::io::stderr().is_terminal();
        bar.set_draw_target(if is_drawn {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        });
        Bar {
            bar,
            is_plain: !self.report.is_json && !is_drawn,
            told: -10.0,
        }
    }
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        let is_ok = self.failures.is_empty();
        self.report.failed += usize::from(!is_ok);
        if self.report.is_json {
            let step = json!({
                "step": self.report.steps,
                "title": self.title,
                "ok": is_ok,
                "seconds": self.began.elapsed().as_secs_f64(),
                "observed": self.observed,
                "failures": self.failures,
            });
            println!("{step}");
        }
    }
}

/// How far something is.
pub(crate) struct Bar {
    bar: ProgressBar,
    is_plain: bool,
    told: f64,
}

impl Bar {
    pub(crate) fn set(&mut self, percent: f64, text: String) {
        if self.is_plain && percent >= self.told + 5.0 {
            println!("      {percent:3.0}%  {text}");
            self.told = percent;
        }
        self.bar.set_position((percent * 10.0) as u64);
        self.bar.set_message(text);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}
