//! The one place that reads and writes the stream.
//!
//! Decides nothing: the protocol says what may be sent and whom a reply concerns. Writes whole
//! messages only, so nothing a caller does can tear one. Reads on whatever callers do.

use std::{
    future::{self, Future as _},
    io,
    os::fd::{AsFd as _, OwnedFd},
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::{
    io::AsyncReadExt as _,
    task::yield_now,
    time::{Instant, sleep_until},
};

use crate::{
    error::{Closed, Failure},
    event::{Event, EventSink},
    frame::{self, Decoder, FrameError},
    message::{Id, Message},
    monitor::Options,
    protocol::Addressee,
    qmp::{Greeting, Health, Reply},
    shared::{Outcome, Shared, Waiter},
    wire::Wire,
};

/// How many bytes of requests are written together at most, give or take one message.
const BATCH: usize = 64 * 1024;
/// After so many messages, others get their turn: a QEMU that floods its monitor would else keep a thread of the runtime
/// for tens of milliseconds at a time (20 000 events in one turn, measured), and other monitors' events waiting.
const TURN: usize = 128;

pub(crate) struct Task<S, K: EventSink> {
    // First, so that the stream is closed before anyone learns that it is.
    wire: S,
    decoder: Decoder,
    outbox: Outbox,
    /// The running probe's number and when it ends.
    probe: Option<(u64, Instant)>,
    probe_limit: Duration,
    /// Writing failed. What QEMU said before it went away is still to be read, until then.
    broken: Option<(Arc<io::Error>, Instant)>,
    sequence: u64,
    /// Messages handled since others had their turn.
    turn: usize,
    ending: Ending<K>,
}

/// Messages on their way out.
#[derive(Default)]
struct Outbox {
    bytes: Vec<u8>,
    written: usize,
    /// Ride on the first byte that is not written yet.
    fds: Vec<OwnedFd>,
}

/// Tells everyone of the end, however it comes: even if the runtime drops the task.
struct Ending<K: EventSink> {
    shared: Arc<Shared>,
    sink: K,
    /// Whether the connection was ever handed out.
    live: bool,
    reported: Health,
    why: Closed,
}

/// What woke the task.
enum Step {
    Sent(io::Result<usize>),
    Read(io::Result<usize>),
    Time,
    Work,
}

impl<S: Wire, K: EventSink> Task<S, K> {
    pub(crate) fn new(wire: S, sink: K, shared: Arc<Shared>, options: &Options) -> Self {
        Self {
            wire,
            decoder: Decoder::new(options.limits),
            outbox: Outbox::default(),
            probe: None,
            probe_limit: options.probe_limit,
            broken: None,
            sequence: 0,
            turn: 0,
            ending: Ending {
                shared,
                sink,
                live: false,
                reported: Health::Ok,
                why: Closed::Abandoned,
            },
        }
    }

    /// Reads until QEMU greets. Events may come before.
    pub(crate) async fn greeting(&mut self) -> Result<Greeting, Failure> {
        loop {
            while let Some(text) = self.decoder.next().map_err(not_qmp)? {
                match Message::parse(text) {
                    Ok(Message::Greeting(greeting)) => return Ok(greeting),
                    Ok(Message::Event {
                        name,
                        data,
                        timestamp,
                    }) => {
                        self.sequence += 1;
                        self.ending.event(Event {
                            name: name.into_owned(),
                            data: data.map(ToOwned::to_owned),
                            timestamp,
                            sequence: self.sequence,
                        });
                    }
                    _ => {
                        return Err(Failure::NotQmp {
                            seen: frame::excerpt(text),
                        });
                    }
                }
            }
            let why = match self.wire.read_buf(self.decoder.space()).await {
                Ok(0) if !self.decoder.unfinished().is_empty() => {
                    let seen = frame::excerpt(self.decoder.unfinished());
                    return Err(Failure::NotQmp { seen });
                }
                Ok(0) => Closed::EndOfStream,
                Ok(_) => continue,
                Err(error) => Closed::Failed(Arc::new(error)),
            };
            return Err(Failure::Closed { why, sent: false });
        }
    }

    /// Serves the connection to its end, then tells everyone.
    pub(crate) async fn run(mut self) {
        self.ending.live = true;
        self.ending.why = self.serve().await;
    }

    /// Serves the connection to its end. Cancel safe: between two polls all is in `self`.
    pub(crate) async fn serve(&mut self) -> Closed {
        loop {
            // What was read together with the greeting is here before anything else is read.
            match self.handle_messages() {
                Ok(answered) if answered && self.ending.shared.lock().has_waiting() => {
                    // Whoever was answered may have more to say, and QEMU reads it with what
                    // waits here: one write instead of two.
                    yield_now().await;
                }
                Ok(_) => {}
                Err(why) => return why,
            }
            if self.turn >= TURN {
                self.turn = 0;
                yield_now().await;
            }
            if let Err(why) = self.prepare() {
                return why;
            }
            match self.step().await {
                Step::Sent(Ok(0)) => self.write_failed(io::ErrorKind::WriteZero.into()),
                Step::Sent(Ok(count)) => self.outbox.advance(count),
                Step::Sent(Err(error)) => self.write_failed(error),
                Step::Read(Ok(0)) => return Closed::EndOfStream,
                Step::Read(Ok(_)) | Step::Work => {}
                Step::Read(Err(error)) => return self.read_failed(error),
                Step::Time => {
                    if let Some((error, _)) = self.broken.take() {
                        return Closed::Failed(error);
                    }
                    if let Some((number, _)) = self.probe.take() {
                        self.ending.shared.lock().probe_ended(number);
                    }
                }
            }
        }
    }

    /// Looks what the protocol wants now: to close, to send, to listen for a while.
    fn prepare(&mut self) -> Result<(), Closed> {
        let mut protocol = self.ending.shared.lock();
        if protocol.closing() {
            return Err(Closed::Local);
        }
        if self.broken.is_none() && self.outbox.is_empty() {
            let outbox = &mut self.outbox;
            while outbox.bytes.len() < BATCH {
                let alone = outbox.bytes.is_empty();
                let Some(fds) = protocol.next_message(&mut outbox.bytes, alone) else {
                    break;
                };
                if !fds.is_empty() {
                    outbox.fds = fds;
                    break;
                }
            }
        }
        self.probe = match (protocol.running_probe(), self.probe) {
            (Some(number), Some(known)) if known.0 == number => Some(known),
            (Some(number), _) => Some((number, Instant::now() + self.probe_limit)),
            (None, _) => None,
        };
        let health = protocol.health();
        drop(protocol);
        self.ending.report(health);
        Ok(())
    }

    /// Waits for the next thing to happen. Nothing is lost if the future is dropped.
    async fn step(&mut self) -> Step {
        let Self {
            wire,
            decoder,
            outbox,
            probe,
            broken,
            ending,
            ..
        } = self;
        let end = broken
            .as_ref()
            .map(|(_, end)| *end)
            .or_else(|| probe.map(|(_, end)| end));
        let mut time = pin!(async {
            match end {
                Some(end) => sleep_until(end).await,
                None => future::pending().await,
            }
        });
        let mut work = pin!(ending.shared.work.notified());
        let may_write = broken.is_none() && !outbox.is_empty();
        future::poll_fn(|cx| {
            // Writing first: the window bounds it, while a flood of events never ends.
            if may_write && let Poll::Ready(sent) = outbox.poll_send(wire, cx) {
                return Poll::Ready(Step::Sent(sent));
            }
            let space = decoder.space();
            if let Poll::Ready(read) = pin!(wire.read_buf(space)).poll(cx) {
                return Poll::Ready(Step::Read(read));
            }
            if time.as_mut().poll(cx).is_ready() {
                return Poll::Ready(Step::Time);
            }
            work.as_mut().poll(cx).map(|()| Step::Work)
        })
        .await
    }

    /// Hands over what was read. Says whether there was an answer in it.
    fn handle_messages(&mut self) -> Result<bool, Closed> {
        let (mut heard, mut answered) = (false, false);
        while let Some(text) = self.decoder.next().map_err(violation)? {
            if !heard {
                heard = true;
                self.ending.shared.lock().heard();
            }
            self.sequence += 1;
            self.turn += 1;
            let message = Message::parse(text)
                .map_err(|error| violation(format!("{error} in \"{}\"", frame::excerpt(text))))?;
            answered |= self.ending.handle(message, self.sequence);
        }
        if answered {
            self.ending.shared.changed.notify_waiters();
        }
        Ok(answered)
    }

    /// QEMU's last words (a SHUTDOWN, a reply to `quit`) may still wait to be read.
    fn write_failed(&mut self, error: io::Error) {
        self.outbox = Outbox::default();
        self.broken = Some((Arc::new(error), Instant::now() + self.probe_limit));
    }

    fn read_failed(&mut self, error: io::Error) -> Closed {
        // A reset after a failed write is how a peer that is gone looks.
        match self.broken.take() {
            Some((first, _)) => Closed::Failed(first),
            None => Closed::Failed(Arc::new(error)),
        }
    }
}

impl Outbox {
    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn poll_send<S: Wire>(
        &mut self,
        wire: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let bytes = &self.bytes[self.written..];
        if self.fds.is_empty() {
            return Pin::new(wire).poll_send(cx, bytes, &[]);
        }
        let fds: Vec<_> = self.fds.iter().map(OwnedFd::as_fd).collect();
        Pin::new(wire).poll_send(cx, bytes, &fds)
    }

    fn advance(&mut self, count: usize) {
        self.fds.clear();
        self.written += count;
        if self.written < self.bytes.len() {
            return;
        }
        self.written = 0;
        if self.bytes.capacity() > BATCH {
            self.bytes = Vec::new();
        } else {
            self.bytes.clear();
        }
    }
}

impl<K: EventSink> Ending<K> {
    /// Hands one message over. Says whether a reply may have changed who waits.
    fn handle(&mut self, message: Message<'_>, sequence: u64) -> bool {
        match message {
            Message::Event {
                name,
                data,
                timestamp,
            } => {
                self.event(Event {
                    name: name.into_owned(),
                    data: data.map(ToOwned::to_owned),
                    timestamp,
                    sequence,
                });
                false
            }
            Message::Return { id, value } => {
                if let Addressee::One(waiter) = self.reply(id, false) {
                    let reply = Reply {
                        value: value.to_owned(),
                        sequence,
                    };
                    // A caller that left in this very moment needs no answer.
                    let _ = waiter.send(Outcome::Done(reply));
                }
                true
            }
            Message::Error { id, class, desc } => {
                match self.reply(id, true) {
                    Addressee::One(waiter) => {
                        let _ = waiter.send(Outcome::Refused { class, desc });
                    }
                    Addressee::All(waiters) => {
                        let among = waiters.len();
                        for waiter in waiters {
                            let (class, desc) = (class.clone(), desc.clone());
                            let _ = waiter.send(Outcome::Unattributed { class, desc, among });
                        }
                    }
                    Addressee::Nobody => {
                        tracing::debug!(%class, desc, "an error that belongs to no command");
                    }
                }
                true
            }
            Message::Greeting(_) | Message::Other => {
                self.shared.lock().counters.unknown += 1;
                false
            }
        }
    }

    /// To the sink, then to those who wait for it.
    fn event(&mut self, event: Event) {
        let met = self.shared.expectations.met_by(&event);
        let copies: Vec<_> = met.iter().map(|_| event.clone()).collect();
        self.sink.event(event);
        for (waiter, copy) in met.into_iter().zip(copies) {
            // Whoever waited may have left in this very moment.
            let _ = waiter.send(copy);
        }
    }

    fn reply(&mut self, id: Id, refused: bool) -> Addressee<Waiter> {
        let mut protocol = self.shared.lock();
        let before = protocol.counters.late;
        let addressee = protocol.reply(id, refused);
        let is_late = protocol.counters.late > before;
        drop(protocol);
        if is_late {
            self.sink.late();
        }
        addressee
    }

    fn report(&mut self, health: Health) {
        if self.live && health != self.reported {
            self.reported = health;
            self.sink.health(health);
        }
    }
}

impl<K: EventSink> Drop for Ending<K> {
    fn drop(&mut self) {
        let waiting = self.shared.lock().close(self.why.clone());
        // A sink whose panic brought us here is not called again.
        if self.live && !std::thread::panicking() {
            self.sink.closed(&self.why);
        }
        self.shared.expectations.end(&self.why);
        for (waiter, sent) in waiting {
            let _ = waiter.send(Outcome::Closed {
                why: self.why.clone(),
                sent,
            });
        }
        self.shared.changed.notify_waiters();
    }
}

fn not_qmp(error: FrameError) -> Failure {
    Failure::NotQmp {
        seen: match error {
            FrameError::NotObject(seen) => seen,
            limit => limit.to_string(),
        },
    }
}

fn violation(what: impl ToString) -> Closed {
    Closed::Violation(what.to_string().into())
}
