//! The same client against a real QEMU: a fake proves the odd cases, QEMU proves the fake.
//!
//! Runs `qemu-system-x86_64 -M none`, found by `VMWRIGHT_QEMU` or in `PATH`. Without one every
//! test is reported as ignored, with the reason.
//!
//! What a real QEMU was seen to do, and the test that holds it:
//!
//! ```text
//!  a second client meets silence              second_client, slot_is_freed
//!  a reply comes late, or to the next client  stopped_qemu, former_client, left_behind
//!  an error has no id                         garbage (what the client makes of it: conversation.rs)
//!  half a message, nesting beyond the limit   left_behind
//!  a command before the negotiation           before_negotiation
//!  the main loop hangs, yank frees it         yank_frees, rescue_passes
//!  an event precedes the reply                events_precede_replies, events_are_expected
//!  COMPLETED carries an error                 completed_with_error
//!  replies that nobody reads                  unread_replies
//!  SIGSTOP, SIGTERM, SIGKILL, quit            stopped_qemu, terminated, killed_qemu, quit
//! ```
//!
//! What needs a guest is in the suite of `tests`: `monitor.rs` and `agent.rs`.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

use std::{
    collections::BTreeSet,
    env,
    fs::File,
    future::Future,
    os::fd::OwnedFd,
    path::PathBuf,
    pin::Pin,
    process::{Child, Command as Process, Stdio},
    task::Poll,
    time::Duration,
};

use futures::{StreamExt as _, future::join_all};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use monitor_qmp::{
    Closed, Deadline, Diagnosis, Effect, ErrorClass, ErrorKind, Events, Health, Monitor, NoFds,
    Notice, Options, Outcome, QmpEvent, Schema, Settled, command::*, events,
};
use serde_json::{Value, json};
use tests::fault::{Faults, Faulty};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::UnixStream,
    time::Instant,
};

/// A deadline that a working QEMU never meets, even on a loaded machine.
fn soon() -> Deadline {
    Instant::now() + Duration::from_secs(60)
}

fn main() -> std::process::ExitCode {
    let qemu = find_qemu();
    let tests = vec![
        trial("typed_replies_fit", &qemu, typed_replies_fit),
        trial(
            "every_type_agrees_with_the_live_schema",
            &qemu,
            types_agree_with_schema,
        ),
        trial(
            "run_state_events_precede_replies",
            &qemu,
            events_precede_replies,
        ),
        trial("many_in_flight_are_answered_right", &qemu, many_in_flight),
        trial(
            "out_of_band_overtakes_a_full_window",
            &qemu,
            out_of_band_overtakes,
        ),
        trial(
            "a_rescue_passes_a_crowd_held_up_by_another_monitor",
            &qemu,
            rescue_passes,
        ),
        trial(
            "yank_frees_a_main_loop_that_waits_for_a_dead_disk",
            &qemu,
            yank_frees,
        ),
        trial(
            "a_command_overdue_in_a_busy_qemu_is_found_done_and_not_sent_twice",
            &qemu,
            overdue_is_settled,
        ),
        trial(
            "an_event_before_the_reply_is_waited_for",
            &qemu,
            events_are_expected,
        ),
        trial("dropped_calls_disturb_no_other", &qemu, dropped_calls),
        trial(
            "split_and_delayed_bytes_carry_the_conversation",
            &qemu,
            split_bytes,
        ),
        trial("refusals_keep_their_class", &qemu, refusals),
        trial("descriptors_arrive_with_their_commands", &qemu, descriptors),
        trial("a_second_client_is_told_of_the_first", &qemu, second_client),
        trial("the_last_handle_frees_the_slot", &qemu, slot_is_freed),
        trial(
            "a_stopped_qemu_is_unresponsive_and_recovers",
            &qemu,
            stopped_qemu,
        ),
        trial(
            "a_late_reply_to_a_former_client_reaches_nobody",
            &qemu,
            former_client,
        ),
        trial("a_killed_qemu_fails_every_caller", &qemu, killed_qemu),
        trial("quit_answers_and_tells_why_before_the_end", &qemu, quit),
        trial("qemu_answers_garbage_without_an_id", &qemu, garbage),
        trial(
            "every_future_dropped_at_every_poll_shifts_no_answer",
            &qemu,
            drop_law,
        ),
        trial(
            "what_a_former_client_left_behind_spoils_nothing",
            &qemu,
            left_behind,
        ),
        trial(
            "a_command_before_the_negotiation_is_refused_and_can_be_told",
            &qemu,
            before_negotiation,
        ),
        trial(
            "a_client_that_does_not_read_holds_up_itself_alone",
            &qemu,
            unread_replies,
        ),
        trial(
            "a_terminated_qemu_tells_why_before_the_end",
            &qemu,
            terminated,
        ),
        trial(
            "a_job_that_completed_with_an_error_is_told_as_failed",
            &qemu,
            completed_with_error,
        ),
    ];
    libtest_mimic::run(&Arguments::from_args(), tests).exit_code()
}

