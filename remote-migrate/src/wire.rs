//! Two daemons in two processes: requests and answers as frames over any stream.
//!
//! [`WirePeer`] is the asking end, [`serve_connection`] the answering end. Between them are bytes, over a
//! unix socket, vsock or TLS; whoever accepts connections says who is there ([`PeerIdentity`]), and the
//! [`AllowList`] whether that one may be. What the requests mean is not known here.
//!
//! # The format
//!
//! A frame is a length, four bytes with the most significant first, and as many bytes of JSON: an object
//! with one member.
//!
//! | member | from | holds | is taken if |
//! |---|---|---|---|
//! | `hello` | both, first | `magic`, `version`, `features` | it is the first, and a version is shared |
//! | `request` | who dialled | `id`, `within_ms`, `request` | `id` is the next, none is open, the epoch is one |
//! | `answer` | who accepted | `id`, `answer` | `id`, migration and epoch are those of the open request |
//! | `ping` | both | `id`, `underway` | `id` is the next |
//! | `pong` | both | `id`, `clock` | `id` is that of the open ping |
//! | `fault` | both, last | `kind`, `text` | always; the connection is over |
//!
//! ```text
//!  00 00 00 63 {"hello":{"magic":"vmwright-migrate","version":1,"features":["clock","downtime","progress","run"]}}
//!  00 00 00 0f {"ping":{"id":1}}
//! ```
//!
//! # Limits
//!
//! | what | limit | beyond it |
//! |---|---|---|
//! | first frame of a side | [`frame::FIRST_LIMIT`] | refused at its length, before anything is kept for it |
//! | any other frame | [`frame::LIMIT`] | the same; it is not sent either |
//! | features in a hello | [`message::MAX_FEATURES`] | refused |
//! | depth of JSON | 128, the parser's own | refused |
//! | requests open on a connection | 1 | refused |
//! | silence, an unanswered ping, a frame that does not end | [`Options::silence`] | given up |
//! | answers a peer does not read | 64 KiB, and one frame | nothing is read from it, so it falls silent |
//! | dialling, handshake and greeting, for the side that dials | [`Options::connect`] | given up |
//! | greeting, for the side that accepts | [`Options::silence`] | given up |
//! | serving one request | [`Options::longest`] | answered as busy |
//!
//! How many connections are accepted is up to the caller.
//!
//! # Versions
//!
//! This is version [`message::VERSION`]. A side names its newest version and speaks that and the one
//! before; both take the older of the two newest, and refuse each other, each naming both, if they are
//! more than one apart. So a cluster is brought up to date host by host, one version at a time. The
//! version goes up when a side that does not know of a change would do the wrong thing. What may be left
//! out is a feature instead: named in the hello, used if both name it. Members that are not known are
//! skipped.
//!
//! | feature | what it brings | a peer without it |
//! |---|---|---|
//! | [`message::CLOCK`] | how far the clocks are apart | no downtime is told |
//! | [`message::DOWNTIME`] | how long the guest stood still | the same |
//! | [`message::PROGRESS`] | how far the migration is, at the destination | it is told at the source alone |
//! | [`message::RUN`] | a guest that was paused on its way arrives paused | it gets no such guest; the source keeps it |
//!
//! Version 1 without features is what the oldest peer speaks; `tests/wire/older.rs` has its frames.
//!
//! # Example
//!
//! `examples/two_daemons.rs` moves a guest between two processes. The ends, in short:
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use remote_migrate::wire::{AllowList, Link, Options, PeerIdentity, UnixDial, WirePeer, serve_connection};
//! use tokio::{net::UnixListener, sync::Semaphore};
//!
//! # async fn accept(destination: remote_migrate::Destination) -> std::io::Result<()> {
//! let options = Options::new(AllowList::nobody().uid(0));
//! let places = Arc::new(Semaphore::new(16));
//! let listener = UnixListener::bind("/run/daemon/migrate.sock")?;
//! loop {
//!     let place = Arc::clone(&places).acquire_owned().await.expect("never closed");
//!     let (stream, _) = listener.accept().await?;
//!     let (destination, options, link) = (destination.clone(), options.clone(), Link::new());
//!     tokio::spawn(async move {
//!         let identity = PeerIdentity::of_unix(&stream)?;
//!         let served = serve_connection(stream, &identity, &destination, &options, &link).await;
//!         served.map_err(std::io::Error::other)?;
//!         drop(place);
//!         std::io::Result::Ok(())
//!     });
//! }
//! # }
//! # fn dial() {
//! let there = UnixDial::new("/run/daemon/migrate.sock");
//! let peer = WirePeer::new(there, Options::new(AllowList::nobody().uid(0)));
//! # }
//! ```
//!
//! # What is not promised
//!
//! Whoever is allowed may ask about every migration: daemons of one cluster trust each other. Certificates
//! are not looked up in revocation lists; an authority of its own with short-lived certificates, and a
//! name taken off the allow-list, do that work.

mod client;
mod clock;
mod connection;
mod dial;
mod error;
pub mod frame;
mod identity;
mod link;
pub mod message;
mod server;
pub mod session;
mod tls;

use std::time::Duration;

pub use client::WirePeer;
pub use clock::ClockOffset;
pub use dial::{Dial, DialError, Dialled, Stream, TlsDial, UnixDial};
pub use error::WireError;
pub use identity::{AllowList, PeerIdentity, Refused};
pub use link::{Link, LinkState};
pub use server::serve_connection;
pub use tls::{Pem, Tls, TlsError};

use message::Hello;
use session::Terms;

/// How this daemon speaks with others, and with whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Who may be at the other end.
    pub allow: AllowList,
    /// How often each side asks whether the other is there. 5 s, as in libvirt.
    pub beat: Duration,
    /// How long silence is taken, from the last whole frame or from an unanswered ping; two beats at
    /// least. 15 s: three beats lost in a row are no accident.
    pub silence: Duration,
    /// How long it may take to make a connection, with its handshake and greeting. 10 s.
    pub connect: Duration,
    /// How long one request is served, whatever its asker would wait. 1 h.
    pub longest: Duration,
}

impl Options {
    /// With these peers alone.
    #[must_use]
    pub fn new(allow: AllowList) -> Self {
        Self {
            allow,
            beat: Duration::from_secs(5),
            silence: Duration::from_secs(15),
            connect: Duration::from_secs(10),
            longest: Duration::from_secs(3600),
        }
    }

    fn terms(&self) -> Terms {
        Terms {
            hello: Hello::ours(),
            beat: self.beat,
            silence: self.silence,
        }
    }
}
