//! A shell for a guest agent: `qga-shell unix:PATH` or `qga-shell tcp:HOST:PORT`.
//!
//! Reads commands from standard input as JSON, in any pieces: `{"execute": "guest-ping"}`, with
//! `arguments` if there are some and `seconds` if 30 are not right, or just `"guest-ping"`. Prints one
//! line of JSON for each, as soon as it has ended: `return`, or `error` with what is known about it.
//! Exits with 1 if one failed.
//!
//! ```text
//! echo '"guest-get-host-name" "guest-get-time"' | qga-shell unix:/run/vm/qga.sock
//! ```

use std::io::{self, Write as _};
use std::process::ExitCode;
use std::time::Duration;

use agent_qga::{
    Agent, Command as _, Error, Options, Qga as _, Reply, Request, Shutdown, SuspendDisk,
    SuspendHybrid, SuspendRam,
};
use serde::Deserialize;
use serde_json::value::to_raw_value;
use serde_json::{Deserializer, Value, json};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Name(String),
    Command {
        execute: String,
        arguments: Option<Value>,
        seconds: Option<f64>,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let Some(target) = std::env::args().nth(1) else {
        eprintln!("usage: qga-shell unix:PATH | tcp:HOST:PORT");
        return ExitCode::from(2);
    };
    match shell(&target).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("qga-shell: {target}: {error}");
            ExitCode::from(2)
        }
    }
}

async fn shell(target: &str) -> io::Result<bool> {
    let agent = match target.split_once(':') {
        Some(("unix", path)) => Agent::new(UnixStream::connect(path).await?, Options::default()),
        Some(("tcp", address)) => {
            Agent::new(TcpStream::connect(address).await?, Options::default())
        }
        _ => {
            return Err(io::Error::other(
                "not of the form unix:PATH or tcp:HOST:PORT",
            ));
        }
    };
    let (sender, mut lines) = mpsc::channel(1);
    // Reading a terminal blocks, so it has a thread, which ends with the process.
    std::thread::spawn(move || {
        for line in Deserializer::from_reader(io::stdin()).into_iter::<Value>() {
            if sender.blocking_send(line).is_err() {
                break;
            }
        }
    });
    let mut all_well = true;
    while let Some(line) = lines.recv().await {
        let answer = agent.call(request(line?)?).await;
        all_well &= answer.is_ok();
        writeln!(io::stdout(), "{}", shown(answer))?;
    }
    Ok(all_well)
}

fn request(line: Value) -> io::Result<Request> {
    let (name, arguments, seconds) = match serde_json::from_value(line)? {
        Line::Name(name) => (name, None, None),
        Line::Command {
            execute,
            arguments,
            seconds,
        } => (execute, arguments, seconds),
    };
    let limit = Duration::try_from_secs_f64(seconds.unwrap_or(30.0)).map_err(io::Error::other)?;
    let silent = [
        Shutdown::NAME,
        SuspendRam::NAME,
        SuspendDisk::NAME,
        SuspendHybrid::NAME,
    ];
    Ok(Request {
        silent: silent.contains(&&*name),
        arguments: arguments.as_ref().map(to_raw_value).transpose()?,
        ..Request::new(name, Instant::now() + limit)
    })
}

fn shown(answer: Result<Reply, Error>) -> Value {
    match answer {
        Ok(Reply::Value(value)) => json!({ "return": value }),
        Ok(Reply::Proven(proof)) => json!({ "return": {}, "proof": format!("{proof:?}") }),
        Err(error) => json!({ "error": {
            "class": error.class(),
            "desc": error.to_string(),
            "kind": format!("{:?}", error.kind()),
            "effect": format!("{:?}", error.effect()),
        }}),
    }
}
