//! The ends of a wire in one process: a stream that can be cut, a server behind it, and a peer played by
//! the test itself.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use remote_migrate::{
    Answer, Destination, Request,
    wire::{
        AllowList, Dialled, Link, Options, PeerIdentity, WireError, WirePeer, frame,
        message::{Fault, Hello, Message},
        serve_connection,
    },
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream, ReadBuf},
    task::JoinHandle,
};

pub(crate) const US: PeerIdentity = PeerIdentity::Unix { uid: 7, pid: None };

pub(crate) fn options() -> Options {
    Options::new(AllowList::nobody().uid(7))
}

pub(crate) type Served = JoinHandle<Result<(), WireError>>;

/// Serves one end of a stream, and gives the other away.
pub(crate) fn serve(destination: Destination) -> (DuplexStream, Served) {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let served = tokio::spawn(async move {
        serve_connection(far, &US, &destination, &options(), &Link::new()).await
    });
    (near, served)
}

/// A peer at the other end of this stream, which cannot be dialled again.
pub(crate) fn peer_over(near: impl remote_migrate::wire::Stream + 'static) -> WirePeer {
    let near = Mutex::new(Some(near));
    let dial = move || {
        let near = near.lock().unwrap().take().ok_or("dialled once already");
        std::future::ready(near.map(|near| Dialled::new(near, US)).map_err(Into::into))
    };
    WirePeer::new(dial, options())
}

/// Where a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cut {
    /// After so many bytes to the destination.
    pub(crate) up: u64,
    /// Or after so many bytes from it.
    pub(crate) down: u64,
    /// Both ends hear that it broke; else neither does, and nothing passes any more.
    pub(crate) heard: bool,
    /// Bytes pass one at a time.
    pub(crate) bytewise: bool,
}

impl Cut {
    pub(crate) const NEVER: Self = Self {
        up: u64::MAX,
        down: u64::MAX,
        heard: true,
        bytewise: false,
    };
}

/// Bytes that passed.
#[derive(Clone, Default)]
pub(crate) struct Passed {
    pub(crate) up: Arc<AtomicU64>,
    pub(crate) down: Arc<AtomicU64>,
}

/// One end of a stream that is cut.
struct Chopped {
    inner: Option<DuplexStream>,
    cut: Cut,
    passed: Passed,
}

impl Chopped {
    /// How many bytes may pass at once; none, once it is cut.
    fn room(&mut self) -> Option<usize> {
        let left =
            |cut: u64, passed: &AtomicU64| cut.saturating_sub(passed.load(Ordering::Relaxed));
        let up = left(self.cut.up, &self.passed.up);
        let down = left(self.cut.down, &self.passed.down);
        if up.min(down) == 0 {
            if self.cut.heard {
                self.inner = None;
            }
            return None;
        }
        let most = if self.cut.bytewise { 1 } else { usize::MAX };
        Some(most.min(usize::try_from(up.min(down)).unwrap_or(usize::MAX)))
    }
}

impl AsyncRead for Chopped {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        out: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(room) = self.room() else {
            return match self.cut.heard {
                true => Poll::Ready(Err(io::ErrorKind::ConnectionReset.into())),
                false => Poll::Pending,
            };
        };
        let mut piece = vec![0; room.min(out.remaining())];
        let mut piece = ReadBuf::new(&mut piece);
        let inner = self.inner.as_mut().unwrap();
        let read = Pin::new(inner).poll_read(context, &mut piece);
        out.put_slice(piece.filled());
        let length = piece.filled().len() as u64;
        self.passed.down.fetch_add(length, Ordering::Relaxed);
        read
    }
}

impl AsyncWrite for Chopped {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let Some(room) = self.room() else {
            // Into a buffer that never empties, or into nothing.
            return match self.cut.heard {
                true => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                false => Poll::Ready(Ok(bytes.len())),
            };
        };
        let inner = self.inner.as_mut().unwrap();
        let bytes = &bytes[..bytes.len().min(room)];
        let written = Pin::new(inner).poll_write(context, bytes);
        if let Poll::Ready(Ok(length)) = &written {
            self.passed.up.fetch_add(*length as u64, Ordering::Relaxed);
        }
        written
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner = None;
        self.cut = Cut {
            up: 0,
            ..Cut::NEVER
        };
        Poll::Ready(Ok(()))
    }
}

