//! A real guest moves from one driver to another in the same process: it runs on one side only, and counts on.

mod disks;
mod kept;
mod left_open;
mod memory;
mod newer;
mod nobody_comes;
mod over_wire;
mod policy;
mod post_copy;
mod restart;
mod run_state;
mod settling;
mod strangers;
mod tls;
mod tls_restart;
mod traps;
mod tuned;
mod unseen;

use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use driver::{
    Domain, Error, ErrorKind, MigrateOptions, Notice, Run, StartOptions, Subscription, Tuning, What,
};
use remote_migrate::{Downtime, InProcess, Owner, Progress, Report, Side};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use crate::harness::tests;
use crate::rig::{Rig, Signal, boot, jobs_until, kill};
use disks::*;
use kept::*;
use left_open::*;
use memory::*;
use newer::*;
use nobody_comes::*;
use over_wire::*;
use policy::*;
use post_copy::*;
use restart::*;
use run_state::*;
use settling::*;
use strangers::*;
use tls::*;
use tls_restart::*;
use traps::*;
use tuned::*;
use unseen::*;

tests! {
    a_guest_that_moved_goes_on_at_the_next_tick_and_is_off_where_it_was,
    how_far_a_guest_is_is_seen_on_both_sides,
    a_guest_moves_there_and_back,
    a_guest_that_writes_to_its_disk_moves_there_and_back_and_the_disk_is_whole,
    a_disk_that_is_not_there_is_refused_by_its_path,
    a_guest_that_moved_away_is_not_started_where_it_was,
    a_guest_that_moved_away_and_came_back_in_vain_is_not_started_there,
    a_definition_that_is_kept_there_stays_as_it_was_but_for_the_files_of_the_disks,
    a_definition_that_is_kept_there_is_not_touched_by_a_guest_that_does_not_arrive,
    a_guest_does_not_arrive_where_it_is_known_by_another_name,
    a_guest_that_arrived_is_saved_and_restored,
    a_guest_moves_into_a_file_while_it_runs_and_back_and_on_to_another_host,
    a_guest_on_its_way_is_destroyed_at_once,
    a_paused_guest_arrives_paused,
    a_guest_that_is_paused_on_its_way_arrives_paused,
    a_guest_that_is_paused_on_its_way_and_stays_is_still_paused,
    a_guest_that_is_paused_on_its_way_is_still_paused_when_its_daemon_is_back,
    a_guest_whose_pause_was_refused_on_its_way_arrives_running,
    a_cancelled_migration_leaves_the_guest_where_it_was,
    a_destination_that_dies_leaves_the_guest_where_it_was,
    a_query_passes_beside_a_migration_and_a_modify_waits,
    a_destination_that_dies_before_it_is_asked_takes_the_guest_when_it_is_back,
    a_destination_that_dies_as_it_takes_the_guest_runs_it_when_it_is_back,
    a_destination_that_dies_as_it_takes_a_guest_in_two_halves_runs_it_when_it_is_back,
    a_destination_that_dies_before_it_is_asked_for_a_guest_in_two_halves_runs_it_when_it_is_back,
    a_post_copy_whose_stream_broke_goes_on_at_the_daemon_that_comes_next,
    a_destination_that_dies_as_it_starts_the_guest_owns_it_when_it_is_back,
    a_destination_that_dies_with_its_answer_repeats_it_when_it_is_back,
    a_source_that_dies_before_it_hears_the_answer_gives_the_guest_up_when_it_is_back,
    a_source_that_dies_while_memory_moves_keeps_the_guest_when_it_is_back,
    a_guest_moves_over_tcp_past_strangers_at_its_port,
    a_guest_that_died_before_its_memory_moved_is_lost_and_nobody_waits_for_it,
    a_guest_that_died_before_its_connections_were_made_is_lost_and_is_not_waited_for_long,
    a_guest_whose_host_goes_down_before_it_connects_is_not_waited_for_long,
    room_that_was_made_by_a_daemon_that_died_is_given_up_though_its_source_is_silent,
    a_guest_comes_over_several_connections_where_that_is_trusted_and_not_elsewhere,
    memory_is_read_on_its_way_in_plaintext_and_not_under_tls,
    a_guest_moves_there_and_back_under_tls_and_keeps_no_key,
    whoever_is_none_to_be_served_starts_nothing_leaves_nothing_and_shuts_nobody_out,
    a_guest_moves_there_and_back_between_daemons_that_speak_under_tls_and_how_long_it_stood_still_is_told,
    a_key_that_was_only_half_put_on_is_forgotten,
    who_is_not_believed_gets_no_memory_and_the_guest_runs_on,
    memory_leaves_under_tls_or_not_at_all_unless_plaintext_was_allowed,
    a_guest_comes_over_several_connections_under_tls,
    a_source_that_dies_while_memory_passes_under_tls_keeps_the_guest_and_no_key,
    a_destination_that_dies_while_memory_passes_under_tls_takes_the_guest_and_keeps_no_key,
    a_guest_that_arrived_has_the_full_name_of_its_machine,
    a_guest_moves_to_a_newer_qemu_with_the_machine_of_the_older,
    a_guest_moves_to_a_newer_qemu_under_tls,
    a_guest_comes_over_several_connections_to_a_newer_qemu,
    a_guest_that_was_turned_to_post_copy_runs_there_and_cannot_be_called_back,
    a_post_copy_whose_stream_broke_goes_on_over_another,
    a_post_copy_under_tls_whose_stream_broke_goes_on_under_tls,
    post_copy_is_not_for_a_migration_that_was_begun_without_it,
    a_destination_that_cannot_read_the_state_gives_the_guest_back_and_says_why,
    what_the_destination_cannot_open_is_refused_by_name,
    what_cannot_be_moved_is_refused_in_qemus_words,
    what_is_left_of_an_earlier_migration_is_named_and_not_met_half_way,
    a_cancel_is_obeyed_at_once_while_nobody_answers_a_connect,
    a_connect_that_nobody_answers_is_given_up_and_leaves_the_guest_where_it_was,
    a_main_loop_that_is_stuck_behind_a_dead_link_is_freed_by_a_cancel,
    a_main_loop_that_is_stuck_behind_a_dead_link_is_freed_when_it_is_silent_too_long,
    a_guest_that_waits_for_the_last_of_its_memory_to_go_runs_on_after_a_cancel,
    a_guest_does_not_stand_still_for_memory_that_goes_nowhere,
    what_the_agent_was_asked_at_the_switchover_ends_as_lost_and_it_answers_there,
    a_destination_that_is_cancelled_leaves_the_guest_where_it_was,
    a_guest_that_writes_faster_than_can_be_sent_stays_when_its_policy_says_so,
    a_guest_that_writes_faster_than_can_be_sent_arrives_once_it_may_stand_still_for_longer,
    a_guest_that_writes_faster_than_can_be_sent_arrives_by_post_copy,
    a_guest_that_writes_faster_than_can_be_sent_shows_no_end_until_it_is_sent_faster,
    a_guest_that_writes_faster_than_can_be_sent_is_throttled_where_that_is_wanted,
    a_destination_that_takes_nothing_any_more_is_given_up_as_the_policy_says,
    what_is_tuned_while_a_guest_moves_takes_effect_and_the_rest_stays,
    options_that_contradict_each_other_are_refused_before_anything_is_begun,
    a_migration_whose_caller_has_left_is_settled_by_itself,
    a_peer_that_does_not_answer_holds_no_job_of_a_guest_that_was_kept,
    a_peer_that_does_not_answer_is_in_the_way_of_no_other,
    a_source_that_is_back_settles_by_itself_what_it_left,
    a_destination_that_is_back_discards_by_itself_what_its_source_kept,
    an_operator_lets_a_complete_copy_run_whose_source_is_fenced,
    an_operator_rules_at_once_while_the_call_that_migrates_still_asks,
    a_guest_that_both_hosts_have_lost_is_started_anew_by_an_operators_word,
    a_ruling_that_takes_longer_than_its_call_may_is_told_as_one_that_stands,
    a_guest_that_stays_is_not_let_run_while_a_record_of_it_cannot_be_read,
    an_operators_word_reaches_the_migration_it_names_and_no_other,
    a_destination_that_calls_a_command_a_place_has_none_run,
    a_guest_that_qemu_does_not_let_run_there_is_given_back_and_runs_here,
    a_copy_that_is_out_of_sight_while_its_memory_comes_is_taken_once_it_is_seen,
    a_destination_that_loses_sight_of_a_guest_before_it_lets_it_run_does_so_once_it_is_seen,
    a_destination_that_loses_sight_of_a_guest_as_it_lets_it_run_owns_it_once_it_is_seen,
    a_source_that_loses_sight_of_a_guest_while_memory_moves_keeps_it,
    a_source_that_loses_sight_of_a_guest_as_it_offers_it_ends_what_it_has_given_away,
    a_post_copy_that_both_sides_lose_sight_of_comes_to_its_end,
    a_post_copy_whose_guest_is_let_run_late_goes_on_over_another_stream,
}

