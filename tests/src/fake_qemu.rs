//! A scripted QEMU: the far end of a QMP connection, told what to say.
//!
//! Speaks bytes and knows no client. It reads a stream of JSON as QEMU does: no line ends are
//! needed, and on a unix socket it reads byte by byte, so each descriptor is seen with the
//! command it came with.
//!
//! A test tells a conversation:
//!
//! ```
//! use serde_json::json;
//! use tests::fake_qemu::FakeQemu;
//! use tokio::io::AsyncWriteExt;
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let (mut client, mut qemu) = FakeQemu::over_memory();
//! client.write_all(br#"{"execute":"query-status","id":1}"#).await.unwrap();
//!
//! let asked = qemu.expect("query-status").await;
//! qemu.event("STOP", json!({})).await;
//! qemu.reply(&asked, json!({"running": false, "status": "paused"})).await;
//! assert_eq!(qemu.seen().commands, 1);
//! # });
//! ```
//!
//! or lets it answer by itself, for a daemon that only needs something to talk to:
//!
//! ```
//! use serde_json::json;
//! use tests::fake_qemu::{Answers, FakeQemu};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let (client, qemu) = FakeQemu::over_unix().unwrap();
//! let answers = Answers::new().returns("query-name", json!({"name": "web-1"}));
//! let served = tokio::spawn(qemu.serve(answers));
//! // ... the daemon's own client talks over `client` here ...
//! drop(client);
//! assert_eq!(served.await.unwrap().commands, 0);
//! # });
//! ```
//!
//! Every method that waits for the client panics with what it saw when the conversation goes
//! otherwise than told: it is a test tool, and the test is what failed.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    io::{self, IoSliceMut},
    mem::MaybeUninit,
    os::fd::{AsFd as _, OwnedFd},
};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::{Map, Value, json};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, Interest},
    net::UnixStream,
};

/// The most descriptors one message can carry (the kernel's `SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// A QEMU that says what a test tells it to.
///
/// Dropping it closes the connection, as when QEMU dies.
pub struct FakeQemu {
    stream: Stream,
    input: Input,
    seen: Seen,
    clock: u64,
}

/// A command that the client sent.
#[derive(Debug)]
#[non_exhaustive]
pub struct Received {
    /// Its name.
    pub name: String,
    /// Its arguments; null if it had none.
    pub arguments: Value,
    /// Its id; null if it had none.
    pub id: Value,
    /// Whether it came as `exec-oob`.
    pub oob: bool,
    /// The descriptors that came with its bytes.
    pub fds: Vec<OwnedFd>,
    /// The message as it was on the wire.
    pub text: String,
}

/// What a fake has seen of its client.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Seen {
    /// Whole commands.
    pub commands: u64,
    /// Bytes, those of unfinished commands included.
    pub bytes: u64,
    /// Descriptors.
    pub fds: u64,
}

enum Stream {
    /// Carries descriptors.
    Unix(UnixStream),
    Other(Box<dyn Bytes>),
}

trait Bytes: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Bytes for T {}

impl FakeQemu {
    /// A fake and the client's end of a unix socket. Carries descriptors.
    ///
    /// # Errors
    ///
    /// When the system has no socket pair to give.
    pub fn over_unix() -> io::Result<(UnixStream, Self)> {
        let (client, ours) = UnixStream::pair()?;
        Ok((client, Self::on_unix(ours)))
    }

    /// A fake and the client's end of a pipe in memory: no system call, so it also runs on
    /// paused time.
    #[must_use]
    pub fn over_memory() -> (DuplexStream, Self) {
        let (client, ours) = tokio::io::duplex(64 * 1024);
        (client, Self::on(ours))
    }

    /// A fake on a unix socket, as one accepted from a listener.
    #[must_use]
    pub fn on_unix(stream: UnixStream) -> Self {
        Self::with(Stream::Unix(stream))
    }

    /// A fake on any stream. It sees no descriptors.
    #[must_use]
    pub fn on(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        Self::with(Stream::Other(Box::new(stream)))
    }

