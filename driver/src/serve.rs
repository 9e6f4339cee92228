//! Other daemons bring their guests: their connections are accepted and put before the driver's own destination side.
//!
//! Knows streams, and how to learn who is behind one. Who may be is the allow-list's matter, what is asked that of
//! `remote-migrate`, and what is done about it that of the arrivals.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use remote_migrate::wire::{Link, Options, PeerIdentity, Stream, Tls, serve_connection};
use remote_migrate::{Destination, Reason};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tracing::warn;
use transport_host::{ErrorKind, Listener};

use crate::dial::identity;
use crate::driver::Driver;

/// How many connections are served at most behind one door; a daemon needs one for each that sends it guests.
const PLACES: usize = 64;
/// How many more have not shown yet who they are, or wait for a place. Whoever comes when all seats are taken has that of
/// the one that has sat there longest: a handshake takes milliseconds, so that one is hardly going to end.
const SEATS: usize = 64;
/// After a failure to accept, as when the process is out of descriptors: it would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);
/// How long a transport waits for somebody at a time: it wants to be told, and is asked again.
const WHILE: Duration = Duration::from_secs(3600);

/// Where other daemons come in to bring their guests.
#[derive(Debug)]
pub struct Door(Kind);

#[derive(Debug)]
enum Kind {
    Unix(UnixListener),
    Tls(TcpListener, Tls),
    Plaintext(TcpListener),
    Transport(Listener),
}

impl Door {
    /// For daemons of this host. The kernel says which user each runs as.
    #[must_use]
    pub fn unix(listener: UnixListener) -> Self {
        Self(Kind::Unix(listener))
    }

    /// For daemons that prove their names by certificates.
    #[must_use]
    pub fn tls(listener: TcpListener, tls: Tls) -> Self {
        Self(Kind::Tls(listener, tls))
    }

    /// For daemons whose addresses the allow-list names, on a network where nobody else is.
    #[must_use]
    pub fn plaintext(listener: TcpListener) -> Self {
        Self(Kind::Plaintext(listener))
    }

    /// For daemons that come over a transport, as over `vsock:`. The kernel says who each is: which virtual machine, by its
    /// context id, or which user; whoever it does not know is not served. They dial by
    /// [`TransportDial`](crate::TransportDial).
    #[must_use]
    pub fn transport(listener: Listener) -> Self {
        Self(Kind::Transport(listener))
    }

    /// Waits for the next one to knock. Cancel safe.
    async fn accept(&self) -> io::Result<Caller> {
        Ok(match &self.0 {
            Kind::Unix(listener) => Caller::Unix(listener.accept().await?.0),
            Kind::Tls(listener, tls) => Caller::Tls(listener.accept().await?.0, tls.clone()),
            Kind::Plaintext(listener) => Caller::Plaintext(listener.accept().await?.0),
            Kind::Transport(listener) => loop {
                match listener.accept(Instant::now() + WHILE).await {
                    Err(error) if matches!(error.kind(), ErrorKind::TimedOut { .. }) => {}
                    accepted => break Caller::Transport(accepted.map_err(io::Error::other)?),
                }
            },
        })
    }
}

impl Driver {
    /// Takes in the guests that other daemons bring through that door, if `options` allow them, until the driver shuts
    /// down. Several doors lead to the same destination side.
    ///
    /// Returns at once. A connection is served for as long as the other side keeps it, so that it learns early when this
    /// daemon is gone; one that breaks, or is cut by the shutdown, tears no migration: its source asks again. While the
    /// driver waits for its last operations, guests that are on their way still arrive, and no new one is begun.
    ///
    /// The door is for what the daemons ask each other. A guest's memory goes from QEMU to QEMU by way of the driver's
    /// [`Landing`](crate::Landing), where nobody is let in who was not told of it at a door.
    ///
    /// Must be called in a tokio runtime.
    pub fn serve_migrations(&self, door: Door, options: Options) {
        let context = self.context();
        let (connections, parting) = (context.watchers.clone(), context.parting.clone());
        let serving = serve(
            door,
            options,
            self.destination(),
            connections,
            parting.clone(),
        );
        context.watchers.spawn(async move {
            parting.run_until_cancelled(serving).await;
        });
    }
}

async fn serve(
    door: Door,
    options: Options,
    destination: Destination,
    connections: TaskTracker,
    parting: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(PLACES));
    let mut hall = Hall::default();
    loop {
        let caller = match door.accept().await {
            Ok(caller) => caller,
            Err(error) => {
                warn!(%error, "a connection for a migration was not accepted");
                sleep(PAUSE).await;
                continue;
            }
        };
        let (seat, places) = (hall.enter(), places.clone());
        let (destination, options) = (destination.clone(), options.clone());
        let parting = parting.clone();
        connections.spawn(async move {
            let attended = attend(caller, &seat, &places, &destination, &options);
            parting.run_until_cancelled(attended).await;
        });
    }
}

/// Those who sit and wait, the one that came first in front. A seat is cancelled when it is left or taken away.
#[derive(Default)]
struct Hall(VecDeque<CancellationToken>);

impl Hall {
    fn enter(&mut self) -> CancellationToken {
        self.0.retain(|seat| !seat.is_cancelled());
        if self.0.len() >= SEATS
            && let Some(oldest) = self.0.pop_front()
        {
            oldest.cancel();
        }
        let seat = CancellationToken::new();
        self.0.push_back(seat.clone());
        seat
    }
}

/// Somebody who knocked.
enum Caller {
    Unix(UnixStream),
    Tls(TcpStream, Tls),
    Plaintext(TcpStream),
    Transport(transport_host::Stream),
}

