//! Bytes into frames and back: a length of four bytes, most significant first, then as many bytes.
//!
//! Knows nothing of what is in a frame. A length is checked before anything is kept for it, and room is
//! made only for bytes that have come: a frame of 4 GiB costs four bytes, and one that is announced and
//! never sent costs what was sent of it.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};

/// The bytes of a length.
pub const HEAD: usize = 4;

/// The most that the first frame of a side may hold: a hello, or a fault with a full
/// [`Reason`](crate::Reason). Nothing is known of that side yet.
pub const FIRST_LIMIT: usize = 32 * 1024;

/// The most that any later frame may hold: twice the MiB that a migration's largest message needs, so that
/// a full [`Cookie`](crate::Cookie) fits however JSON escapes it.
pub const LIMIT: usize = 2 * 1024 * 1024;

/// A frame longer than may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("frame of {length} bytes: the limit is {limit} bytes")]
pub struct TooLong {
    /// What was announced, or was to be sent.
    pub length: usize,
    /// What may be.
    pub limit: usize,
}

/// Puts `payload` behind its length at the end of `out`.
///
/// # Errors
///
/// [`TooLong`]: it exceeds [`LIMIT`]; `out` is unchanged.
pub fn encode(payload: &[u8], out: &mut BytesMut) -> Result<(), TooLong> {
    let length = payload.len();
    let head = u32::try_from(length).ok().filter(|_| length <= LIMIT);
    let head = head.ok_or(TooLong {
        length,
        limit: LIMIT,
    })?;
    out.reserve(HEAD + length);
    out.put_u32(head);
    out.put_slice(payload);
    Ok(())
}

/// The bytes of one direction, as they come.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
    greeted: bool,
}

impl Decoder {
    /// At the beginning of a stream.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Where the next bytes go. A caller that reads in pieces keeps no more than one frame and one piece.
    pub fn space(&mut self) -> &mut BytesMut {
        &mut self.buffer
    }

    /// The next frame, once all of it is there.
    ///
    /// # Errors
    ///
    /// [`TooLong`]: the stream cannot be read any further.
    pub fn next_frame(&mut self) -> Result<Option<Bytes>, TooLong> {
        let Some(length) = self.announced() else {
            return Ok(None);
        };
        let limit = if self.greeted { LIMIT } else { FIRST_LIMIT };
        if length > limit {
            return Err(TooLong { length, limit });
        }
        if self.buffer.len() < HEAD + length {
            return Ok(None);
        }
        self.greeted = true;
        self.buffer.advance(HEAD);
        Ok(Some(self.buffer.split_to(length).freeze()))
    }

    /// How many bytes there are of a frame that is not whole, and how many it announced, its length included.
    #[must_use]
    pub fn unfinished(&self) -> Option<(usize, usize)> {
        let have = self.buffer.len();
        let of = self.announced().map_or(HEAD, |length| HEAD + length);
        (have > 0).then_some((have, of))
    }

    fn announced(&self) -> Option<usize> {
        let head = self.buffer.first_chunk::<HEAD>()?;
        Some(usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stream(payloads: &[Vec<u8>]) -> Vec<u8> {
        let mut out = BytesMut::new();
        for payload in payloads {
            encode(payload, &mut out).unwrap();
        }
        out.to_vec()
    }

    fn all(decoder: &mut Decoder) -> Vec<Vec<u8>> {
        std::iter::from_fn(|| decoder.next_frame().unwrap())
            .map(|frame| frame.to_vec())
            .collect()
    }

    proptest! {
        #[test]
        fn frames_are_the_same_wherever_the_stream_is_cut(
            payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 1..6),
            cuts in prop::collection::vec(1_usize..9, 1..40),
        ) {
            let stream = stream(&payloads);
            let mut decoder = Decoder::new();
            let mut seen = Vec::new();
            let mut rest = &stream[..];
            for cut in cuts.iter().cycle() {
                let (now, later) = rest.split_at((*cut).min(rest.len()));
                decoder.space().extend_from_slice(now);
                seen.extend(all(&mut decoder));
                rest = later;
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(seen, payloads);
            prop_assert_eq!(decoder.unfinished(), None);
        }

        #[test]
        fn any_bytes_end_in_frames_or_a_refusal(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut decoder = Decoder::new();
            decoder.space().extend_from_slice(&bytes);
            let mut taken = 0;
            while let Ok(Some(frame)) = decoder.next_frame() {
                taken += HEAD + frame.len();
            }
            prop_assert!(taken <= bytes.len());
        }
    }

    #[test]
    fn a_frame_of_4_gib_is_refused_at_its_length_and_nothing_is_kept_for_it() {
        let mut decoder = Decoder::new();
        decoder.space().extend_from_slice(&u32::MAX.to_be_bytes());
        let refused = decoder.next_frame().unwrap_err();
        assert_eq!(
            (refused.length, refused.limit),
            (4_294_967_295, FIRST_LIMIT)
        );
        assert!(decoder.space().capacity() < FIRST_LIMIT);
    }

    #[test]
    fn the_first_frame_has_the_smaller_limit() {
        let mut decoder = Decoder::new();
        decoder
            .space()
            .extend_from_slice(&stream(&[vec![7], vec![0; FIRST_LIMIT + 1]]));
        assert_eq!(all(&mut decoder).len(), 2);

        let mut decoder = Decoder::new();
        decoder
            .space()
            .extend_from_slice(&stream(&[vec![0; FIRST_LIMIT + 1]]));
        assert!(decoder.next_frame().is_err());
    }

    #[test]
    fn what_is_too_long_is_not_sent_either() {
        let mut out = BytesMut::new();
        assert!(encode(&vec![0; LIMIT + 1], &mut out).is_err());
        assert!(out.is_empty());
    }
}