    fn with(stream: Stream) -> Self {
        Self {
            stream,
            input: Input::default(),
            seen: Seen::default(),
            clock: 0,
        }
    }

    /// Says what QEMU 7.2 says on connect, with or without the out-of-band lane.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the greeting may be torn.
    pub async fn greet(&mut self, oob: bool) {
        self.send(&greeting(oob)).await;
    }

    /// Greets, expects `qmp_capabilities` and grants it; gives what was asked for.
    ///
    /// # Panics
    ///
    /// If the client does anything else.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn negotiate(&mut self, oob: bool) -> Received {
        self.greet(oob).await;
        let asked = self.expect("qmp_capabilities").await;
        self.reply(&asked, json!({})).await;
        asked
    }

    /// The next command, or `None` if the client closed the stream.
    ///
    /// # Panics
    ///
    /// If what the client sent is no command.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was read is kept.
    pub async fn next(&mut self) -> Option<Received> {
        loop {
            if let Some((text, fds)) = self.input.take_object() {
                self.seen.commands += 1;
                return Some(Received::parse(&text, fds));
            }
            let read = self.stream.read_into(&mut self.input).await;
            let (bytes, fds) = read.unwrap_or((0, 0));
            self.seen.bytes += bytes;
            self.seen.fds += fds;
            if bytes == 0 {
                return None;
            }
        }
    }

    /// The next command, which must be `name`.
    ///
    /// # Panics
    ///
    /// If it is another, or the client closed the stream.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: what was read is kept.
    pub async fn expect(&mut self, name: &str) -> Received {
        let Some(received) = self.next().await else {
            panic!(
                "expected {name}, but the client closed the stream {}",
                self.input
            )
        };
        assert_eq!(
            received.name, name,
            "expected {name}, got {}",
            received.text
        );
        received
    }

    /// Expects that the client closes the stream without another byte.
    ///
    /// # Panics
    ///
    /// If it sends anything.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn expect_end(&mut self) {
        if let Some(received) = self.next().await {
            panic!("expected the end of the stream, got {}", received.text)
        }
        assert!(
            self.input.is_empty(),
            "the client left {} behind",
            self.input
        );
    }

    /// Answers a command.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the reply may be torn.
    pub async fn reply(&mut self, to: &Received, value: Value) {
        self.send(&with_id(json!({"return": value}), &to.id)).await;
    }

    /// Expects `name` and answers it.
    ///
    /// # Panics
    ///
    /// As [`expect`](Self::expect) and [`reply`](Self::reply).
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn reply_to(&mut self, name: &str, value: Value) {
        let asked = self.expect(name).await;
        self.reply(&asked, value).await;
    }

    /// Refuses a command.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn refuse(&mut self, to: &Received, class: &str, desc: &str) {
        self.send(&with_id(error(class, desc), &to.id)).await;
    }

    /// Sends an error that does not say whose it is, as QEMU does for what it cannot parse.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn error_without_id(&mut self, class: &str, desc: &str) {
        self.send(&error(class, desc)).await;
    }

    /// Sends an event. `data` is left out if it is null or empty. The clock goes on by a
    /// microsecond each time.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn event(&mut self, name: &str, data: Value) {
        self.clock += 1;
        let mut event = json!({
            "event": name,
            "timestamp": {"seconds": self.clock / 1_000_000, "microseconds": self.clock % 1_000_000},
        });
        if data.as_object().is_some_and(|members| !members.is_empty()) {
            event["data"] = data;
        }
        self.send(&event).await;
    }

    /// Sends a message, with QEMU's line end.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn send(&mut self, message: &Value) {
        self.raw(format!("{message}\r\n")).await;
    }

    /// Sends bytes as they are: torn, glued or no QMP at all.
    ///
    /// # Panics
    ///
    /// If the client is gone.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe.
    pub async fn raw(&mut self, bytes: impl AsRef<[u8]>) {
        let sent = self.stream.write(bytes.as_ref()).await;
        sent.unwrap_or_else(|error| panic!("the client is gone: {error}"));
    }

    /// Closes the way to the client only: it sees the end of the stream and may still send.
    ///
    /// # Panics
    ///
    /// If the stream cannot be shut down.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn close_half(&mut self) {
        match &mut self.stream {
            Stream::Unix(stream) => stream.shutdown().await,
            Stream::Other(stream) => stream.shutdown().await,
        }
        .expect("a stream that is open can be shut down");
    }

    /// Keeps the connection and does nothing any more, as a QEMU under SIGSTOP. Never returns.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe: dropping the future wakes it up again.
    pub async fn hang(&mut self) -> std::convert::Infallible {
        std::future::pending().await
    }

    /// Closes the connection at once, as a QEMU under SIGKILL.
    pub fn die(self) {
        drop(self);
    }

    /// Greets, negotiates and answers by `answers` until the client closes the stream.
    ///
    /// # Panics
    ///
    /// If what the client sent is no command.
    ///
    /// # Cancel safety
    ///
    /// Not cancel safe: the connection is dropped with it.
    pub async fn serve(mut self, mut answers: Answers) -> Seen {
        let mut message = greeting(answers.oob);
        loop {
            // A client may leave at any moment: that ends the service and is no failure.
            if self
                .stream
                .write(format!("{message}\r\n").as_bytes())
                .await
                .is_err()
            {
                return self.seen;
            }
            message = loop {
                let Some(asked) = self.next().await else {
                    return self.seen;
                };
                if let Some(answer) = answers.to(&asked) {
                    break with_id(answer, &asked.id);
                }
            };
        }
    }

    /// What it has seen so far.
    #[must_use]
    pub fn seen(&self) -> Seen {
        self.seen
    }
}

