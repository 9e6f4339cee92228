//! A scripted guest agent.
//!
//! [`FakeGuest`] owns one end of a stream and speaks as `qemu-ga` does, or as badly as the script
//! says. It knows nothing of any client: it parses a byte stream, and what it does well it does as
//! a real agent was seen to do it (7.2.22):
//!
//! - requests need no line end, may come in any pieces and several at once;
//! - a 0xFF ends half a request and is answered by an error line of its own;
//! - `guest-sync-delimited` is answered behind a 0xFF, `guest-sync` is not;
//! - an `id` is echoed; an answer is one line;
//! - an answer whose client has left is delivered to the next client, before its own
//!   ([`FakeGuest::reconnect`]).
//!
//! As a conversation, when each step matters:
//!
//! ```
//! # use serde_json::json;
//! # use tests::fake_guest::FakeGuest;
//! # use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> std::io::Result<()> {
//! let (stream, mut guest) = FakeGuest::open();
//! let mut client = BufReader::new(stream);
//! client.write_all(br#"{"execute":"guest-ping"}"#).await?;
//! guest.expect("guest-ping").await;
//! guest.send(b"half of an answer").await; // anything at all
//! guest.answer(json!({})).await;
//! let mut line = String::new();
//! client.read_line(&mut line).await?;
//! assert_eq!(line, "half of an answer{\"return\":{}}\n");
//! # Ok(())
//! # }
//! ```
//!
//! By itself, from a [`Table`] of answers, in a task of its own:
//!
//! ```
//! # use serde_json::json;
//! # use tests::fake_guest::{Act, FakeGuest, Table};
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() {
//! let (stream, mut guest) = FakeGuest::open();
//! let mut table = Table::typical().on("guest-get-users", [Act::Return(json!([]))]);
//! tokio::spawn(async move { guest.serve(&mut table).await });
//! # drop(stream);
//! # }
//! ```

mod parser;
mod table;

use std::collections::VecDeque;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};

use self::parser::{Heard, Parser};
pub use self::table::{Act, Table};

/// What a real channel holds before its writer must wait, about.
const CHANNEL: usize = 64 * 1024;

/// One request as it was heard.
#[derive(Clone, Debug, PartialEq)]
#[expect(
    clippy::exhaustive_structs,
    reason = "these are all members of a request"
)]
pub struct Request {
    /// The command.
    pub name: String,
    /// Its arguments, `Null` if there were none.
    pub arguments: Value,
    /// What its client calls it, to be echoed.
    pub id: Option<Value>,
}

/// What becomes of `guest-sync` and `guest-sync-delimited`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Syncs {
    /// Both are answered, as today's agents do.
    #[default]
    Answered,
    /// The delimited one is a command that the agent does not have.
    PlainOnly,
    /// Both are swallowed.
    Swallowed,
    /// Both are handed to the script like any other request.
    Scripted,
}

/// One end of a channel, and the agent at it.
///
/// Dropping it hangs up. What it was sent and what it could not deliver outlives a client.
#[derive(Debug)]
pub struct FakeGuest<S = DuplexStream> {
    stream: S,
    parser: Parser,
    heard: VecDeque<Heard>,
    syncs: Syncs,
    synced: usize,
    id: Option<Value>,
    undelivered: Vec<u8>,
}

impl FakeGuest {
    /// A new agent, and the stream of its first client.
    #[must_use]
    pub fn open() -> (DuplexStream, Self) {
        let (client, stream) = tokio::io::duplex(CHANNEL);
        (client, Self::over(stream))
    }

