//! Where the memory of a guest that arrives comes in, and who may bring it.
//!
//! The driver listens itself, on a port that the system chooses, so that ports cannot collide. Both drivers make and check the
//! connection before their QEMUs are given it: the one that brings the guest dials, and shows the ticket that it was told
//! over the door ([`Driver::serve_migrations`](crate::Driver::serve_migrations)), where it had to say who it is. Whoever
//! connects without it is sent away, and is not waited for.
//!
//! ```text
//!  door   source ── Prepare ──► destination: listens, makes up a ticket for one use
//!                ◄─ where, ticket ──
//!  here   source ── connect, ticket ──► destination: the right one? then QEMU is handed the connection
//!         QEMU   ══════ memory ══════►  QEMU
//! ```
//!
//! The ticket keeps strangers out who cannot see the network. It passes in plain: who sees it can come first, and then the
//! guest stays where it was, as it does when that one cuts the line. Under TLS that is all: what QEMU reads comes from a
//! holder of a certificate of the daemons' own authority, and what the other sends goes to the daemon with that name. In
//! plaintext, who can read or change what passes between the two hosts can read or change the memory too.
//!
//! What a driver lets in it lets out: how it takes memory in says on which networks it sends any.
//!
//! Must not know what is done with the connection.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use monitor_qmp::command::Listening;
use remote_migrate::wire::Tls;
use rustix::net::{AddressFamily, sockopt};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::time::{sleep, timeout};
use tracing::warn;
use transport_host::Stream;
use uuid::Uuid;

use crate::error::{Cause, io as failed_to};

/// How many may stand at the gate with their tickets not shown yet. More wait in the kernel's queue.
const STANDING: usize = 16;
/// How long one may take to show its ticket: it is in the first packet of whoever means it.
const SHOWING: Duration = Duration::from_secs(5);
/// After a failure to accept, as when the process is out of descriptors: it would fail again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// Where the memory of guests that arrive is taken in, and so how that of guests that leave may pass.
#[derive(Clone, Debug, Default)]
pub struct Landing {
    place: Place,
    is_trusting: bool,
}

#[derive(Clone, Debug, Default)]
enum Place {
    #[default]
    Unix,
    Tcp {
        address: IpAddr,
        name: Option<String>,
        /// None is plaintext.
        tls: Option<Tls>,
    },
}

impl Landing {
    /// On a unix socket in the directory of the guest: for daemons of the same user of this host. Nothing is sent over a
    /// network then.
    #[must_use]
    pub fn unix() -> Self {
        Self::default()
    }

    /// On that address of this host, each guest on a port that the system chooses, and under TLS. Both QEMUs show the
    /// certificates that the daemons know each other by at their doors, and none but one of the same authority is believed;
    /// the side that sends believes only the one with the name that the other daemon told it at the door, the first in that
    /// one's certificate. So the door must be one where nobody else can tell it. Guests that leave do so under TLS too, or not
    /// at all: a daemon of this host to which they may go takes them in under TLS as well.
    #[must_use]
    pub fn tls(address: IpAddr, tls: Tls) -> Self {
        Self::on(address, Some(tls))
    }

    /// On that address of this host, each guest on a port that the system chooses. The memory of guests that arrive, and of
    /// those that leave, passes in plain: the network must be one where nobody else reads or writes.
    #[must_use]
    pub fn plaintext(address: IpAddr) -> Self {
        Self::on(address, None)
    }

    fn on(address: IpAddr, tls: Option<Tls>) -> Self {
        let place = Place::Tcp {
            address,
            name: None,
            tls,
        };
        Self {
            place,
            is_trusting: false,
        }
    }

    /// What other hosts call this one: a name, or an address, one of version 6 in brackets. Without it they are told the
    /// address itself, which an address that stands for all of them does not allow.
    #[must_use]
    pub fn known_as(self, host: impl Into<String>) -> Self {
        let place = match self.place {
            Place::Tcp { address, tls, .. } => Place::Tcp {
                address,
                name: Some(host.into()),
                tls,
            },
            Place::Unix => Place::Unix,
        };
        Self { place, ..self }
    }

    /// Lets QEMU listen there itself, in plaintext, where a guest is to come over several connections: whoever connects
    /// first is taken for the one who brings the memory then, so nobody else may reach that address. Under TLS it needs no
    /// such trust.
    #[must_use]
    pub fn trusting(self) -> Self {
        Self {
            is_trusting: true,
            ..self
        }
    }

