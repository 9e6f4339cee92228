//! What happened, for those who want to know: the kinds of news, the bounded log, the pump that fills it.

mod log;
mod mark;
mod pump;
mod ring;

use std::sync::Arc;
use std::time::SystemTime;

use job_core::{GoneWhy, Kind, Label, Outcome, Progress};
use remote_migrate::{Downtime, Side};
use uuid::Uuid;

use crate::block_job::{BlockJobEnd, BlockJobKind};
use crate::ops::Recovered;
use crate::parts::PartKind;

pub(crate) use log::Log;
pub use log::{Notice, Subscription};
pub(crate) use pump::Pump;
pub(crate) use ring::Bound;

/// One thing that happened to one domain.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct News {
    /// The domain.
    pub uuid: Uuid,
    /// Its name.
    pub name: Label,
    /// When, by the daemon's clock; an event of QEMU has QEMU's own timestamp as well.
    pub at: SystemTime,
    /// What.
    pub what: What,
}

impl News {
    /// About how many bytes it takes in memory.
    fn weight(&self) -> usize {
        /// What the allocator and the counts beside each part add.
        const PARTS: usize = 96;
        let told = match &self.what {
            What::Qemu(event) => {
                let data = event.data.as_ref().map_or(0, |data| data.get().len());
                size_of::<monitor_qmp::Event>() + event.name.len() + data
            }
            What::Phase { phase, .. } => phase.len(),
            _ => 0,
        };
        size_of::<Self>() + told + PARTS
    }
}

/// What happened.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum What {
    /// The domain is known from now on.
    Defined,
    /// QEMU was started or found, and its monitor answers.
    Started {
        /// The generation of the guest.
        generation: u64,
    },
    /// QEMU told of an event.
    Qemu(Arc<monitor_qmp::Event>),
    /// An async job entered a phase.
    Phase {
        /// The job's id.
        job: u64,
        /// The phase.
        phase: Label,
    },
    /// An async job is that far; at most four times a second.
    Progress {
        /// The job's id.
        job: u64,
        /// How far.
        progress: Progress,
    },
    /// A job ended.
    JobEnded {
        /// The job's id.
        job: u64,
        /// What it was.
        kind: Kind,
        /// Who opened it.
        owner: Label,
        /// How it ended.
        outcome: Outcome,
    },
    /// A part was plugged in.
    Plugged {
        /// What kind of part.
        kind: PartKind,
        /// Its name.
        name: Label,
    },
    /// A part is gone from the guest, and cleaned up.
    Unplugged {
        /// What kind of part.
        kind: PartKind,
        /// Its name.
        name: Label,
    },
    /// A block job is ready: both files are equal, and are kept so until it pivots or is cancelled.
    BlockJobReady {
        /// Its id.
        id: Label,
        /// The name of its disk.
        disk: Label,
    },
    /// A block job ended.
    BlockJobEnded {
        /// Its id.
        id: Label,
        /// The name of its disk.
        disk: Label,
        /// What it was.
        kind: BlockJobKind,
        /// How it ended.
        end: BlockJobEnd,
    },
    /// The guest is gone.
    Gone {
        /// The generation that ended.
        generation: u64,
        /// How.
        why: GoneWhy,
    },
    /// The guest has moved: away from here, or to here, which both sides tell.
    Moved {
        /// Which side this is.
        side: Side,
        /// How long it stood still, if both hosts and the distance of their clocks are known.
        downtime: Option<Downtime>,
    },
    /// What an earlier driver froze in the guest, and did not live to thaw, is thawed.
    Thawed {
        /// How many file systems, as its agent says; 0 if they were thawed already.
        file_systems: i64,
    },
    /// The same, and its agent does not thaw it. That is tried again until it does or the guest ends.
    StillFrozen {
        /// What its agent said, or that it said nothing.
        reason: String,
    },
    /// A driver that came back found it, and this became of it and of the job that was at it.
    Recovered(Recovered),
    /// The domain was removed.
    Removed,
}
