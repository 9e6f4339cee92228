//! Who held a domain when, drawn from its history of finished jobs.

use driver::Domain;
use job_core::Finished;

const WIDTH: usize = 48;

/// The finished jobs of a domain on one scale: dots while it waited, bars while it ran.
pub(crate) fn lines(domain: &Domain) -> Vec<String> {
    let history = domain.history();
    let began = |job: &Finished| (job.age + job.ran + job.waited).as_secs_f64();
    let oldest = history.iter().map(began).fold(0.0, f64::max);
    let newest = history
        .iter()
        .map(|job| job.age.as_secs_f64())
        .fold(f64::INFINITY, f64::min);
    let span = (oldest - newest).max(0.001);
    let column = |age: f64| (((oldest - age) / span) * (WIDTH - 1) as f64).round() as usize;

    let mut lines = vec![
        String::new(),
        format!(
            "Who held \"{}\" over {span:.1} s, of the last {} jobs:",
            domain.name(),
            history.len()
        ),
    ];
    for job in &history {
        let (asked, granted, ended) = (
            column(began(job)),
            column((job.age + job.ran).as_secs_f64()),
            column(job.age.as_secs_f64()),
        );
        let drawn: String = (0..WIDTH)
            .map(|at| match at {
                _ if at >= granted && at <= ended => '█',
                _ if at >= asked && at < granted => '·',
                _ => ' ',
            })
            .collect();
        let ran = job.ran.as_secs_f64();
        lines.push(format!(
            "  {:>3} {:14} {:12} |{drawn}| {ran:7.3} s  {}",
            job.id,
            job.owner,
            job.kind,
            short(job)
        ));
    }
    lines
}

/// The outcome in a word.
fn short(job: &Finished) -> String {
    format!("{:?}", job.outcome)
        .split('(')
        .next()
        .unwrap_or_default()
        .to_owned()
}