    /// A listener for QEMU itself, whose directory that is, and where that is.
    pub(crate) async fn lend(
        &self,
        directory: &Path,
        silence: Duration,
    ) -> Result<(OwnedFd, String), Cause> {
        self.check_several()?;
        let (listener, connect) = self.listen(directory).await?;
        let failed = |error| failed_to("lend the listener at", &connect)(error);
        let listener: OwnedFd = match listener {
            Listener::Unix(listener) => listener.into_std().map_err(failed)?.into(),
            Listener::Tcp(listener) => {
                // What it accepts has inherited these.
                end_if_silent(&listener, silence).map_err(failed)?;
                listener.into_std().map_err(failed)?.into()
            }
        };
        Ok((listener, connect))
    }

    /// Where QEMU is to listen by itself, whose directory that is: on a port that the system chooses.
    pub(crate) fn leave(&self, directory: &Path) -> Result<String, Cause> {
        self.check_several()?;
        Ok(match &self.place {
            Place::Unix => format!("unix:{}", directory.join("migrate.sock").display()),
            Place::Tcp { address, .. } => format!("tcp:{}", SocketAddr::new(*address, 0)),
        })
    }

    /// Where others find what QEMU said it listens on.
    pub(crate) fn found(&self, at: &Listening) -> Result<String, Cause> {
        let port = at.port.as_ref().and_then(|port| port.parse().ok());
        match (&self.place, &at.path, port) {
            (Place::Unix, Some(path), _) => Ok(format!("unix:{path}")),
            (Place::Tcp { address, name, .. }, _, Some(port)) => {
                Ok(reached(name.as_deref(), SocketAddr::new(*address, port)))
            }
            _ => Err(Cause::State(format!("QEMU listens elsewhere, on {at:?}"))),
        }
    }

    fn check_several(&self) -> Result<(), Cause> {
        if !self.is_trusting && matches!(self.place, Place::Tcp { tls: None, .. }) {
            let text = "guests are not taken in over several connections here";
            return Err(Cause::State(text.into()));
        }
        Ok(())
    }

    /// Whether others could be told where it is.
    pub(crate) fn check(&self) -> Result<(), Cause> {
        match &self.place {
            Place::Tcp {
                address,
                name: None,
                ..
            } if address.is_unspecified() => Err(Cause::BadRequest(format!(
                "guests are taken in on {address}, and no other host could be told where that is"
            ))),
            Place::Tcp { tls: Some(tls), .. } if tls.names().is_empty() => Err(Cause::BadRequest(
                "the certificate for the memory of guests has no DNS name that others could ask for"
                    .into(),
            )),
            _ => Ok(()),
        }
    }

    /// What is shown to those who bring memory, and the name by which they know it.
    pub(crate) fn shown(&self) -> Option<(&Tls, &str)> {
        match &self.place {
            Place::Tcp { tls: Some(tls), .. } => Some((tls, tls.names().first()?)),
            _ => None,
        }
    }

    /// How memory may go from here to `connect`, where a daemon that is called `name` takes it in under TLS, or in plaintext
    /// if it is called nothing: with what is shown there, or in plaintext.
    ///
    /// Both are the other side's words, and QEMU obeys the first: it runs commands and opens files for such words too, so
    /// none passes but that of a place where memory is taken in. What leaves under TLS alone does so to a socket of this host
    /// too: who listens there is not known, and may pass it on.
    pub(crate) fn towards(&self, connect: &str, name: Option<&str>) -> Result<Option<&Tls>, Cause> {
        let refused = |why: &str| Err(Cause::State(format!("send memory to {connect}: {why}")));
        if !is_place(connect) {
            return refused("that is no place where memory is taken in");
        }
        match (&self.place, name) {
            (Place::Tcp { tls: Some(tls), .. }, Some(_)) => Ok(Some(tls)),
            (Place::Tcp { tls: None, .. }, None) => Ok(None),
            (Place::Tcp { tls: Some(_), .. }, None) => {
                refused("it is taken in in plaintext there, and sent under TLS alone from here")
            }
            (_, Some(name)) => refused(&format!(
                "{name} takes it in under TLS, and there is no certificate to show from here"
            )),
            (Place::Unix, None) if connect.starts_with("unix:") => Ok(None),
            (Place::Unix, None) => {
                refused("it would pass in plaintext, which was not allowed over a network here")
            }
        }
    }

