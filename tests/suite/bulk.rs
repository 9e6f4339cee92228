//! Many guests at once: one that hangs costs its own row.

use std::time::Duration;

use driver::{ErrorKind, Select, StartOptions};
use futures::future::join_all;
use job_core::JobKind;
use tokio::time::Instant;

use crate::guests::signal;
use crate::harness::tests;
use crate::rig::{Rig, Signal, jobs_until};

tests! {
    the_figures_of_two_hundred_guests_of_which_five_hang_take_one_deadline,
    who_holds_a_guest_and_who_waits_is_told_in_words,
    a_list_names_the_holder_while_the_domains_own_lock_is_held,
    whoever_watches_a_guest_slowly_sees_its_newest_state_and_its_end,
}

const SECOND: Duration = Duration::from_secs(1);

async fn the_figures_of_two_hundred_guests_of_which_five_hang_take_one_deadline(rig: Rig) {
    const GUESTS: usize = 200;
    const HANG: usize = 5;
    // Eight at a time: QEMUs that all begin at once only wait for each other.
    for eight in (0..GUESTS).collect::<Vec<_>>().chunks(8) {
        let start = |number: &usize| {
            let guest = rig.empty(&format!("m{number}"));
            rig.driver
                .start(guest, StartOptions::default())
                .into_future()
        };
        for started in join_all(eight.iter().map(start)).await {
            started.expect("it starts");
        }
    }
    let domains = rig.driver.domains();
    for domain in &domains[..HANG] {
        signal(domain, Signal::STOP);
    }
    let began = Instant::now();
    let limit = 3 * SECOND;
    let rows = rig.driver.stats(limit).await;
    let took = began.elapsed();
    let (answered, silent): (Vec<_>, Vec<_>) = rows.iter().partition(|row| row.stats.is_ok());
    println!(
        "figure driver-stats-200-of-which-5-hang {:.2} s",
        took.as_secs_f64()
    );
    assert_eq!((answered.len(), silent.len()), (GUESTS - HANG, HANG));
    for row in answered {
        let stats = row.stats.as_ref().expect("it answered");
        assert_eq!(
            (stats.status.as_str(), stats.vcpus),
            ("running", 0),
            "{}",
            row.name
        );
    }
    for row in silent {
        let error = row.stats.as_ref().expect_err("it hangs");
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut | ErrorKind::Unresponsive),
            "{error:#}"
        );
    }
    assert!(took < limit + SECOND, "{took:?}");
    // A stopped process obeys nothing but its end.
    for domain in &domains[..HANG] {
        signal(domain, Signal::CONT);
    }
}

async fn who_holds_a_guest_and_who_waits_is_told_in_words(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    let (begun, has_begun) = tokio::sync::oneshot::channel();
    let (end, may_end) = tokio::sync::oneshot::channel::<()>();
    let domain = web.clone();
    let holding = tokio::spawn(async move {
        let deadline = Instant::now() + 20 * SECOND;
        let held = domain.run("nightly", JobKind::Modify, deadline, |_op| async move {
            let _told = begun.send(());
            let _ended = may_end.await;
            Ok(())
        });
        held.await
    });
    has_begun.await.expect("it is held");
    let waiting = tokio::spawn(web.pause().into_future());
    assert!(jobs_until(&web, 5 * SECOND, |jobs| !jobs.waiting.is_empty()).await);
    let text = web.explain().to_string();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 5, "{text}");
    assert!(lines[0].starts_with("\"web\" is running for "), "{text}");
    assert_eq!(lines[1], "  its monitor answers");
    assert_eq!(lines[2], "  its agent has no channel that is known");
    assert!(lines[3].starts_with("  normal held by modify ("), "{text}");
    assert!(
        lines[4].starts_with("  waits  suspend for \"pause\", 0."),
        "{text}"
    );
    assert!(lines[4].ends_with("for \"nightly\""), "{text}");
    end.send(()).expect("it is held");
    holding.await.expect("no panic").expect("it ends");
    waiting.await.expect("no panic").expect("its turn came");
}

/// What an operation changes under the domain's lock may take its time: a list does not wait for it.
async fn a_list_names_the_holder_while_the_domains_own_lock_is_held(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    let other = rig
        .driver
        .start(rig.empty("other"), StartOptions { paused: true });
    other.await.expect("it starts");
    let (inside, is_inside) = std::sync::mpsc::channel();
    let (leave, may_leave) = std::sync::mpsc::channel::<()>();
    let deadline = Instant::now() + 20 * SECOND;
    let domain = web.clone();
    let work = move |op: driver::Op| async move {
        tokio::task::block_in_place(|| {
            op.with_state(|_records| {
                inside.send(()).expect("somebody waits for it");
                may_leave.recv().expect("it is told");
            })
        })
    };
    let holding = tokio::spawn(async move {
        let held = domain.run("nightly", JobKind::Modify, deadline, work);
        held.await
    });
    tokio::task::block_in_place(|| is_inside.recv()).expect("it came there");

    let rows = rig.driver.list();
    let of = |name: &str| rows.iter().find(|row| &*row.name == name).expect("a row");
    let holder = of("web").holder.clone().expect("it is held");
    assert_eq!(
        (&*holder.owner, holder.kind),
        ("nightly", job_core::Kind::Normal(JobKind::Modify))
    );
    assert_eq!(of("other").holder, None);
    assert_eq!(of("other").run.name(), "prelaunch");
    let held = rig.driver.list_of(&Select::all().held(true));
    assert_eq!(held.len(), 1);
    assert_eq!(rig.driver.list_of(&Select::all().run("prelaunch")).len(), 1);

    leave.send(()).expect("it waits");
    holding.await.expect("no panic").expect("it ends");
    assert_eq!(
        web.row().holder,
        None,
        "who was told of the end finds it free"
    );
}

async fn whoever_watches_a_guest_slowly_sees_its_newest_state_and_its_end(rig: Rig) {
    let web = rig.started(rig.empty("web")).await;
    let mut watch = web.watch();
    let now = watch.next().await.expect("what is known now");
    assert!(now.run.is_running());
    // It does not look while all this happens.
    web.pause().await.expect("it pauses");
    web.resume().await.expect("it runs");
    web.pause().await.expect("it pauses");
    let newest = watch.next().await.expect("the newest");
    assert_eq!(newest.run.name(), "paused");
    assert!(
        futures::FutureExt::now_or_never(watch.next()).is_none(),
        "and nothing else"
    );
    web.destroy().await.expect("it ends");
    web.remove().await.expect("it is off");
    let last = watch.next().await.expect("the last state");
    assert_eq!(last.run.name(), "off");
    assert!(watch.next().await.is_none(), "it is removed");
    let waiting = web.wait_for(|seen| seen.run.is_running(), Instant::now() + 20 * SECOND);
    let error = waiting.await.expect_err("it never will");
    assert_eq!(error.kind(), ErrorKind::Closed);
}
