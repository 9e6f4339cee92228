//! Two scripted hosts, their journals, and a link that can be cut, as one value.

use std::{
    collections::HashSet,
    future::{Future, poll_fn},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    task::Poll,
};

use async_trait::async_trait;
use remote_migrate::{
    Answer, Begun, Call, Control, Cookie, CopyState, Destination, DestinationHost, Epoch, Error,
    ErrorKind, Estimate, Guest, HostError, InProcess, Journal, JournalError, Limits, Load,
    MemoryJournal, Meter, MigrationId, Peer, PeerError, Plan, Prepared, Ran, Reason, Record,
    Report, Request, RunState, Side, SourceHost, Standing, StartError, Step, Stopped, Transfer,
    source::Outcome,
    verdict::{GuestState, Ruling},
};
use tokio::{
    sync::{Notify, watch},
    time::Instant,
};
use uuid::Uuid;

/// A step of a host that fails, the first time only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fails {
    Begin,
    BeginHangs,
    Perform,
    PerformHangs,
    /// QEMU stops the guest itself.
    StopsItself,
    Complete,
    Confirm,
    Inspect,
    Prepare,
    PrepareHangs,
    Load,
    StartRefused,
    StartLost,
    StartHangs,
    /// The start is refused, and the copy with it is gone.
    Cpu,
    /// Post-copy does not begin.
    Switch,
    /// The stream breaks in post-copy.
    Drain,
    /// The stream hangs in post-copy.
    DrainHangs,
    /// The copy gave up while it read, and says why when it is asked.
    Copy,
    /// Somebody pauses the guest once it was described there; for good.
    Paused,
}

/// Where the guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Where {
    Source,
    Destination,
    Nowhere,
    Twice,
}

#[derive(Debug, Default)]
struct Scene {
    stopped: bool,
    killed: bool,
    copy: Option<CopyState>,
    fails: HashSet<Fails>,
    prepares: usize,
    starts: usize,
    resumes: usize,
    /// Steps of the destination's host, its looks at the copy included.
    calls: usize,
}

fn started(scene: &Scene) -> bool {
    matches!(scene.copy, Some(CopyState::Started | CopyState::Partial))
}

/// What both hosts do, and what becomes of the guest.
#[derive(Default)]
struct Stage {
    scene: Mutex<Scene>,
    hanging: Notify,
    /// What the source told in passing.
    told: watch::Sender<Transfer>,
}