    /// Listens for the memory of one guest, whose directory that is.
    pub(crate) async fn open(&self, directory: &Path, silence: Duration) -> Result<Gate, Cause> {
        let (listener, connect) = self.listen(directory).await?;
        Ok(Gate {
            listener,
            connect,
            ticket: Ticket(Uuid::new_v4()),
            silence,
            standing: FuturesUnordered::new(),
        })
    }

    async fn listen(&self, directory: &Path) -> Result<(Listener, String), Cause> {
        Ok(match &self.place {
            Place::Unix => {
                let path = directory.join("migrate.sock");
                // A gate that was closed has left its name.
                let _none = std::fs::remove_file(&path);
                let listener = UnixListener::bind(&path).map_err(failed_to("listen on", &path))?;
                let connect = format!("unix:{}", path.display());
                (Listener::Unix(listener), connect)
            }
            Place::Tcp { address, name, .. } => {
                let failed = |error| failed_to("listen on", address.to_string())(error);
                let bound = TcpListener::bind(SocketAddr::new(*address, 0)).await;
                let listener = bound.map_err(failed)?;
                let at = listener.local_addr().map_err(failed)?;
                (Listener::Tcp(listener), reached(name.as_deref(), at))
            }
        })
    }
}

/// How the memory of one guest is brought.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Way {
    /// The driver connects, and shows this.
    Ticket(Ticket),
    /// QEMU connects, as often as it likes.
    Bare,
}

/// What whoever brings the memory of one guest shows first. For one use.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub(crate) struct Ticket(Uuid);

impl Ticket {
    /// Whether it is the right one, in a time that does not tell where it differs.
    fn is(self, shown: [u8; 16]) -> bool {
        let pairs = self.0.as_bytes().iter().zip(shown);
        pairs.fold(0, |differs, (ours, shown)| differs | (ours ^ shown)) == 0
    }

    /// What is shown.
    pub(crate) fn bytes(self) -> [u8; 16] {
        self.0.into_bytes()
    }

    /// Shows it on a connection that was made just now, and yields that.
    pub(crate) async fn show(self, mut stream: Stream, silence: Duration) -> io::Result<OwnedFd> {
        stream.write_all(&self.bytes()).await?;
        let connection = stream.into_fd();
        end_if_silent(&connection, silence)?;
        Ok(connection)
    }
}

/// It is as good as a password for as long as it is of use.
impl fmt::Debug for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Ticket(..)")
    }
}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

/// Where one guest comes in.
pub(crate) struct Gate {
    listener: Listener,
    /// Where that is, in the words of a transport's target.
    pub(crate) connect: String,
    pub(crate) ticket: Ticket,
    silence: Duration,
    /// Those who have not shown a ticket yet. They do not wait for each other.
    standing: FuturesUnordered<Showing>,
}

type Showing = Pin<Box<dyn Future<Output = io::Result<OwnedFd>> + Send>>;

impl Gate {
    /// Waits for the one with the ticket. Cancel safe: who stands at the gate stays there.
    pub(crate) async fn admit(&mut self) -> OwnedFd {
        loop {
            let has_room = self.standing.len() < STANDING;
            let come = tokio::select! {
                Some(shown) = self.standing.next() => match shown {
                    Ok(connection) => return connection,
                    Err(error) => {
                        warn!(%error, at = self.connect, "somebody who was not expected was sent away");
                        continue;
                    }
                },
                come = accept(&self.listener, self.ticket, self.silence), if has_room => come,
            };
            match come {
                Ok(showing) => self.standing.push(showing),
                Err(error) => {
                    warn!(%error, at = self.connect, "a connection for a guest's memory was not accepted");
                    sleep(PAUSE).await;
                }
            }
        }
    }
}