impl fmt::Debug for FakeQemu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeQemu")
            .field("seen", &self.seen)
            .finish_non_exhaustive()
    }
}

impl Received {
    fn parse(text: &[u8], fds: Vec<OwnedFd>) -> Self {
        let text = String::from_utf8_lossy(text).into_owned();
        let mut members: Map<String, Value> = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("the client sent no JSON: {error} in {text}"));
        let oob = members.contains_key("exec-oob");
        let key = if oob { "exec-oob" } else { "execute" };
        let Some(Value::String(name)) = members.remove(key) else {
            panic!("the client sent no command: {text}")
        };
        let mut take = |key| members.remove(key).unwrap_or(Value::Null);
        Self {
            name,
            arguments: take("arguments"),
            id: take("id"),
            oob,
            fds,
            text,
        }
    }
}

/// How a fake answers by itself.
///
/// Knows `qmp_capabilities`, `query-status`, `query-version`, `query-yank`, `cont` and `stop`
/// from the start; what it does not know it refuses as QEMU does.
pub struct Answers {
    oob: bool,
    table: HashMap<String, Responder>,
}

type Responder = Box<dyn FnMut(&Received) -> Answer + Send>;

/// One answer of [`Answers`].
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Answer {
    /// A value.
    Return(Value),
    /// An error.
    Refuse {
        /// Its class, as `GenericError`.
        class: String,
        /// Its text.
        desc: String,
    },
    /// None at all.
    Silence,
}

impl Answers {
    /// Those every QEMU has, with the out-of-band lane.
    #[must_use]
    pub fn new() -> Self {
        Self {
            oob: true,
            table: HashMap::new(),
        }
        .returns("qmp_capabilities", json!({}))
        .returns(
            "query-status",
            json!({"running": true, "singlestep": false, "status": "running"}),
        )
        .returns("query-version", greeting(true)["QMP"]["version"].clone())
        .returns("query-yank", json!([]))
        .returns("cont", json!({}))
        .returns("stop", json!({}))
    }

    /// Without the out-of-band lane.
    #[must_use]
    pub fn without_oob(mut self) -> Self {
        self.oob = false;
        self
    }

    /// Answers `name` with `value`.
    #[must_use]
    pub fn returns(self, name: &str, value: Value) -> Self {
        self.with(name, move |_| Answer::Return(value.clone()))
    }

