//! Freezes that end: by their holder, by a drop, by their time, after a death, and after silence.
//! On a fake agent and with the clock in hand; on a real file system in the suite.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use agent_qga::{
    Agent, Effect, Error, ErrorKind, FileLeases, FreezeEnd, FreezeLease, FreezePlan, FreezeState,
    FsfreezeStatus, FsfreezeThaw, GetHostName, LeaseRecord, LeaseStore, MemoryLeases, Options, Qga,
    QgaExt as _, Recovered, SyncDelimited, ThawedBy, freeze, recover,
};
use futures::poll;
use serde_json::{Value, json};
use tests::fake_guest::{Act, FakeGuest, Syncs, Table};
use tokio::runtime::Builder;
use tokio::sync::mpsc;
use tokio::task::yield_now;
use tokio::time::{Instant, sleep};

const GUEST: &str = "web/1";
const HOLD: Duration = Duration::from_secs(60);

fn within(seconds: u64) -> Instant {
    Instant::now() + Duration::from_secs(seconds)
}

fn served(mut table: Table) -> Arc<dyn Qga> {
    let (stream, mut guest) = FakeGuest::open();
    tokio::spawn(async move { guest.serve(&mut table).await });
    Arc::new(Agent::new(stream, Options::default()))
}

fn plan() -> FreezePlan {
    FreezePlan::new(GUEST, HOLD)
}

fn store() -> Arc<MemoryLeases> {
    Arc::new(MemoryLeases::default())
}

async fn frozen(agent: &Arc<dyn Qga>, store: &Arc<MemoryLeases>) -> FreezeLease {
    freeze(agent.clone(), store.clone(), plan(), within(30))
        .await
        .unwrap()
}

async fn is_frozen(agent: &Arc<dyn Qga>) -> bool {
    let state = agent.execute(FsfreezeStatus, within(30)).await.unwrap();
    state == FreezeState::Frozen
}

fn records(store: &MemoryLeases) -> usize {
    store.pending().unwrap().len()
}