const SECOND: Duration = Duration::from_secs(1);

fn peer(there: &Rig) -> Arc<InProcess> {
    Arc::new(InProcess::new(Arc::new(there.driver.destination())))
}

fn slow() -> MigrateOptions {
    MigrateOptions {
        bandwidth: Some(8 << 20),
        ..MigrateOptions::default()
    }
}

async fn at_full_speed(domain: &Domain) {
    let tuned = domain.tune_migration(Tuning {
        bandwidth: Some(0),
        ..Tuning::default()
    });
    tuned.await.expect("it passes beside the migration");
}

async fn is_performing(domain: &Domain) -> bool {
    let moved = |jobs: &job_core::Snapshot| {
        let progress = jobs.asynchronous.as_ref().and_then(|held| held.progress);
        progress.is_some_and(|progress| progress.done > 0)
    };
    jobs_until(domain, 20 * SECOND, moved).await
}

/// What a side of a migration shows first that `is_it`.
async fn seen(side: &Domain, is_it: impl FnMut(&Progress) -> bool) -> Progress {
    let mut progress = side.migration_progress().expect("it is under way");
    let seen = timeout(90 * SECOND, progress.wait_for(is_it)).await;
    *seen.expect("it comes").expect("it goes on")
}

/// The guest counts past `more` further ticks, wherever it is, and in order.
async fn counts_on(rig: &Rig, more: u64, limit: Duration) {
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    let on = console.past(last + more, limit).await;
    on.expect("it counts on");
    let ticks = console.ticks();
    let is_gapless = ticks.windows(2).all(|pair| pair[1] == pair[0] + 1);
    assert!(is_gapless, "no gap, no repeat: {ticks:?}");
}

