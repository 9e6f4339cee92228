//! What needs more of the machine than a user has: files of other users, and networks of which
//! nothing comes back. What cannot be tried is reported as ignored, with the reason.
//!
//! One after the other, since descriptors and threads of the whole process are counted.

#![allow(clippy::unwrap_used, reason = "a test may stop at the first surprise")]

#[path = "support/stage.rs"]
mod support;

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::fs::chown;
use std::process::Command;
use std::thread;
use std::time::Duration;

use futures::poll;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use rustix::net::{AddressFamily, SocketType};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use support::{Stage, later, open_descriptors, threads};
use transport_host::{Deadline, ErrorKind, Transports};

fn main() {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = vec![
        Trial::ignorable_test("a_plugin_of_another_user_is_refused", foreign_owner),
        Trial::ignorable_test(
            "a_connect_whose_packets_are_dropped_ends_by_its_limit_and_leaves_nothing",
            dropped_packets,
        ),
        Trial::test(
            "a_connect_to_a_full_tcp_backlog_ends_by_its_limit_and_leaves_nothing",
            full_backlog,
        ),
    ];
    libtest_mimic::run(&arguments, trials).exit();
}

fn foreign_owner() -> Result<Completion, Failed> {
    let stage = Stage::new();
    let plugin = stage.built("unix");
    if chown(&plugin, Some(12345), None).is_err() {
        return Ok(Completion::ignored_with("only root can give a file away"));
    }
    let error = Transports::builder().load(plugin).unwrap_err();
    assert!(
        matches!(error.kind(), ErrorKind::ForeignOwner { owner: 12345, .. }),
        "{error}"
    );
    assert!(
        error
            .to_string()
            .ends_with("is owned by uid 12345; must be root or 0"),
        "{error}"
    );
    Ok(Completion::Completed)
}

fn dropped_packets() -> Result<Completion, Failed> {
    let network = match Network::new() {
        Ok(network) => network,
        Err(reason) => return Ok(Completion::ignored_with(reason)),
    };
    let stage = Stage::new();
    network.inside(|| {
        let transports = stage.loaded();
        for target in ["tcp:192.0.2.1:9", "tcp:[2001:db8::1]:9"] {
            ends_by_its_limit(&transports, target);
        }
    });
    Ok(Completion::Completed)
}

fn full_backlog() -> Result<(), Failed> {
    let transports = Stage::new().loaded();
    let socket = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None)?;
    let any_port: SocketAddr = "127.0.0.1:0".parse()?;
    rustix::net::bind(&socket, &any_port)?;
    rustix::net::listen(&socket, 0)?;
    let server = TcpListener::from(socket);
    let address = server.local_addr()?;
    let _in_the_backlog = TcpStream::connect(address)?; // room for one
    ends_by_its_limit(&transports, &format!("tcp:{address}"));
    Ok(())
}

/// Dials what never answers, twice: once until the deadline, once until the caller gives up. The
/// clock is the test's, so nothing really waits.
fn ends_by_its_limit(transports: &Transports, target: &str) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap();
    runtime.block_on(async {
        let before = (open_descriptors(), threads());
        let deadline = Deadline::now() + Duration::from_secs(600);
        let error = transports.dial(target, deadline).await.unwrap_err();
        assert!(
            matches!(error.kind(), ErrorKind::TimedOut { waited, .. } if waited.as_secs() == 600),
            "{error}"
        );
        assert_eq!(Deadline::now(), deadline);

        let mut dial = Box::pin(transports.dial(target, later()));
        assert!(poll!(&mut dial).is_pending());
        assert_eq!(threads(), before.1, "nobody waits on a thread of their own");
        drop(dial);
        assert_eq!((open_descriptors(), threads()), before);
    });
}

/// A network namespace in which every packet to the documentation's addresses is dropped.
struct Network {
    name: String,
}

impl Network {
    /// Or the reason why this machine has none.
    fn new() -> Result<Self, String> {
        let name = format!("vmwright-{}", std::process::id());
        ip(&format!("netns add {name}"))?;
        let network = Self { name };
        // Through the loopback they arrive where nobody has such an address, and nobody forwards.
        for route in [
            "link set lo up",
            "route add 192.0.2.0/24 dev lo",
            "-6 route add 2001:db8::/64 dev lo",
        ] {
            ip(&format!("-n {} {route}", network.name))?;
        }
        Ok(network)
    }

    /// Runs `work` on a thread of that network.
    fn inside(&self, work: impl FnOnce() + Send) {
        let namespace = File::open(format!("/run/netns/{}", self.name)).unwrap();
        thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).unwrap();
                work();
            });
            inside.join().unwrap();
        });
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _stays_for_the_next_boot = ip(&format!("netns del {}", self.name));
    }
}

fn ip(words: &str) -> Result<(), String> {
    let output = Command::new("ip").args(words.split(' ')).output();
    let output = output.map_err(|error| format!("cannot run ip (iproute2): {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("ip {words}: {}", said.trim()))
}