/// A way to a destination whose first connection is cut.
#[derive(Clone)]
pub(crate) struct Road {
    destination: Arc<Mutex<Destination>>,
    cut: Cut,
    closed: Arc<Mutex<bool>>,
    /// Whether nothing can be dialled after the first connection was cut.
    closes: bool,
    pub(crate) passed: Passed,
    pub(crate) dialled: Arc<AtomicUsize>,
}

impl Road {
    pub(crate) fn new(destination: Destination, cut: Cut, closes: bool) -> Self {
        Self {
            destination: Arc::new(Mutex::new(destination)),
            cut,
            closed: Arc::default(),
            closes,
            passed: Passed::default(),
            dialled: Arc::default(),
        }
    }

    pub(crate) fn peer(&self) -> WirePeer {
        let road = self.clone();
        WirePeer::new(move || std::future::ready(road.dial()), options())
    }

    pub(crate) fn heal(&self) {
        *self.closed.lock().unwrap() = false;
    }

    fn dial(&self) -> Result<Dialled, Box<dyn std::error::Error + Send + Sync>> {
        let first = self.dialled.fetch_add(1, Ordering::Relaxed) == 0;
        if std::mem::replace(&mut *self.closed.lock().unwrap(), self.closes && first) {
            *self.closed.lock().unwrap() = true;
            return Err("no route to host".into());
        }
        let (near, _served) = serve(self.destination.lock().unwrap().clone());
        let (cut, passed) = if first {
            (self.cut, self.passed.clone())
        } else {
            (Cut::NEVER, Passed::default())
        };
        let inner = Some(near);
        Ok(Dialled::new(Chopped { inner, cut, passed }, US))
    }
}

/// A peer that the test plays itself, frame by frame.
pub(crate) struct Played {
    pub(crate) stream: DuplexStream,
    decoder: frame::Decoder,
}

impl Played {
    pub(crate) fn new(stream: DuplexStream) -> Self {
        Self {
            stream,
            decoder: frame::Decoder::new(),
        }
    }

    /// One that has said hello, and heard it.
    pub(crate) async fn greeted(stream: DuplexStream) -> Self {
        let mut played = Self::new(stream);
        played.say(&Message::Hello(Hello::ours())).await;
        assert_eq!(played.hear().await, Some(Message::Hello(Hello::ours())));
        played
    }

    pub(crate) async fn say(&mut self, message: &Message) {
        self.say_text(&serde_json::to_string(message).unwrap())
            .await;
    }

    pub(crate) async fn say_text(&mut self, text: &str) {
        let mut out = BytesMut::new();
        frame::encode(text.as_bytes(), &mut out).unwrap();
        self.say_bytes(&out).await;
    }

    pub(crate) async fn say_bytes(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.unwrap();
    }

    /// The next message but pings, which are answered; `None` once the other side has hung up.
    pub(crate) async fn hear(&mut self) -> Option<Message> {
        loop {
            match self.hear_any().await? {
                Message::Ping { id, .. } => self.say(&Message::Pong { id, clock: None }).await,
                message => return Some(message),
            }
        }
    }

    pub(crate) async fn hear_any(&mut self) -> Option<Message> {
        let frame = self.hear_frame().await?;
        Some(serde_json::from_slice(&frame).unwrap())
    }

    /// The next frame as it came; `None` once the other side has hung up.
    pub(crate) async fn hear_frame(&mut self) -> Option<Bytes> {
        loop {
            if let Some(frame) = self.decoder.next_frame().unwrap() {
                return Some(frame);
            }
            if self.stream.read_buf(self.decoder.space()).await.unwrap() == 0 {
                return None;
            }
        }
    }

    /// The fault that comes next, whatever comes before it.
    pub(crate) async fn fault(&mut self) -> Fault {
        loop {
            match self.hear_any().await {
                Some(Message::Fault(fault)) => return fault,
                Some(_) => {}
                None => panic!("hung up without a word"),
            }
        }
    }

    pub(crate) async fn ask(&mut self, id: u64, request: Request) {
        let within_ms = 9_000;
        self.say(&Message::Request {
            id,
            within_ms,
            request,
        })
        .await;
    }

    pub(crate) async fn answer(&mut self) -> Answer {
        match self.hear().await {
            Some(Message::Answer { answer, .. }) => answer,
            other => panic!("no answer but {other:?}"),
        }
    }
}
