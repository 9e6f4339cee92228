//! A guest's life on a real QEMU: start, agent, pause, balloon, reset, power down, and start again.

use std::time::Duration;

use driver::{ErrorKind, Notice, Run, StartOptions, What};
use tokio::time::Instant;

use crate::harness::tests;
use crate::rig::{Rig, boot, is_clean};

tests! {
    a_guest_boots_answers_its_agent_and_counts,
    pause_stops_the_count_and_resume_goes_on_without_a_gap,
    the_balloon_moves,
    the_power_button_ends_the_guest,
    a_reset_starts_the_count_anew_and_the_agent_answers_again,
    a_guest_started_paused_waits_for_resume,
    a_program_runs_in_the_guest_and_its_output_comes_back,
    shutdown_of_the_driver_leaves_the_guest_running,
    events_come_in_order_with_numbers_and_can_be_read_again,
}

const SECOND: Duration = Duration::from_secs(1);

async fn a_guest_boots_answers_its_agent_and_counts(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    assert!(domain.query_status().await.expect("it answers").running);
    assert!(
        domain.observed().agent_open,
        "QEMU told that the agent opened its port"
    );
    rig.console("web")
        .past(3, 20 * SECOND)
        .await
        .expect("it counts");
    let row = rig.driver.list().pop().expect("one domain");
    assert_eq!((&*row.name, row.run.name()), ("web", "running"));
    assert_eq!(
        rig.driver.by_name("web").map(|found| found.uuid()),
        Some(domain.uuid())
    );
    domain.destroy().await.expect("it ends");
    assert_eq!(domain.observed().run, Run::Off);
    assert!(
        is_clean(&rig, &domain),
        "its run directory is gone when destroy returns"
    );
}

async fn pause_stops_the_count_and_resume_goes_on_without_a_gap(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let console = rig.console("web");
    console.past(3, 20 * SECOND).await.expect("it counts");
    domain.pause().await.expect("it pauses");
    assert_eq!(
        domain.observed().run.name(),
        "paused",
        "the STOP event came before the reply"
    );
    let stopped_at = console.ticks().len();
    domain.resume().await.expect("it resumes");
    assert!(
        domain.observed().run.is_running(),
        "the RESUME event came before the reply"
    );
    let last = *console.ticks().last().expect("it counted");
    console
        .past(last + 3, 20 * SECOND)
        .await
        .expect("it goes on");
    let ticks = console.ticks();
    assert!(ticks.len() > stopped_at);
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{ticks:?}"
    );
}

async fn the_balloon_moves(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let wanted = 160 << 20;
    domain.set_memory(wanted).await.expect("QEMU takes it");
    let reached = domain
        .wait_for(
            |observed| observed.memory == Some(wanted),
            Instant::now() + 30 * SECOND,
        )
        .await;
    reached.expect("the guest gives the memory back");
    assert_eq!(domain.query_memory().await.expect("it answers"), wanted);
}

async fn the_power_button_ends_the_guest(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    domain.powerdown().await.expect("it is pressed");
    let off = domain
        .wait_for(
            |observed| observed.run == Run::Off,
            Instant::now() + 30 * SECOND,
        )
        .await;
    let why = off.expect("it ends").ended.expect("it says why");
    assert_eq!(why, job_core::GoneWhy::ShutDown);
    let error = domain.query_status().await.expect_err("there is no guest");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
}

async fn a_reset_starts_the_count_anew_and_the_agent_answers_again(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let console = rig.console("web");
    console.past(3, 20 * SECOND).await.expect("it counts");
    domain.reset().await.expect("it is pressed");
    domain
        .wait_agent()
        .deadline(60 * SECOND)
        .await
        .expect("the agent of the next boot answers");
    let starts = console.ticks().iter().filter(|tick| **tick == 0).count();
    assert_eq!(
        (starts, domain.observed().generation),
        (2, 1),
        "another boot of the same QEMU"
    );
}

async fn a_guest_started_paused_waits_for_resume(rig: Rig) {
    let options = StartOptions { paused: true };
    let domain = rig
        .driver
        .start(rig.guest("web"), options)
        .await
        .expect("it starts");
    let status = domain.query_status().await.expect("it answers");
    assert!(!status.running, "{status:?}");
    domain.resume().await.expect("it runs");
    rig.console("web")
        .past(0, 60 * SECOND)
        .await
        .expect("it boots");
}

async fn a_program_runs_in_the_guest_and_its_output_comes_back(rig: Rig) {
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let arguments = vec!["-c".into(), "echo out; echo err >&2; exit 3".into()];
    let output = domain
        .exec("/bin/sh", arguments, agent_qga::Limits::default())
        .await
        .expect("it runs");
    assert_eq!(output.exit_code, Some(3));
    assert_eq!(
        (&output.stdout[..], &output.stderr[..]),
        (&b"out\n"[..], &b"err\n"[..])
    );
}

async fn shutdown_of_the_driver_leaves_the_guest_running(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let pid = domain.observed().pid.expect("it has a process");
    rig.driver
        .shutdown(Instant::now() + 5 * SECOND)
        .await
        .expect("nothing runs");
    let late = domain
        .query_status()
        .await
        .expect_err("the driver is closing");
    assert_eq!(late.kind(), ErrorKind::ShuttingDown, "{late:#}");
    assert!(
        std::path::Path::new(&format!("/proc/{pid}/exe")).exists(),
        "QEMU runs on"
    );
}

async fn events_come_in_order_with_numbers_and_can_be_read_again(rig: Rig) {
    let domain = rig.started(rig.empty("web")).await;
    let mut follow = domain.subscribe();
    domain.pause().await.expect("it pauses");
    domain.resume().await.expect("it resumes");
    let (mut names, mut numbers) = (Vec::new(), Vec::new());
    while names.len() < 4 {
        let Notice::News { sequence, news } = follow.next().await else {
            panic!("nothing is missed")
        };
        numbers.push(sequence);
        match &news.what {
            What::Qemu(event) => names.push(event.name.clone()),
            What::JobEnded { owner, .. } => names.push(owner.to_string()),
            _ => {}
        }
    }
    assert_eq!(
        names,
        ["STOP", "pause", "RESUME", "resume"],
        "each event before the end of the job that caused it"
    );
    assert!(
        numbers.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "{numbers:?}"
    );
    let again = domain.subscribe_from(numbers[0]).next().await;
    assert!(matches!(again, Notice::News { sequence, .. } if sequence == numbers[0]));
}