    /// Answers `name` with an error.
    #[must_use]
    pub fn refuses(self, name: &str, class: &str, desc: &str) -> Self {
        let (class, desc) = (class.to_owned(), desc.to_owned());
        self.with(name, move |_| Answer::Refuse {
            class: class.clone(),
            desc: desc.clone(),
        })
    }

    /// Answers `name` with what `answer` says.
    #[must_use]
    pub fn with(
        mut self,
        name: &str,
        answer: impl FnMut(&Received) -> Answer + Send + 'static,
    ) -> Self {
        self.table.insert(name.to_owned(), Box::new(answer));
        self
    }

    fn to(&mut self, asked: &Received) -> Option<Value> {
        let Some(answer) = self.table.get_mut(&asked.name) else {
            let desc = format!("no such command: {}", asked.name);
            return Some(error("CommandNotFound", &desc));
        };
        match answer(asked) {
            Answer::Return(value) => Some(json!({"return": value})),
            Answer::Refuse { class, desc } => Some(error(&class, &desc)),
            Answer::Silence => None,
        }
    }
}

impl Default for Answers {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answers")
            .field("names", &self.table.keys())
            .finish_non_exhaustive()
    }
}

/// What QEMU 7.2 says on connect.
#[must_use]
pub fn greeting(oob: bool) -> Value {
    let capabilities = if oob { json!(["oob"]) } else { json!([]) };
    json!({"QMP": {
        "version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": "fake"},
        "capabilities": capabilities,
    }})
}

fn error(class: &str, desc: &str) -> Value {
    json!({"error": {"class": class, "desc": desc}})
}

fn with_id(mut message: Value, id: &Value) -> Value {
    if !id.is_null() {
        message["id"] = id.clone();
    }
    message
}

/// What was read and not yet taken.
#[derive(Default)]
struct Input {
    bytes: Vec<u8>,
    fds: VecDeque<OwnedFd>,
    /// Bytes at the front that were looked at.
    scanned: usize,
    depth: usize,
    in_string: bool,
    escaped: bool,
}

impl Input {
    /// The next whole object with its descriptors. Objects are taken as soon as they are whole,
    /// so all descriptors there are came with this one.
    fn take_object(&mut self) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
        while let Some(&byte) = self.bytes.get(self.scanned) {
            self.scanned += 1;
            if self.escaped {
                self.escaped = false;
            } else if self.in_string {
                self.escaped = byte == b'\\';
                self.in_string = byte != b'"';
            } else {
                match byte {
                    b'"' => self.in_string = true,
                    b'{' | b'[' => self.depth += 1,
                    b'}' | b']' => self.depth = self.depth.saturating_sub(1),
                    _ => {}
                }
                if self.depth == 0 && byte == b'}' {
                    let rest = self.bytes.split_off(self.scanned);
                    self.scanned = 0;
                    let object = std::mem::replace(&mut self.bytes, rest);
                    return Some((object, self.fds.drain(..).collect()));
                }
            }
        }
        None
    }

    fn is_empty(&self) -> bool {
        self.bytes.iter().all(u8::is_ascii_whitespace)
    }
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.bytes.escape_ascii())
    }
}

impl Stream {
    async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes).await,
            Self::Other(stream) => stream.write_all(bytes).await,
        }
    }

    /// Reads more; gives how many bytes and descriptors.
    async fn read_into(&mut self, input: &mut Input) -> io::Result<(u64, u64)> {
        match self {
            Self::Other(stream) => Ok((stream.read_buf(&mut input.bytes).await? as u64, 0)),
            Self::Unix(stream) => {
                stream
                    .async_io(Interest::READABLE, || receive_byte(stream, input))
                    .await
            }
        }
    }
}

/// Reads one byte, as QEMU does: more at once would blur which command a descriptor came with.
fn receive_byte(stream: &UnixStream, input: &mut Input) -> io::Result<(u64, u64)> {
    let mut byte = [0];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(
        stream.as_fd(),
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT,
    )?;
    let before = input.fds.len();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            input.fds.extend(fds);
        }
    }
    input.bytes.extend_from_slice(&byte[..received.bytes]);
    Ok((received.bytes as u64, (input.fds.len() - before) as u64))
}