    /// The stream of the next client. The one before is gone, the agent is the same: half a
    /// request that it was sent is still there, and what it answers to it goes to the new one.
    pub fn reconnect(&mut self) -> DuplexStream {
        let (client, stream) = tokio::io::duplex(CHANNEL);
        self.stream = stream;
        client
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> FakeGuest<S> {
    /// An agent at the end of any stream, such as one end of a socket pair.
    pub fn over(stream: S) -> Self {
        Self {
            stream,
            parser: Parser::default(),
            heard: VecDeque::new(),
            syncs: Syncs::default(),
            synced: 0,
            id: None,
            undelivered: Vec::new(),
        }
    }

    /// From now on, treats syncs in another way.
    pub fn set_syncs(&mut self, syncs: Syncs) {
        self.syncs = syncs;
    }

    /// How many syncs it has heard.
    #[must_use]
    pub fn syncs_heard(&self) -> usize {
        self.synced
    }

    /// The next request that is the script's to answer, or `None` when the client has left.
    ///
    /// Syncs and what is no request are answered on the way.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe towards requests: none is lost. An answer on the way may be cut.
    pub async fn request(&mut self) -> Option<Request> {
        loop {
            while let Some(heard) = self.heard.pop_front() {
                match heard {
                    Heard::Request(request) => {
                        self.id.clone_from(&request.id);
                        if !self.answer_sync(&request).await {
                            return Some(request);
                        }
                    }
                    Heard::Nonsense(what) => {
                        self.id = None;
                        self.refuse("GenericError", &what).await;
                    }
                }
            }
            let mut chunk = [0; 4096];
            match self.stream.read(&mut chunk).await {
                Ok(0) | Err(_) => return None,
                Ok(count) => self.heard.extend(self.parser.hear(&chunk[..count])),
            }
        }
    }

    /// The next request, which must be this one.
    ///
    /// # Panics
    ///
    /// If it is another, or the client has left.
    ///
    /// # Cancel safety
    ///
    /// As [`request`](Self::request).
    pub async fn expect(&mut self, name: &str) -> Request {
        match self.request().await {
            Some(request) if request.name == name => request,
            other => panic!("expected the client to ask {name}, it asked {other:?}"),
        }
    }

    /// Answers the request heard last.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the answer may be cut.
    pub async fn answer(&mut self, value: Value) {
        let line = self.line(Act::Return(value));
        self.send(&line).await;
    }

    /// Answers the request heard last with an error.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the answer may be cut.
    pub async fn refuse(&mut self, class: &str, desc: &str) {
        let line = self.line(Act::refuse(class, desc));
        self.send(&line).await;
    }

    /// Sends any bytes. What a client that has left did not take is kept for the next.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: an unknown part may have been sent.
    pub async fn send(&mut self, bytes: &[u8]) {
        self.undelivered.extend_from_slice(bytes);
        let mut sent = 0;
        while sent < self.undelivered.len() {
            match self.stream.write(&self.undelivered[sent..]).await {
                Ok(count) if count > 0 => sent += count,
                _ => break,
            }
        }
        self.undelivered.drain(..sent);
    }

    /// Sends `bytes` bytes without a line end, or as many as the client takes.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: an unknown part may have been sent.
    pub async fn flood(&mut self, bytes: usize) {
        let mut left = bytes;
        while left > 0 && self.undelivered.is_empty() {
            let piece = left.min(4096);
            self.send(&vec![b'x'; piece]).await;
            left -= piece;
        }
        self.undelivered.clear();
    }

    /// Answers from a table until the client leaves, or the table says to hang up.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe towards requests: none is lost. An answer on the way may be cut.
    pub async fn serve(&mut self, table: &mut Table) {
        while let Some(request) = self.request().await {
            // Neighbours are written at once: two answers to one request arrive glued.
            let mut glued = Vec::new();
            for act in table.respond(&request) {
                match act {
                    Act::Wait(_) | Act::Flood(_) | Act::HangUp => {
                        self.send(&glued).await;
                        glued.clear();
                    }
                    _ => {}
                }
                match act {
                    Act::Wait(time) => tokio::time::sleep(time).await,
                    Act::Flood(bytes) => self.flood(bytes).await,
                    Act::HangUp => return,
                    Act::Freeze(frozen) => table.set_frozen(frozen),
                    act => glued.extend(self.line(act)),
                }
            }
            self.send(&glued).await;
        }
    }

    /// Whether the request was a sync, and not the script's.
    async fn answer_sync(&mut self, request: &Request) -> bool {
        let delimited = match &*request.name {
            "guest-sync" => false,
            "guest-sync-delimited" => true,
            _ => return false,
        };
        self.synced += 1;
        match self.syncs {
            Syncs::Scripted => return false,
            Syncs::Swallowed => {}
            Syncs::PlainOnly if delimited => {
                let line = self.line(Act::not_found(&request.name));
                self.send(&line).await;
            }
            Syncs::Answered | Syncs::PlainOnly => {
                let mut bytes = if delimited { vec![0xFF] } else { Vec::new() };
                bytes.extend(self.line(Act::Return(request.arguments["id"].clone())));
                self.send(&bytes).await;
            }
        }
        true
    }

    /// An act as bytes, with the id that its request had.
    fn line(&self, act: Act) -> Vec<u8> {
        let mut answer = match act {
            Act::Return(value) => json!({ "return": value }),
            Act::Refuse { class, desc } => json!({ "error": { "class": class, "desc": desc } }),
            Act::Raw(bytes) => return bytes,
            Act::Wait(_) | Act::Flood(_) | Act::Freeze(_) | Act::HangUp => return Vec::new(),
        };
        if let Some(id) = &self.id {
            answer["id"] = id.clone();
        }
        format!("{answer}\n").into_bytes()
    }
}
