//! The lines by which a program tells what it measured, shown as they come, kept as JSON.
//!
//! ```text
//! figure NAME VALUE UNIT bar OP LIMIT ok|short
//! ```
//!
//! Must not know what is measured. Whether a figure is short is the program's word.

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::error::Failure;
use crate::{run, workspace};

/// Runs a program, shows what it prints, writes its figures to `target/figures/FILE.json`; fails
/// if one of them is short or the program fails.
pub(crate) fn collect(command: &mut Command, file: &str) -> Result<(), Failure> {
    run::show(command);
    let broken = || Failure::because("run what measures");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(broken())?;
    let output = child.stdout.take().expect("stdout was asked to be a pipe");
    let mut figures = Vec::new();
    for line in BufReader::new(output).lines() {
        let line = line.map_err(broken())?;
        println!("{line}");
        figures.extend(figure(&line));
    }
    let outcome = run::judge(child.wait().map_err(broken())?);
    if !figures.is_empty() {
        write(file, &figures)?;
    }
    outcome?;
    let short: Vec<_> = figures
        .iter()
        .filter(|figure| figure["ok"] == false)
        .map(|figure| format!("{} is short", figure["name"].as_str().unwrap_or_default()))
        .collect();
    if short.is_empty() {
        Ok(())
    } else {
        Err(Failure::Wrong(short))
    }
}

fn write(file: &str, figures: &[Value]) -> Result<(), Failure> {
    let folder = workspace::target()?.join("figures");
    let path = folder.join(format!("{file}.json"));
    let text = format!("{:#}\n", Value::from(figures));
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&path, text))
        .map_err(Failure::because(format!("write {}", path.display())))
}

/// The figure in a line, if it is one.
fn figure(line: &str) -> Option<Value> {
    let words: Vec<_> = line.split(' ').collect();
    let ["figure", name, value, unit, "bar", op, limit, verdict] = words[..] else {
        return None;
    };
    Some(json!({
        "name": name,
        "value": value.parse::<f64>().ok()?,
        "unit": unit,
        "bar": { "op": op, "limit": limit.parse::<f64>().ok()? },
        "ok": verdict == "ok",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_read_whole() {
        let read = figure("figure dial-unix 1.07 x bar <= 1.2 ok").unwrap();
        assert_eq!(
            read,
            json!({"name": "dial-unix", "value": 1.07, "unit": "x", "bar": {"op": "<=", "limit": 1.2}, "ok": true})
        );
        assert_eq!(
            figure("figure left 3 threads bar <= 0 short").unwrap()["ok"],
            false
        );
    }

    #[test]
    fn what_only_looks_like_a_figure_is_none() {
        for line in [
            "figures follow",
            "figure a b c",
            "figure a b c bar <= d ok",
            "a figure x 1 s bar <= 2 ok",
        ] {
            assert_eq!(figure(line), None, "{line}");
        }
    }

    #[test]
    fn a_short_figure_and_a_failed_program_both_fail() {
        let says = |text: &str| {
            let mut shell = Command::new("sh");
            shell.args(["-c", text]);
            shell
        };
        assert!(collect(&mut says("echo nothing measured"), "never-written").is_ok());
        assert!(matches!(
            collect(&mut says("exit 3"), "never-written"),
            Err(Failure::Status(3))
        ));
    }
}