/// A QEMU that ends with the test.
struct Qemu {
    process: Child,
    binary: PathBuf,
    folder: tempfile::TempDir,
}

impl Qemu {
    fn start(binary: &PathBuf) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let process = Process::new(binary)
            .args([
                "-M",
                "none",
                "-S",
                "-display",
                "none",
                "-nodefaults",
                "-no-user-config",
            ])
            .args(["-qmp", "unix:qmp,server=on,wait=off"])
            .args(["-qmp", "unix:other,server=on,wait=off"])
            .current_dir(folder.path())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self {
            process,
            binary: binary.clone(),
            folder,
        }
    }

    async fn dial(&self) -> UnixStream {
        self.dial_at("qmp").await
    }

    async fn dial_at(&self, name: &str) -> UnixStream {
        let path = self.folder.path().join(name);
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            match UnixStream::connect(&path).await {
                Ok(stream) => return stream,
                Err(error) if Instant::now() > end => panic!("cannot reach QEMU: {error}"),
                // QEMU makes its socket when it is ready, and nothing tells when that is.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        }
    }

    async fn connect(&self) -> Monitor {
        Monitor::connect(self.dial().await, Options::default(), (), soon())
            .await
            .unwrap()
    }

    async fn connect_with_events(&self) -> (Monitor, Events) {
        let (queue, stream) = events(256);
        let wire = self.dial().await;
        (
            Monitor::connect(wire, Options::default(), queue, soon())
                .await
                .unwrap(),
            stream,
        )
    }

    fn signal(&self, name: &str) {
        let sent = Process::new("kill")
            .arg(name)
            .arg(self.process.id().to_string())
            .status();
        assert!(sent.unwrap().success(), "cannot send {name}");
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn find_qemu() -> Option<PathBuf> {
    if let Some(given) = env::var_os("VMWRIGHT_QEMU") {
        return Some(given.into());
    }
    let path = env::var_os("PATH")?;
    env::split_paths(&path)
        .map(|dir| dir.join("qemu-system-x86_64"))
        .find(|file| file.is_file())
}

fn trial<F>(name: &str, binary: &Option<PathBuf>, test: fn(Qemu) -> F) -> Trial
where
    F: Future<Output = ()> + 'static,
{
    let binary = binary.clone();
    Trial::ignorable_test(name, move || {
        let Some(binary) = binary else {
            return Ok(Completion::ignored_with(
                "no qemu-system-x86_64; set VMWRIGHT_QEMU",
            ));
        };
        let runtime = tokio::runtime::Runtime::new().map_err(Failed::from)?;
        runtime.block_on(test(Qemu::start(&binary)));
        Ok(Completion::Completed)
    })
}

async fn typed_replies_fit(qemu: Qemu) {
    let monitor = qemu.connect().await;
    assert!(monitor.has_oob());
    let status = monitor.execute(QueryStatus, soon()).await.unwrap();
    assert_eq!(
        (status.running, status.status),
        (false, RunState::PreLaunch)
    );
    let version = monitor.execute(QueryVersion, soon()).await.unwrap();
    assert_eq!(version.qemu, monitor.greeting().version.qemu);
    assert_eq!(monitor.execute(QueryName, soon()).await.unwrap().name, None);
    assert!(
        monitor
            .execute(QueryUuid, soon())
            .await
            .unwrap()
            .uuid
            .starts_with("00000000-")
    );
    assert!(monitor.execute(QueryCommands, soon()).await.unwrap().len() > 100);
    assert!(
        monitor
            .execute(QueryCpusFast, soon())
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        monitor
            .execute(QueryBlock, soon())
            .await
            .unwrap()
            .is_empty()
    );
    assert!(monitor.execute(QueryJobs, soon()).await.unwrap().is_empty());
    assert!(
        monitor
            .execute(QueryBlockJobs, soon())
            .await
            .unwrap()
            .is_empty()
    );
    assert!(
        monitor
            .execute(QueryFdsets, soon())
            .await
            .unwrap()
            .is_empty()
    );
    assert_eq!(
        monitor.execute(QueryMigrate, soon()).await.unwrap().status,
        None
    );
    assert_eq!(
        monitor.execute(QueryDump, soon()).await.unwrap().status,
        DumpStatus::None
    );
    let chardevs = monitor.execute(QueryChardev, soon()).await.unwrap();
    assert!(
        chardevs
            .iter()
            .any(|chardev| chardev.filename.starts_with("unix:"))
    );
    let capabilities = monitor
        .execute(QueryMigrateCapabilities, soon())
        .await
        .unwrap();
    assert!(
        capabilities
            .iter()
            .any(|capability| capability.capability == "events")
    );

    let add = BlockdevAdd::new("null-co", "n0")
        .with("size", 1 << 20)
        .with("read-zeroes", true);
    monitor.execute(add, soon()).await.unwrap();
    let nodes = monitor
        .execute(QueryNamedBlockNodes::default(), soon())
        .await
        .unwrap();
    assert_eq!(
        (nodes[0].drv.as_str(), nodes[0].image.virtual_size),
        ("null-co", 1 << 20)
    );
    let mut query = QueryBlockstats::default();
    query.query_nodes = Some(true);
    assert_eq!(
        monitor.execute(query, soon()).await.unwrap()[0]
            .stats
            .rd_bytes,
        0
    );
    monitor
        .execute(
            BlockdevDel {
                node_name: "n0".to_owned(),
            },
            soon(),
        )
        .await
        .unwrap();

    let object = ObjectAdd::new("iothread").with("id", "io0");
    monitor.execute(object, soon()).await.unwrap();
    let path = || "/objects/io0".to_owned();
    let property = || "poll-max-ns".to_owned();
    let set = QomSet {
        path: path(),
        property: property(),
        value: json!(5),
    };
    monitor.execute(set, soon()).await.unwrap();
    let got = monitor
        .execute(
            QomGet {
                path: path(),
                property: property(),
            },
            soon(),
        )
        .await
        .unwrap();
    assert_eq!(got.get(), "5");
    monitor
        .execute(ObjectDel::new("io0"), soon())
        .await
        .unwrap();

    let mut parameters = MigrateSetParameters::default();
    parameters.downtime_limit = Some(200);
    parameters.tls_creds = Some(String::new());
    monitor.execute(parameters, soon()).await.unwrap();
    let capabilities = vec![MigrationCapability::on("events")];
    monitor
        .execute(MigrateSetCapabilities { capabilities }, soon())
        .await
        .unwrap();
    let text = monitor
        .execute(HumanMonitorCommand::new("info version"), soon())
        .await
        .unwrap();
    assert!(text.starts_with(&version.qemu.to_string()), "{text}");
    let own_socket = |instance: &YankInstance| matches!(instance, YankInstance::Chardev { .. });
    assert!(
        monitor
            .execute_oob(QueryYank, soon())
            .await
            .unwrap()
            .iter()
            .any(own_socket)
    );
    let raw = monitor
        .execute_raw("query-status", Value::Null, soon())
        .await
        .unwrap();
    assert_eq!(raw["status"], "prelaunch");
}

async fn types_agree_with_schema(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let schema = Schema::ask(&monitor, soon()).await.unwrap();
    let release = monitor.greeting().version.qemu;
    let surprising: Vec<_> = schema
        .compare()
        .into_iter()
        .filter(|difference| !difference.is_expected_of(release))
        .map(|difference| difference.to_string())
        .collect();
    assert_eq!(surprising, [""; 0]);
    assert!(schema.has_command("yank") && !schema.has_command("yonk"));
    assert!(schema.has_event("STOP") && !schema.has_command("STOP"));
    assert!(schema.has_argument("device_add", "driver"));
}

async fn events_precede_replies(qemu: Qemu) {
    let (monitor, mut stream) = qemu.connect_with_events().await;
    for round in 0..20 {
        monitor.execute(Cont, soon()).await.unwrap();
        monitor.execute(Stop, soon()).await.unwrap();
        // Both are there already: the stream must not have to wait.
        for expected in ["RESUME", "STOP"] {
            match futures::poll!(stream.next()) {
                Poll::Ready(Some(Notice::Event(event))) => {
                    assert_eq!(event.name, expected, "round {round}");
                    assert!(event.timestamp.to_system_time().is_some());
                }
                other => panic!("expected {expected}, got {other:?} in round {round}"),
            }
        }
    }
}

async fn many_in_flight(qemu: Qemu) {
    let monitor = qemu.connect().await;
    for n in 0..20 {
        let add = ObjectAdd::new("iothread")
            .with("id", format!("io{n}"))
            .with("poll-max-ns", n);
        monitor.execute(add, soon()).await.unwrap();
    }
    let calls = (0..200).map(|n| {
        let path = format!("/objects/io{}", n % 20);
        let get = QomGet {
            path,
            property: "poll-max-ns".to_owned(),
        };
        monitor.execute(get, soon())
    });
    for (n, outcome) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(outcome.unwrap().get(), (n % 20).to_string());
    }
}

async fn out_of_band_overtakes(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let slow = (0..10).map(|_| monitor.execute(QueryQmpSchema, soon()));
    let mut slow = std::pin::pin!(join_all(slow));
    tokio::select! {
        biased;
        _ = &mut slow => panic!("ten schemas came before one probe"),
        probed = async {
            tokio::task::yield_now().await;
            monitor.execute_oob(QueryYank, soon()).await
        } => assert!(probed.is_ok()),
    }
    assert!(slow.await.iter().all(Result::is_ok));
}

/// QEMU takes in-band commands off one queue for all monitors, one by one. While it is at one,
/// the eighth behind it makes it stop reading that monitor, rescues included.
async fn rescue_passes(qemu: Qemu) {
    let stuck = qemu.connect().await;
    let add = BlockdevAdd::new("null-co", "slow");
    stuck.execute(add, soon()).await.unwrap();
    let other = Monitor::connect(qemu.dial_at("other").await, Options::default(), (), soon());
    let other = other.await.unwrap();
    let sleep = HumanMonitorCommand::new("qemu-io slow \"sleep 1500\"");
    let mut sleeping = std::pin::pin!(stuck.execute(sleep, soon()));
    let crowd = (0..20).map(|_| other.execute(QueryName, soon()));
    let mut crowd = std::pin::pin!(join_all(crowd));
    let rescue = async {
        // Once QEMU is asleep, the crowd fills the window and stays there.
        tokio::time::sleep(Duration::from_millis(200)).await;
        tokio::select! {
            biased;
            _ = &mut crowd => panic!("the other monitor was not held up"),
            () = tokio::time::sleep(Duration::from_millis(200)) => {}
        }
        other.execute_oob(QueryYank, soon()).await
    };
    tokio::select! {
        biased;
        _ = &mut sleeping => panic!("the rescue had to wait for the main loop"),
        rescued = rescue => assert!(rescued.is_ok()),
    }
    sleeping.await.unwrap();
    assert!(crowd.await.iter().all(Result::is_ok));
}

/// The disk is served by another QEMU, which stops: reading hangs the main loop for all monitors.
async fn yank_frees(qemu: Qemu) {
    let server = Qemu::start(&qemu.binary);
    let disk = server.connect().await;
    let add = BlockdevAdd::new("null-co", "disk").with("size", 1 << 20);
    disk.execute(add, soon()).await.unwrap();
    let path = server.folder.path().join("nbd");
    let path = path.to_str().unwrap().to_owned();
    let address = SocketAddress::Unix { path: path.clone() };
    disk.execute(NbdServerStart::new(address), soon())
        .await
        .unwrap();
    disk.execute(
        BlockExportAdd::new("nbd", "disk", "disk").with("writable", true),
        soon(),
    )
    .await
    .unwrap();

    let monitor = qemu.connect().await;
    let add = BlockdevAdd::new("nbd", "far")
        .with("server", json!({"type": "unix", "path": path}))
        .with("export", "disk");
    monitor.execute(add, soon()).await.unwrap();
    server.signal("-STOP");
    let other = Monitor::connect(qemu.dial_at("other").await, Options::default(), (), soon());
    let other = other.await.unwrap();
    let read = HumanMonitorCommand::new("qemu-io far \"read 0 64k\"");
    let mut reading = std::pin::pin!(monitor.execute(read, soon()));
    let crowd = (0..20).map(|_| other.execute(QueryName, soon()));
    let mut crowd = std::pin::pin!(join_all(crowd));
    let shortly = Instant::now() + Duration::from_millis(500);
    let diagnosis = tokio::select! {
        biased;
        _ = &mut reading => panic!("a stopped server was read from"),
        _ = &mut crowd => panic!("the other monitor was not held up"),
        diagnosis = other.diagnose(shortly) => diagnosis,
    };
    let Diagnosis::LinkDown(instances) = diagnosis else {
        panic!("a dead disk looks like {diagnosis:?}")
    };
    let disk = YankInstance::BlockNode {
        node_name: "far".to_owned(),
    };
    assert_eq!(instances, [disk]);
    let yank = other.execute_oob(Yank { instances }, soon());
    let (yanked, read) = tokio::join!(yank, &mut reading);
    yanked.unwrap();
    read.unwrap();
    assert!(crowd.await.iter().all(Result::is_ok));
    assert!(matches!(other.diagnose(soon()).await, Diagnosis::Fine));
    server.signal("-CONT");
}

async fn overdue_is_settled(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let add = BlockdevAdd::new("null-co", "slow");
    monitor.execute(add, soon()).await.unwrap();
    let sleep = HumanMonitorCommand::new("qemu-io slow \"sleep 1000\"");
    let add = ObjectAdd::new("iothread").with("id", "io0");
    let (slept, added) = tokio::join!(monitor.execute(sleep, soon()), async {
        let shortly = Instant::now() + Duration::from_millis(200);
        monitor.execute_settled(&add, shortly, soon()).await
    });
    slept.unwrap();
    assert!(matches!(added, Ok(Outcome::Done)), "{added:?}");
    assert_eq!(monitor.counters().late, 1);
    let again = monitor.execute(&add, soon()).await.unwrap_err();
    assert_eq!(again.effect(), Effect::Refused, "it is there already");
    let del = ObjectDel::new("io0");
    assert_eq!(monitor.settle(&del, soon()).await, Settled::NotDone);
    monitor.execute(&del, soon()).await.unwrap();
    assert_eq!(monitor.settle(&del, soon()).await, Settled::Done);
}

async fn events_are_expected(qemu: Qemu) {
    let monitor = qemu.connect().await;
    for _ in 0..20 {
        let mut resumed = monitor.expect_event(|event| event.name == "RESUME");
        monitor.execute(Cont, soon()).await.unwrap();
        // It came before the reply: there is nothing left to wait for.
        let now = Instant::now();
        assert!(resumed.wait(now).await.is_ok());
        monitor.execute(Stop, soon()).await.unwrap();
    }
}

async fn dropped_calls(qemu: Qemu) {
    let monitor = qemu.connect().await;
    for round in 0..50 {
        let impatient = (0..20).map(|n| {
            let deadline = Instant::now() + Duration::from_micros(n * 50 + round);
            monitor.execute(QueryVersion, deadline)
        });
        join_all(impatient).await;
        assert_eq!(
            monitor.execute(QueryStatus, soon()).await.unwrap().status,
            RunState::PreLaunch
        );
    }
    monitor.settled(soon()).await.unwrap();
    let counters = monitor.counters();
    assert_eq!((counters.unknown, counters.unattributed), (0, 0));
}

async fn split_bytes(qemu: Qemu) {
    for seed in 0..5 {
        let wire = NoFds(Faulty::new(
            qemu.dial().await,
            Faults::seeded(seed).split(3),
        ));
        let monitor = Monitor::connect(wire, Options::default(), (), soon())
            .await
            .unwrap();
        let calls = (0..20).map(|_| monitor.execute(QueryCommands, soon()));
        for outcome in join_all(calls).await {
            assert!(
                outcome
                    .unwrap()
                    .iter()
                    .any(|command| command.name == "query-status")
            );
        }
    }
}

async fn refusals(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let error = monitor
        .execute(DeviceDel::new("none"), soon())
        .await
        .unwrap_err();
    assert_eq!(error.class(), Some(&ErrorClass::DeviceNotFound));
    assert_eq!(error.effect(), Effect::Refused);
    let error = monitor
        .execute_raw("no-such", Value::Null, soon())
        .await
        .unwrap_err();
    assert_eq!(error.class(), Some(&ErrorClass::CommandNotFound));
    let error = monitor
        .execute_raw("stop", json!([1]), soon())
        .await
        .unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::Encode, Effect::None)
    );
    let error = monitor.execute(QueryBalloon, soon()).await.unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Refused,
        "a machine without a balloon: {error}"
    );
}