async fn accept(listener: &Listener, ticket: Ticket, silence: Duration) -> io::Result<Showing> {
    Ok(match listener {
        Listener::Unix(listener) => {
            let (mut stream, _) = listener.accept().await?;
            Box::pin(async move {
                examine(&mut stream, ticket).await?;
                Ok(stream.into_std()?.into())
            })
        }
        Listener::Tcp(listener) => {
            let (mut stream, _) = listener.accept().await?;
            Box::pin(async move {
                end_if_silent(&stream, silence)?;
                stream.set_nodelay(true)?;
                examine(&mut stream, ticket).await?;
                Ok(stream.into_std()?.into())
            })
        }
    })
}

/// Whether it is `unix:` and a path, or `tcp:`, a host and a port, and nothing more that QEMU would read into it.
fn is_place(connect: &str) -> bool {
    let is_plain = |part: &str| part.chars().all(|c| c.is_ascii_graphic() && c != ',');
    if let Some(path) = connect.strip_prefix("unix:") {
        return path.starts_with('/');
    }
    let at = connect.strip_prefix("tcp:");
    let at = at.and_then(|at| at.rsplit_once(':'));
    at.is_some_and(|(host, port)| !host.is_empty() && is_plain(host) && port.parse::<u16>().is_ok())
}

/// How others reach what listens there: by that name, if this host has one for them.
fn reached(name: Option<&str>, at: SocketAddr) -> String {
    match name {
        Some(name) => format!("tcp:{name}:{}", at.port()),
        None => format!("tcp:{at}"),
    }
}

/// Reads the ticket, and not a byte of what follows it.
async fn examine(stream: &mut (impl AsyncRead + Unpin), ticket: Ticket) -> io::Result<()> {
    let mut shown = [0; 16];
    timeout(SHOWING, stream.read_exact(&mut shown)).await??;
    if ticket.is(shown) {
        Ok(())
    } else {
        Err(io::Error::other("it showed a wrong ticket"))
    }
}

