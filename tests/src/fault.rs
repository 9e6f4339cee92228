//! A stream that splits, delays and cuts, the same way each time for the same seed.
//!
//! Wraps any stream and knows nothing of what flows through it. Its delays are on tokio's
//! clock, so a test on paused time takes none. The seed is printed when the stream is made:
//! a failed test shows it, and `FAULT_SEED` replays it.
//!
//! ```
//! use tests::fault::{Faults, Faulty};
//! use tokio::io::{AsyncReadExt, AsyncWriteExt};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
//! let (near, mut far) = tokio::io::duplex(64);
//! let mut near = Faulty::new(near, Faults::seeded(7).split(1).cut_reads_after(3));
//! far.write_all(b"hello").await.unwrap();
//!
//! let mut read = Vec::new();
//! near.read_to_end(&mut read).await.unwrap();
//! assert_eq!(read, b"hel");
//! # });
//! ```

use std::{
    hash::{BuildHasher as _, RandomState},
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep_until},
};

/// The longest piece; longer ones add nothing to what splitting finds.
const LONGEST: usize = 4096;

/// What goes wrong with a stream.
#[derive(Clone, Debug)]
pub struct Faults {
    seed: u64,
    longest: usize,
    delay: Duration,
    reads: Option<u64>,
    writes: Option<u64>,
}

impl Faults {
    /// None yet. The seed is that of `FAULT_SEED`, else a new one.
    #[must_use]
    pub fn new() -> Self {
        let given = std::env::var("FAULT_SEED")
            .ok()
            .and_then(|seed| seed.parse().ok());
        Self::seeded(given.unwrap_or_else(|| RandomState::new().hash_one(())))
    }

    /// None yet, with this seed.
    #[must_use]
    pub fn seeded(seed: u64) -> Self {
        Self {
            seed,
            longest: LONGEST,
            delay: Duration::ZERO,
            reads: None,
            writes: None,
        }
    }

    /// Splits both ways into pieces of 1 to `longest` bytes. 1 splits at every byte.
    #[must_use]
    pub fn split(mut self, longest: usize) -> Self {
        self.longest = longest.clamp(1, LONGEST);
        self
    }

    /// Waits up to `longest` before each piece.
    #[must_use]
    pub fn delay(mut self, longest: Duration) -> Self {
        self.delay = longest;
        self
    }

    /// The stream ends after so many bytes were read.
    #[must_use]
    pub fn cut_reads_after(mut self, bytes: u64) -> Self {
        self.reads = Some(bytes);
        self
    }

    /// Writing fails as on a broken pipe after so many bytes were written.
    #[must_use]
    pub fn cut_writes_after(mut self, bytes: u64) -> Self {
        self.writes = Some(bytes);
        self
    }
}

impl Default for Faults {
    fn default() -> Self {
        Self::new()
    }
}

/// A stream with [`Faults`].
#[derive(Debug)]
pub struct Faulty<T> {
    inner: T,
    read: Side,
    write: Side,
}

/// One direction. Each has its own numbers, so that one does not shift the other's.
#[derive(Debug)]
struct Side {
    random: SplitMix,
    longest: usize,
    delay: Duration,
    left: Option<u64>,
    pause: Option<Pin<Box<Sleep>>>,
    /// The current piece was waited for.
    rested: bool,
}

/// Steele, Lea and Flood's generator: one number of state, and good enough to shake a parser.
#[derive(Debug)]
struct SplitMix(u64);

impl<T> Faulty<T> {
    /// Wraps `inner` and prints the seed.
    pub fn new(inner: T, faults: Faults) -> Self {
        eprintln!("fault stream: FAULT_SEED={}", faults.seed);
        let side = |salt, left| Side {
            random: SplitMix(faults.seed ^ salt),
            longest: faults.longest,
            delay: faults.delay,
            left,
            pause: None,
            rested: false,
        };
        Self {
            inner,
            read: side(0, faults.reads),
            write: side(u64::MAX, faults.writes),
        }
    }
}

impl Side {
    /// How long the next piece may be, once its delay is over. Zero is the end.
    fn poll_piece(&mut self, cx: &mut Context<'_>) -> Poll<usize> {
        if !self.delay.is_zero() && !self.rested {
            let random = &mut self.random;
            let delay = self.delay;
            let pause = self.pause.get_or_insert_with(|| {
                let part = delay.mul_f64(random.below(1001) as f64 / 1000.0);
                Box::pin(sleep_until(Instant::now() + part))
            });
            ready!(pause.as_mut().poll(cx));
            self.pause = None;
            self.rested = true;
        }
        let piece = 1 + self.random.below(self.longest as u64);
        Poll::Ready(piece.min(self.left.unwrap_or(u64::MAX)) as usize)
    }

    fn moved(&mut self, bytes: usize) {
        self.rested = false;
        if let Some(left) = &mut self.left {
            *left -= bytes as u64;
        }
    }
}

impl SplitMix {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Faulty<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let piece = ready!(this.read.poll_piece(cx)).min(buffer.remaining());
        let mut space = [0; LONGEST];
        let mut part = ReadBuf::new(&mut space[..piece]);
        if piece > 0 {
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut part))?;
        }
        buffer.put_slice(part.filled());
        this.read.moved(part.filled().len());
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Faulty<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let piece = ready!(this.write.poll_piece(cx));
        if piece == 0 {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let part = &bytes[..bytes.len().min(piece)];
        let written = ready!(Pin::new(&mut this.inner).poll_write(cx, part))?;
        this.write.moved(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}