async fn a_guest_that_moved_goes_on_at_the_next_tick_and_is_off_where_it_was(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let console = rig.console("web");
    console.past(3, 20 * SECOND).await.expect("it counts");
    let mut told = [&rig, &there].map(|rig| rig.driver.subscribe());
    let report = domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    assert_eq!(
        domain.observed().run,
        Run::Off,
        "its QEMU here ended before the call did"
    );
    let downtime = report.downtime.expect("both are on one host");
    assert!(downtime.took > Duration::ZERO && downtime.took < report.took);
    for (told, side) in told.iter_mut().zip([Side::Source, Side::Destination]) {
        assert_eq!(moved_by(told).await, (side, Some(downtime)));
    }
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 3, 20 * SECOND).await;
    moved
        .wait_agent()
        .deadline(30 * SECOND)
        .await
        .expect("its agent answers there");
}

/// What a driver tells of a guest that has moved.
async fn moved_by(told: &mut Subscription) -> (Side, Option<Downtime>) {
    loop {
        if let Notice::News { news, .. } = told.next().await
            && let What::Moved { side, downtime } = news.what
        {
            return (side, downtime);
        }
    }
}

async fn how_far_a_guest_is_is_seen_on_both_sides(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    assert!(domain.migration_progress().is_none(), "it does not move");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let copy = there.driver.by_uuid(domain.uuid()).expect("it comes");
    assert!(is_performing(&copy).await, "its job there reports it, too");
    for side in [&domain, &copy] {
        let mut progress = side.migration_progress().expect("it is under way");
        let moves = progress.wait_for(|now| now.transfer.sent > 0).await;
        let transfer = moves.expect("it goes on").transfer;
        assert!(transfer.remaining < transfer.total && transfer.pass > 0);
    }
    let tuned = copy.tune_migration(Tuning::default()).await;
    let error = tuned.expect_err("it is led from the other side");
    assert_eq!(error.kind(), ErrorKind::State);
    at_full_speed(&domain).await;
    moving.await.expect("no panic").expect("it moves");
    let is_over = |jobs: &job_core::Snapshot| jobs.asynchronous.is_none();
    for side in [&domain, &copy] {
        assert!(jobs_until(side, 20 * SECOND, is_over).await);
        assert!(side.migration_progress().is_none(), "it is over");
    }
}

