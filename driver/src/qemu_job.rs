//! One of QEMU's own jobs from its beginning to its end, as a plain value: what its events and the list of jobs say, and
//! what is to be done next. No monitor, no clock; [`block::watch`](crate::block) asks and waits.
//!
//! ```text
//!  created ─► running ─┬────────► waiting ─► pending ─► concluded ─► dismissed: gone from the list
//!                      └► ready ────┘                       │
//!                        (mirror, active commit)            └ only now its end is known, by its `error`
//! ```
//!
//! How a job ended is read from the list while it is still there: so each of ours is begun with `auto-dismiss` off, and a
//! daemon that was not there when it ended can read it later. `BLOCK_JOB_COMPLETED` is no success by itself: it is also
//! sent with an `error` (test bed, section 4). One that vanished from the list, dismissed by somebody else, ended as its
//! events said; without any its end is not known.

use monitor_qmp::QmpEvent;
use monitor_qmp::command::{Job, JobStatus};

/// What QEMU writes as the error of a job that was asked to stop (`strerror(ECANCELED)`, `job.c`).
pub(crate) const CANCELLED: &str = "Operation canceled";

/// Something that was seen of QEMU's jobs.
#[derive(Debug)]
pub(crate) enum Seen<'a> {
    /// An event, of this job or of another.
    Event(&'a QmpEvent),
    /// `query-jobs` answered, and this is what it says of the job, if it lists it.
    Listed(Option<&'a Job>),
    /// Events were missed, or none came for a while.
    Unsure,
    /// The job was dismissed.
    Dismissed,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Wait for the next event.
    Wait,
    /// Ask for the list of jobs.
    Ask,
    /// Dismiss the job: its end is known.
    Dismiss,
    /// Nothing: it is over.
    Stop,
}

/// How a job of QEMU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// It did what it was begun for.
    Done,
    /// It was asked to stop, and did.
    Cancelled,
    /// It failed, and this is QEMU's reason.
    Failed(String),
    /// Somebody else took it off the list, and no event told how it ended.
    Unknown,
}

/// One job, as far as it was seen.
#[derive(Clone, Debug)]
pub(crate) struct JobState {
    id: String,
    /// How far, and how far it goes, in QEMU's units: bytes, mostly.
    done: u64,
    total: u64,
    /// Whether it is known to have been ready; it may have gone on since.
    was_ready: bool,
    /// What the events said of its end.
    told: Option<End>,
    /// Its end.
    end: Option<End>,
}

impl JobState {
    /// The job of that id, of which nothing was seen yet.
    pub(crate) fn new(id: impl Into<String>) -> Self {
        Self {
            id: id.into(),
            done: 0,
            total: 0,
            was_ready: false,
            told: None,
            end: None,
        }
    }

    pub(crate) fn id(&self) -> &str {
        &self.id
    }

    /// How far it is, and how far it goes, which may grow.
    pub(crate) fn progress(&self) -> (u64, u64) {
        (self.done, self.total)
    }

    /// Whether it is ready to be completed, and waits for that.
    pub(crate) fn is_ready(&self) -> bool {
        self.was_ready && self.end.is_none()
    }

    /// How it ended, once that is known.
    pub(crate) fn end(&self) -> Option<&End> {
        self.end.as_ref()
    }

    /// Takes in what was seen.
    pub(crate) fn take(&mut self, seen: &Seen<'_>) -> Next {
        match seen {
            Seen::Dismissed => Next::Stop,
            _ if self.end.is_some() => Next::Dismiss,
            Seen::Unsure => Next::Ask,
            Seen::Event(event) => self.event(event),
            Seen::Listed(None) => {
                self.end = Some(self.told.clone().unwrap_or(End::Unknown));
                Next::Stop
            }
            Seen::Listed(Some(job)) => {
                self.status(&job.status);
                (self.done, self.total) = (job.current_progress, job.total_progress);
                if job.status != JobStatus::Concluded {
                    return Next::Wait;
                }
                self.end = Some(match job.error.as_deref() {
                    None => End::Done,
                    // The event says the same, and is not there if the daemon was not.
                    Some(CANCELLED) => End::Cancelled,
                    Some(_) if self.told == Some(End::Cancelled) => End::Cancelled,
                    Some(error) => End::Failed(error.to_owned()),
                });
                Next::Dismiss
            }
        }
    }

    fn event(&mut self, event: &QmpEvent) -> Next {
        match event {
            QmpEvent::JobStatusChange(change) if change.id == self.id => {
                match change.status {
                    JobStatus::Concluded | JobStatus::Null => Next::Ask,
                    // How far it is by then is told with the next event, or when QEMU is asked: not ready at 0 of it.
                    JobStatus::Ready | JobStatus::Standby if !self.was_ready => Next::Ask,
                    _ => Next::Wait,
                }
            }
            QmpEvent::BlockJobReady(job) if job.device == self.id => {
                self.was_ready = true;
                (self.done, self.total) = (job.offset, job.len);
                Next::Wait
            }
            // What follows is its change to `concluded`, or to `null` if it is not kept on the list.
            QmpEvent::BlockJobCompleted(job) if job.device == self.id => {
                let failed = job.error.clone().map(End::Failed);
                self.told = Some(failed.unwrap_or(End::Done));
                Next::Wait
            }
            QmpEvent::BlockJobCancelled(job) if job.device == self.id => {
                self.told = Some(End::Cancelled);
                Next::Wait
            }
            _ => Next::Wait,
        }
    }

