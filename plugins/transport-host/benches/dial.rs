//! Does dialing through a loaded plugin cost more than tokio's own connect, and do bytes flow as fast afterwards?
//!
//! Both contenders take turns in one run, on one thread, against the same listener, whose backlog
//! takes them; accepting is outside of what is measured. The rate is that of a stream that the
//! plugin made beside that of tokio's own type.
//!
//! `--short`: fewer rounds, the figures a little rougher.

#![allow(clippy::unwrap_used, reason = "a bench may stop at the first surprise")]

#[path = "../tests/support/stage.rs"]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::{Stage, later};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use transport_host::Transports;

/// How much longer a dial may take, and how much of the rate must be left.
const DIAL_AT_MOST: f64 = 1.2;
const RATE_AT_LEAST: f64 = 0.9;

fn main() {
    let short = std::env::args().any(|argument| argument == "--short");
    let plan = Plan {
        dials: if short { 2_000 } else { 20_000 },
        transfers: if short { 50 } else { 400 },
        chunks: 100,
    };
    let stage = Stage::new();
    let transports = stage.loaded();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let unix = UnixListener::bind(stage.path("bench")).unwrap();
    let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut held = true;
    runtime.block_on(async {
        held &= plan.measure(&transports, &unix).await;
        held &= plan.measure(&transports, &tcp).await;
    });
    if !held {
        std::process::exit(1);
    }
}

struct Plan {
    dials: usize,
    transfers: usize,
    chunks: usize,
}

impl Plan {
    /// Whether all figures are good enough.
    async fn measure<S: Server>(&self, transports: &Transports, server: &S) -> bool {
        let address = server.address();
        let target = S::target(&address);
        let (mut ours, mut direct) = (Vec::new(), Vec::new());
        for round in 0..self.dials {
            for turn in 0..2 {
                // Who comes first, finds colder caches: so they take turns at that too.
                if (round + turn) % 2 == 0 {
                    let start = Instant::now();
                    let stream = transports.dial(&target, later()).await.unwrap();
                    ours.push(start.elapsed());
                    drop(stream);
                } else {
                    let start = Instant::now();
                    let stream = S::connect(&address).await;
                    direct.push(start.elapsed());
                    drop(stream);
                }
                drop(server.accept());
            }
        }
        let (ours, direct) = (median(ours), median(direct));
        let name = S::NAME;
        println!(
            "dial {name}: {ours:?} through the plugin, {direct:?} with tokio alone (p50 of {})",
            self.dials
        );
        let ratio = ours.as_secs_f64() / direct.as_secs_f64();
        let mut held = figure(&format!("dial-{name}"), ratio, "<=", DIAL_AT_MOST);

        for direction in [Direction::Send, Direction::Receive] {
            let dialed = transports.dial(&target, later()).await.unwrap();
            let mut ours = Pair(dialed, server.accept());
            let mut direct = Pair(S::connect(&address).await, server.accept());
            let mut ratios = Vec::new();
            for _ in 0..self.transfers {
                let ours = ours.carry(direction, self.chunks).await;
                let direct = direct.carry(direction, self.chunks).await;
                ratios.push(direct.as_secs_f64() / ours.as_secs_f64());
            }
            ratios.sort_by(f64::total_cmp);
            let ratio = ratios[ratios.len() / 2];
            let name = format!("{}-{name}", direction.name());
            held &= figure(&name, ratio, ">=", RATE_AT_LEAST);
        }
        held
    }
}

/// A stream under test and a blocking one at its far end.
struct Pair<Near, Far>(Near, Far);

impl<Near: AsyncRead + AsyncWrite + Unpin, Far: Read + Write> Pair<Near, Far> {
    /// How long the bytes take, chunk by chunk, all on this thread: a chunk fits into the kernel's
    /// buffers, so nobody waits, and how busy the machine is matters little.
    async fn carry(&mut self, direction: Direction, chunks: usize) -> Duration {
        const CHUNK: usize = 32 * 1024;
        let Self(near, far) = self;
        let mut chunk = vec![1; CHUNK];
        let start = Instant::now();
        for _ in 0..chunks {
            match direction {
                Direction::Send => {
                    near.write_all(&chunk).await.unwrap();
                    far.read_exact(&mut chunk).unwrap();
                }
                Direction::Receive => {
                    far.write_all(&chunk).unwrap();
                    near.read_exact(&mut chunk).await.unwrap();
                }
            }
        }
        start.elapsed()
    }
}

#[derive(Clone, Copy)]
enum Direction {
    Send,
    Receive,
}

impl Direction {
    fn name(self) -> &'static str {
        match self {
            Self::Send => "send-rate",
            Self::Receive => "receive-rate",
        }
    }
}

/// What both contenders connect to.
trait Server {
    const NAME: &'static str;
    type Address;
    type Direct: AsyncRead + AsyncWrite + Unpin;
    type Accepted: Read + Write + Send + 'static;

    fn address(&self) -> Self::Address;
    fn target(address: &Self::Address) -> String;
    async fn connect(address: &Self::Address) -> Self::Direct;
    fn accept(&self) -> Self::Accepted;
}

impl Server for UnixListener {
    const NAME: &'static str = "unix";
    type Address = PathBuf;
    type Direct = tokio::net::UnixStream;
    type Accepted = UnixStream;

    fn address(&self) -> PathBuf {
        self.local_addr().unwrap().as_pathname().unwrap().to_owned()
    }

    fn target(address: &PathBuf) -> String {
        format!("unix:{}", address.display())
    }

    async fn connect(address: &PathBuf) -> Self::Direct {
        tokio::net::UnixStream::connect(address).await.unwrap()
    }

    fn accept(&self) -> UnixStream {
        Self::accept(self).unwrap().0
    }
}

impl Server for TcpListener {
    const NAME: &'static str = "tcp";
    type Address = SocketAddr;
    type Direct = tokio::net::TcpStream;
    type Accepted = TcpStream;

    fn address(&self) -> SocketAddr {
        self.local_addr().unwrap()
    }

    fn target(address: &SocketAddr) -> String {
        format!("tcp:{address}")
    }

    async fn connect(address: &SocketAddr) -> Self::Direct {
        tokio::net::TcpStream::connect(*address).await.unwrap()
    }

    fn accept(&self) -> TcpStream {
        Self::accept(self).unwrap().0
    }
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Prints a figure and says whether it is good enough.
fn figure(name: &str, value: f64, op: &str, limit: f64) -> bool {
    let held = if op == "<=" {
        value <= limit
    } else {
        value >= limit
    };
    let verdict = if held { "ok" } else { "short" };
    println!("figure transport-{name} {value:.3} x bar {op} {limit} {verdict}");
    held
}
