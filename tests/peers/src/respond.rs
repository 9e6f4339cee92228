//! The canned responder: answers as fast as a socket can, from a process of its own.
//!
//! Reads what is there, answers all whole requests of it with one write. A connection is a
//! thread. Knows five commands and the id that a client may send.

use std::{
    io::{self, Read as _, Write as _},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
};

const GREETING: &str = "{\"QMP\": {\"version\": {\"qemu\": {\"micro\": 22, \"minor\": 2, \"major\": 7}, \"package\": \"canned\"}, \"capabilities\": [\"oob\"]}}\r\n";

/// Events in a burst.
pub const BURST: usize = 200_000;

/// The sizes of the big replies, in entries of about 80 bytes: 207 kB and 10 MB.
pub const BIG: [usize; 2] = [2_690, 130_000];

/// A reply of `entries` commands, as `query-qmp-schema` gives them.
pub fn schema(entries: usize) -> String {
    let entry = |n| {
        format!(
            "{{\"name\": \"command-{n}\", \"ret-type\": \"{n}\", \"meta-type\": \"command\", \"arg-type\": \"0\"}}"
        )
    };
    let all: Vec<String> = (0..entries).map(entry).collect();
    format!("[{}]", all.join(", "))
}

/// What takes long to make, made before anything is measured.
struct Canned {
    big: [String; 2],
    burst: Vec<u8>,
}

fn burst() -> Vec<u8> {
    let event = |n| {
        format!(
            "{{\"timestamp\": {{\"seconds\": 1, \"microseconds\": {n}}}, \"event\": \"RTC_CHANGE\", \"data\": {{\"offset\": {n}, \"qom-path\": \"/rtc\"}}}}\r\n"
        )
    };
    (0..BURST).flat_map(|n| event(n).into_bytes()).collect()
}

/// Serves connections at `path` until killed.
pub fn serve(path: &Path) -> io::Result<()> {
    let listener = UnixListener::bind(path)?;
    let canned = Arc::new(Canned {
        big: BIG.map(schema),
        burst: burst(),
    });
    println!("ready");
    io::stdout().flush()?;
    for stream in listener.incoming() {
        let (stream, canned) = (stream?, Arc::clone(&canned));
        std::thread::Builder::new()
            .stack_size(128 * 1024)
            .spawn(move || {
                // A client that leaves is no failure.
                let _ = answer(stream, &canned);
            })?;
    }
    Ok(())
}

fn answer(mut stream: UnixStream, canned: &Canned) -> io::Result<()> {
    stream.write_all(GREETING.as_bytes())?;
    let mut input = Vec::new();
    let mut output = Vec::new();
    let mut chunk = [0; 16 * 1024];
    let (mut reads, mut bytes) = (0_u64, 0_u64);
    loop {
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Ok(());
        }
        reads += 1;
        bytes += count as u64;
        input.extend_from_slice(&chunk[..count]);
        let (mut start, mut depth) = (0, 0);
        for at in 0..input.len() {
            match input[at] {
                b'{' => depth += 1,
                b'}' => {
                    depth -= 1;
                    if depth == 0 {
                        let request = &input[start..=at];
                        start = at + 1;
                        let value: &[u8] = match name(request) {
                            b"query-status" => b"{\"status\": \"running\", \"running\": true}",
                            b"query-qmp-schema" => canned.big[0].as_bytes(),
                            b"query-commands" => canned.big[1].as_bytes(),
                            // What was read of this client so far, and the next count begins.
                            b"query-name" => {
                                let text = format!("{{\"name\": \"{reads} {bytes}\"}}");
                                (reads, bytes) = (0, 0);
                                reply(&mut output, text.as_bytes(), request);
                                continue;
                            }
                            b"stop" => {
                                output.extend_from_slice(&canned.burst);
                                b"{}"
                            }
                            _ => b"{}",
                        };
                        reply(&mut output, value, request);
                    }
                }
                _ => {}
            }
        }
        input.drain(..start);
        stream.write_all(&output)?;
        output.clear();
        output.shrink_to(1 << 20);
    }
}

fn reply(output: &mut Vec<u8>, value: &[u8], request: &[u8]) {
    output.extend_from_slice(b"{\"return\": ");
    output.extend_from_slice(value);
    if let Some(at) = find(request, b"\"id\":") {
        let id = &request[at + 5..];
        let end = id.iter().position(|byte| matches!(byte, b',' | b'}'));
        output.extend_from_slice(b", \"id\": ");
        output.extend_from_slice(&id[..end.unwrap_or(id.len())]);
    }
    output.extend_from_slice(b"}\r\n");
}

fn name(request: &[u8]) -> &[u8] {
    let Some(at) = find(request, b"\"execute\":") else {
        return b"";
    };
    request[at + 10..]
        .split(|byte| *byte == b'"')
        .nth(1)
        .unwrap_or_default()
}

fn find(among: &[u8], what: &[u8]) -> Option<usize> {
    among.windows(what.len()).position(|window| window == what)
}