/// Waits until no task acts for a lease any more.
async fn settled(agent: &Arc<dyn Qga>) {
    while Arc::strong_count(agent) > 1 {
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_freeze_is_recorded_before_it_is_asked_for() {
    let store = store();
    let seen = Arc::new(AtomicBool::new(false));
    let (witness, known) = (seen.clone(), store.clone());
    let table = Table::typical().on_call("guest-fsfreeze-freeze", move |_| {
        let records = known.pending().unwrap();
        witness.store(records.len() == 1, Ordering::Relaxed);
        assert_eq!(records[0].guest, GUEST);
        assert_eq!(records[0].until_ms - records[0].since_ms, 60_000);
        vec![Act::Freeze(true), Act::Return(json!(2))]
    });
    let agent = served(table);
    let lease = frozen(&agent, &store).await;
    assert!(seen.load(Ordering::Relaxed));
    assert_eq!(lease.file_systems(), 2);
    assert!(is_frozen(&agent).await);
    let thawed = lease.thaw(within(30)).await.unwrap();
    assert_eq!((thawed.by, thawed.file_systems), (ThawedBy::Holder, 1));
    assert!(!is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_lease_thaws_from_any_thread() {
    let (agent, store) = (served(Table::typical()), store());
    for elsewhere in [false, true] {
        let lease = frozen(&agent, &store).await;
        let watch = lease.watch();
        if elsewhere {
            std::thread::spawn(move || drop(lease)).join().unwrap();
        } else {
            drop(lease);
        }
        let end = watch.ended().await;
        assert!(
            matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Drop),
            "{end:?}"
        );
        assert!(!is_frozen(&agent).await);
        assert_eq!(records(&store), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_lease_whose_time_is_over_thaws_and_its_holder_is_told() {
    let (agent, store) = (served(Table::typical()), store());
    let lease = frozen(&agent, &store).await;
    let since = Instant::now();
    let end = lease.watch().ended().await;
    assert_eq!(since.elapsed().as_secs(), HOLD.as_secs());
    assert!(
        matches!(end, FreezeEnd::Thawed(thawed) if thawed.by == ThawedBy::Deadline),
        "{end:?}"
    );
    assert!(!is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
    let told = lease.thaw(within(30)).await.unwrap();
    assert_eq!(
        told.by,
        ThawedBy::Deadline,
        "what was done meanwhile is not to be trusted"
    );
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_is_not_ours_is_reported_and_left_alone() {
    let mut table = Table::typical();
    table.set_frozen(true);
    let (agent, store) = (served(table), store());
    let error = freeze(agent.clone(), store.clone(), plan(), within(30))
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::ForeignFreeze, Effect::None)
    );
    let found = recover(&*agent, store.clone(), GUEST, within(30)).await;
    assert_eq!(found.unwrap(), Recovered::Foreign);
    settled(&agent).await;
    assert!(is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn of_two_who_freeze_at_once_one_has_it_and_keeps_it() {
    let (agent, store) = (served(Table::typical()), store());
    let one = freeze(agent.clone(), store.clone(), plan(), within(30));
    let two = freeze(agent.clone(), store.clone(), plan(), within(30));
    let (lease, refused) = match tokio::join!(one, two) {
        (Ok(lease), Err(error)) | (Err(error), Ok(lease)) => (lease, error),
        both => panic!("{both:?}"),
    };
    let kind = refused.kind();
    assert!(
        matches!(kind, ErrorKind::ForeignFreeze | ErrorKind::LeasePending),
        "{refused}"
    );
    assert!(is_frozen(&agent).await);
    assert_eq!(records(&store), 1, "the one that holds");
    lease.thaw(within(30)).await.unwrap();
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn a_freeze_answered_too_late_is_found_and_undone() {
    let late = [
        Act::Wait(Duration::from_secs(25)),
        Act::Freeze(true),
        Act::Return(json!(1)),
    ];
    let table = Table::typical().on("guest-fsfreeze-freeze", late);
    let (agent, store) = (served(table), store());
    let since = Instant::now();
    let error = freeze(agent.clone(), store.clone(), plan(), within(50))
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::FreezeUndone, Effect::None)
    );
    assert!(
        error.to_string().contains("found frozen and thawed"),
        "{error}"
    );
    assert!((25..50).contains(&since.elapsed().as_secs()));
    assert!(!is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_was_lost_is_found_to_have_done_nothing() {
    let table = Table::typical().on("guest-fsfreeze-freeze", []);
    let (agent, store) = (served(table), store());
    let error = freeze(agent.clone(), store.clone(), plan(), within(50))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::FreezeUndone);
    assert!(error.to_string().contains("and found thawed"), "{error}");
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn a_freeze_that_outlasts_its_caller_is_thawed_once_the_agent_answers() {
    let late = [
        Act::Wait(Duration::from_secs(3600)),
        Act::Freeze(true),
        Act::Return(json!(1)),
    ];
    let table = Table::typical().on("guest-fsfreeze-freeze", late);
    let (agent, store) = (served(table), store());
    let since = Instant::now();
    let error = freeze(agent.clone(), store.clone(), plan(), within(30))
        .await
        .unwrap_err();
    assert_eq!(since.elapsed().as_secs(), 30);
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    assert_eq!(records(&store), 1, "nobody knows yet");
    settled(&agent).await;
    assert!((3600..3620).contains(&since.elapsed().as_secs()));
    assert!(!is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_fell_silent_is_asked_to_thaw_until_it_does() {
    // The first three thaws are swallowed whole.
    let mut left = 3;
    let table = Table::typical().on_call("guest-fsfreeze-thaw", move |_| {
        if left > 0 {
            left -= 1;
            return Vec::new();
        }
        vec![Act::Freeze(false), Act::Return(json!(1))]
    });
    let (agent, store) = (served(table), store());
    let lease = frozen(&agent, &store).await;
    let watch = lease.watch();
    let error = lease.thaw(within(5)).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    assert!(matches!(watch.ended().await, FreezeEnd::Thawed(_)));
    assert!(!is_frozen(&agent).await);
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn a_thaw_that_did_not_thaw_is_asked_again() {
    let mut lies = 2;
    let table = Table::typical().on_call("guest-fsfreeze-thaw", move |_| {
        let frozen = lies > 0;
        lies -= i32::from(frozen);
        vec![Act::Freeze(frozen), Act::Return(json!(1))]
    });
    let (agent, store) = (served(table), store());
    let lease = frozen(&agent, &store).await;
    lease.thaw(within(30)).await.unwrap();
    assert!(!is_frozen(&agent).await);
}

#[tokio::test(start_paused = true)]
async fn a_refused_freeze_leaves_no_record_and_keeps_the_agents_words() {
    let refusal = [Act::refuse("GenericError", "failed to freeze /mnt")];
    let table = Table::typical().on("guest-fsfreeze-freeze", refusal);
    let (agent, store) = (served(table), store());
    let error = freeze(agent.clone(), store.clone(), plan(), within(30))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert_eq!(error.desc(), Some("failed to freeze /mnt"));
    assert_eq!(records(&store), 0);
}

#[tokio::test(start_paused = true)]
async fn only_the_mount_points_of_the_plan_are_asked_for() {
    let table = Table::typical().on_call("guest-fsfreeze-freeze-list", |request| {
        assert_eq!(
            request.arguments,
            json!({ "mountpoints": ["/mnt", "/srv"] })
        );
        vec![Act::Freeze(true), Act::Return(json!(2))]
    });
    let (agent, store) = (served(table), store());
    let plan = plan().mountpoints(["/mnt".to_owned(), "/srv".to_owned()]);
    let lease = freeze(agent.clone(), store, plan, within(30))
        .await
        .unwrap();
    assert_eq!(lease.file_systems(), 2);
    lease.thaw(within(30)).await.unwrap();
}

/// A store whose disk is full.
struct Full;

impl LeaseStore for Full {
    fn put(&self, _: &LeaseRecord) -> io::Result<()> {
        Err(io::ErrorKind::StorageFull.into())
    }

    fn remove(&self, _: &str) -> io::Result<()> {
        Ok(())
    }

    fn pending(&self) -> io::Result<Vec<LeaseRecord>> {
        Ok(Vec::new())
    }
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_recorded_is_not_frozen() {
    let asked = Arc::new(AtomicBool::new(false));
    let witness = asked.clone();
    let table = Table::typical().on_call("guest-fsfreeze-freeze", move |_| {
        witness.store(true, Ordering::Relaxed);
        vec![Act::Freeze(true), Act::Return(json!(1))]
    });
    let agent = served(table);
    let error = freeze(agent.clone(), Arc::new(Full), plan(), within(30))
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::LeaseStore, Effect::None)
    );
    assert!(std::error::Error::source(&error).is_some());
    assert!(!asked.load(Ordering::Relaxed));
}

#[tokio::test(start_paused = true)]
async fn a_connection_that_ends_leaves_the_record_and_the_next_one_thaws() {
    let (stream, mut guest) = FakeGuest::open();
    let (hang_up, mut told) = mpsc::channel::<()>(1);
    let (next, mut streams) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut table = Table::typical();
        tokio::select! {
            () = guest.serve(&mut table) => {}
            _ = told.recv() => {}
        }
        next.send(guest.reconnect()).await.unwrap();
        guest.serve(&mut table).await;
    });
    let agent: Arc<dyn Qga> = Arc::new(Agent::new(stream, Options::default()));
    let store = store();
    let lease = frozen(&agent, &store).await;
    hang_up.send(()).await.unwrap();
    let stream = streams.recv().await.unwrap();
    let error = lease.thaw(within(30)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Closed);
    assert_eq!(records(&store), 1);

    let agent: Arc<dyn Qga> = Arc::new(Agent::new(stream, Options::default()));
    assert!(is_frozen(&agent).await);
    let error = freeze(agent.clone(), store.clone(), plan(), within(30))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::LeasePending);
    let found = recover(&*agent, store.clone(), GUEST, within(30)).await;
    let thawed = Recovered::Thawed {
        records: 1,
        file_systems: 1,
    };
    assert_eq!(found.unwrap(), thawed);
    assert!(!is_frozen(&agent).await);
    let found = recover(&*agent, store, GUEST, within(30)).await;
    assert_eq!(found.unwrap(), Recovered::Nothing);
}

#[test]
fn a_runtime_that_is_torn_down_leaves_the_record_in_the_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases.json");
    let runtime = || Builder::new_current_thread().enable_all().build().unwrap();
    let first = runtime();
    let lease = first.block_on(async {
        let store = Arc::new(FileLeases::new(&path));
        freeze(served(Table::typical()), store, plan(), within(30))
            .await
            .unwrap()
    });
    let watch = lease.watch();
    drop(first);
    drop(lease);
    runtime().block_on(async {
        assert!(matches!(watch.ended().await, FreezeEnd::Stopped));
        let mut table = Table::typical();
        table.set_frozen(true);
        let agent = served(table);
        let store = Arc::new(FileLeases::new(&path));
        let other = recover(&*agent, store.clone(), "db/1", within(30)).await;
        assert_eq!(other.unwrap(), Recovered::Foreign, "another guest's record");
        let found = recover(&*agent, store, GUEST, within(30)).await;
        assert!(matches!(found, Ok(Recovered::Thawed { .. })), "{found:?}");
        assert!(!is_frozen(&agent).await);
    });
}

#[tokio::test(start_paused = true)]
async fn a_thaw_goes_before_all_who_wait() {
    let (stream, mut guest) = FakeGuest::open();
    let agent = Agent::new(stream, Options::default());
    let mut calls = Vec::new();
    for number in 0..5 {
        let agent = agent.clone();
        let arguments = json!({ "number": number });
        calls.push(tokio::spawn(async move {
            agent
                .execute_raw("guest-echo", arguments, within(600))
                .await
                .unwrap()
        }));
    }
    guest.expect("guest-echo").await;
    let urgent = agent.clone();
    let thaw = tokio::spawn(async move { urgent.execute(FsfreezeThaw, within(600)).await });
    sleep(Duration::from_secs(1)).await;
    guest.answer(json!(0)).await;
    guest.expect("guest-fsfreeze-thaw").await;
    guest.answer(json!(1)).await;
    assert_eq!(thaw.await.unwrap().unwrap(), 1);
    for number in 1..5 {
        let request = guest.expect("guest-echo").await;
        assert_eq!(
            request.arguments["number"], number,
            "the others keep their order"
        );
        guest.answer(request.arguments["number"].clone()).await;
    }
    for (number, call) in calls.into_iter().enumerate() {
        assert_eq!(call.await.unwrap(), number);
    }
}

#[tokio::test(start_paused = true)]
async fn a_frozen_command_is_told_from_a_missing_one() {
    let mut table = Table::typical();
    table.set_frozen(true);
    let agent = served(table);
    let frozen = agent.execute(GetHostName, within(30)).await.unwrap_err();
    assert_eq!(frozen.kind(), ErrorKind::Frozen);
    let missing = agent.execute_raw("guest-nonsense", Value::Null, within(30));
    let missing = missing.await.unwrap_err();
    assert_eq!(missing.kind(), ErrorKind::Refused);
    assert_eq!(frozen.class(), missing.class(), "to the agent they are one");
}

#[tokio::test(start_paused = true)]
async fn recovery_ends_by_its_deadline_and_keeps_the_record() {
    let (stream, mut guest) = FakeGuest::open();
    guest.set_syncs(Syncs::Swallowed);
    tokio::spawn(async move { guest.request().await });
    let agent = Agent::new(stream, Options::default());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("leases.json");
    let record = json!([{ "id": "1", "guest": GUEST, "since_ms": 0, "until_ms": 1, "new": 0 }]);
    std::fs::write(&path, record.to_string()).unwrap();
    let store = Arc::new(FileLeases::new(&path));
    let since = Instant::now();
    let error = recover(&agent, store.clone(), GUEST, within(12)).await;
    assert_eq!(error.unwrap_err().kind(), ErrorKind::Unresponsive);
    assert!(since.elapsed() <= Duration::from_secs(12));
    assert_eq!(store.pending().unwrap().len(), 1);
}

/// Polls a future so often, all others having their turn in between, then drops it.
async fn dropped_after<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    for _ in 0..polls {
        if let std::task::Poll::Ready(done) = poll!(&mut future) {
            return Some(done);
        }
        yield_now().await;
    }
    None
}

/// Drops `act` after one poll, after two, and later and later until it ends; after each the guest
/// is thawed.
fn drop_at_every_poll(name: &str, act: impl AsyncFn(Arc<dyn Qga>, Arc<MemoryLeases>)) {
    let runtime = Builder::new_current_thread()
        .enable_time()
        .event_interval(1)
        .build();
    runtime.unwrap().block_on(async {
        let mut polls = 0;
        loop {
            let (agent, store) = (served(Table::typical()), store());
            let ended = dropped_after(polls, act(agent.clone(), store.clone())).await;
            settled(&agent).await;
            assert!(
                !is_frozen(&agent).await,
                "{name} dropped after {polls} polls"
            );
            assert_eq!(records(&store), 0, "{name} dropped after {polls} polls");
            for id in 0..100 {
                let answer = agent.execute(SyncDelimited { id }, within(30)).await;
                assert_eq!(answer.unwrap(), id, "{name} dropped after {polls} polls");
            }
            if ended.is_some() {
                break;
            }
            // Most polls only wait for the thread that writes the record: in ever longer strides.
            polls += 1 + polls / 16;
        }
        assert!(polls > 3, "{name} ended after {polls} polls");
    });
}

#[test]
fn a_freeze_dropped_at_any_poll_leaves_the_guest_thawed() {
    drop_at_every_poll("freeze", async |agent, store| {
        drop(freeze(agent, store, plan(), within(30)).await.unwrap());
    });
}

#[test]
fn a_thaw_dropped_at_any_poll_is_done_all_the_same() {
    drop_at_every_poll("freeze and thaw", async |agent, store| {
        let lease = freeze(agent, store, plan(), within(30)).await.unwrap();
        lease.thaw(within(30)).await.unwrap();
    });
}

#[test]
fn a_recovery_dropped_at_any_poll_can_be_done_again() {
    drop_at_every_poll("recover", async |agent, store| {
        let dropped: Result<Recovered, Error> = recover(&*agent, store, GUEST, within(30)).await;
        assert_eq!(dropped.unwrap(), Recovered::Nothing);
    });
}

#[tokio::test(start_paused = true)]
async fn a_lease_keeps_the_connection_until_the_guest_is_thawed() {
    let (stream, mut guest) = FakeGuest::open();
    let served = tokio::spawn(async move {
        let mut table = Table::typical();
        guest.serve(&mut table).await;
        table.is_frozen()
    });
    let agent: Arc<dyn Qga> = Arc::new(Agent::new(stream, Options::default()));
    let store = store();
    let lease = frozen(&agent, &store).await;
    drop(agent);
    drop(lease);
    assert!(
        !served.await.unwrap(),
        "thawed before the channel was freed"
    );
    assert_eq!(records(&store), 0);
}
