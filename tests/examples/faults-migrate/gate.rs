//! Where a daemon can be made to stand still: at a record of its journal, or at a question to its peer.
//!
//! A point is named as it reads: `stores starting`, `stored starting`, `asks finish`, `heard finish`. Whoever armed one is
//! told when the daemon comes to it, and the daemon goes on when told to; only the task at the point stands still. Wraps
//! the driver's own seams and decides nothing.
//!
//! The store of files reserves what a migration's record may need, so that a disk that is full refuses none but the first.
//! Other stores need not, and a disk may refuse for other reasons: here each record needs a page that is free.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use driver::{Found, Shelf, StateStore};
use remote_migrate::{Answer, Call, Peer, PeerError, Request};
use serde_json::Value;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::daemon::say;

/// What a disk gives at least, or nothing.
const PAGE: usize = 4096;

/// One point at a time.
#[derive(Clone)]
pub(crate) struct Gate(Arc<watch::Sender<State>>);

#[derive(Clone, Debug, Default, PartialEq)]
enum State {
    #[default]
    Open,
    Armed(String),
    Reached,
}

impl Gate {
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(State::Open)))
    }

    pub(crate) fn arm(&self, point: &str) {
        self.0.send_replace(State::Armed(point.to_owned()));
    }

    pub(crate) fn open(&self) {
        self.0.send_replace(State::Open);
    }

    /// Stands still here if this is the point. Once: whoever comes second goes by.
    async fn pass(&self, point: &str) {
        let is_here = self.0.send_if_modified(|state| {
            let is_here = matches!(state, State::Armed(armed) if armed == point);
            if is_here {
                *state = State::Reached;
            }
            is_here
        });
        if is_here {
            say(&format!("at {point}"));
            let mut state = self.0.subscribe();
            // The sender lives in `self`.
            let _opened = state.wait_for(|state| *state == State::Open).await;
        }
    }
}

/// A store whose records of migrations have points before and after them.
pub(crate) struct GatedStore<S> {
    pub(crate) store: S,
    /// On the disk that the records are on.
    pub(crate) probe: PathBuf,
    pub(crate) gate: Gate,
    pub(crate) runtime: Handle,
}

impl<S> GatedStore<S> {
    fn pass(&self, when: &str, stage: &str) {
        self.runtime
            .block_on(self.gate.pass(&format!("{when} {stage}")));
    }

    /// Whether the disk has a page left, by its own word.
    fn ask_the_disk(&self) -> io::Result<()> {
        let written = fs::write(&self.probe, [1; PAGE]);
        let removed = fs::remove_file(&self.probe);
        written.and(removed)
    }
}

impl<S: StateStore> StateStore for GatedStore<S> {
    fn put(&self, shelf: Shelf, key: &str, record: &[u8]) -> io::Result<()> {
        let stage = (shelf == Shelf::Migrations)
            .then(|| stage(record))
            .flatten();
        let Some(stage) = stage.as_deref() else {
            return self.store.put(shelf, key, record);
        };
        self.pass("stores", stage);
        let put = self.ask_the_disk();
        if let Err(error) = put.and_then(|()| self.store.put(shelf, key, record)) {
            say(&format!("refused {stage}: {error}"));
            return Err(error);
        }
        self.pass("stored", stage);
        Ok(())
    }

    fn list(&self, shelf: Shelf) -> io::Result<Vec<Found>> {
        self.store.list(shelf)
    }

    fn remove(&self, shelf: Shelf, key: &str) -> io::Result<()> {
        if shelf == Shelf::Migrations {
            self.pass("stores", "nothing");
        }
        self.store.remove(shelf, key)
    }

    fn set_aside(&self, shelf: Shelf, key: &str) -> io::Result<String> {
        self.store.set_aside(shelf, key)
    }
}

/// The stage that a record of a migration stands at, as it is written.
pub(crate) fn stage(record: &[u8]) -> Option<String> {
    let record: Value = serde_json::from_slice(record).ok()?;
    let (_side, record) = record["record"].as_object()?.iter().next()?;
    let stage = &record["stage"];
    let name = stage
        .as_str()
        .or_else(|| stage.as_object()?.keys().next().map(String::as_str));
    name.map(str::to_owned)
}

/// The way to a peer, with a point before and after each question.
pub(crate) struct GatedPeer<P> {
    pub(crate) peer: P,
    pub(crate) gate: Gate,
}

#[async_trait]
impl<P: Peer> Peer for GatedPeer<P> {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let call = match request.call {
            Call::Prepare(_) => "prepare",
            Call::Finish => "finish",
            Call::Confirm(_) => "confirm",
            _ => return self.peer.ask(request, deadline).await,
        };
        self.gate.pass(&format!("asks {call}")).await;
        let answer = self.peer.ask(request, deadline).await;
        self.gate.pass(&format!("heard {call}")).await;
        answer
    }
}
