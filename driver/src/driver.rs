//! The driver: all domains of one daemon. Define, find, list, start, attach, restore, follow, shut down.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use remote_migrate::{Destination, Journal};
use tokio::time::timeout_at;
use tracing::warn;
use uuid::Uuid;

use crate::arrivals::Arrivals;
use crate::builder::Builder;
use crate::context::Context;
use crate::domain::{Domain, Inner, Records, Row};
use crate::error::{Cause, Error};
use crate::events::{Subscription, What};
use crate::guest::Guest;
use crate::metrics::Metrics;
use crate::ops::{Attach, Call, Deadline, Recovered, StartOptions, attach};
use crate::registry::Taken;
use crate::save_file::SaveFile;
use crate::select::Select;
use crate::settling::settle;

/// All domains of one daemon. Clones share them.
///
/// Dropping the last clone leaves the guests running, and nobody watches them any more; [`shutdown`](Self::shutdown) does
/// the same in good order.
#[derive(Clone)]
pub struct Driver(Arc<Owner>);

/// Ends the driver's tasks with its last handle. The domains hold the context, so that alone would never go.
struct Owner {
    context: Arc<Context>,
    destination: Destination,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.context.closing.cancel();
        self.context.parting.cancel();
        self.context.tracker.close();
        self.context.watchers.close();
        self.context.registry.clear();
    }
}

impl Driver {
    /// A driver whose guests' sockets and logs live below `run_dir`, and which connects through `transports`.
    pub fn builder(transports: transport_host::Transports, run_dir: impl Into<PathBuf>) -> Builder {
        Builder::new(transports, run_dir.into())
    }

    pub(crate) fn new(context: Arc<Context>) -> Self {
        let arrivals = Arc::new(Arrivals::new(context.clone()));
        let destination = Destination::new(arrivals, context.journal.clone());
        let settling = settle(context.clone(), destination.clone());
        context.watchers.spawn(settling);
        Self(Arc::new(Owner {
            context,
            destination,
        }))
    }

    /// Makes a guest known, for good: its definition is kept until it is removed. Nothing is started.
    ///
    /// Refused as [`Invalid`](crate::ErrorKind::Invalid), with the member that makes no sense, and as
    /// [`Exists`](crate::ErrorKind::Exists) if its name or uuid is taken.
    pub fn define(&self, guest: Guest) -> Call<Domain> {
        let driver = self.clone();
        Call::new(self.context().defaults.call, move |_| async move {
            let domain = driver.make_known(guest, true)?;
            if let Err(cause) = domain.0.store_definition().await {
                domain.0.close();
                return Err(domain.error("define", cause));
            }
            Ok(domain)
        })
    }

    /// Makes a guest known, for as long as the driver lives unless it is `persistent`.
    fn make_known(&self, guest: Guest, persistent: bool) -> Result<Domain, Error> {
        let name = guest.name.clone();
        let failed = |cause: Cause| Error::new("define", Some(name.clone().into()), cause);
        guest.check().map_err(|error| failed(error.into()))?;
        if self.context().closing.is_cancelled() {
            return Err(failed(Cause::ShuttingDown));
        }
        let uuid = guest.uuid;
        let records = Records {
            definition: Some(guest),
            persistent,
            ..Records::default()
        };
        let make = |id| Inner::new(id, &name, uuid, self.context(), records);
        let inner = self
            .context()
            .registry
            .insert(&name, uuid, make)
            .map_err(|taken| {
                failed(Cause::Exists(match taken {
                    Taken::Name => "the name is taken".into(),
                    Taken::Uuid => format!("the uuid {uuid} is taken"),
                }))
            })?;
        inner.tell(What::Defined);
        Ok(Domain(inner))
    }

    /// Makes a guest known and starts it. One that cannot be started is forgotten again. It is not
    /// [kept](Self::define): a later driver finds it as long as it runs.
    pub fn start(&self, guest: Guest, options: StartOptions) -> Call<Domain> {
        let driver = self.clone();
        Call::new(
            self.context().defaults.connect,
            move |deadline| async move {
                let domain = driver.make_known(guest, false)?;
                driver
                    .or_forget(&domain, domain.start_with(options).until(deadline))
                    .await?;
                Ok(domain)
            },
        )
    }

    /// Takes in a guest that somebody else started: by the address of its QMP socket, such as `unix:/run/web/qmp.sock`, or
    /// as [`Attach`] says.
    ///
    /// It can be ended, unless it is observed only, but not started again; it runs on when it is
    /// [let go of](Domain::detach), and a driver that comes back knows it.
    pub fn attach(&self, which: impl Into<Attach>) -> Call<Domain> {
        attach(self.context(), which.into())
    }

    /// Brings a guest back from the file it was saved to. A domain that is known already, and off, is used; a new one is
    /// forgotten if it cannot be restored. The file is left, and is not restored from twice.
    pub fn restore(&self, path: impl Into<PathBuf>) -> Call<Domain> {
        let (driver, path) = (self.clone(), path.into());
        Call::new(self.context().defaults.long, move |deadline| async move {
            if !path.is_absolute() {
                let text = format!("{} is not an absolute path", path.display());
                return Err(Error::new("restore", None, Cause::BadRequest(text)));
            }
            let head = {
                let path = path.clone();
                let opened = tokio::task::spawn_blocking(move || SaveFile::open(&path)).await;
                let opened = opened.unwrap_or_else(|error| Err(Cause::Panicked(error.to_string())));
                opened
                    .map_err(|cause| Error::new("restore", None, cause))?
                    .1
            };
            match driver
                .context()
                .registry
                .by_uuid(head.guest.uuid)
                .map(Domain)
            {
                Some(domain) => {
                    domain.restore_from(path).until(deadline).await?;
                    Ok(domain)
                }
                None => {
                    let domain = driver.make_known(head.guest, false)?;
                    driver
                        .or_forget(&domain, domain.restore_from(path).until(deadline))
                        .await?;
                    Ok(domain)
                }
            }
        })
    }

