//! What a migration passes on its way over the point of return: its questions to the peer, and its journal.
//!
//! Nobody is offered a guest who does not answer, and whoever was told that a migration is cancelled is not told a lie. Decides
//! nothing else: the phases do.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use job_core::{Guard, Stop};
use remote_migrate::wire::ClockOffset;
use remote_migrate::{
    Answer, Call, Journal, JournalError, MigrationId, Peer, PeerError, Record, Request, Side,
    SourceStage, Underway,
};
use tokio::sync::Mutex;
use tokio::time::{Instant, timeout};

use crate::ops::AsyncOp;

/// The peer, asked while the job is held.
pub(super) struct Asked<'a> {
    op: &'a Mutex<AsyncOp>,
    peer: &'a dyn Peer,
    /// Whether the guest was offered, or may have been by an earlier daemon.
    is_offered: AtomicBool,
}

impl<'a> Asked<'a> {
    pub(super) fn first(op: &'a Mutex<AsyncOp>, peer: &'a dyn Peer) -> Self {
        let is_offered = AtomicBool::new(false);
        Self {
            op,
            peer,
            is_offered,
        }
    }

    /// For a migration that an earlier call began.
    pub(super) fn again(op: &'a Mutex<AsyncOp>, peer: &'a dyn Peer) -> Self {
        let is_offered = AtomicBool::new(true);
        Self {
            op,
            peer,
            is_offered,
        }
    }

    /// Asks. Before the guest is offered for the first time the other side must have answered just now: an offer over a link
    /// that is down leaves the guest in doubt, and one that was not sent leaves it here.
    async fn ask_now(
        &self,
        request: Request,
        deadline: Instant,
        silence: Duration,
    ) -> Result<Answer, PeerError> {
        if request.call == Call::Finish && !self.is_offered.swap(true, Ordering::Relaxed) {
            let status = Request {
                call: Call::Status(Side::Destination),
                ..request.clone()
            };
            let asked = self.peer.ask(status, Instant::now() + silence);
            timeout(silence, asked)
                .await
                .map_err(PeerError::not_sent)?
                .map_err(PeerError::not_sent)?;
        }
        self.peer.ask(request, deadline).await
    }
}

#[async_trait]
impl Peer for Asked<'_> {
    fn clock(&self) -> Option<ClockOffset> {
        self.peer.clock()
    }

    fn tell(&self, underway: Underway) {
        self.peer.tell(underway);
    }

    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let mut op = self.op.lock().await;
        let silence = op.domain().0.context.defaults.silence;
        let mut answer = None;
        let asking =
            async { answer = Some(self.ask_now(request.clone(), deadline, silence).await) };
        let asked = op.job().remote(asking).await;
        match (answer, asked) {
            // The answer counts also when the guest died here meanwhile: it may live there. The phases look at it next.
            (Some(answer), _) => answer,
            // The guest was gone before: the question stands all the same, since the other side may have it.
            (None, _) => self.ask_now(request, deadline, silence).await,
        }
    }
}

/// The journal, in which the point of return is passed with the record that says so.
pub(super) struct Noted<'a> {
    op: &'a Mutex<AsyncOp>,
    journal: &'a dyn Journal,
}

impl<'a> Noted<'a> {
    pub(super) fn new(op: &'a Mutex<AsyncOp>, journal: &'a dyn Journal) -> Self {
        Self { op, journal }
    }
}

#[async_trait]
impl Journal for Noted<'_> {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let is_offer = |stage: &SourceStage| {
            matches!(stage, SourceStage::Switching | SourceStage::HandingOver)
        };
        if matches!(record, Record::Source(source) if is_offer(&source.stage)) {
            let mut op = self.op.lock().await;
            // In this order: a cancel that comes between the two is answered as too late, and one that came before is seen.
            op.job().pass_point_of_return();
            if let Some(stop @ Stop::Cancelled(_)) = op.job.token().stopped() {
                return Err(JournalError::new(stop.to_string()));
            }
        }
        self.journal.store(record).await
    }

    async fn load(&self, id: MigrationId, side: Side) -> Result<Option<Record>, JournalError> {
        self.journal.load(id, side).await
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        self.journal.list().await
    }

    async fn remove(&self, id: MigrationId, side: Side) -> Result<(), JournalError> {
        self.journal.remove(id, side).await
    }
}
