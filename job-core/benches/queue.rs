//! Does a grant cost more the more callers wait?
//!
//! That many callers wait, a job ends, the oldest is granted, ends and queues again as the youngest. Of those who wait
//! half are held back by the mask of a running async job, so that a search among them would show.

#![expect(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "support/measure.rs"]
mod measure;

use std::collections::VecDeque;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use job_core::{AsyncKind, BeginError, Job, JobKind, Limits, Overdue, Scheduler};
use measure::{Bar, figure, median, ratio};

type Begin = Pin<Box<dyn Future<Output = Result<Job, BeginError>>>>;

const LENGTHS: [usize; 3] = [10, 1_000, 100_000];

fn main() {
    let (rounds, grants) = if measure::is_short() {
        (11, 2_000)
    } else {
        (51, 10_000)
    };
    let mut queues = LENGTHS.map(Queue::new);
    let mut times = LENGTHS.map(|_| Vec::new());
    for _ in 0..rounds {
        for (queue, times) in queues.iter_mut().zip(&mut times) {
            times.push(queue.grants(grants));
        }
    }
    for (length, times) in LENGTHS.iter().zip(&times) {
        println!(
            "{length:>7} waiting  {:>7.0} ns a grant",
            median(times.clone())
        );
    }
    let [few, many, most] = times;
    figure(
        "grant-1000/grant-10",
        ratio(&many, &few),
        "x",
        Bar::AtMost(2.0),
    );
    figure(
        "grant-100000/grant-10",
        ratio(&most, &few),
        "x",
        Bar::AtMost(2.0),
    );
}

struct Queue {
    domain: Scheduler,
    holder: Option<Job>,
    waiting: VecDeque<Begin>,
    /// What the mask holds back, and whose mask it is.
    _aside: (job_core::AsyncJob, Vec<Begin>),
}

impl Queue {
    fn new(length: usize) -> Self {
        let limits = Limits {
            normal: u32::MAX,
            ..Limits::default()
        };
        let domain = Scheduler::with("web", limits, &Overdue::new());
        let save = domain
            .caller("save")
            .try_begin_async(AsyncKind::Save)
            .unwrap();
        let holder = domain.caller("first").try_begin(JobKind::Query).unwrap();
        let many = |kind| {
            (0..length / 2)
                .map(|_| wait(&domain, kind))
                .collect::<Vec<_>>()
        };
        Self {
            holder: Some(holder),
            _aside: (save, many(JobKind::Modify)),
            waiting: many(JobKind::Query).into(),
            domain,
        }
    }

    /// Nanoseconds of one grant: end, pick up, queue again.
    fn grants(&mut self, count: usize) -> f64 {
        let start = Instant::now();
        for _ in 0..count {
            drop(self.holder.take());
            let mut next = self.waiting.pop_front().unwrap();
            let Poll::Ready(job) = next.as_mut().poll(&mut Context::from_waker(Waker::noop()))
            else {
                panic!("the oldest is granted");
            };
            self.holder = Some(job.unwrap());
            self.waiting.push_back(wait(&self.domain, JobKind::Query));
        }
        start.elapsed().as_nanos() as f64 / count as f64
    }
}

fn wait(domain: &Scheduler, kind: JobKind) -> Begin {
    let mut begin: Begin = Box::pin(domain.caller("op").begin(kind, std::future::pending()));
    let polled = begin.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(polled.is_pending());
    begin
}