async fn a_guest_moves_there_and_back(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    moved
        .migrate(peer(&rig), MigrateOptions::default())
        .await
        .expect("it moves back");
    assert_eq!(moved.observed().run, Run::Off);
    assert!(
        domain.query_status().await.expect("it answers").running,
        "in the domain that was known here"
    );
    let ticks = rig.console("web").ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "no gap, no repeat: {ticks:?}"
    );
}

/// A guest on its way, which somebody has paused meanwhile.
async fn paused_on_its_way(rig: &Rig, there: &Rig) -> (Domain, JoinHandle<Result<Report, Error>>) {
    let (domain, _) = boot(rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let paused = domain.pause().await;
    paused.expect("it passes beside the migration");
    (domain, moving)
}

/// It stands still, and goes on when it is told to.
async fn is_paused(rig: &Rig, domain: &Domain) {
    assert!(!domain.query_status().await.expect("it answers").running);
    domain.resume().await.expect("it runs when it is told to");
    counts_on(rig, 3, 20 * SECOND).await;
}

async fn a_guest_that_is_paused_on_its_way_arrives_paused(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = paused_on_its_way(&rig, &there).await;
    at_full_speed(&domain).await;
    moving.await.expect("no panic").expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    is_paused(&rig, &moved).await;
}

async fn a_guest_that_is_paused_on_its_way_and_stays_is_still_paused(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, moving) = paused_on_its_way(&rig, &there).await;
    domain.cancel_job("test").expect("memory moves still");
    moving.await.expect("no panic").expect_err("it stays");
    is_paused(&rig, &domain).await;
}

async fn a_paused_guest_arrives_paused(rig: Rig) {
    let there = Rig::new(&rig.env);
    let domain = rig
        .driver
        .start(rig.guest("web"), StartOptions { paused: true })
        .await
        .expect("it starts");
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(!moved.query_status().await.expect("it answers").running);
}

async fn a_cancelled_migration_leaves_the_guest_where_it_was(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    domain.cancel_job("test").expect("it can be cancelled");
    let error = moving
        .await
        .expect("no panic")
        .expect_err("it was cancelled");
    assert_eq!(error.kind(), ErrorKind::Cancelled, "{error:#}");
    assert!(
        domain.query_status().await.expect("it answers").running,
        "it goes on here"
    );
    let is_gone = |seen: &driver::Observed| seen.run == Run::Off;
    if let Some(left) = there.driver.by_uuid(domain.uuid()) {
        left.wait_for(is_gone, Instant::now() + 20 * SECOND)
            .await
            .expect("its copy there ends");
    }
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("the next one moves it");
}

async fn a_destination_that_dies_leaves_the_guest_where_it_was(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let copy = there
        .driver
        .by_uuid(domain.uuid())
        .expect("it is on its way");
    kill(copy.observed().pid.expect("it has a process"), Signal::KILL);
    let error = moving
        .await
        .expect("no panic")
        .expect_err("there is no destination");
    assert_eq!(error.kind(), ErrorKind::Migration, "{error:#}");
    assert!(
        domain.query_status().await.expect("it answers").running,
        "it goes on here"
    );
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    console
        .past(last, 20 * SECOND)
        .await
        .expect("and counts on");
}

