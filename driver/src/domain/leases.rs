//! The freezes of a guest, in the record of that guest: they are written before the guest is asked, are forgotten with it,
//! and a driver that comes back finds them there.

use std::io;
use std::sync::{Arc, Weak};

use agent_qga::{LeaseRecord, LeaseStore};
use uuid::Uuid;

use crate::domain::Inner;
use crate::error::{Cause, Error};

/// The freezes of one life of a domain's guest. Keeps no driver alive: what it left is in the record.
pub(crate) struct Leases {
    domain: Weak<Inner>,
    uuid: Uuid,
    life: Uuid,
}

impl Leases {
    pub(crate) fn new(domain: &Arc<Inner>, life: Uuid) -> Self {
        Self {
            domain: Arc::downgrade(domain),
            uuid: domain.uuid,
            life,
        }
    }

    /// What a freeze is filed under. No freeze outlives the guest's QEMU, and each has a life of its own.
    pub(crate) fn key(&self) -> String {
        format!("{}/{}", self.uuid, self.life)
    }

    fn domain(&self) -> io::Result<Arc<Inner>> {
        let domain = self.domain.upgrade();
        domain.ok_or_else(|| io::Error::other("the driver is gone"))
    }

    fn change(&self, change: impl FnOnce(&mut Vec<LeaseRecord>)) -> io::Result<()> {
        let mut is_there = false;
        let written = self.domain()?.note_blocking(|record| {
            if let Some(record) = record.as_mut().filter(|record| record.life == self.life) {
                change(&mut record.freezes);
                is_there = true;
            }
        });
        written.map_err(failed)?;
        if is_there {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::NotFound,
                "nothing is written of the guest any more",
            ))
        }
    }
}

impl LeaseStore for Leases {
    fn put(&self, lease: &LeaseRecord) -> io::Result<()> {
        self.change(|leases| leases.push(lease.clone()))
    }

    fn remove(&self, id: &str) -> io::Result<()> {
        match self.change(|leases| leases.retain(|lease| lease.id != id)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn pending(&self) -> io::Result<Vec<LeaseRecord>> {
        let record = self.domain()?.noted_blocking();
        let mine = record.filter(|record| record.life == self.life);
        Ok(mine.map(|record| record.freezes).unwrap_or_default())
    }
}

fn failed(cause: Cause) -> io::Error {
    io::Error::other(format!("{:#}", Error::from(cause)))
}
