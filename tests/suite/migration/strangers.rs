//! Whoever knocks at a driver's door and is none to be served: refused with its own error, at no cost to the guests, the driver
//! or those who may come.

use std::collections::HashSet;
use std::fs;
use std::future::IntoFuture;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use driver::{Domain, Door, MigrateOptions};
use remote_migrate::wire::message::{FaultKind, Hello, Message};
use remote_migrate::wire::{
    AllowList, Dial, Options, Stream, Tls, TlsDial, TlsError, UnixDial, WireError, WirePeer, frame,
};
use remote_migrate::{
    Answer, Call, Effect, Epoch, MigrationId, Owner, Peer, PeerError, Reply, Request, Side,
};
use rustls::pki_types::pem::PemObject;
use rustls::{AlertDescription, ClientConfig, RootCertStore};
use serde_json::{Value, json, to_value};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::runtime::{Builder, Runtime};
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use super::{SECOND, at_full_speed, counts_on, is_performing, slow};
use crate::authority::Authority;
use crate::rig::{Rig, boot};

/// How long the doors bear silence, and a frame that does not end. Long enough for a good peer on a machine that is busy.
const SILENCE: Duration = Duration::from_secs(4);
/// More than there are places behind a door.
const CROWD: usize = 70;
const TCP_LISTENS: &str = "0A";
const UNIX_LISTENS: &str = "00010000";

fn soon() -> Instant {
    Instant::now() + 60 * SECOND
}

/// With these alone, and without patience.
fn options(allow: AllowList) -> Options {
    Options {
        beat: SILENCE / 4,
        silence: SILENCE,
        // No handshake is given up for its time here.
        connect: 600 * SECOND,
        ..Options::new(allow)
    }
}

/// A driver with a door for each kind of daemon, and one through which nobody may come.
struct House {
    /// On which nothing runs but what the doors do.
    runtime: Option<Runtime>,
    rig: Rig,
    tcp: SocketAddr,
    unix: PathBuf,
    shut: PathBuf,
}

impl House {
    async fn open(env: &Rig, authority: &Authority) -> Self {
        let rig = Rig::at(&env.env, authority.landing("b.example"));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await;
        let listener = listener.expect("a port");
        let mut runtime = Builder::new_multi_thread();
        let runtime = runtime.worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime can be made");
        let inside = runtime.enter();
        let tcp = listener.local_addr().expect("it has one");
        let door = Door::tls(listener, authority.tls("b.example"));
        let by_name = options(AllowList::nobody().name("a.example"));
        rig.driver.serve_migrations(door, by_name);
        let us = AllowList::nobody().uid(rustix::process::getuid().as_raw());
        let (unix, shut) = (rig.dir.path().join("door"), rig.dir.path().join("shut"));
        for (path, allow) in [(&unix, us), (&shut, AllowList::nobody())] {
            let door = Door::unix(UnixListener::bind(path).expect("it is free"));
            rig.driver.serve_migrations(door, options(allow));
        }
        drop(inside);
        Self {
            runtime: Some(runtime),
            rig,
            tcp,
            unix,
            shut,
        }
    }

    /// How many tasks there are that have not ended.
    fn tasks(&self) -> usize {
        let runtime = self.runtime.as_ref().expect("it is there until the end");
        runtime.metrics().num_alive_tasks()
    }

    /// The way of a daemon that shows this.
    fn by_tcp(&self, tls: Tls) -> TlsDial {
        TlsDial::new(self.tcp, "b.example", tls)
    }

    /// A daemon that shows this, and waits as long as any does.
    fn peer(&self, tls: Tls) -> WirePeer {
        let options = Options::new(AllowList::nobody().name("b.example"));
        WirePeer::new(self.by_tcp(tls), options)
    }

    /// Nothing is known, begun or started here, and the guest is where it was.
    async fn is_untouched_by(&self, guest: &Domain) {
        let driver = &self.rig.driver;
        assert!(driver.domains().is_empty());
        let open = driver.migrations().await.expect("the journal is read");
        assert!(open.is_empty(), "{open:?}");
        let runs = guest.observed().pid.expect("it runs on");
        assert_eq!(qemus(guest.uuid()), [runs], "its copy runs here");
    }

    /// Nobody is behind a door any more, and nobody is busy with one who was.
    async fn is_left(&self, doors: usize) {
        let is_left = async {
            while (self.connections(), self.tasks()) != (0, doors) {
                // The kernel tells nobody that a socket is gone.
                sleep(Duration::from_millis(5)).await;
            }
        };
        let left = timeout_at(soon(), is_left).await;
        let (behind, tasks) = (self.connections(), self.tasks());
        left.unwrap_or_else(|_| panic!("{behind} are behind the doors, {tasks} tasks of {doors}"));
    }

