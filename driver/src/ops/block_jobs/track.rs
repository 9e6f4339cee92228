//! Following a block job to its end, whoever began it: a task for each, which takes a job for a moment when there is
//! something to ask or to do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use job_core::JobKind;
use monitor_qmp::command;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;

use super::handle::{BlockJob, BlockJobState};
use super::over::{end, pivot, tell};
use crate::block_job::{BlockJobEnd, Noted, Stage};
use crate::domain::Domain;
use crate::error::Error;
use crate::events::{Notice, Subscription, What};
use crate::ops::job_watch::cancel;
use crate::qemu_job::{End, JobState, Next, Seen};
use crate::records::Running;

/// How often QEMU is asked how far its job is, and whether an event was missed: while somebody waits for it, and else. Each
/// time is a job of the domain, in its history and its news.
const ASK: Duration = Duration::from_secs(1);
const ASK_ALONE: Duration = Duration::from_secs(10);
/// Between two tries of what failed, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// A block job that is followed.
#[derive(Debug)]
pub(crate) struct Tracked {
    pub(crate) noted: Noted,
    pub(crate) state: watch::Sender<BlockJobState>,
    /// Something was asked of it.
    pub(crate) asked: Notify,
}

/// The block jobs of a domain that go on.
#[derive(Debug, Default)]
pub(crate) struct Tracks(Mutex<Vec<Arc<Tracked>>>);

impl Tracks {
    fn with<R>(&self, change: impl FnOnce(&mut Vec<Arc<Tracked>>) -> R) -> R {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn all(&self, domain: &Domain) -> Vec<BlockJob> {
        let all = self.with(|all| all.clone());
        all.into_iter()
            .map(|tracked| BlockJob::new(domain.clone(), tracked))
            .collect()
    }
}

/// Follows the block jobs of a guest that an earlier driver left. They wait until the guest is found.
pub(crate) fn track_again(domain: &Domain, record: &Running) {
    for noted in &record.block_jobs {
        Tracked::begin(domain, noted);
    }
}

impl Tracked {
    /// Follows that job from now on, unless it is followed already.
    pub(super) fn begin(domain: &Domain, noted: &Noted) -> Arc<Self> {
        let (tracked, is_new) = domain.0.block_jobs.with(|all| {
            let known = all.iter().find(|tracked| tracked.noted.id == noted.id);
            match known {
                Some(known) => (known.clone(), false),
                None => {
                    let new = Arc::new(Self {
                        noted: noted.clone(),
                        state: watch::Sender::new(BlockJobState::default()),
                        asked: Notify::new(),
                    });
                    all.push(new.clone());
                    (new, true)
                }
            }
        });
        if is_new {
            let (domain, tracked) = (domain.clone(), tracked.clone());
            let watchers = domain.0.context.watchers.clone();
            watchers.spawn(async move {
                let parting = domain.0.context.parting.clone();
                let following = follow(&domain, &tracked);
                let Some(end) = parting.run_until_cancelled(following).await else {
                    return;
                };
                domain.0.block_jobs.with(|all| {
                    all.retain(|other| !Arc::ptr_eq(other, &tracked));
                });
                tracked.state.send_modify(|state| state.end = Some(end));
            });
        }
        tracked
    }

    /// What is written of it now; nothing once it is over.
    async fn noted_now(&self, domain: &Domain) -> Option<Noted> {
        let record = domain.0.noted().await?;
        let mut jobs = record.block_jobs.into_iter();
        jobs.find(|job| job.id == self.noted.id)
    }

