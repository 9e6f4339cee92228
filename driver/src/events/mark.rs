//! What a piece of news is about: of two with the same subject the later one is enough for whoever missed both.

use std::hash::{BuildHasher as _, Hash, Hasher as _, RandomState};
use std::mem::discriminant;
use std::sync::LazyLock;

use job_core::{Kind, Outcome};

use crate::events::ring::Mark;
use crate::events::{News, What};

/// Nobody outside can make two subjects look like one.
static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);

impl News {
    pub(super) fn mark(&self) -> Mark {
        let mut subject = KEYS.build_hasher();
        self.uuid.hash(&mut subject);
        discriminant(&self.what).hash(&mut subject);
        let ends = match &self.what {
            What::Qemu(event) => {
                let about = event.subject();
                about.hash(&mut subject);
                about.ends()
            }
            What::Phase { job, .. } | What::Progress { job, .. } => {
                job.hash(&mut subject);
                false
            }
            // A query that was answered is nothing that anybody has to learn of later.
            What::JobEnded {
                kind: kind @ (Kind::Normal(_) | Kind::Agent(_)),
                owner,
                outcome: Outcome::Done,
                ..
            } => {
                (kind, &**owner).hash(&mut subject);
                false
            }
            What::JobEnded { job, .. } => {
                job.hash(&mut subject);
                true
            }
            What::Plugged { kind, name } => {
                (kind, &**name).hash(&mut subject);
                false
            }
            What::Unplugged { kind, name } => {
                (kind, &**name).hash(&mut subject);
                true
            }
            What::BlockJobReady { id, .. } => {
                (**id).hash(&mut subject);
                false
            }
            What::BlockJobEnded { id, .. } => {
                (**id).hash(&mut subject);
                true
            }
            What::Recovered(recovered) => {
                recovered.job.as_deref().hash(&mut subject);
                true
            }
            What::Gone { .. } | What::Removed => true,
            What::Defined
            | What::Started { .. }
            | What::Thawed { .. }
            | What::StillFrozen { .. }
            | What::Moved { .. } => false,
        };
        let subject = subject.finish();
        Mark { subject, ends }
    }
}