    /// The side that takes in the guests of other daemons, on this driver's journal: to be put behind a peer, or asked to
    /// reconcile, cancel or resolve a migration. All handles share one;
    /// [`serve_migrations`](Self::serve_migrations) puts it behind a listener.
    #[must_use]
    pub fn destination(&self) -> Destination {
        self.0.destination.clone()
    }

    /// The local steps of guests that arrive here from another host, for a `remote_migrate::Destination` of one's own:
    /// on another journal, or with a host around it. Else [`destination`](Self::destination) is the one to use.
    #[must_use]
    pub fn arrivals(&self) -> Arrivals {
        Arrivals::new(self.context().clone())
    }

    /// Where the records of migrations are kept.
    #[must_use]
    pub fn journal(&self) -> Arc<dyn Journal> {
        self.context().journal.clone()
    }

    /// The domain of that uuid.
    #[must_use]
    pub fn by_uuid(&self, uuid: Uuid) -> Option<Domain> {
        self.context().registry.by_uuid(uuid).map(Domain)
    }

    /// The domain of that name.
    #[must_use]
    pub fn by_name(&self, name: &str) -> Option<Domain> {
        self.context().registry.by_name(name).map(Domain)
    }

    /// The domain of that number.
    #[must_use]
    pub fn by_id(&self, id: u64) -> Option<Domain> {
        self.context().registry.by_id(id).map(Domain)
    }

    /// All domains, in the order in which they became known.
    #[must_use]
    pub fn domains(&self) -> Vec<Domain> {
        self.context()
            .registry
            .all()
            .into_iter()
            .map(Domain)
            .collect()
    }

    /// A line for each domain: what it does, since when, who holds it. Asks no guest, waits for nobody, and takes no
    /// domain's lock.
    #[must_use]
    pub fn list(&self) -> Vec<Row> {
        let mut rows = Vec::with_capacity(self.context().registry.len());
        self.for_each(|domain| rows.push(domain.row()));
        rows
    }

    /// The lines of those that are wanted, as [`list`](Self::list).
    #[must_use]
    pub fn list_of(&self, wanted: &Select) -> Vec<Row> {
        let mut rows = Vec::new();
        self.for_each(|domain| {
            let row = domain.row();
            if wanted.fits(&row) {
                rows.push(row);
            }
        });
        rows
    }

    fn for_each(&self, mut look: impl FnMut(Domain)) {
        let registry = &self.context().registry;
        registry.for_each(|domain| look(Domain(domain)));
    }

    /// What all domains came to since this driver was built: jobs, commands, events. Waits for nobody; read it as often as
    /// you like.
    #[must_use]
    pub fn metrics(&self) -> Metrics {
        let mut metrics = self.context().meter.read();
        metrics.counts.gaps = self.context().log.gaps();
        self.for_each(|domain| metrics.counts.gaps += domain.counts().gaps);
        metrics
    }

    /// What became of the guests that an earlier driver left, of the jobs that were at them, and of records that could
    /// not be read. Waits until each guest was reached, or could not be; those are tried again, and told of as news.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut) if some were not looked at by the deadline.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn recovered(&self, deadline: Deadline) -> Result<Vec<Recovered>, Error> {
        let began = Deadline::now();
        let recoveries = &self.context().recoveries;
        match timeout_at(deadline, recoveries.wait()).await {
            Ok(()) => Ok(recoveries.all()),
            Err(_) => {
                let cause = Cause::TimedOut {
                    what: "guests of an earlier driver",
                    waited: began.elapsed(),
                };
                Err(Error::new("recover", None, cause))
            }
        }
    }

    /// Follows what happens to all domains from now on.
    #[must_use]
    pub fn subscribe(&self) -> Subscription {
        Subscription::from_now(&self.context().log)
    }

    /// Stops in good order: new operations are refused, running ones get until `deadline` to end, guests run on.
    ///
    /// # Errors
    ///
    /// [`TimedOut`](crate::ErrorKind::TimedOut) if operations still run at the deadline; they are left to themselves.
    ///
    /// # Cancel safety
    ///
    /// Dropping it only stops the waiting.
    pub async fn shutdown(&self, deadline: Deadline) -> Result<(), Error> {
        let began = Deadline::now();
        let context = self.context();
        context.closing.cancel();
        context.tracker.close();
        let ended = timeout_at(deadline, context.tracker.wait()).await;
        // Those that watch serve the last operations; only now they may go.
        context.parting.cancel();
        context.watchers.close();
        let parted = timeout_at(deadline, context.watchers.wait()).await;
        for domain in context.registry.all() {
            // Frees QEMU's one place for a client, for whoever comes next.
            domain.let_go();
        }
        ended.and(parted).map_err(|_| {
            let cause = Cause::TimedOut {
                what: "running operations",
                waited: began.elapsed(),
            };
            Error::new("shut the driver down", None, cause)
        })
    }

    /// The same result, and without the domain if it is a failure.
    async fn or_forget(&self, domain: &Domain, call: Call<()>) -> Result<(), Error> {
        let result = call.await;
        if result.is_err() {
            let deadline = Deadline::now() + self.context().defaults.destroy;
            if let Err(error) = domain.remove_after_job(deadline).await {
                warn!(
                    domain = domain.name(),
                    error = format!("{error:#}"),
                    "a domain that could not be started stays"
                );
            }
        }
        result
    }

    pub(crate) fn context(&self) -> &Arc<Context> {
        &self.0.context
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver")
            .field("run_dir", &self.context().run_dir)
            .finish_non_exhaustive()
    }
}