    fn status(&mut self, status: &JobStatus) {
        if matches!(status, JobStatus::Ready | JobStatus::Standby) {
            self.was_ready = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use monitor_qmp::{BlockJob, JobChange};
    use serde_json::{from_value, json};

    const ID: &str = "j";

    fn change(id: &str, status: &str) -> QmpEvent {
        let change = from_value::<JobChange>(json!({"id": id, "status": status}));
        QmpEvent::JobStatusChange(change.unwrap())
    }

    fn block_job(id: &str, error: Option<&str>) -> BlockJob {
        from_value(json!({"device": id, "len": 9, "offset": 5, "error": error})).unwrap()
    }

    fn listed(status: &str, error: Option<&str>) -> Job {
        let job = json!({"id": ID, "type": "mirror", "status": status, "current-progress": 3, "total-progress": 8,
            "error": error});
        from_value(job).unwrap()
    }

    /// What events can tell of an end, by what they are.
    fn told() -> Vec<(Option<QmpEvent>, Option<End>)> {
        let failed = End::Failed("No space left on device".into());
        vec![
            (None, None),
            (
                Some(QmpEvent::BlockJobCompleted(block_job(ID, None))),
                Some(End::Done),
            ),
            (
                Some(QmpEvent::BlockJobCompleted(block_job(
                    ID,
                    Some("No space left on device"),
                ))),
                Some(failed),
            ),
            (
                Some(QmpEvent::BlockJobCancelled(block_job(ID, None))),
                Some(End::Cancelled),
            ),
            // Of another job.
            (
                Some(QmpEvent::BlockJobCompleted(block_job("k", None))),
                None,
            ),
        ]
    }

    #[test]
    fn a_job_that_is_on_the_list_ended_as_the_list_says() {
        for (event, told) in told() {
            for (error, expected) in [
                (None, End::Done),
                (Some("Operation canceled"), End::Cancelled),
                (
                    Some("Input/output error"),
                    End::Failed("Input/output error".into()),
                ),
            ] {
                let mut job = JobState::new(ID);
                for status in ["created", "running", "waiting", "pending", "aborting"] {
                    assert_eq!(job.take(&Seen::Event(&change(ID, status))), Next::Wait);
                }
                if let Some(event) = &event {
                    assert_eq!(job.take(&Seen::Event(event)), Next::Wait);
                }
                assert_eq!(job.end(), None, "no event decides it");
                assert_eq!(job.take(&Seen::Event(&change(ID, "concluded"))), Next::Ask);
                let next = job.take(&Seen::Listed(Some(&listed("concluded", error))));
                assert_eq!(next, Next::Dismiss);
                let expected = match (&told, expected) {
                    (Some(End::Cancelled), End::Failed(_)) => End::Cancelled,
                    (_, expected) => expected,
                };
                assert_eq!(job.end(), Some(&expected), "{event:?} {error:?}");
                assert_eq!(job.take(&Seen::Dismissed), Next::Stop);
            }
        }
    }

    #[test]
    fn a_job_that_vanished_ended_as_its_events_said_and_else_nobody_knows() {
        for (event, told) in told() {
            let mut job = JobState::new(ID);
            if let Some(event) = &event {
                job.take(&Seen::Event(event));
            }
            assert_eq!(job.take(&Seen::Event(&change(ID, "null"))), Next::Ask);
            assert_eq!(job.take(&Seen::Listed(None)), Next::Stop);
            assert_eq!(job.end(), Some(&told.unwrap_or(End::Unknown)), "{event:?}");
        }
    }

    #[test]
    fn a_job_is_ready_once_it_is_known_how_far_it_is() {
        let ready = |seen: &Seen<'_>| {
            let mut job = JobState::new(ID);
            let next = job.take(seen);
            (next, job.is_ready(), job.progress())
        };
        let event = QmpEvent::BlockJobReady(block_job(ID, None));
        assert_eq!(ready(&Seen::Event(&event)), (Next::Wait, true, (5, 9)));
        assert_eq!(
            ready(&Seen::Event(&change(ID, "ready"))),
            (Next::Ask, false, (0, 0))
        );
        assert_eq!(
            ready(&Seen::Listed(Some(&listed("ready", None)))),
            (Next::Wait, true, (3, 8))
        );
        assert_eq!(
            ready(&Seen::Listed(Some(&listed("running", None)))),
            (Next::Wait, false, (3, 8))
        );
    }

    #[test]
    fn another_job_and_a_gap_decide_nothing() {
        let mut job = JobState::new(ID);
        assert_eq!(
            job.take(&Seen::Event(&change("k", "concluded"))),
            Next::Wait
        );
        assert_eq!(job.take(&Seen::Event(&QmpEvent::Stop)), Next::Wait);
        assert_eq!(job.take(&Seen::Unsure), Next::Ask);
        assert_eq!((job.end(), job.is_ready()), (None, false));
    }

    #[test]
    fn an_end_that_is_known_does_not_change() {
        let mut job = JobState::new(ID);
        job.take(&Seen::Listed(Some(&listed("concluded", Some("broken")))));
        for seen in [
            Seen::Listed(None),
            Seen::Listed(Some(&listed("concluded", None))),
            Seen::Unsure,
        ] {
            assert_eq!(job.take(&seen), Next::Dismiss);
            assert_eq!(job.end(), Some(&End::Failed("broken".into())));
        }
    }
}