impl Stage {
    fn scene(&self) -> MutexGuard<'_, Scene> {
        self.scene.lock().unwrap()
    }

    fn fails(&self, step: Fails) -> Result<(), HostError> {
        if self.scene().fails.remove(&step) {
            return Err(HostError::new(format!("{step:?} was told to fail")));
        }
        Ok(())
    }

    async fn hangs(&self, step: Fails) {
        let hangs = self.scene().fails.remove(&step);
        if hangs {
            self.hanging.notify_one();
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl SourceHost for Stage {
    async fn begin(&self, _step: Step) -> Result<Begun, HostError> {
        self.hangs(Fails::BeginHangs).await;
        self.fails(Fails::Begin)?;
        tokio::task::yield_now().await;
        let cookie = Cookie::new("a guest").unwrap();
        Ok(Begun {
            cookie,
            run: RunState::Running,
        })
    }

    fn was_paused(&self) -> bool {
        let scene = self.scene();
        scene.prepares > 0 && scene.fails.contains(&Fails::Paused)
    }

    async fn perform(
        &self,
        _step: Step,
        to: &Prepared,
        meter: &Meter,
    ) -> Result<Stopped, HostError> {
        assert_eq!(&*to.connect, "there");
        self.hangs(Fails::PerformHangs).await;
        self.fails(Fails::Perform)?;
        meter.report(Transfer {
            sent: 1,
            ..Default::default()
        });
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        if scene.copy != Some(CopyState::Incoming) {
            return Err(HostError::new("nobody listens there"));
        }
        scene.stopped = true;
        Ok(match scene.fails.remove(&Fails::StopsItself) {
            true => Stopped::ByHypervisor,
            false => Stopped::ByHost,
        })
    }

    async fn complete(&self, _step: Step, _meter: &Meter) -> Result<(), HostError> {
        self.fails(Fails::Complete)?;
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        match scene.copy {
            Some(CopyState::Incoming | CopyState::Complete) if !scene.killed => {
                scene.copy = Some(CopyState::Complete);
                Ok(())
            }
            _ => Err(HostError::new("nobody takes it")),
        }
    }

    async fn switch(&self, _step: Step, to: &Prepared) -> Result<(), HostError> {
        assert_eq!(&*to.connect, "there");
        self.fails(Fails::Switch)?;
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        scene.stopped = true;
        scene.copy = Some(CopyState::Switched);
        Ok(())
    }

    async fn drain(
        &self,
        _step: Step,
        to: Option<&Prepared>,
        _meter: &Meter,
    ) -> Result<(), HostError> {
        self.hangs(Fails::DrainHangs).await;
        self.fails(Fails::Drain)?;
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        scene.resumes += usize::from(to.is_some());
        match scene.copy {
            Some(CopyState::Partial | CopyState::Started) => {
                scene.copy = Some(CopyState::Started);
                Ok(())
            }
            _ => Err(HostError::new("nobody needs it")),
        }
    }

    async fn confirm(&self, _step: Step, outcome: Outcome) -> Result<(), HostError> {
        self.fails(Fails::Confirm)?;
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        match outcome {
            Outcome::Kept(run) => {
                assert!(!started(&scene), "the guest runs twice");
                scene.stopped = run == RunState::Paused;
            }
            Outcome::Released => {
                assert_ne!(scene.copy, Some(CopyState::Partial), "its memory is needed");
                scene.killed = true;
            }
        }
        Ok(())
    }

    async fn inspect(&self, _step: Step) -> Result<GuestState, HostError> {
        self.fails(Fails::Inspect)?;
        let scene = self.scene();
        Ok(match (scene.killed, scene.stopped) {
            (true, _) => GuestState::Gone,
            (false, true) => GuestState::Stopped,
            (false, false) => GuestState::Running,
        })
    }
}

#[async_trait]
impl DestinationHost for Stage {
    async fn prepare(&self, _step: Step, guest: &Guest) -> Result<Prepared, HostError> {
        assert_eq!(guest.cookie.as_str(), "a guest");
        self.scene().calls += 1;
        self.hangs(Fails::PrepareHangs).await;
        self.fails(Fails::Prepare)?;
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        scene.prepares += 1;
        scene.copy = Some(CopyState::Incoming);
        Ok(Prepared {
            connect: "there".into(),
            cookie: Cookie::empty(),
        })
    }

    async fn load(&self, _step: Step) -> Result<Load, HostError> {
        let fails = self.scene().fails.remove(&Fails::Load);
        let mut scene = self.scene();
        scene.calls += 1;
        if fails {
            scene.copy = Some(CopyState::Gone(Ran::Never));
        }
        Ok(match scene.copy {
            Some(CopyState::Complete | CopyState::Switched) => Load::Complete,
            Some(CopyState::Incoming) => Load::Loading,
            _ => Load::Failed(Reason::new("device missing here")),
        })
    }

    async fn start(&self, _step: Step, run: RunState) -> Result<(), StartError> {
        let is_paused = self.scene().fails.contains(&Fails::Paused);
        assert_eq!(run == RunState::Paused, is_paused);
        self.scene().calls += 1;
        self.hangs(Fails::StartHangs).await;
        self.fails(Fails::StartRefused)
            .map_err(StartError::never_ran)?;
        if let Err(error) = self.fails(Fails::Cpu) {
            self.scene().copy = Some(CopyState::Gone(Ran::Never));
            return Err(StartError::never_ran(error));
        }
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        assert!(scene.stopped || scene.killed, "the guest runs twice");
        scene.starts += usize::from(!started(&scene));
        scene.copy = Some(match scene.copy {
            Some(CopyState::Switched | CopyState::Partial) => CopyState::Partial,
            _ => CopyState::Started,
        });
        drop(scene);
        self.fails(Fails::StartLost)
            .map_err(StartError::may_have_run)
    }

    async fn resume(&self, _step: Step) -> Result<Prepared, HostError> {
        assert_eq!(self.scene().copy, Some(CopyState::Partial));
        Ok(Prepared {
            connect: "there".into(),
            cookie: Cookie::empty(),
        })
    }

    async fn trouble(&self, _step: Step) -> Option<Reason> {
        self.fails(Fails::Copy)
            .err()
            .map(|error| Reason::of(&error))
    }

    async fn discard(&self, _step: Step) -> Result<(), HostError> {
        tokio::task::yield_now().await;
        let mut scene = self.scene();
        scene.calls += 1;
        assert!(!started(&scene), "a running guest is not discarded");
        scene.copy = None;
        Ok(())
    }

    fn transferred(&self, _migration: MigrationId, transfer: Transfer, _estimate: Estimate) {
        self.told.send_replace(transfer);
    }

    async fn inspect(&self, _step: Step) -> Result<CopyState, HostError> {
        self.scene().calls += 1;
        Ok(self.scene().copy.unwrap_or(CopyState::Gone(Ran::Never)))
    }
}

/// A journal in memory whose n-th write fails.
#[derive(Default)]
pub(crate) struct Paper {
    records: MemoryJournal,
    /// Writes left until one fails, and whether that one is written all the same.
    plan: Mutex<Option<(usize, bool)>>,
}

impl Paper {
    pub(crate) fn fail(&self, write: usize, written: bool) {
        *self.plan.lock().unwrap() = Some((write, written));
    }

    /// Whether this write fails, and is written all the same.
    fn turn(&self) -> Option<bool> {
        let mut plan = self.plan.lock().unwrap();
        let (left, written) = (*plan)?;
        *plan = (left > 0).then(|| (left - 1, written));
        (left == 0).then_some(written)
    }
}

#[async_trait]
impl Journal for Paper {
    async fn store(&self, record: &Record) -> Result<(), JournalError> {
        let turn = self.turn();
        tokio::task::yield_now().await;
        if turn != Some(false) {
            self.records.store(record).await?;
        }
        turn.map_or(Ok(()), |_| {
            Err(JournalError::new("no space left on device"))
        })
    }

    async fn load(
        &self,
        migration: MigrationId,
        side: Side,
    ) -> Result<Option<Record>, JournalError> {
        self.records.load(migration, side).await
    }

    async fn list(&self) -> Result<Vec<Record>, JournalError> {
        self.records.list().await
    }

    async fn remove(&self, migration: MigrationId, side: Side) -> Result<(), JournalError> {
        let turn = self.turn();
        if turn != Some(false) {
            self.records.remove(migration, side).await?;
        }
        turn.map_or(Ok(()), |_| Err(JournalError::new("input/output error")))
    }
}

/// The link from the source to the destination.
pub(crate) struct Link {
    to: Mutex<InProcess>,
    plan: Mutex<Weather>,
}

#[derive(Clone, Copy, Debug)]
enum Weather {
    Fair,
    /// One request of this name is lost, or its answer.
    LoseOnce {
        name: &'static str,
        arrives: bool,
    },
    /// From the first request of this name on nothing passes; that one may still arrive.
    CutAt {
        name: &'static str,
        arrives: bool,
    },
    Down,
    Lying,
}

impl Link {
    pub(crate) const PREPARE: &'static str = "prepare";
    pub(crate) const FINISH: &'static str = "finish";
    pub(crate) const CONFIRM: &'static str = "confirm";
    pub(crate) const RESUME: &'static str = "resume";
    pub(crate) const STATUS: &'static str = "status";

    pub(crate) fn prepare() -> Call {
        let cookie = Cookie::new("a guest").unwrap();
        Call::Prepare(Guest {
            cookie,
            run: RunState::Running,
            home: "".into(),
        })
    }

    pub(crate) fn lose_once(&self, name: &'static str, arrives: bool) {
        self.set(Weather::LoseOnce { name, arrives });
    }

    pub(crate) fn cut_before(&self, name: &'static str) {
        self.set(Weather::CutAt {
            name,
            arrives: false,
        });
    }

    pub(crate) fn cut_after(&self, name: &'static str) {
        self.set(Weather::CutAt {
            name,
            arrives: true,
        });
    }

    pub(crate) fn lie_about_epoch(&self) {
        self.set(Weather::Lying);
    }

    pub(crate) fn heal(&self) {
        self.set(Weather::Fair);
    }

    fn set(&self, weather: Weather) {
        *self.plan.lock().unwrap() = weather;
    }

    /// Whether this request arrives, and whether its answer does.
    fn passes(&self, call: &Call) -> (bool, bool) {
        let called = match call {
            Call::Prepare(_) => Self::PREPARE,
            Call::Finish => Self::FINISH,
            Call::Confirm(_) => Self::CONFIRM,
            Call::Status(_) => Self::STATUS,
            Call::Resume => Self::RESUME,
        };
        let mut plan = self.plan.lock().unwrap();
        match *plan {
            Weather::LoseOnce { name, arrives } if name == called => {
                *plan = Weather::Fair;
                (arrives, false)
            }
            Weather::CutAt { name, arrives } if name == called => {
                *plan = Weather::Down;
                (arrives, false)
            }
            Weather::Down => (false, false),
            _ => (true, true),
        }
    }
}

#[async_trait]
impl Peer for Link {
    async fn ask(&self, request: Request, deadline: Instant) -> Result<Answer, PeerError> {
        let (arrives, answered) = self.passes(&request.call);
        let to = self.to.lock().unwrap().clone();
        let answer = if arrives {
            Some(to.ask(request, deadline).await?)
        } else {
            None
        };
        match answer {
            Some(mut answer) if answered => {
                if matches!(*self.plan.lock().unwrap(), Weather::Lying) {
                    answer.epoch = answer.epoch.next();
                }
                Ok(answer)
            }
            _ => Err(PeerError::no_answer("connection reset by peer")),
        }
    }
}

/// A guest at the source, and a destination.
pub(crate) struct Rig {
    pub(crate) link: Link,
    stage: Arc<Stage>,
    journals: [Arc<Paper>; 2],
    domain: Uuid,
    id: MigrationId,
    destination: Mutex<Destination>,
}

impl Rig {
    pub(crate) fn new() -> Self {
        let stage = Arc::new(Stage::default());
        let journals = [Arc::default(), Arc::new(Paper::default())];
        let destination = Destination::new(stage.clone(), journals[1].clone());
        Self {
            link: Link {
                to: Mutex::new(InProcess::new(Arc::new(destination.clone()))),
                plan: Mutex::new(Weather::Fair),
            },
            stage,
            journals,
            domain: Uuid::from_u128(7),
            id: MigrationId::random(),
            destination: Mutex::new(destination),
        }
    }

    pub(crate) fn id(&self) -> MigrationId {
        self.id
    }

    pub(crate) fn request(&self, call: Call) -> Request {
        Request {
            migration: self.id,
            epoch: Epoch::FIRST,
            domain: self.domain,
            call,
            run: None,
            downtime: None,
        }
    }

    pub(crate) fn fail(&self, step: Fails) {
        self.stage.scene().fails.insert(step);
    }

    /// Resolves when the step that hangs is hanging.
    pub(crate) async fn reached(&self, _step: Fails) {
        self.stage.hanging.notified().await;
    }

    pub(crate) fn journal(&self, side: Side) -> &Paper {
        &self.journals[usize::from(side == Side::Destination)]
    }

    pub(crate) fn destination(&self) -> Destination {
        self.destination.lock().unwrap().clone()
    }

    pub(crate) async fn migrate(&self) -> Result<Report, Error> {
        self.migrate_under(&Control::new()).await
    }

    pub(crate) async fn migrate_under(&self, control: &Control) -> Result<Report, Error> {
        let plan = Plan::new(self.domain).migration(self.id);
        self.run(&plan, &self.link, control).await
    }

    /// Turns to post-copy as soon as memory moves.
    pub(crate) async fn migrate_by_post_copy(&self, peer: &dyn Peer) -> Result<Report, Error> {
        self.fail(Fails::PerformHangs);
        let plan = Plan::new(self.domain).migration(self.id);
        let control = Control::new();
        control.post_copy();
        self.run(&plan, peer, &control).await
    }

    pub(crate) async fn migrate_over(&self, peer: &dyn Peer) -> Result<Report, Error> {
        let plan = Plan::new(self.domain).migration(self.id);
        self.run(&plan, peer, &Control::new()).await
    }

    /// The same guest, in another migration.
    pub(crate) async fn migrate_anew(&self) -> Result<Report, Error> {
        self.run(&Plan::new(self.domain), &self.link, &Control::new())
            .await
    }

    async fn run(&self, plan: &Plan, peer: &dyn Peer, control: &Control) -> Result<Report, Error> {
        let journal = self.journal(Side::Source);
        remote_migrate::migrate(plan, &*self.stage, peer, journal, control).await
    }

    pub(crate) async fn recover(&self) -> Result<Report, Error> {
        self.recover_over(&self.link).await
    }

    pub(crate) async fn recover_over(&self, peer: &dyn Peer) -> Result<Report, Error> {
        self.take_up(peer, &Control::new()).await
    }

    pub(crate) async fn recover_under(&self, control: &Control) -> Result<Report, Error> {
        self.take_up(&self.link, control).await
    }

    async fn take_up(&self, peer: &dyn Peer, control: &Control) -> Result<Report, Error> {
        let (limits, journal) = (Limits::default(), self.journal(Side::Source));
        remote_migrate::recover(self.id, limits, &*self.stage, peer, journal, control).await
    }

    pub(crate) async fn resolve(&self, ruling: Ruling) -> Result<Report, Error> {
        let (limits, journal) = (Limits::default(), self.journal(Side::Source));
        remote_migrate::resolve(self.id, ruling, limits, &*self.stage, journal).await
    }

    pub(crate) async fn resolve_there(&self, ruling: Ruling) -> Result<Standing, Error> {
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        self.destination().resolve(self.id, ruling, deadline).await
    }

    /// What the destination's daemon does once the source is back.
    pub(crate) async fn reconcile(&self) {
        let source_stage: Arc<Stage> = Arc::default();
        let source = Destination::new(source_stage, self.journals[0].clone());
        let source = InProcess::new(Arc::new(source));
        let deadline = Instant::now() + std::time::Duration::from_secs(60);
        self.destination()
            .reconcile(self.id, Some(&source), deadline)
            .await
            .unwrap();
    }

    /// All that is in memory is gone; hosts and journals are as they were.
    pub(crate) fn restart_destination(&self) {
        let fresh = Destination::new(self.stage.clone(), self.journals[1].clone());
        *self.link.to.lock().unwrap() = InProcess::new(Arc::new(fresh.clone()));
        *self.destination.lock().unwrap() = fresh;
    }

    /// The one side that runs the guest after a migration that was dropped was recovered, with nothing left behind.
    pub(crate) async fn owner_after(
        &self,
        recovered: Result<Report, Error>,
        polls: usize,
    ) -> Where {
        match recovered {
            Ok(report) => assert!(report.settled, "dropped after {polls} polls"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::NotFound, "after {polls} polls"),
        }
        self.reconcile().await;
        let owner = self.runs();
        assert!(
            matches!(owner, Where::Source | Where::Destination),
            "dropped after {polls} polls, the guest runs {owner:?}"
        );
        assert!(
            self.forgotten().await && self.clean(),
            "after {polls} polls"
        );
        owner
    }

    pub(crate) fn runs(&self) -> Where {
        let scene = self.stage.scene();
        let here = !scene.stopped && !scene.killed;
        match (here, started(&scene)) {
            (true, false) => Where::Source,
            (false, true) => Where::Destination,
            (false, false) => Where::Nowhere,
            (true, true) => Where::Twice,
        }
    }

    /// Whether no copy is left but the one that runs.
    pub(crate) fn clean(&self) -> bool {
        let scene = self.stage.scene();
        match scene.copy {
            Some(CopyState::Started) => scene.killed,
            Some(CopyState::Gone(_)) | None => !scene.killed,
            Some(
                CopyState::Incoming
                | CopyState::Complete
                | CopyState::Switched
                | CopyState::Partial,
            ) => false,
        }
    }

    /// The source's host has lost power.
    pub(crate) fn loses_power_here(&self) {
        self.stage.scene().killed = true;
    }

    /// Whether the source's copy was ended.
    pub(crate) fn is_ended_here(&self) -> bool {
        self.stage.scene().killed
    }

    pub(crate) async fn forgotten(&self) -> bool {
        let here = self.journals[0].records.list().await.unwrap();
        let there = self.journals[1].records.list().await.unwrap();
        here.is_empty() && there.is_empty()
    }

    pub(crate) fn prepares(&self) -> usize {
        self.stage.scene().prepares
    }

    /// How often the destination's host was called, for whatever.
    pub(crate) fn calls(&self) -> usize {
        self.stage.scene().calls
    }

    /// How often post-copy went on over a new stream.
    pub(crate) fn resumes(&self) -> usize {
        self.stage.scene().resumes
    }

    /// What the source tells the destination next in passing.
    pub(crate) async fn told(&self) -> Transfer {
        let mut told = self.stage.told.subscribe();
        let told = told.wait_for(|told| *told != Transfer::default()).await;
        *told.unwrap()
    }

    /// A destination that is not this rig's has made a place, and takes the guest in.
    pub(crate) fn arrives_elsewhere(&self) {
        let mut scene = self.stage.scene();
        scene.prepares += 1;
        scene.copy = Some(CopyState::Incoming);
    }

    /// A source that is not this rig's has moved the memory, and stopped the guest.
    pub(crate) fn memory_has_moved(&self) {
        let mut scene = self.stage.scene();
        scene.stopped = true;
        scene.copy = Some(CopyState::Complete);
    }

    pub(crate) fn starts(&self) -> usize {
        self.stage.scene().starts
    }
}

/// Polls at most so often, and drops what is not ready then.
pub(crate) async fn poll_times<F: Future>(future: F, times: usize) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut left = times;
    poll_fn(|context| match left {
        0 => Poll::Ready(None),
        _ => {
            left -= 1;
            future.as_mut().poll(context).map(Some)
        }
    })
    .await
}
