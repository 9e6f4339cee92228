//! Cuts what an agent hears into requests, as a streaming JSON parser does: by brackets, not by
//! lines. It knows no command and answers nothing.

use serde_json::Value;

use super::Request;

/// Where `qemu-ga` gives up as well.
const DEPTH: usize = 1024;

/// What came out of the stream.
#[derive(Debug)]
pub(super) enum Heard {
    Request(Request),
    /// Not a request; the words of the error to answer.
    Nonsense(String),
}

#[derive(Debug, Default)]
pub(super) struct Parser {
    /// The value so far, from its first bracket.
    value: Vec<u8>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// Dropping what was complained about, up to the end of its line.
    skipping: bool,
}

impl Parser {
    pub(super) fn hear(&mut self, bytes: &[u8]) -> Vec<Heard> {
        bytes
            .iter()
            .filter_map(|&byte| self.hear_byte(byte))
            .collect()
    }

    fn hear_byte(&mut self, byte: u8) -> Option<Heard> {
        if byte == 0xFF {
            *self = Self::default();
            return Some(Heard::Nonsense("JSON parse error, stray '\u{FFFD}'".into()));
        }
        if self.skipping {
            self.skipping = byte != b'\n';
            return None;
        }
        if self.depth == 0 && byte.is_ascii_whitespace() {
            return None;
        }
        if self.depth == 0 && !matches!(byte, b'{' | b'[') {
            return Some(self.complain("JSON parse error, expecting value"));
        }
        self.value.push(byte);
        if self.in_string {
            self.in_string = self.escaped || byte != b'"';
            self.escaped = !self.escaped && byte == b'\\';
            return None;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        match self.depth {
            0 => Some(request(&std::mem::take(&mut self.value))),
            depth if depth > DEPTH => Some(self.complain("JSON nesting depth limit exceeded")),
            _ => None,
        }
    }

    fn complain(&mut self, what: &str) -> Heard {
        *self = Self {
            skipping: true,
            ..Self::default()
        };
        Heard::Nonsense(what.into())
    }
}

fn request(text: &[u8]) -> Heard {
    let Ok(mut value) = serde_json::from_slice::<Value>(text) else {
        return Heard::Nonsense("JSON parse error".into());
    };
    match value.get("execute").and_then(Value::as_str) {
        Some(name) => Heard::Request(Request {
            name: name.to_owned(),
            arguments: value
                .get_mut("arguments")
                .map(Value::take)
                .unwrap_or_default(),
            id: value.get_mut("id").map(Value::take),
        }),
        None => Heard::Nonsense("QMP input lacks member 'execute'".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: &[u8] = b"\xFF{\"execute\":\"a\",\"arguments\":{\"x\":\"}\\\"[\"}}{\"execute\":\"b\"}\r\n{\"execute\":\"hal\xFF{\"id\":7,\n\"execute\":\"c\"} junk\n[1]\n{\"execute\":\"d\"}";

    fn heard(chunks: &[&[u8]]) -> Vec<String> {
        let mut parser = Parser::default();
        let heard = chunks
            .iter()
            .flat_map(|chunk| parser.hear(chunk))
            .map(|heard| match heard {
                Heard::Request(request) => request.name,
                Heard::Nonsense(_) => "!".to_owned(),
            });
        heard.collect()
    }

    #[test]
    fn requests_are_the_same_wherever_the_stream_is_split() {
        for at in 0..STREAM.len() {
            let (head, tail) = STREAM.split_at(at);
            assert_eq!(
                heard(&[head, tail]),
                ["!", "a", "b", "!", "c", "!", "!", "d"],
                "split at {at}"
            );
        }
    }

    #[test]
    fn a_deep_request_is_refused_before_it_ends() {
        assert_eq!(
            heard(&[&[b'['; 2000], b"\n{\"execute\":\"a\"}"]),
            ["!", "a"]
        );
    }
}