    /// How many sockets this process holds behind the doors.
    fn connections(&self) -> usize {
        let unix = kernel("/proc/net/unix", |words| {
            let at = Path::new(words.get(7)?);
            let is_it = (at == self.unix || at == self.shut) && words[3] != UNIX_LISTENS;
            is_it.then(|| words[6].to_owned())
        });
        self.behind_tls() + held(&unix)
    }

    fn behind_tls(&self) -> usize {
        let port = format!(":{:04X}", self.tcp.port());
        let tcp = kernel("/proc/net/tcp", |words| {
            let is_it = words[1].ends_with(&port) && words[3] != TCP_LISTENS;
            is_it.then(|| words[9].to_owned())
        });
        held(&tcp)
    }
}

impl Drop for House {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // What it still does may block, which the test's own runtime must not.
            runtime.shutdown_background();
        }
    }
}

/// What is wanted of each line of a list of the kernel's.
fn kernel(list: &str, wanted: impl Fn(&[&str]) -> Option<String>) -> Vec<String> {
    let text = fs::read_to_string(list).expect("there is such a list");
    let lines = text.lines().skip(1);
    let words = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    words.filter_map(|words| wanted(&words)).collect()
}

/// How many of these sockets, by their inodes, are open in this process.
fn held(sockets: &[String]) -> usize {
    let open = fs::read_dir("/proc/self/fd").expect("it can be listed");
    let targets = open.filter_map(|one| fs::read_link(one.ok()?.path()).ok());
    let inode = |target: PathBuf| {
        let name = target.to_str()?.strip_prefix("socket:[")?;
        Some(name.strip_suffix(']')?.to_owned())
    };
    let ours: HashSet<String> = targets.filter_map(inode).collect();
    let held = sockets.iter().filter(|inode| ours.contains(*inode));
    held.count()
}

/// The QEMUs that were told of this guest, on whichever side.
fn qemus(uuid: Uuid) -> Vec<u32> {
    let uuid = uuid.to_string();
    let all = fs::read_dir("/proc").expect("it can be listed");
    let pids = all.filter_map(|one| one.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let is_told = |pid: &u32| {
        let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&words).contains(&uuid)
    };
    pids.filter(is_told).collect()
}

/// A way that leads nowhere, and keeps the first that was asked on it: what starts a guest where it is served.
#[derive(Default)]
struct Kept(Mutex<Option<Request>>);

#[async_trait]
impl Peer for Kept {
    async fn ask(&self, request: Request, _: Instant) -> Result<Answer, PeerError> {
        self.0.lock().expect("no panic").get_or_insert(request);
        Err(PeerError::not_sent(WireError::Closed))
    }
}

/// One that says what it likes.
struct Stranger {
    stream: Box<dyn Stream>,
    decoder: frame::Decoder,
}

impl Stranger {
    async fn by(way: &dyn Dial) -> Self {
        let dialled = way.dial(soon()).await.expect("the door is there");
        Self::over(dialled.stream)
    }

    fn over(stream: impl Stream + 'static) -> Self {
        Self {
            stream: Box::new(stream),
            decoder: frame::Decoder::new(),
        }
    }

    /// One that has said who it is, as it should.
    async fn greeted(way: &dyn Dial) -> Self {
        let mut stranger = Self::by(way).await;
        stranger.say(&hello(|_| {})).await;
        assert!(matches!(stranger.hear().await, Some(Message::Hello(_))));
        stranger
    }

    /// Whether it is heard or not.
    async fn say(&mut self, message: &Value) {
        let text = message.to_string();
        let length = u32::try_from(text.len()).expect("it is short");
        self.say_bytes(&length.to_be_bytes()).await;
        self.say_bytes(text.as_bytes()).await;
    }

    async fn say_bytes(&mut self, bytes: &[u8]) {
        let _refused = self.stream.write_all(bytes).await;
        let _refused = self.stream.flush().await;
    }

    /// The next message, or nothing once the other side has hung up.
    async fn hear(&mut self) -> Option<Message> {
        loop {
            if let Some(frame) = self.decoder.next_frame().expect("it keeps to the limits") {
                return Some(serde_json::from_slice(&frame).expect("it is one"));
            }
            let read = self.stream.read_buf(self.decoder.space()).await;
            if read.expect("it says goodbye") == 0 {
                return None;
            }
        }
    }

    /// With what it is refused, and that it is shown out then.
    async fn fault(mut self) -> FaultKind {
        let refused = async {
            let kind = loop {
                match self.hear().await.expect("it is told why") {
                    Message::Fault(fault) => break fault.kind,
                    Message::Hello(_) | Message::Ping { .. } => {}
                    message => panic!("it is served: {message:?}"),
                }
            };
            assert_eq!(self.hear().await, None);
            kind
        };
        let refused = timeout_at(soon(), refused).await;
        refused.expect("it is not kept waiting")
    }
}