async fn descriptors(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let file = || OwnedFd::from(File::open("/dev/null").unwrap());
    // Sent at once: each must still find its own descriptor.
    let adds = (0..30).map(|n| {
        let mut add = AddFd::default();
        add.fdset_id = Some(n);
        add.opaque = Some(format!("n{n}"));
        monitor.execute_with_fds(add, vec![file()], soon())
    });
    let added = join_all(adds).await;
    let numbers: BTreeSet<i64> = added.into_iter().map(|added| added.unwrap().fd).collect();
    assert_eq!(numbers.len(), 30);
    let sets = monitor.execute(QueryFdsets, soon()).await.unwrap();
    assert_eq!(sets.len(), 30);
    for set in sets {
        assert_eq!(set.fds[0].opaque, Some(format!("n{}", set.fdset_id)));
        monitor
            .execute(RemoveFd::all(set.fdset_id), soon())
            .await
            .unwrap();
    }

    let named = || "a".to_owned();
    monitor
        .execute_with_fds(Getfd { fdname: named() }, vec![file()], soon())
        .await
        .unwrap();
    monitor
        .execute(Closefd { fdname: named() }, soon())
        .await
        .unwrap();
    let error = monitor
        .execute(Getfd { fdname: named() }, soon())
        .await
        .unwrap_err();
    assert_eq!(
        error.kind(),
        ErrorKind::Refused,
        "no descriptor was left over: {error}"
    );
}

