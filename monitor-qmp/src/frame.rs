//! Bytes into JSON objects, one at a time, bounded in size and depth.
//!
//! Knows JSON's brackets and strings and nothing of QMP. QMP is a stream of objects, not of
//! lines: `pretty=on` puts line ends inside a message, so only brackets tell where one ends.
//! Each byte is looked at once, however the stream is cut up.

use std::fmt;

use bytes::{Buf as _, BytesMut};
use memchr::memchr2;

/// Room for the next read while nothing big is under way; an idle connection keeps no more. Most of what an idle
/// connection weighs: with 8 KiB, ten thousand of them weighed 40 MiB more, and read nothing faster.
const IDLE_CAPACITY: usize = 4 * 1024;

/// How much of an offending input an error shows.
const EXCERPT: usize = 64;

/// What a peer may send at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Bytes of one message. Default 64 MiB, as QEMU's own parser takes from us.
    pub size: usize,
    /// Nested brackets in one message. Default 1024, as QEMU's own parser takes from us.
    pub depth: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            size: 64 << 20,
            depth: 1024,
        }
    }
}

/// Why the stream cannot be read any further.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum FrameError {
    /// Something else than a JSON object began here; shown with harmless characters only.
    NotObject(String),
    TooLong(usize),
    TooDeep(usize),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotObject(seen) => write!(f, "expected a JSON object, got \"{seen}\""),
            Self::TooLong(limit) => write!(f, "a message is longer than {limit} bytes"),
            Self::TooDeep(limit) => write!(f, "a message is nested deeper than {limit}"),
        }
    }
}

/// Shows the first bytes of `input` without control characters.
pub(crate) fn excerpt(input: &[u8]) -> String {
    let cut = &input[..input.len().min(EXCERPT)];
    let more = if cut.len() < input.len() { "..." } else { "" };
    format!("{}{more}", cut.escape_ascii())
}

/// The read buffer and what is known about its content.
pub(crate) struct Decoder {
    buffer: BytesMut,
    limits: Limits,
    scanner: Scanner,
    /// Bytes at the front that the scanner has seen.
    scanned: usize,
    /// Bytes at the front that were handed out and go away with the next call.
    handed_out: usize,
}

impl Decoder {
    pub(crate) fn new(limits: Limits) -> Self {
        Self {
            buffer: BytesMut::new(),
            limits,
            scanner: Scanner::default(),
            scanned: 0,
            handed_out: 0,
        }
    }

    /// Where the next bytes go. Reads grow with the message, so a big one costs few of them.
    pub(crate) fn space(&mut self) -> &mut BytesMut {
        self.discard();
        let room = self.buffer.len().max(IDLE_CAPACITY);
        if self.buffer.is_empty() && self.buffer.capacity() > IDLE_CAPACITY {
            self.buffer = BytesMut::with_capacity(IDLE_CAPACITY);
        } else if self.buffer.capacity() - self.buffer.len() < room / 2 {
            self.buffer.reserve(room);
        }
        &mut self.buffer
    }

    /// The next whole object, if it is there.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, FrameError> {
        self.discard();
        if self.scanned == 0 {
            // Space between messages belongs to none: else it would count towards a limit or not,
            // depending on how the stream is cut.
            let is_message = |byte: &u8| !matches!(byte, b' ' | b'\t' | b'\r' | b'\n');
            let start = self.buffer.iter().position(is_message);
            self.buffer.advance(start.unwrap_or(self.buffer.len()));
        }
        match self
            .scanner
            .scan(&self.buffer[self.scanned..], self.limits.depth)
        {
            Scan::Complete(length) => {
                let end = self.scanned + length;
                if end > self.limits.size {
                    return Err(FrameError::TooLong(self.limits.size));
                }
                self.scanned = 0;
                self.handed_out = end;
                Ok(Some(&self.buffer[..end]))
            }
            Scan::Between => {
                self.buffer.clear();
                self.scanned = 0;
                Ok(None)
            }
            Scan::Inside => {
                self.scanned = self.buffer.len();
                if self.scanned > self.limits.size {
                    return Err(FrameError::TooLong(self.limits.size));
                }
                Ok(None)
            }
            Scan::Stray(at) => Err(FrameError::NotObject(excerpt(
                &self.buffer[self.scanned + at..],
            ))),
            Scan::TooDeep => Err(FrameError::TooDeep(self.limits.depth)),
        }
    }

    /// What is there of a message that is not whole yet.
    pub(crate) fn unfinished(&self) -> &[u8] {
        &self.buffer[self.handed_out..]
    }

    fn discard(&mut self) {
        self.buffer.advance(std::mem::take(&mut self.handed_out));
    }
}

/// Finds where an object ends. Resumable after any byte.
#[derive(Default)]
struct Scanner {
    depth: usize,
    in_string: bool,
    escaped: bool,
}

enum Scan {
    /// An object ends after so many bytes.
    Complete(usize),
    /// All bytes seen, and an object is open.
    Inside,
    /// All bytes seen, and nothing but space among them.
    Between,
    /// Something else than an object begins here.
    Stray(usize),
    TooDeep,
}