fn hello(change: impl FnOnce(&mut Hello)) -> Value {
    let mut hello = Hello::ours();
    change(&mut hello);
    json!({ "hello": to_value(hello).expect("it is JSON") })
}

/// The first question, on a connection of its own.
fn question(request: &Value) -> Value {
    json!({"request": {"id": 1, "within_ms": 30_000, "request": request}})
}

/// A client that believes the authority and shows nothing of itself.
async fn without_certificate(at: SocketAddr, tls: &Tls) -> impl Stream + use<> {
    let mut roots = RootCertStore::empty();
    let authority = PemObject::from_pem_slice(&tls.pem().authority).expect("it is PEM");
    roots.add(authority).expect("it is an authority");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config =
        ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let mut config = config
        .expect("there are versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"vmwright-migrate".to_vec()];
    let stream = TcpStream::connect(at).await.expect("the door is there");
    let name = "b.example".try_into().expect("it is a name");
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let connected = connector.connect(name, stream).await;
    connected.expect("this side believes the other")
}

/// With what a daemon is refused that asks this, and shows that.
#[derive(Debug, PartialEq, Eq)]
enum Refusal {
    /// By TLS.
    Alert(AlertDescription),
    /// In place of an answer.
    Fault(FaultKind),
}

async fn refused(house: &House, tls: Tls, prepare: &Request) -> Refusal {
    let asked = house.peer(tls).ask(prepare.clone(), soon()).await;
    let error = asked.expect_err("it may not");
    assert_eq!(error.effect(), Effect::None, "{error:?}");
    let source = std::error::Error::source(&error).and_then(|source| source.downcast_ref());
    match source {
        Some(WireError::Tls(TlsError::NotBelieved(rustls::Error::AlertReceived(alert)))) => {
            Refusal::Alert(*alert)
        }
        Some(error @ WireError::Session(_)) => {
            Refusal::Fault(error.remote().expect("the other side says why").kind)
        }
        _ => panic!("{error:?}"),
    }
}

/// What would start a guest, had it been asked by a daemon that may.
async fn real_request(domain: &Domain) -> Request {
    let kept = Arc::new(Kept::default());
    let moved = domain.migrate(kept.clone(), MigrateOptions::default());
    moved.await.expect_err("nobody is there");
    let request = kept.0.lock().expect("no panic").take();
    let request = request.expect("it was asked");
    assert!(matches!(request.call, Call::Prepare(_)), "{request:?}");
    request
}

/// Those whom a door knows before they have said anything.
async fn who_may_not(house: &House, authority: &Authority, guest: &Domain) {
    let request = &real_request(guest).await;
    let forged = Authority::new().tls_believing("a.example", &[authority]);
    let refusal = refused(house, forged, request).await;
    let alert = Refusal::Alert(AlertDescription::DecryptError);
    assert_eq!(refusal, alert, "the other authority has the name of ours");
    house.is_untouched_by(guest).await;

    let asks = question(&to_value(request).expect("it is JSON"));
    let stream = without_certificate(house.tcp, &authority.tls("a.example")).await;
    let mut nobody = Stranger::over(stream);
    nobody.say(&hello(|_| {})).await;
    nobody.say(&asks).await;
    let told = nobody.stream.read_buf(nobody.decoder.space()).await;
    let told = told.expect_err("it is told nothing else");
    let told = told.get_ref().and_then(|error| error.downcast_ref());
    let alert = rustls::Error::AlertReceived(AlertDescription::CertificateRequired);
    assert_eq!(told, Some(&alert));
    house.is_untouched_by(guest).await;

    let other = authority.tls("c.example");
    let refusal = refused(house, other, request).await;
    assert_eq!(refusal, Refusal::Fault(FaultKind::Forbidden));
    house.is_untouched_by(guest).await;

    let mut stranger = Stranger::by(&UnixDial::new(&house.shut)).await;
    stranger.say(&hello(|_| {})).await;
    stranger.say(&asks).await;
    assert_eq!(stranger.fault().await, FaultKind::Forbidden);
    house.is_untouched_by(guest).await;
}

/// Those who may come in, and then speak as nobody does.
async fn who_speaks_wrongly(house: &House, way: &dyn Dial, guest: &Domain) {
    let request = &real_request(guest).await;
    let asks = question(&to_value(request).expect("it is JSON"));
    let mut old = Stranger::by(way).await;
    old.say(&hello(|hello| hello.version -= 1)).await;
    old.say(&asks).await;
    assert_eq!(old.fault().await, FaultKind::Version);
    house.is_untouched_by(guest).await;

    let mut early = Stranger::by(way).await;
    early.say_bytes(&u32::MAX.to_be_bytes()).await;
    let mut late = Stranger::greeted(way).await;
    late.say_bytes(&u32::MAX.to_be_bytes()).await;
    for huge in [early, late] {
        assert_eq!(huge.fault().await, FaultKind::TooLong);
    }
    house.is_untouched_by(guest).await;

    let mut endless = Stranger::greeted(way).await;
    let began = Instant::now();
    endless.say_bytes(&(1_u32 << 20).to_be_bytes()).await;
    endless.say_bytes(b"{\"request\":").await;
    assert_eq!(endless.fault().await, FaultKind::Silent);
    assert!(began.elapsed() >= SILENCE, "not before its time");
    house.is_untouched_by(guest).await;

    let mut lie = to_value(request).expect("it is JSON");
    lie["epoch"] = 0.into();
    let mut liar = Stranger::greeted(way).await;
    liar.say(&question(&lie)).await;
    assert_eq!(liar.fault().await, FaultKind::Mismatch);
    house.is_untouched_by(guest).await;
}

fn status() -> Request {
    Request {
        migration: MigrationId::random(),
        epoch: Epoch::FIRST,
        domain: Uuid::new_v4(),
        call: Call::Status(Side::Destination),
        run: None,
        downtime: None,
    }
}

/// More than there are places come to each door, say nothing and stay; and those who may come are served all the same.
async fn crowd(house: &House, good: &Tls) {
    let mut crowd: Vec<Box<dyn Stream>> = Vec::new();
    for _ in 0..CROWD {
        let before_tls = TcpStream::connect(house.tcp).await;
        crowd.push(Box::new(before_tls.expect("the kernel lets it in")));
        let before_hello = UnixStream::connect(&house.unix).await;
        crowd.push(Box::new(before_hello.expect("the kernel lets it in")));
    }
    let answer = house.peer(good.clone()).ask(status(), soon()).await;
    assert_eq!(answer.expect("it is served").reply, Reply::Unknown);
    // The only ones that leave so soon are those who had sat there longest.
    let sit = house.behind_tls();
    assert!(sit > CROWD / 2, "{sit} of them are there still");
    let us = AllowList::nobody().uid(rustix::process::getuid().as_raw());
    let patient = Options {
        connect: 60 * SECOND,
        ..Options::new(us)
    };
    let neighbour = WirePeer::new(UnixDial::new(&house.unix), patient);
    let answer = neighbour.ask(status(), soon()).await;
    assert_eq!(answer.expect("it is served").reply, Reply::Unknown);
}

/// One that may come in, and takes itself for a later life of the source of a guest that is on its way.
async fn claims_it(house: &House, way: &dyn Dial, guest: &Domain) {
    let open = house.rig.driver.migrations().await;
    let open = open.expect("the journal is read");
    let finish = Request {
        migration: open.first().expect("it is on its way").id,
        domain: guest.uuid(),
        call: Call::Finish,
        ..status()
    };
    let mut lie = to_value(finish).expect("it is JSON");
    lie["epoch"] = u64::MAX.into();
    let mut liar = Stranger::greeted(way).await;
    liar.say(&question(&lie)).await;
    assert_eq!(liar.fault().await, FaultKind::Mismatch);
}

pub(super) async fn whoever_is_none_to_be_served_starts_nothing_leaves_nothing_and_shuts_nobody_out(
    rig: Rig,
) {
    let authority = Authority::new();
    let house = House::open(&rig, &authority).await;
    let here = Rig::at(&rig.env, authority.landing("a.example"));
    let (domain, _) = boot(&here, "web").await.expect("it boots");
    let good = authority.tls("a.example");
    let doors = house.tasks();

    who_may_not(&house, &authority, &domain).await;
    who_speaks_wrongly(&house, &house.by_tcp(good.clone()), &domain).await;
    who_speaks_wrongly(&house, &UnixDial::new(&house.unix), &domain).await;
    house.is_left(doors).await;
    crowd(&house, &good).await;
    house.is_left(doors).await;
    house.is_untouched_by(&domain).await;

    let peer = Arc::new(house.peer(good.clone()));
    let moving = tokio::spawn(domain.migrate(peer, slow()).into_future());
    assert!(is_performing(&domain).await);
    claims_it(&house, &house.by_tcp(good), &domain).await;
    at_full_speed(&domain).await;
    let moved = moving.await.expect("no panic");
    let report = moved.expect("who may come is served as ever");
    assert_eq!((report.owner, report.settled), (Owner::Destination, true));
    let moved = house.rig.driver.by_uuid(domain.uuid());
    let runs = moved.and_then(|moved| moved.observed().pid);
    assert_eq!(qemus(domain.uuid()), [runs.expect("it runs there")]);
    counts_on(&here, 1, 20 * SECOND).await;
}