/// Has the kernel end a connection over a network whose other end has not answered for so long, whether something is being
/// sent or not: a QEMU that only reads would never notice that nobody writes any more.
fn end_if_silent(connection: &impl AsFd, silence: Duration) -> io::Result<()> {
    let family = sockopt::socket_domain(connection)?;
    if family != AddressFamily::INET && family != AddressFamily::INET6 {
        return Ok(());
    }
    let probe = (silence / 3).max(Duration::from_secs(1));
    sockopt::set_tcp_keepidle(connection, probe)?;
    sockopt::set_tcp_keepintvl(connection, probe)?;
    sockopt::set_tcp_keepcnt(connection, 3)?;
    sockopt::set_socket_keepalive(connection, true)?;
    let millis = u32::try_from(silence.as_millis()).unwrap_or(u32::MAX);
    Ok(sockopt::set_tcp_user_timeout(connection, millis)?)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use super::*;

    async fn gate() -> (Gate, SocketAddr) {
        let landing = Landing::plaintext(Ipv4Addr::LOCALHOST.into());
        let gate = landing.open(Path::new("/"), SHOWING).await.unwrap();
        let at = gate.connect.strip_prefix("tcp:").unwrap().parse().unwrap();
        (gate, at)
    }

    fn connected(at: SocketAddr, first: &[u8]) -> std::net::TcpStream {
        let mut stream = std::net::TcpStream::connect(at).unwrap();
        stream.write_all(first).unwrap();
        stream
    }

    #[tokio::test]
    async fn who_shows_the_ticket_is_let_in_past_those_who_do_not() {
        let (mut gate, at) = gate().await;
        let silent = connected(at, b"");
        let wrong = connected(at, &[7; 16]);
        let mut ours = connected(at, gate.ticket.0.as_bytes());
        let let_in = gate.admit().await;
        ours.write_all(b"memory").unwrap();
        let mut stream = std::net::TcpStream::from(let_in);
        stream.set_nonblocking(false).unwrap();
        let mut read = [0; 6];
        io::Read::read_exact(&mut stream, &mut read).unwrap();
        assert_eq!(&read, b"memory", "and nothing of it was taken");
        drop((silent, wrong));
    }

    #[tokio::test]
    async fn who_stands_at_the_gate_stays_there_when_the_wait_is_given_up() {
        let (mut gate, at) = gate().await;
        let mut ours = connected(at, &gate.ticket.0.as_bytes()[..9]);
        while gate.standing.is_empty() {
            let _early = futures::poll!(Box::pin(gate.admit()));
            tokio::task::yield_now().await;
        }
        ours.write_all(&gate.ticket.0.as_bytes()[9..]).unwrap();
        gate.admit().await;
    }

    #[tokio::test]
    async fn a_connection_over_a_network_ends_when_its_other_end_is_silent() {
        let (mut gate, at) = gate().await;
        let _ours = connected(at, gate.ticket.0.as_bytes());
        let let_in = gate.admit().await;
        assert!(sockopt::socket_keepalive(&let_in).unwrap());
        let limit = sockopt::tcp_user_timeout(&let_in).unwrap();
        assert_eq!(u128::from(limit), SHOWING.as_millis());
    }

    #[test]
    fn what_stands_for_all_addresses_needs_a_name() {
        let all = [Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()];
        for address in all {
            Landing::plaintext(address).check().unwrap_err();
            Landing::plaintext(address)
                .known_as("host")
                .check()
                .unwrap();
        }
        Landing::unix().check().unwrap();
    }

    #[test]
    fn where_qemu_listens_by_itself_is_told_as_others_reach_it() {
        let mut at = Listening::default();
        at.port = Some("4000".into());
        let named = Landing::plaintext(Ipv4Addr::UNSPECIFIED.into()).known_as("host");
        assert_eq!(named.found(&at).unwrap(), "tcp:host:4000");
        let six = Landing::plaintext(Ipv6Addr::LOCALHOST.into()).trusting();
        assert_eq!(six.found(&at).unwrap(), "tcp:[::1]:4000");
        assert_eq!(six.leave(Path::new("/")).unwrap(), "tcp:[::1]:0");
        named.leave(Path::new("/")).unwrap_err();
        Landing::unix().found(&at).unwrap_err();
    }

    #[tokio::test]
    async fn others_are_told_the_name_and_the_port_that_the_system_chose() {
        let landing = Landing::plaintext(Ipv4Addr::UNSPECIFIED.into()).known_as("host");
        let gate = landing.open(Path::new("/"), SHOWING).await.unwrap();
        let port = gate.connect.strip_prefix("tcp:host:").unwrap();
        assert_ne!(port.parse::<u16>().unwrap(), 0);
    }

    #[test]
    fn memory_leaves_over_a_network_as_it_may_come_in_and_never_in_plaintext_by_default() {
        let loopback = || Ipv4Addr::LOCALHOST.into();
        let (unix, plaintext) = (Landing::unix(), Landing::plaintext(loopback()));
        let network = "tcp:192.0.2.7:4000";
        assert!(unix.towards("unix:/run/migrate.sock", None).is_ok());
        assert!(unix.towards(network, None).is_err());
        assert!(unix.towards(network, Some("b.example")).is_err());
        assert!(matches!(plaintext.towards(network, None), Ok(None)));
        assert!(plaintext.towards(network, Some("b.example")).is_err());
        assert!(plaintext.shown().is_none() && unix.shown().is_none());
    }

    #[test]
    fn what_another_side_calls_a_place_and_is_none_never_reaches_a_qemu() {
        let plaintext = Landing::plaintext(Ipv4Addr::LOCALHOST.into());
        let places = [
            "unix:/run/a guest/migrate.sock",
            "tcp:192.0.2.7:4000",
            "tcp:[2001:db8::7]:4000",
            "tcp:b.example:4000",
        ];
        for place in places {
            assert!(plaintext.towards(place, None).is_ok(), "{place}");
        }
        let others = [
            "",
            "exec:touch /tmp/here",
            "fd:3",
            "file:/etc/passwd",
            "rdma:192.0.2.7:4000",
            "vsock:2:4000",
            "defer",
            "/run/migrate.sock",
            "unix:",
            "unix:migrate.sock",
            "tcp:",
            "tcp::4000",
            "tcp:192.0.2.7",
            "tcp:192.0.2.7:http",
            "tcp:192.0.2.7,to=5000:4000",
            "tcp:192.0.2.7:4000,to=5000",
            "tcp:b example:4000",
            " exec:touch /tmp/here",
            "EXEC:touch /tmp/here",
        ];
        for other in others {
            for name in [None, Some("b.example")] {
                for landing in [&plaintext, &Landing::unix()] {
                    let refused = landing.towards(other, name).unwrap_err();
                    let refused = format!("{refused:?}");
                    assert!(refused.contains("no place"), "{other}: {refused}");
                }
            }
        }
    }
}