async fn second_client(qemu: Qemu) {
    let first = qemu.connect().await;
    let deadline = Instant::now() + Duration::from_millis(200);
    let second = Monitor::connect(qemu.dial().await, Options::default(), (), deadline).await;
    let error = second.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NotQmp);
    assert!(
        error
            .to_string()
            .contains("another client may hold this socket"),
        "{error}"
    );
    drop(first);
}

async fn slot_is_freed(qemu: Qemu) {
    for _ in 0..10 {
        let monitor = qemu.connect().await;
        let call = monitor.execute(QueryQmpSchema, Instant::now() + Duration::from_millis(1));
        let _ = call.await;
    }
    let monitor = qemu.connect().await;
    assert_eq!(
        monitor.execute(QueryStatus, soon()).await.unwrap().status,
        RunState::PreLaunch
    );
}

async fn stopped_qemu(qemu: Qemu) {
    let monitor = qemu.connect().await;
    qemu.signal("-STOP");
    let deadline = Instant::now() + Duration::from_millis(50);
    let error = monitor.execute(QueryName, deadline).await.unwrap_err();
    assert_eq!(
        (error.kind(), error.effect()),
        (ErrorKind::TimedOut, Effect::Unknown)
    );
    assert_ne!(monitor.health(), Health::Ok);
    let unresponsive = async {
        while monitor.health() != Health::Unresponsive {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout_at(soon(), unresponsive).await.unwrap();
    qemu.signal("-CONT");
    monitor.settled(soon()).await.unwrap();
    assert_eq!(monitor.health(), Health::Ok);
    assert_eq!(monitor.counters().late, 1);
    assert_eq!(
        monitor.execute(QueryStatus, soon()).await.unwrap().status,
        RunState::PreLaunch
    );
}

async fn former_client(qemu: Qemu) {
    let former = qemu.connect().await;
    qemu.signal("-STOP");
    for _ in 0..5 {
        let deadline = Instant::now() + Duration::from_millis(5);
        former.execute(QueryQmpSchema, deadline).await.unwrap_err();
    }
    drop(former);
    let next = async { qemu.connect().await };
    let (monitor, ()) = tokio::join!(next, async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        qemu.signal("-CONT");
    });
    for _ in 0..20 {
        let status = monitor.execute(QueryStatus, soon()).await.unwrap();
        assert_eq!(status.status, RunState::PreLaunch);
    }
}

async fn killed_qemu(qemu: Qemu) {
    let monitor = qemu.connect().await;
    qemu.signal("-STOP");
    let calls = join_all((0..10).map(|_| monitor.execute(QueryStatus, soon())));
    let (outcomes, ()) = tokio::join!(calls, async {
        tokio::task::yield_now().await;
        qemu.signal("-KILL");
    });
    for outcome in outcomes {
        assert_eq!(outcome.unwrap_err().kind(), ErrorKind::Closed);
    }
    assert!(matches!(
        monitor.closed().await,
        Closed::EndOfStream | Closed::Failed(_)
    ));
}

async fn quit(qemu: Qemu) {
    let (monitor, mut stream) = qemu.connect_with_events().await;
    monitor.execute(Quit, soon()).await.unwrap();
    let mut seen = Vec::new();
    while let Some(notice) = stream.next().await {
        seen.push(notice);
    }
    let [Notice::Event(event), Notice::Closed(_)] = &seen[..] else {
        panic!("{seen:?}")
    };
    let QmpEvent::Shutdown(shutdown) = event.typed() else {
        panic!("{event:?}")
    };
    assert!(!shutdown.guest);
    assert_eq!(shutdown.reason.as_str(), "host-qmp-quit");
}

/// Why an error without id has to be dealt with at all, and that the stream goes on after it.
async fn garbage(qemu: Qemu) {
    let mut stream = qemu.dial().await;
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}}nonsense\n")
        .await
        .unwrap();
    stream
        .write_all(b"{\"execute\":\"query-name\",\"id\":9}")
        .await
        .unwrap();
    let mut text = String::new();
    while !text.contains("\"id\": 9") {
        let mut chunk = [0; 1024];
        let count = stream.read(&mut chunk).await.unwrap();
        assert!(count > 0, "QEMU hung up: {text}");
        text.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
    }
    let errors: Vec<_> = text
        .lines()
        .filter(|line| line.contains("\"error\""))
        .collect();
    assert!(
        !errors.is_empty() && errors.iter().all(|line| !line.contains("\"id\"")),
        "{text}"
    );
}

