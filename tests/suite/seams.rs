//! A daemon's author puts something of their own around the scheduler and the monitor: it may refuse, record and
//! forward, and it cannot forge.

use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use driver::{Driver, ErrorKind, StartOptions};
use job_core::{
    AgentJob, AgentKind, Ask, AsyncJob, AsyncKind, BeginError, Job, JobKind, Jobs, Kind, KindSet,
    Scheduler, Snapshot,
};
use monitor_qmp::{Error, ErrorClass, Qmp, Reply, Request};

use crate::between::{GoBetween, between};
use crate::harness::tests;
use crate::rig::Rig;

tests! {
    a_scheduler_that_refuses_is_heard_with_its_reason,
    a_scheduler_that_gives_the_job_of_another_domain_is_found_out,
    a_monitor_that_keeps_a_list_records_and_refuses,
}

/// Lets nobody press a button.
struct NoModify(Scheduler);

#[async_trait]
impl Jobs for NoModify {
    async fn begin(&self, ask: Ask, kind: JobKind) -> Result<Job, BeginError> {
        if kind == JobKind::Modify {
            let wanted = Kind::Normal(kind);
            return Err(BeginError::Refused {
                wanted,
                reason: "this guest is under a litigation hold".into(),
            });
        }
        self.0.begin(ask, kind).await
    }

    async fn begin_agent(&self, ask: Ask, kind: AgentKind) -> Result<AgentJob, BeginError> {
        self.0.begin_agent(ask, kind).await
    }

    async fn begin_async(
        &self,
        ask: Ask,
        kind: AsyncKind,
        mask: KindSet,
    ) -> Result<AsyncJob, BeginError> {
        self.0.begin_async(ask, kind, mask).await
    }

    fn snapshot(&self) -> Snapshot {
        self.0.snapshot()
    }
}

async fn a_scheduler_that_refuses_is_heard_with_its_reason(rig: Rig) {
    let driver = Driver::builder(
        rig.env.transports().expect("they load"),
        rig.dir.path().join("run2"),
    )
    .qemu(&rig.env.qemu)
    .wrap_jobs(|scheduler| Arc::new(NoModify(scheduler.clone())))
    .build()
    .expect("it can be made");
    let domain = driver
        .start(rig.empty("web"), StartOptions::default())
        .await
        .expect("it starts");
    let error = domain.reset().await.expect_err("refused");
    assert_eq!(error.kind(), ErrorKind::Refused);
    assert!(
        format!("{error:#}").contains("litigation hold"),
        "{error:#}"
    );
    domain.query_status().await.expect("a query is let through");
    domain.destroy().await.expect("so is its end");
}

async fn a_scheduler_that_gives_the_job_of_another_domain_is_found_out(rig: Rig) {
    let other = Scheduler::new("other");
    let driver = Driver::builder(
        rig.env.transports().expect("they load"),
        rig.dir.path().join("run2"),
    )
    .qemu(&rig.env.qemu)
    .wrap_jobs(move |_| Arc::new(other.clone()))
    .build()
    .expect("it can be made");
    let domain = driver.define(rig.empty("web")).await.expect("it is free");
    let error = domain.start().await.expect_err("found out");
    assert!(
        error.to_string().contains("job of another domain"),
        "{error}"
    );
}

/// Writes down what is asked, and lets nobody look at the processors.
#[derive(Default)]
struct List(Mutex<Vec<String>>);

#[async_trait]
impl GoBetween for List {
    async fn call(&self, monitor: &dyn Qmp, request: Request) -> Result<Reply, Error> {
        let name = request.name.to_string();
        self.0.lock().expect("nobody panics").push(name);
        if request.name == "query-cpus-fast" {
            return Err(Error::refused(
                request.name,
                ErrorClass::GenericError,
                "not on the list",
            ));
        }
        monitor.call(request).await
    }
}

async fn a_monitor_that_keeps_a_list_records_and_refuses(rig: Rig) {
    let list = Arc::new(List::default());
    let driver = Driver::builder(
        rig.env.transports().expect("they load"),
        rig.dir.path().join("run2"),
    )
    .qemu(&rig.env.qemu)
    .wrap_monitor(between(list.clone()))
    .build()
    .expect("it can be made");
    let domain = driver
        .start(rig.empty("web"), StartOptions::default())
        .await
        .expect("it starts");
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(10);
    let refused = domain.run("look", JobKind::Query, deadline, |mut op| async move {
        op.monitor()?
            .execute(monitor_qmp::command::QueryCpusFast)
            .await
    });
    let error = refused.await.expect_err("it is not on the list");
    assert!(
        format!("{error:#}").contains("not on the list"),
        "{error:#}"
    );
    domain.destroy().await.expect("it ends");
    let asked = list.0.lock().expect("nobody panics").clone();
    assert!(
        asked.contains(&"cont".to_owned()) && asked.contains(&"query-cpus-fast".to_owned()),
        "{asked:?}"
    );
}
