//! From the monitor's reader to the domain's state, its agent and the logs. Called in wire order; never waits.

use std::sync::{Arc, Weak};

use agent_qga::Signal;
use monitor_qmp::{Closed, DevicePath, Event, EventSink, Health, QmpEvent};

use tracing::{trace, warn};

use crate::domain::state::Observation;
use crate::domain::{Inner, Live, resync};
use crate::events::What;

/// One connection's sink. Holds the domain weakly: a monitor must not keep a removed domain alive.
pub(crate) struct Pump {
    domain: Weak<Inner>,
    live: Weak<Live>,
    health: Health,
}

impl Pump {
    pub(crate) fn new(domain: &Arc<Inner>, live: &Arc<Live>) -> Self {
        Self {
            domain: Arc::downgrade(domain),
            live: Arc::downgrade(live),
            health: Health::Ok,
        }
    }
}

impl EventSink for Pump {
    fn event(&mut self, event: Event) {
        let (Some(domain), Some(live)) = (self.domain.upgrade(), self.live.upgrade()) else {
            return;
        };
        domain.count(|tally| &tally.events);
        trace!(domain = %domain.name, event = event.name, "QEMU tells");
        let typed = event.typed();
        live.turned(&typed, event.timestamp);
        domain.observe(Observation::Event(&typed, event.sequence));
        if let (Some(signal), Some(agent)) = (agent_signal(&typed), live.agent()) {
            agent.note(signal);
        }
        domain.tell(What::Qemu(Arc::new(event)));
        // Those without an id are inner ones, whose outer one follows.
        if let QmpEvent::DeviceDeleted(DevicePath {
            device: Some(_), ..
        }) = typed
        {
            domain.settle_parts();
        }
    }

    fn health(&mut self, health: Health) {
        let (Some(domain), Some(live)) = (self.domain.upgrade(), self.live.upgrade()) else {
            return;
        };
        if health == Health::Unresponsive {
            // Before it can be seen: who sees the silence finds it counted.
            domain.count(|tally| &tally.silences);
            warn!(domain = %domain.name, "QEMU is silent, also out of band");
        }
        domain.observe(Observation::Health(health));
        if self.health == Health::Unresponsive && health == Health::Ok {
            // What happened while QEMU was silent is told by no event.
            let tracker = domain.context.watchers.clone();
            tracker.spawn(async move { resync(&domain, &live).await });
        }
        self.health = health;
    }

    fn late(&mut self) {
        if let Some(domain) = self.domain.upgrade() {
            domain.count(|tally| &tally.late_replies);
        }
    }

    fn closed(&mut self, _why: &Closed) {
        if let Some(live) = self.live.upgrade() {
            live.monitor_closed();
        }
    }
}

/// What the agent's connection should know of what the monitor saw.
fn agent_signal(event: &QmpEvent) -> Option<Signal> {
    match event {
        QmpEvent::VserportChange(port) if port.open => Some(Signal::PortOpened),
        QmpEvent::VserportChange(_) => Some(Signal::PortClosed),
        QmpEvent::Reset(_) => Some(Signal::Reset),
        QmpEvent::Shutdown(_) => Some(Signal::Shutdown),
        QmpEvent::Suspend | QmpEvent::SuspendDisk => Some(Signal::Suspended),
        _ => None,
    }
}