/// Polls `future` so often as it is woken, at most `polls` times, then drops it.
async fn drop_at<F: Future>(polls: usize, future: F) -> Option<F::Output> {
    let mut future = std::pin::pin!(future);
    let mut polled = 0;
    std::future::poll_fn(|cx| {
        if polled == polls {
            return Poll::Ready(None);
        }
        polled += 1;
        let answer = future.as_mut().poll(cx).map(Some);
        if answer.is_pending() && polled == polls {
            return Poll::Ready(None);
        }
        answer
    })
    .await
}

/// Ten objects, each with a number of its own that a reply can be told by.
async fn ten_numbers(monitor: &Monitor) {
    for n in 0..10 {
        let add = ObjectAdd::new("iothread")
            .with("id", format!("io{n}"))
            .with("poll-max-ns", n);
        monitor.execute(add, soon()).await.unwrap();
    }
}

async fn a_hundred_are_answered_right(monitor: &Monitor) {
    let calls = (0..100).map(|n| {
        let get = QomGet {
            path: format!("/objects/io{}", n % 10),
            property: "poll-max-ns".to_owned(),
        };
        monitor.execute(get, soon())
    });
    for (n, outcome) in join_all(calls).await.into_iter().enumerate() {
        assert_eq!(outcome.unwrap().get(), (n % 10).to_string());
    }
}

