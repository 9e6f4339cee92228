//! Several of QEMU's jobs that end together, or one by itself, as its list of them says. Pure.
//!
//! They are begun with `auto-finalize` and `auto-dismiss` off: what they did takes effect when they are told so, and how
//! they ended stays on the list, also when nobody was there.
//!
//! ```text
//!  under way ─► copied (pending) ─► finalized: done (concluded)
//!      └─ failed, cancelled: all of them are, and nothing has taken effect
//! ```

use monitor_qmp::command::{Job, JobStatus};

use crate::qemu_job::CANCELLED;

/// How far a group of jobs is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Group {
    /// None of them is on the list.
    Absent,
    /// They go on.
    UnderWay,
    /// They have done all, and wait to be told that it takes effect.
    Copied,
    /// They have ended well.
    Done,
    /// They were cancelled.
    Cancelled,
    /// They failed, for this reason.
    Failed(String),
}

impl Group {
    /// What that list says of the jobs of these ids. What was dismissed already had ended as the others did.
    pub(crate) fn of(list: &[Job], ids: &[String]) -> Self {
        let mine = || list.iter().filter(|job| ids.contains(&job.id));
        let all = |status: JobStatus| mine().all(|job| job.status == status);
        if mine().next().is_none() {
            return Self::Absent;
        }
        if all(JobStatus::Pending) {
            return Self::Copied;
        }
        if !all(JobStatus::Concluded) {
            return Self::UnderWay;
        }
        let mut errors = mine().filter_map(|job| job.error.as_deref());
        // When one fails the others are cancelled.
        match errors.clone().find(|error| *error != CANCELLED) {
            Some(error) => Self::Failed(error.to_owned()),
            None if errors.next().is_some() => Self::Cancelled,
            None => Self::Done,
        }
    }

    /// How far those jobs are, and how far they go, in all.
    pub(crate) fn progress(list: &[Job], ids: &[String]) -> (u64, u64) {
        let mine = list.iter().filter(|job| ids.contains(&job.id));
        mine.fold((0, 0), |(done, total), job| {
            (done + job.current_progress, total + job.total_progress)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(id: &str, status: &str, error: Option<&str>) -> Job {
        let value = serde_json::json!({
            "id": id, "type": "backup", "status": status, "current-progress": 3, "total-progress": 5, "error": error,
        });
        serde_json::from_value(value).unwrap()
    }

    fn of(list: &[Job]) -> Group {
        Group::of(list, &["a".to_owned(), "b".to_owned()])
    }

    #[test]
    fn a_group_is_as_far_as_its_last_member_and_fails_with_its_first() {
        let done = |id| job(id, "concluded", None);
        let pending = |id| job(id, "pending", None);
        assert_eq!(of(&[done("other")]), Group::Absent);
        assert_eq!(
            of(&[job("a", "running", None), pending("b")]),
            Group::UnderWay
        );
        assert_eq!(
            of(&[pending("a"), pending("b"), job("other", "running", None)]),
            Group::Copied
        );
        assert_eq!(of(&[pending("a"), done("b")]), Group::UnderWay);
        assert_eq!(of(&[done("a"), done("b")]), Group::Done);
        assert_eq!(of(&[done("b")]), Group::Done, "one was dismissed already");
        let cancelled = |id| job(id, "concluded", Some(CANCELLED));
        assert_eq!(of(&[cancelled("a"), cancelled("b")]), Group::Cancelled);
        let failed = job("b", "concluded", Some("No space left on device"));
        let why = Group::Failed("No space left on device".into());
        assert_eq!(of(&[cancelled("a"), failed]), why);
        assert_eq!(
            of(&[job("a", "aborting", Some("x")), cancelled("b")]),
            Group::UnderWay
        );
        let ids = ["a".to_owned(), "b".to_owned()];
        assert_eq!(
            Group::progress(&[done("a"), done("b"), done("c")], &ids),
            (6, 10)
        );
    }
}