impl Caller {
    /// Learns who it is.
    async fn met(self, options: &Options) -> io::Result<(Box<dyn Stream>, PeerIdentity)> {
        Ok(match self {
            Self::Unix(stream) => {
                let identity = PeerIdentity::of_unix(&stream)?;
                (Box::new(stream), identity)
            }
            Self::Tls(stream, tls) => {
                stream.set_nodelay(true)?;
                let limit = Instant::now() + options.connect;
                let met = tls.accept(stream, limit).await;
                let (stream, identity) = met.map_err(io::Error::other)?;
                (Box::new(stream), identity)
            }
            Self::Plaintext(stream) => {
                stream.set_nodelay(true)?;
                let identity = PeerIdentity::of_tcp(&stream)?;
                (Box::new(stream), identity)
            }
            Self::Transport(stream) => {
                let identity = identity(stream.peer())?;
                (Box::new(stream), identity)
            }
        })
    }
}

/// Serves one connection to its end, once it is known whose it is and there is a place for it.
async fn attend(
    caller: Caller,
    seat: &CancellationToken,
    places: &Semaphore,
    destination: &Destination,
    options: &Options,
) {
    let waiting = async {
        let met = caller.met(options).await?;
        let place = places.acquire().await;
        io::Result::Ok((met, place.expect("the semaphore is never closed")))
    };
    let waited = seat.run_until_cancelled(waiting).await;
    seat.cancel();
    let ((stream, identity), _place) = match waited {
        Some(Ok(met)) => met,
        Some(Err(error)) => {
            let why = Reason::of(&error);
            warn!(%why, "nobody to serve was found behind a connection");
            return;
        }
        None => {
            warn!(
                "a connection was closed behind which nobody has shown who it is, for those who came after it"
            );
            return;
        }
    };
    let link = Link::new();
    // Why a connection broke is logged by the wire, and what was asked over it goes on.
    let _broken = serve_connection(stream, &identity, destination, options, &link).await;
}

#[cfg(test)]
mod tests {
    use remote_migrate::wire::{AllowList, UnixDial, WirePeer};
    use remote_migrate::{Answer, Call, Epoch, MigrationId, Peer, PeerError, Reply, Request, Side};
    use tempfile::TempDir;
    use transport_host::Transports;
    use uuid::Uuid;

    use super::*;

    fn us() -> Options {
        Options::new(AllowList::nobody().uid(rustix::process::getuid().as_raw()))
    }

    fn serving(dir: &TempDir, options: Options) -> (Driver, WirePeer) {
        let transports = Transports::builder().build().unwrap();
        let driver = Driver::builder(transports, dir.path().join("run"))
            .build()
            .unwrap();
        let socket = dir.path().join("wire");
        let listener = UnixListener::bind(&socket).unwrap();
        driver.serve_migrations(Door::unix(listener), options);
        (driver, WirePeer::new(UnixDial::new(socket), us()))
    }

    async fn ask(peer: &WirePeer) -> Result<Answer, PeerError> {
        let request = Request {
            migration: MigrationId::random(),
            epoch: Epoch::FIRST,
            domain: Uuid::new_v4(),
            call: Call::Status(Side::Destination),
            run: None,
            downtime: None,
        };
        let limit = Instant::now() + Duration::from_secs(10);
        peer.ask(request, limit).await
    }

    #[tokio::test]
    async fn who_is_on_the_list_is_answered_and_who_is_not_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let (_driver, peer) = serving(&dir, us());
        assert_eq!(ask(&peer).await.unwrap().reply, Reply::Unknown);

        let dir = tempfile::tempdir().unwrap();
        let (_driver, peer) = serving(&dir, Options::new(AllowList::nobody()));
        let error = ask(&peer).await.unwrap_err();
        let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source());
        let why: Vec<_> = causes.map(ToString::to_string).collect();
        assert!(why.concat().contains("allow-list"), "{why:?}");
    }

    #[tokio::test]
    async fn a_shutdown_hangs_up_and_nobody_is_let_in_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let (driver, peer) = serving(&dir, us());
        ask(&peer).await.unwrap();
        let mut link = peer.link().watch();
        let limit = Instant::now() + Duration::from_secs(10);
        driver.shutdown(limit).await.unwrap();
        link.wait_for(|state| !state.up).await.unwrap();
        ask(&peer).await.unwrap_err();
    }

    #[tokio::test]
    async fn whoever_finds_all_places_taken_is_served_once_one_is_free() {
        let dir = tempfile::tempdir().unwrap();
        let (_driver, peer) = serving(&dir, us());
        let dial = || WirePeer::new(UnixDial::new(dir.path().join("wire")), us());
        let mut all = Vec::new();
        for _ in 0..PLACES {
            let peer = dial();
            ask(&peer).await.unwrap();
            all.push(peer);
        }
        let (waits, leaves) = tokio::join!(ask(&peer), async {
            tokio::task::yield_now().await;
            drop(all.pop());
        });
        assert_eq!(waits.unwrap().reply, Reply::Unknown);
        drop((leaves, all));
    }

    #[test]
    fn whoever_comes_when_all_seats_are_taken_has_that_of_the_one_that_came_first() {
        let mut hall = Hall::default();
        let seats: Vec<_> = (0..SEATS).map(|_| hall.enter()).collect();
        assert!(!seats.iter().any(CancellationToken::is_cancelled));
        seats[7].cancel();
        let next = hall.enter();
        assert!(!seats[0].is_cancelled(), "one was free");
        hall.enter();
        assert!(seats[0].is_cancelled());
        assert!(!seats[1].is_cancelled() && !next.is_cancelled());
    }
}