async fn drop_law(qemu: Qemu) {
    type Act = for<'a> fn(&'a Monitor) -> Pin<Box<dyn Future<Output = ()> + 'a>>;
    const ALL: &[(&str, Act)] = &[
        ("execute", |monitor| {
            Box::pin(async {
                let _told = monitor.execute(QueryVersion, soon()).await.unwrap();
            })
        }),
        ("execute_raw", |monitor| {
            Box::pin(async {
                let asked = monitor.execute_raw("query-name", Value::Null, soon());
                let _told = asked.await.unwrap();
            })
        }),
        ("execute_oob", |monitor| {
            Box::pin(async {
                let _told = monitor.execute_oob(QueryYank, soon()).await.unwrap();
            })
        }),
        ("execute_with_fds", |monitor| {
            Box::pin(async {
                let null = OwnedFd::from(File::open("/dev/null").unwrap());
                let add = AddFd::default();
                let _told = monitor
                    .execute_with_fds(add, vec![null], soon())
                    .await
                    .unwrap();
            })
        }),
        ("execute_settled", |monitor| {
            Box::pin(async {
                let _told = monitor
                    .execute_settled(&Cont, soon(), soon())
                    .await
                    .unwrap();
            })
        }),
        ("settle", |monitor| {
            Box::pin(async {
                let _told = monitor.settle(&Cont, soon()).await;
            })
        }),
        ("settled", |monitor| {
            Box::pin(async { monitor.settled(soon()).await.unwrap() })
        }),
        ("diagnose", |monitor| {
            Box::pin(async {
                let _told = monitor.diagnose(soon()).await;
            })
        }),
        ("expect_event and wait", |monitor| {
            Box::pin(async {
                let mut stopped = monitor.expect_event(|event| event.name == "STOP");
                monitor.execute(Cont, soon()).await.unwrap();
                monitor.execute(Stop, soon()).await.unwrap();
                stopped.wait(soon()).await.unwrap();
            })
        }),
        ("Schema::ask", |monitor| {
            Box::pin(async {
                let _told = Schema::ask(monitor, soon()).await.unwrap();
            })
        }),
        ("a refused call", |monitor| {
            Box::pin(async {
                let _told = monitor
                    .execute(DeviceDel::new("no"), soon())
                    .await
                    .unwrap_err();
            })
        }),
    ];
    for polls in 0.. {
        let wire = qemu.dial().await;
        let made = drop_at(
            polls,
            Monitor::connect(wire, Options::default(), (), soon()),
        )
        .await;
        if let Some(made) = made {
            made.unwrap();
            break;
        }
    }
    let monitor = qemu.connect().await;
    ten_numbers(&monitor).await;
    for (name, act) in ALL {
        for polls in 1.. {
            let ended = drop_at(polls, act(&monitor)).await.is_some();
            a_hundred_are_answered_right(&monitor).await;
            if ended {
                break;
            }
            assert!(polls < 100, "{name} never ends");
        }
    }
    monitor.settled(soon()).await.unwrap();
    let counters = monitor.counters();
    assert_eq!((counters.unknown, counters.unattributed), (0, 0));
}

