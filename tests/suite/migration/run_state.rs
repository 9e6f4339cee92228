//! A guest that is paused while it leaves: what its user was told holds, whoever dies and wherever it ends up.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use driver::{Became, Driver, ErrorKind};
use monitor_qmp::{Error, ErrorClass, Qmp, Reply, Request};
use remote_migrate::Owner;

use super::restart::{Daemon, Deaf, Town, begins_to_move};
use super::{SECOND, at_full_speed, counts_on, is_paused, is_performing, peer, slow};
use crate::between::{GoBetween, between};
use crate::rig::{Rig, boot};

pub(super) async fn a_guest_that_is_paused_on_its_way_is_still_paused_when_its_daemon_is_back(
    rig: Rig,
) {
    let dir = tempfile::tempdir().expect("it can be made");
    let here = Daemon::in_town(&rig.env, dir.path(), Town::default()).await;
    let domain = begins_to_move(&here, &rig, Deaf::new(&rig), slow()).await;
    assert!(is_performing(&domain).await);
    domain
        .pause()
        .await
        .expect("it passes beside the migration");
    drop(domain);
    let here = here.again(&rig.env, dir.path()).await;
    let (web, became) = here.takes_up("web").await;
    assert_eq!(became, Became::InDoubt);
    let report = web.recover_migration(peer(&rig)).await.expect("it is told");
    assert_eq!((report.owner, report.settled), (Owner::Source, true));
    is_paused(&rig, &web).await;
}

/// Refuses to stop the guest the first time.
#[derive(Default)]
struct Restless {
    has_refused: AtomicBool,
}

#[async_trait]
impl GoBetween for Restless {
    async fn call(&self, monitor: &dyn Qmp, request: Request) -> Result<Reply, Error> {
        if request.name == "stop" && !self.has_refused.swap(true, Ordering::Relaxed) {
            return Err(Error::refused(
                request.name,
                ErrorClass::GenericError,
                "not now",
            ));
        }
        monitor.call(request).await
    }
}

pub(super) async fn a_guest_whose_pause_was_refused_on_its_way_arrives_running(rig: Rig) {
    let there = Rig::new(&rig.env);
    let transports = rig.env.transports().expect("they load");
    let restless = Driver::builder(transports, rig.dir.path().join("restless"))
        .qemu(&rig.env.qemu)
        .wrap_monitor(between(Arc::new(Restless::default())))
        .build()
        .expect("it can be made");
    let rig = rig.with_driver(restless);
    let (domain, _) = boot(&rig, "web").await.expect("it boots");
    let moving = tokio::spawn(domain.migrate(peer(&there), slow()).into_future());
    assert!(is_performing(&domain).await);
    let error = domain.pause().await.expect_err("it is refused");
    assert_eq!(error.kind(), ErrorKind::Refused, "{error:#}");
    at_full_speed(&domain).await;
    moving.await.expect("no panic").expect("it moves");
    let moved = there.driver.by_uuid(domain.uuid()).expect("it is there");
    assert!(moved.query_status().await.expect("it answers").running);
    counts_on(&rig, 0, 20 * SECOND).await;
}
