//! What a test puts between a driver and the monitors of its guests.
//!
//! A test says what becomes of a command; all else is the monitor's own, as whoever wraps one is to pass it on.

use std::sync::Arc;

use async_trait::async_trait;
use monitor_qmp::{
    Closed, Deadline, Error, Event, Expected, Greeting, Health, Qmp, Reply, Request,
};

/// What stands there: one for all guests of a driver.
#[async_trait]
pub(crate) trait GoBetween: Send + Sync + 'static {
    /// What becomes of a command on its way to that monitor.
    async fn call(&self, monitor: &dyn Qmp, request: Request) -> Result<Reply, Error>;
}

/// What a driver is to wrap its monitors with, for it to stand there.
pub(crate) fn between(
    it: Arc<impl GoBetween>,
) -> impl Fn(&str, Arc<dyn Qmp>) -> Arc<dyn Qmp> + Send + Sync + 'static {
    move |_, monitor| {
        let it = it.clone();
        Arc::new(Between { it, monitor })
    }
}

struct Between<G> {
    it: Arc<G>,
    monitor: Arc<dyn Qmp>,
}

#[async_trait]
impl<G: GoBetween> Qmp for Between<G> {
    async fn call(&self, request: Request) -> Result<Reply, Error> {
        self.it.call(&*self.monitor, request).await
    }

    async fn settled(&self, deadline: Deadline) -> Result<(), Error> {
        self.monitor.settled(deadline).await
    }

    fn arm(&self, filter: Box<dyn FnMut(&Event) -> bool + Send>) -> Expected {
        self.monitor.arm(filter)
    }

    fn health(&self) -> Health {
        self.monitor.health()
    }

    fn greeting(&self) -> &Greeting {
        self.monitor.greeting()
    }

    async fn closed(&self) -> Closed {
        self.monitor.closed().await
    }
}