/// Half a message, nesting beyond QEMU's limit, and replies that nobody fetched.
async fn left_behind(qemu: Qemu) {
    let deep = "[".repeat(2000);
    for left in [
        "{\"execute\":\"qmp_capabil",
        "{\"execute\":\"qmp_capabilities\"}{\"execute\":\"query-qmp-schema\",\"id\":1}{\"exec",
        &deep,
    ] {
        let mut former = qemu.dial().await;
        let mut greeting = [0; 16];
        former.read_exact(&mut greeting).await.unwrap();
        former.write_all(left.as_bytes()).await.unwrap();
        drop(former);
        let monitor = qemu.connect().await;
        for _ in 0..10 {
            let status = monitor.execute(QueryStatus, soon()).await.unwrap();
            assert_eq!(status.status, RunState::PreLaunch, "after {left:.40}");
        }
        assert_eq!(monitor.counters().unknown, 0, "after {left:.40}");
    }
}

/// Why the negotiation is a part of connecting.
async fn before_negotiation(qemu: Qemu) {
    let mut stream = qemu.dial().await;
    let asked = b"{\"execute\":\"query-name\",\"id\":9}";
    stream.write_all(asked).await.unwrap();
    let text = read_until(&mut stream, "\"id\": 9").await;
    assert!(
        text.contains("CommandNotFound") && text.contains("capabilities negotiation"),
        "{text}"
    );
}