    fn show(&self, job: &JobState) {
        let (done, total) = job.progress();
        let is_ready = job.is_ready();
        self.state.send_if_modified(|state| {
            let next = BlockJobState {
                done,
                total,
                is_ready,
                end: None,
            };
            let is_new = *state != next;
            *state = next;
            is_new
        });
    }
}

async fn follow(domain: &Domain, tracked: &Tracked) -> BlockJobEnd {
    let mut events = domain.subscribe();
    let mut job = JobState::new(tracked.noted.id.clone());
    let mut next = Next::Ask;
    let mut pause = FIRST_PAUSE;
    let mut asked_at = Instant::now();
    loop {
        let Some(noted) = tracked.noted_now(domain).await else {
            // With the guest goes all that is written of it.
            tell(domain, &tracked.noted, &BlockJobEnd::Gone);
            return BlockJobEnd::Gone;
        };
        let was_ready = job.is_ready();
        let is_asking = next == Next::Ask;
        let step = step(
            domain,
            &mut events,
            asked_at,
            &mut job,
            next,
            &noted,
            tracked,
        );
        match step.await {
            Ok(Stepped::Next(then)) => (next, pause) = (then, FIRST_PAUSE),
            Ok(Stepped::Over(end)) => return end,
            Err(error) => {
                let error = format!("{error:#}");
                warn!(
                    domain = domain.name(),
                    job = noted.id,
                    error,
                    "a block job waits"
                );
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
                next = Next::Ask;
            }
        }
        if is_asking {
            // Not before it answered: one that is slow is not asked without a pause.
            asked_at = Instant::now();
        }
        tracked.show(&job);
        if job.is_ready() && !was_ready {
            domain.0.tell(What::BlockJobReady {
                id: noted.id.clone().into(),
                disk: noted.disk.clone().into(),
            });
        }
    }
}

enum Stepped {
    Next(Next),
    Over(BlockJobEnd),
}

async fn step(
    domain: &Domain,
    events: &mut Subscription,
    asked_at: Instant,
    job: &mut JobState,
    next: Next,
    noted: &Noted,
    tracked: &Tracked,
) -> Result<Stepped, Error> {
    let is_pivoting = matches!(noted.stage, Stage::Pivoting { .. });
    match next {
        Next::Wait if is_pivoting || (job.is_ready() && noted.is_to_pivot()) => {
            let noted = noted.clone();
            let work = move |mut op| async move { pivot(&mut op, &noted).await };
            let deadline = Instant::now() + domain.0.context.defaults.call;
            let ended = domain.run("pivot", JobKind::Modify, deadline, work);
            Ok(Stepped::Over(ended.await?))
        }
        Next::Wait => {
            let is_watched = tracked.state.receiver_count() > 0;
            let patience = if is_watched { ASK } else { ASK_ALONE };
            // Counted from the last time: news of other things that come ever faster do not put it off.
            let waiting = timeout_at(asked_at + patience, events.next());
            let notice = tokio::select! {
                notice = waiting => notice,
                () = tracked.asked.notified() => return Ok(Stepped::Next(Next::Ask)),
            };
            Ok(Stepped::Next(match notice {
                Ok(Notice::News { news, .. }) => match &news.what {
                    What::Qemu(event) => job.take(&Seen::Event(&event.typed())),
                    _ => Next::Wait,
                },
                Ok(Notice::Gap { .. }) | Err(_) => job.take(&Seen::Unsure),
            }))
        }
        Next::Ask => {
            let deadline = Instant::now() + domain.0.context.defaults.call;
            let asked = domain.run(
                "look-at-block-job",
                JobKind::Query,
                deadline,
                |mut op| async move { op.monitor()?.execute(command::QueryJobs).await },
            );
            let jobs = asked.await?;
            let mine = jobs.iter().find(|listed| listed.id == noted.id);
            if mine.is_some() && noted.stage == Stage::Cancelling {
                // Asked for by an earlier driver, it may never have been sent.
                send_cancel(domain, &noted.id).await?;
            }
            Ok(Stepped::Next(job.take(&Seen::Listed(mine))))
        }
        Next::Dismiss | Next::Stop => {
            let ended = job.end().cloned().unwrap_or(End::Unknown);
            let noted = noted.clone();
            let work = move |mut op| async move { end(&mut op, &noted, &ended).await };
            let deadline = Instant::now() + domain.0.context.defaults.call;
            let over = domain.run("end-block-job", JobKind::Modify, deadline, work);
            Ok(Stepped::Over(over.await?))
        }
    }
}

/// Has QEMU cancel a job.
async fn send_cancel(domain: &Domain, id: &str) -> Result<(), Error> {
    let id = id.to_owned();
    let deadline = Instant::now() + domain.0.context.defaults.call;
    let work = move |mut op| async move { cancel(&mut op, &id).await };
    domain
        .run("cancel-block-job", JobKind::Abort, deadline, work)
        .await
}
