//! What the benches share: rounds that take turns, medians, and the lines that `cargo xtask bench` collects.
//!
//! Ratios compare contenders of one run, a round of each in turn, so that a noisy neighbour disturbs all alike.

#![allow(dead_code, reason = "each bench uses what it needs")]

use std::time::{Duration, Instant};

/// Whether a quick look is enough: fewer rounds, figures a little rougher.
pub(crate) fn is_short() -> bool {
    std::env::args().any(|argument| argument == "--short")
}

/// The middle of the values.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The median over the rounds of one contender's figure divided by the other's in the same round.
pub(crate) fn ratio(ours: &[f64], theirs: &[f64]) -> f64 {
    median(ours.iter().zip(theirs).map(|(a, b)| a / b).collect())
}

/// How long `work` takes.
pub(crate) fn time(work: impl FnOnce()) -> Duration {
    let start = Instant::now();
    work();
    start.elapsed()
}

/// What a figure must be.
#[derive(Clone, Copy)]
pub(crate) enum Bar {
    AtMost(f64),
    AtLeast(f64),
}

/// One measured figure, as `cargo xtask bench` reads it.
pub(crate) fn figure(name: &str, value: f64, unit: &str, bar: Bar) {
    let (op, limit, ok) = match bar {
        Bar::AtMost(limit) => ("<=", limit, value <= limit),
        Bar::AtLeast(limit) => (">=", limit, value >= limit),
    };
    let verdict = if ok { "ok" } else { "short" };
    println!("figure {name} {value:.3} {unit} bar {op} {limit} {verdict}");
}