async fn read_until(stream: &mut UnixStream, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk).await.unwrap();
        assert!(count > 0, "QEMU hung up: {text}");
        text.push_str(std::str::from_utf8(&chunk[..count]).unwrap());
    }
    text
}

async fn unread_replies(qemu: Qemu) {
    let monitor = qemu.connect().await;
    let mut deaf = qemu.dial_at("other").await;
    let hello = b"{\"execute\":\"qmp_capabilities\"}";
    deaf.write_all(hello).await.unwrap();
    // QEMU may read on and keep the replies, or stop to read: either is its own affair.
    let asked = b"{\"execute\":\"query-version\",\"id\":7}".repeat(5000);
    let writing = deaf.write_all(&asked);
    let _all = tokio::time::timeout(Duration::from_secs(2), writing).await;
    a_version_is_told(&monitor).await;
    drop(deaf);
    a_version_is_told(&monitor).await;
    let other = Monitor::connect(qemu.dial_at("other").await, Options::default(), (), soon());
    a_version_is_told(&other.await.unwrap()).await;
}

async fn a_version_is_told(monitor: &Monitor) {
    let version = monitor.execute(QueryVersion, soon()).await.unwrap();
    assert_eq!(version.qemu, monitor.greeting().version.qemu);
}

async fn terminated(qemu: Qemu) {
    let (monitor, mut stream) = qemu.connect_with_events().await;
    qemu.signal("-TERM");
    let Some(Notice::Event(event)) = stream.next().await else {
        panic!("no event before the end")
    };
    let QmpEvent::Shutdown(shutdown) = event.typed() else {
        panic!("{event:?}")
    };
    assert_eq!(
        (shutdown.guest, shutdown.reason.as_str()),
        (false, "host-signal")
    );
    monitor.closed().await;
    assert!(matches!(stream.next().await, Some(Notice::Closed(_))));
}

/// A block job whose target fails: BLOCK_JOB_COMPLETED comes, and is no success.
async fn completed_with_error(qemu: Qemu) {
    let (monitor, mut stream) = qemu.connect_with_events().await;
    let full = json!({"driver": "null-co", "size": 1 << 20, "read-zeroes": false});
    let inject = json!([{"event": "none", "iotype": "write", "errno": 28, "once": false}]);
    let nodes = [
        BlockdevAdd::new("null-co", "from").with("size", 1 << 20),
        BlockdevAdd::new("blkdebug", "to")
            .with("image", full)
            .with("inject-error", inject),
    ];
    for add in nodes {
        monitor.execute(add, soon()).await.unwrap();
    }
    let backup = json!({"device": "from", "target": "to", "sync": "full", "job-id": "job"});
    monitor
        .execute_raw("blockdev-backup", backup, soon())
        .await
        .unwrap();
    let ended = async {
        loop {
            match stream.next().await {
                Some(Notice::Event(event)) => {
                    if let QmpEvent::BlockJobCompleted(job) = event.typed() {
                        return job;
                    }
                }
                other => panic!("{other:?}"),
            }
        }
    };
    let job = tokio::time::timeout_at(soon(), ended).await.unwrap();
    assert!(
        job.error
            .as_deref()
            .is_some_and(|text| text.contains("space")),
        "{job:?}"
    );
    assert!(job.offset < job.len, "{job:?}");
}
