//! What a daemon's author can see of a driver: counts that are right, and spans that name who does what on which domain.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use driver::{MonitorLink, Notice, What};
use job_core::JobKind;
use serde_json::json;
use tokio::time::{Instant, timeout};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id};
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use crate::guests::signal;
use crate::harness::tests;
use crate::rig::{Rig, Signal};

tests! {
    what_was_done_is_counted_by_how_it_ended,
    a_reader_that_missed_a_flood_still_finds_what_was_told_once,
    a_qemu_that_is_silent_is_counted_explained_and_its_late_answer_as_well,
    every_operation_and_command_has_a_span_with_the_fixed_fields,
}

const SECOND: Duration = Duration::from_secs(1);

async fn what_was_done_is_counted_by_how_it_ended(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    let before = rig.driver.metrics();
    web.pause().await.expect("it pauses");
    web.query_status().await.expect("it answers");
    let deadline = Instant::now() + 20 * SECOND;
    let refused = web.run("try", JobKind::Query, deadline, |mut op| async move {
        op.monitor()?
            .execute_raw("no-such-command", json!(null))
            .await
    });
    refused.await.expect_err("QEMU has no such command");
    let (leave, may_leave) = tokio::sync::oneshot::channel::<()>();
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let holder = web.clone();
    let holding = tokio::spawn(async move {
        let work = |_op| async move {
            let _told = begun.send(());
            let _left = may_leave.await;
            Ok(())
        };
        holder.run("hold", JobKind::Modify, deadline, work).await
    });
    has_begun.await.expect("it holds");
    let late = web.resume().deadline(SECOND / 20).await;
    late.expect_err("its turn does not come");
    leave.send(()).expect("it waits");
    holding.await.expect("no panic").expect("it ends");

    let after = rig.driver.metrics();
    assert_eq!(after.jobs.done - before.jobs.done, 3);
    assert_eq!(after.jobs.failed - before.jobs.failed, 1);
    assert_eq!(after.jobs.timed_out - before.jobs.timed_out, 1);
    assert_eq!(after.jobs.held.count() - before.jobs.held.count(), 4);
    assert_eq!(after.jobs.waited.count() - before.jobs.waited.count(), 4);
    assert_eq!(after.monitor.done - before.monitor.done, 2);
    assert_eq!(after.monitor.refused - before.monitor.refused, 1);
    assert!(after.monitor.took.quantile(0.5).is_some());
    let counts = web.counts();
    assert!(counts.events >= 1, "it told that it stopped: {counts:?}");
    assert_eq!(after.counts.events, counts.events, "there is one domain");

    // Longer than the log: who reads only now is told of a gap, and that is counted.
    let mut slow = web.subscribe();
    for _ in 0..150 {
        web.resume().await.expect("it runs");
        web.pause().await.expect("it pauses");
    }
    assert!(matches!(slow.next().await, Notice::Gap { .. }));
    assert_eq!(web.counts().gaps, 1);
    assert_eq!(rig.driver.metrics().counts.gaps, 1);
    assert!(web.counts().events >= counts.events + 300);
}

async fn a_reader_that_missed_a_flood_still_finds_what_was_told_once(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    let (mut slow, mut slow_of_all) = (web.subscribe(), rig.driver.subscribe());
    for round in 0..150 {
        web.resume().await.expect("it runs");
        web.pause().await.expect("it pauses");
        if round == 10 {
            web.reset().await.expect("it starts anew");
        }
    }
    let mut seen = Vec::new();
    while !seen.ends_with(&["RESET", "gap"]) {
        let next = timeout(10 * SECOND, slow.next()).await;
        match next.expect("the reset, and then a gap, is still to come") {
            Notice::Gap { .. } => seen.push("gap"),
            Notice::News { news, .. } if is_reset(&news.what) => seen.push("RESET"),
            _ => {}
        }
    }
    assert_eq!(seen[0], "gap", "{seen:?}");
    // The driver's log has room for all of this.
    while let Notice::News { news, .. } = slow_of_all.next().await {
        if is_reset(&news.what) {
            return;
        }
    }
    panic!("there is no gap in it");
}

fn is_reset(what: &What) -> bool {
    matches!(what, What::Qemu(event) if event.name == "RESET")
}

async fn a_qemu_that_is_silent_is_counted_explained_and_its_late_answer_as_well(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    assert_eq!(web.explain().monitor, Some(MonitorLink::Answers));
    signal(&web, Signal::STOP);
    let before = rig.driver.metrics();
    let asked = web.query_status().deadline(SECOND / 4).await;
    asked.expect_err("it is stopped");
    let deadline = Instant::now() + 10 * SECOND;
    let silent = |seen: &driver::Observed| seen.health == monitor_qmp::Health::Unresponsive;
    web.wait_for(silent, deadline)
        .await
        .expect("that is noticed");
    let explained = web.explain();
    assert_eq!(explained.monitor, Some(MonitorLink::Silent));
    assert!(
        explained.to_string().contains("its monitor is silent"),
        "{explained}"
    );
    assert_eq!(
        rig.driver.metrics().monitor.unknown - before.monitor.unknown,
        1
    );
    assert_eq!(web.counts().silences, 1);
    signal(&web, Signal::CONT);
    let well = |seen: &driver::Observed| seen.health == monitor_qmp::Health::Ok;
    web.wait_for(well, deadline)
        .await
        .expect("it answers again");
    assert_eq!(web.counts().late_replies, 1);
    web.destroy().await.expect("it ends");
    assert_eq!(web.explain().monitor, None);
}

/// The spans that were opened: their names, with the names of their fields and of all around them.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Opened>>>);

type Opened = (String, BTreeSet<String>);

#[derive(Default)]
struct Fields(BTreeSet<String>);

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(format!("{}={value}", field.name()));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.0.insert(format!("{}={value:?}", field.name()));
    }
}

impl<S: tracing::Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Spans {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        let span = context.span(id).expect("it was just made");
        for outer in span.scope().skip(1) {
            fields.0.insert(format!("in={}", outer.name()));
        }
        // Other tests run beside this one.
        if !fields.0.iter().any(|field| field.ends_with("spanned")) {
            return;
        }
        let mut spans = self.0.lock().expect("nobody panics with it");
        spans.push((attributes.metadata().name().to_owned(), fields.0));
    }
}

async fn every_operation_and_command_has_a_span_with_the_fixed_fields(rig: Rig) {
    let spans = Spans::default();
    let subscriber = tracing_subscriber::registry().with(spans.clone());
    // For all threads: operations run on tasks of their own.
    tracing::subscriber::set_global_default(subscriber).expect("no other test does");
    let web = rig.started(rig.empty("spanned")).await;
    web.pause().await.expect("it pauses");
    web.destroy().await.expect("it ends");
    let spans = spans.0.lock().expect("nobody panics with it");
    let has = |name: &str, wanted: &[&str]| {
        spans.iter().any(|(found, fields)| {
            let has = |field: &&str| fields.iter().any(|found| found.starts_with(*field));
            found == name && wanted.iter().all(has)
        })
    };
    for (name, fields) in [
        (
            "operation",
            &["domain=spanned", "job=", "kind=", "owner=start"][..],
        ),
        (
            "operation",
            &["domain=spanned", "job=", "kind=", "owner=pause"],
        ),
        ("operation", &["domain=spanned", "owner=destroy"]),
        (
            "command",
            &["domain=spanned", "command=stop", "in=operation"],
        ),
        (
            "connect",
            &["domain=spanned", "transport=unix", "in=operation"],
        ),
    ] {
        assert!(has(name, fields), "{name} {fields:?} in {spans:#?}");
    }
}