async fn a_query_passes_beside_a_migration_and_a_modify_waits(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    domain
        .query_status()
        .deadline(5 * SECOND)
        .await
        .expect("a query passes");
    domain
        .pause()
        .deadline(5 * SECOND)
        .await
        .expect("so does a pause");
    let error = domain
        .reset()
        .deadline(SECOND / 5)
        .await
        .expect_err("a reset does not");
    assert!(
        format!("{error:#}").contains("held by migration-out (perform, "),
        "{error:#}"
    );
    domain.cancel_job("test").expect("it can be cancelled");
    moving
        .await
        .expect("no panic")
        .expect_err("it was cancelled");
}

async fn a_guest_that_moved_away_is_not_started_where_it_was(rig: Rig) {
    let there = Rig::new(&rig.env);
    let domain = rig
        .driver
        .start(rig.guest("web"), StartOptions { paused: true })
        .await
        .expect("it starts");
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    let error = domain.start().await.expect_err("it would run twice");
    assert_eq!(error.kind(), ErrorKind::State, "{error:#}");
    assert!(
        error.to_string().contains("moved to another host"),
        "{error}"
    );
}

async fn a_guest_that_moved_away_and_came_back_in_vain_is_not_started_there(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    domain
        .migrate(peer(&there), MigrateOptions::default())
        .await
        .expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    let moving = tokio::spawn(moved.migrate(peer(&rig), slow()).into_future());
    assert!(is_performing(&moved).await);
    moved.cancel_job("test").expect("it can be cancelled");
    moving.await.expect("no panic").expect_err("it was");
    let is_off = |seen: &driver::Observed| seen.run == Run::Off;
    let off = domain.wait_for(is_off, Instant::now() + 20 * SECOND);
    off.await.expect("its copy here ends");
    let error = domain.start().await.expect_err("it would run twice");
    assert!(
        error.to_string().contains("moved to another host"),
        "{error}"
    );
}

async fn a_guest_that_arrived_is_saved_and_restored(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    domain
        .migrate(peer(&there), slow_at_first())
        .await
        .expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    let path = there.dir.path().join("web.save");
    moved
        .save(&path, driver::SaveOptions::default())
        .await
        .expect("its return path is not in the way");
    let restored = there
        .driver
        .restore(&path)
        .await
        .expect("at once: the save has cleaned up");
    assert!(restored.query_status().await.expect("it answers").running);
    let console = rig.console("web");
    let last = *console.ticks().last().expect("it counted");
    console
        .past(last, 20 * SECOND)
        .await
        .expect("and counts on");
    let ticks = console.ticks();
    assert!(
        ticks.windows(2).all(|pair| pair[1] == pair[0] + 1),
        "no gap, no repeat: {ticks:?}"
    );
}

/// The same stream with a file at its other end: a live save, and a restore.
async fn a_guest_moves_into_a_file_while_it_runs_and_back_and_on_to_another_host(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let path = rig.dir.path().join("web.save");
    let options = driver::SaveOptions {
        live: true,
        bandwidth: slow().bandwidth,
    };
    let saving = tokio::spawn(domain.save(&path, options).into_future());
    assert!(is_performing(&domain).await);
    let before = *rig.console("web").ticks().last().expect("it counted");
    let counted = rig.console("web").past(before, 20 * SECOND).await;
    counted.expect("it counts while it moves");
    saving.await.expect("no panic").expect("it moves");
    assert_eq!(domain.observed().run, Run::Off);
    let back = rig.driver.restore(&path).await.expect("it moves back");
    assert!(back.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
    let moved = back.migrate(peer(&there), MigrateOptions::default());
    let report = moved.await.expect("nothing of the file is in the way");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    counts_on(&rig, 0, 20 * SECOND).await;
}

/// Leaves a bandwidth behind that a save must not inherit.
fn slow_at_first() -> MigrateOptions {
    MigrateOptions {
        bandwidth: Some(64 << 20),
        ..MigrateOptions::default()
    }
}

async fn a_guest_on_its_way_is_destroyed_at_once(rig: Rig) {
    let there = Rig::new(&rig.env);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let copy = there
        .driver
        .by_uuid(domain.uuid())
        .expect("it is on its way");
    // Within its default limit: no guard of the old guest has to be evicted first.
    copy.destroy().await.expect("the copy ends");
    moving
        .await
        .expect("no panic")
        .expect_err("there is no destination");
    assert!(
        domain.query_status().await.expect("it answers").running,
        "it goes on here"
    );
}