impl Scanner {
    fn scan(&mut self, input: &[u8], max_depth: usize) -> Scan {
        let mut at = 0;
        loop {
            if self.in_string {
                match self.string_end(&input[at..]) {
                    Some(length) => at += length,
                    None => return Scan::Inside,
                }
            }
            // What lies between brackets and strings is most of it, and of no interest here.
            let Some(found) = input[at..].iter().position(|byte| self.stops_at(*byte)) else {
                break;
            };
            at += found;
            match input[at] {
                b'"' if self.depth > 0 => self.in_string = true,
                b'{' => self.depth += 1,
                b'[' if self.depth > 0 => self.depth += 1,
                b'}' | b']' if self.depth > 0 => {
                    self.depth -= 1;
                    if self.depth == 0 {
                        return Scan::Complete(at + 1);
                    }
                }
                _ => return Scan::Stray(at),
            }
            if self.depth > max_depth {
                return Scan::TooDeep;
            }
            at += 1;
        }
        if self.depth == 0 {
            Scan::Between
        } else {
            Scan::Inside
        }
    }

    /// Whether a byte outside of strings has to be looked at.
    fn stops_at(&self, byte: u8) -> bool {
        const BRACKETS_AND_QUOTE: [bool; 256] = {
            let mut table = [false; 256];
            let stops = b"{}[]\"";
            let mut at = 0;
            while at < stops.len() {
                table[stops[at] as usize] = true;
                at += 1;
            }
            table
        };
        if self.depth > 0 {
            BRACKETS_AND_QUOTE[usize::from(byte)]
        } else {
            !matches!(byte, b' ' | b'\t' | b'\r' | b'\n')
        }
    }

    /// The length of what is left of a string, its closing quote included, if it ends here.
    fn string_end(&mut self, input: &[u8]) -> Option<usize> {
        let mut at = 0;
        if self.escaped && !input.is_empty() {
            self.escaped = false;
            at = 1;
        }
        while let Some(found) = memchr2(b'"', b'\\', &input[at..]) {
            at += found + 1;
            if input[at - 1] == b'"' {
                self.in_string = false;
                return Some(at);
            }
            if at == input.len() {
                self.escaped = true;
                return None;
            }
            at += 1;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b" \r\n{\"QMP\":{\"a\\\"}\":[1,{}]}}\r\n{\"return\":{\r\n  \"x\": \"]}\\\\\"\r\n}}\n\t{\"e\":1}{}";

    fn objects(chunks: &[&[u8]]) -> Result<Vec<String>, FrameError> {
        let mut decoder = Decoder::new(Limits { size: 64, depth: 4 });
        let mut found = Vec::new();
        for chunk in chunks {
            decoder.space().extend_from_slice(chunk);
            while let Some(object) = decoder.next()? {
                found.push(String::from_utf8_lossy(object).trim().to_owned());
            }
        }
        Ok(found)
    }

    #[test]
    fn objects_are_the_same_however_the_stream_is_split() {
        let whole = objects(&[STREAM]).unwrap();
        assert_eq!(whole.len(), 4);
        assert_eq!(whole[1], "{\"return\":{\r\n  \"x\": \"]}\\\\\"\r\n}}");
        for first in 0..=STREAM.len() {
            for second in first..=STREAM.len() {
                let parts = [&STREAM[..first], &STREAM[first..second], &STREAM[second..]];
                assert_eq!(
                    objects(&parts).unwrap(),
                    whole,
                    "split at {first} and {second}"
                );
            }
        }
        let bytes: Vec<&[u8]> = STREAM.chunks(1).collect();
        assert_eq!(objects(&bytes).unwrap(), whole);
    }

    #[test]
    fn what_is_no_object_is_shown_without_control_characters() {
        let error = objects(&[b"\n\x1b[31mSSH-2.0"]).unwrap_err();
        assert_eq!(error, FrameError::NotObject("\\x1b[31mSSH-2.0".to_owned()));
        assert!(objects(&[b"[1]"]).is_err(), "an array is no message");
        assert!(objects(&[b"{}}"]).is_err(), "a bracket too many");
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(64));
        assert_eq!(objects(&[long.as_bytes()]), Err(FrameError::TooLong(64)));
        assert_eq!(
            objects(&[&long.as_bytes()[..65]]),
            Err(FrameError::TooLong(64))
        );
        assert!(objects(&[b"{\"a\":[[[1]]]}"]).is_ok());
        assert_eq!(objects(&[b"{\"a\":[[[["]), Err(FrameError::TooDeep(4)));
        assert_eq!(
            objects(&[&[b' '; 1000]]).unwrap().len(),
            0,
            "space is no message"
        );
    }

    #[test]
    fn a_big_message_leaves_no_big_buffer_behind() {
        let mut decoder = Decoder::new(Limits::default());
        let big = format!("{{\"a\":\"{}\"}}", "x".repeat(1 << 20));
        for chunk in big.as_bytes().chunks(1000) {
            decoder.space().extend_from_slice(chunk);
        }
        assert_eq!(decoder.next().unwrap().unwrap().len(), big.len());
        assert!(decoder.next().unwrap().is_none());
        assert!(decoder.space().capacity() <= IDLE_CAPACITY);
    }
}
