//! Where one line of the agent ends, and which bytes never belonged to one.
//!
//! It knows bytes only: nothing of JSON, of commands, or of time. An agent ends each answer with a
//! line feed and puts 0xFF before the answer to `guest-sync-delimited`. That byte cannot occur in
//! UTF-8, so wherever it stands, what came before it is half of something that will never be whole.
//!
//! Each byte is looked at once, and at most one line over the limit and one read are held.

use std::mem;

use memchr::{memchr2, memchr2_iter};

/// Ends whatever came before it. Never part of UTF-8 text.
pub(crate) const RESTART: u8 = 0xFF;

/// A buffer above this is given back once it is empty: one big answer must not cost for ever.
const KEPT: usize = 4 * 1024;

/// What the stream holds next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame<'a> {
    /// One line without its end.
    Line(&'a [u8]),
    /// A line longer than the limit. Told once; the rest of it is dropped as it comes.
    TooLarge,
}

/// Cuts a stream into lines.
#[derive(Debug)]
pub(crate) struct Framer {
    buffer: Vec<u8>,
    /// Where the current line begins.
    start: usize,
    /// Everything before this was searched.
    scanned: usize,
    limit: usize,
    /// Inside a line that was too long already.
    skipping: bool,
}

impl Framer {
    pub(crate) const fn new(limit: usize) -> Self {
        Self {
            buffer: Vec::new(),
            start: 0,
            scanned: 0,
            limit,
            skipping: false,
        }
    }

    /// Takes bytes in. Ask [`next`](Self::next) until it has no more before the next call.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.scanned -= self.start;
        self.start = 0;
        self.buffer.extend_from_slice(bytes);
    }

    pub(crate) fn next(&mut self) -> Option<Frame<'_>> {
        loop {
            let rest = &self.buffer[self.scanned..];
            let Some(offset) = memchr2(b'\n', RESTART, rest) else {
                return self.unfinished();
            };
            let end = self.scanned + offset;
            let line = self.start..end;
            self.start = end + 1;
            self.scanned = end + 1;
            let reported = mem::take(&mut self.skipping);
            if reported || self.buffer[end] == RESTART {
                continue;
            }
            if line.len() > self.limit {
                return Some(Frame::TooLarge);
            }
            return Some(Frame::Line(&self.buffer[line]));
        }
    }

    /// Whether the beginning of a line waits for its end.
    pub(crate) fn has_partial(&self) -> bool {
        self.skipping || !self.buffer[self.start..].trim_ascii().is_empty()
    }

    #[cfg(test)]
    pub(crate) fn held(&self) -> usize {
        self.buffer.capacity()
    }

    fn unfinished(&mut self) -> Option<Frame<'static>> {
        self.scanned = self.buffer.len();
        let too_large = !self.skipping && self.scanned - self.start > self.limit;
        self.skipping |= too_large;
        if self.skipping || self.start == self.scanned {
            self.buffer.clear();
            self.buffer.shrink_to(KEPT);
            self.start = 0;
            self.scanned = 0;
        }
        too_large.then_some(Frame::TooLarge)
    }
}

/// Whether arrays and objects are nested more than `limit` deep, counted without recursion.
pub(crate) fn deeper_than(line: &[u8], limit: usize) -> bool {
    let mut depth = 0_usize;
    let mut rest = line;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        match byte {
            b'"' => rest = &after[string_len(after)..],
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > limit {
            return true;
        }
    }
    false
}

/// How many bytes a string takes up whose opening quote was passed, its closing quote included.
fn string_len(bytes: &[u8]) -> usize {
    let mut escaped = None;
    for at in memchr2_iter(b'"', b'\\', bytes) {
        if escaped == Some(at) {
            continue;
        }
        if bytes[at] == b'"' {
            return at + 1;
        }
        escaped = Some(at + 1);
    }
    bytes.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(chunks: &[&[u8]], limit: usize) -> Vec<Result<Vec<u8>, ()>> {
        let mut framer = Framer::new(limit);
        let mut seen = Vec::new();
        for chunk in chunks {
            framer.push(chunk);
            while let Some(frame) = framer.next() {
                seen.push(match frame {
                    Frame::Line(line) => Ok(line.to_vec()),
                    Frame::TooLarge => Err(()),
                });
            }
        }
        seen
    }

    const STREAM: &[u8] = b"one\n\xFFtwo\nhalf of three\xFF\xFFfour\n\nmuch too long to keep\nfive\nlong again, then\xFFsix\nrest";

    #[test]
    fn lines_are_the_same_wherever_the_stream_is_split() {
        let whole = lines(&[STREAM], 13);
        let text: Vec<_> = whole
            .iter()
            .map(|line| line.as_ref().map(|line| String::from_utf8_lossy(line)))
            .collect();
        let expected = ["one", "two", "four", "", "!", "five", "six"];
        for (line, expected) in text.iter().zip(expected) {
            assert_eq!(line.as_deref().unwrap_or("!"), expected);
        }
        for at in 0..STREAM.len() {
            let (head, tail) = STREAM.split_at(at);
            // A line over the limit is told as soon as it is known to be too long, so one that a
            // restart would have dropped may be told as well; nothing else may differ.
            let mut split = lines(&[head, tail], 13);
            split.retain(Result::is_ok);
            let mut kept = whole.clone();
            kept.retain(Result::is_ok);
            assert_eq!(split, kept, "split at {at}");
        }
    }

    #[test]
    fn a_flood_without_a_line_end_is_told_once_and_not_kept() {
        let mut framer = Framer::new(1000);
        let mut told = 0;
        for _ in 0..10_000 {
            framer.push(&[b'x'; 100]);
            while let Some(frame) = framer.next() {
                assert_eq!(frame, Frame::TooLarge);
                told += 1;
            }
            assert!(framer.held() <= KEPT.max(4000), "holds {}", framer.held());
        }
        assert_eq!(told, 1);
        framer.push(b"tail\nwhole\n");
        assert_eq!(framer.next(), Some(Frame::Line(b"whole")));
    }

    #[test]
    fn a_big_line_leaves_no_big_buffer_behind() {
        let mut framer = Framer::new(1 << 20);
        framer.push(&vec![b'x'; 1 << 20]);
        assert_eq!(framer.next(), None);
        framer.push(b"\n");
        assert!(matches!(framer.next(), Some(Frame::Line(line)) if line.len() == 1 << 20));
        assert_eq!(framer.next(), None);
        assert!(framer.held() <= KEPT);
    }

    #[test]
    fn depth_counts_brackets_outside_strings_only() {
        assert!(!deeper_than(br#"{"a": [1, "[[[\"[[", {}]}"#, 3));
        assert!(deeper_than(br#"{"a": [1, "\\", {}]}"#, 2));
        assert!(!deeper_than(b"[][][][]", 1));
        assert!(deeper_than(&[b'['; 129], 128));
        assert!(!deeper_than(br#""never closed [[[["#, 0));
    }
}
