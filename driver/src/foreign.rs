//! Where a QEMU that another tool started listens: its QMP sockets and its agent's channel, by its command line and by the
//! kernel's word.
//!
//! The command line only says what was meant. A socket counts if that very process has it open and listens on it, so
//! nobody is dialled whom the process has not named. Reading the arguments is pure; [`find`] looks at the process.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::error::{Cause, io};

/// The name by which a guest agent's port is known.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Where something listens, by the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// On that path, from the process' own folder.
    Path(PathBuf),
    /// On a socket that was passed to it under that number.
    Passed(u32),
    /// Elsewhere: on a port, say.
    Other(String),
}

/// What a command line says.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Named {
    pub(crate) monitors: Vec<Place>,
    pub(crate) agent: Option<Place>,
}

/// Addresses that can be dialled.
#[derive(Debug)]
pub(crate) struct Found {
    /// The QMP sockets, in the order of the command line. Each serves one client at a time.
    pub(crate) monitors: Vec<String>,
    pub(crate) agent: Option<String>,
}

/// Where the process of that number listens.
pub(crate) fn find(pid: u32) -> Result<Found, Cause> {
    let process = PathBuf::from(format!("/proc/{pid}"));
    if !is_qemu(pid) {
        return Err(Cause::State(format!("process {pid} is no QEMU")));
    }
    let line = process.join("cmdline");
    let line = fs::read(&line).map_err(io("read", line))?;
    let arguments = line.split(|byte| *byte == 0);
    let arguments: Vec<_> = arguments.map(String::from_utf8_lossy).collect();
    let named = named(arguments.iter().map(AsRef::as_ref));
    let listening = listening(&process)?;
    let address = |place: &Place| address(&process, &listening, place);
    let monitors: Vec<_> = named.monitors.iter().map(address).collect();
    if monitors.iter().all(Result::is_err) {
        let why: Vec<_> = monitors.into_iter().filter_map(Result::err).collect();
        let why = if why.is_empty() {
            "its command line names none".to_owned()
        } else {
            why.join("; ")
        };
        let text = format!("process {pid} has no QMP socket that can be dialled: {why}");
        return Err(Cause::State(text));
    }
    Ok(Found {
        monitors: monitors.into_iter().flatten().collect(),
        agent: named.agent.as_ref().and_then(|place| address(place).ok()),
    })
}

/// Whether that process is a QEMU, by the program it runs.
pub(crate) fn is_qemu(pid: u32) -> bool {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    program
        .file_name()
        .is_some_and(|name| name.to_string_lossy().starts_with("qemu"))
}

/// The unix sockets on which a process listens, by the number it has them under.
fn listening(process: &Path) -> Result<HashMap<u32, PathBuf>, Cause> {
    /// The flag by which the kernel's list tells a socket that listens (`__SO_ACCEPTCON`).
    const LISTENS: &str = "00010000";
    let list = process.join("net/unix");
    let list = fs::read_to_string(&list).map_err(io("read", list))?;
    let sockets: HashMap<&str, &str> = list
        .lines()
        .filter_map(|line| {
            // Num RefCount Protocol Flags Type St Inode Path, and a path may have spaces in it.
            let mut fields = line.split_whitespace();
            let (flags, inode) = (fields.nth(3)?, fields.nth(2)?);
            let path = line.split_once('/')?.1;
            (flags == LISTENS).then_some((inode, path))
        })
        .collect();
    let folder = process.join("fd");
    let open = fs::read_dir(&folder).map_err(io("read", folder))?;
    let path_of = |entry: fs::DirEntry| {
        let number = entry.file_name().to_str()?.parse().ok()?;
        let link = fs::read_link(entry.path()).ok()?;
        let inode = link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?;
        let path = sockets.get(inode)?;
        Some((number, PathBuf::from(format!("/{path}"))))
    };
    Ok(open.flatten().filter_map(path_of).collect())
}

/// The place as an address, if the process listens there. Else why not.
fn address(
    process: &Path,
    listening: &HashMap<u32, PathBuf>,
    place: &Place,
) -> Result<String, String> {
    let path = match place {
        Place::Passed(number) => listening
            .get(number)
            .cloned()
            .ok_or_else(|| format!("descriptor {number} is no unix socket it listens on"))?,
        Place::Path(named) => {
            let folder = fs::read_link(process.join("cwd")).unwrap_or_default();
            let path = folder.join(named);
            if !listening
                .values()
                .any(|known| *known == path || known == named)
            {
                return Err(format!("it does not listen on {}", path.display()));
            }
            path
        }
        Place::Other(text) => {
            return Err(format!("{text} is no unix socket: attach by its address"));
        }
    };
    Ok(format!("unix:{}", path.display()))
}

/// What a command line names. Pure.
pub(crate) fn named<'a>(arguments: impl Iterator<Item = &'a str>) -> Named {
    let (mut chardevs, mut controls, mut agent) = (HashMap::new(), Vec::new(), None);
    let mut monitors = Vec::new();
    let mut arguments = arguments.peekable();
    while let Some(argument) = arguments.next() {
        let Some(option) = argument.strip_prefix('-') else {
            continue;
        };
        let Some(value) = arguments.peek() else {
            continue;
        };
        match option.strip_prefix('-').unwrap_or(option) {
            "qmp" | "qmp-pretty" => monitors.push(legacy(value)),
            "chardev" => {
                let values = Values::of(value, "backend");
                if let Some(id) = values.get("id") {
                    chardevs.insert(id.to_owned(), socket(&values));
                }
            }
            "mon" => {
                let values = Values::of(value, "chardev");
                if values.get("mode") == Some("control") {
                    controls.extend(values.get("chardev").map(ToOwned::to_owned));
                }
            }
            "device" => {
                let values = Values::of(value, "driver");
                if values.get("name") == Some(AGENT_PORT) {
                    agent = values.get("chardev").map(ToOwned::to_owned);
                }
            }
            _ => continue,
        }
        arguments.next();
    }
    let place = |id: &String| chardevs.get(id).cloned();
    monitors.extend(controls.iter().filter_map(place));
    Named {
        monitors,
        agent: agent.as_ref().and_then(place),
    }
}

/// `unix:PATH,server=on` and its like.
fn legacy(value: &str) -> Place {
    match value.strip_prefix("unix:") {
        Some(rest) => Place::Path(PathBuf::from(&Values::of(rest, "path").0[0].1)),
        None => Place::Other(value.to_owned()),
    }
}

fn socket(values: &Values) -> Place {
    let passed = values.get("fd").and_then(|fd| fd.parse().ok());
    match (values.get("backend"), values.get("path"), passed) {
        (Some("socket"), Some(path), _) => Place::Path(path.into()),
        (Some("socket"), None, Some(number)) => Place::Passed(number),
        (backend, ..) => Place::Other(format!("a chardev \"{}\"", backend.unwrap_or_default())),
    }
}

/// An option's `KEY=VALUE,...`, in which `,,` is a comma, or the same as a JSON object.
struct Values(Vec<(String, String)>);

impl Values {
    /// `first` is the key of a first value without one.
    fn of(text: &str, first: &str) -> Self {
        if let Ok(Value::Object(members)) = serde_json::from_str(text) {
            let texts = members.into_iter().filter_map(|(key, value)| match value {
                Value::String(text) => Some((key, text)),
                _ => None,
            });
            return Self(texts.collect());
        }
        // No path and no name has a zero in it.
        let text = text.replace(",,", "\0");
        let pairs = text.split(',').enumerate().map(|(place, part)| {
            let (key, value) = match part.split_once('=') {
                Some(pair) => pair,
                None if place == 0 => (first, part),
                None => (part, "on"),
            };
            (key.to_owned(), value.replace('\0', ","))
        });
        Self(pairs.collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        let pair = self.0.iter().find(|(found, _)| found == key)?;
        Some(&pair.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(line: &str) -> Named {
        named(line.split(' '))
    }

    #[test]
    fn monitors_are_found_however_they_are_written() {
        let path = |text: &str| Place::Path(text.into());
        let table = [
            (
                "qemu -M none -qmp unix:/run/a,,b.sock,server=on,wait=off",
                vec![path("/run/a,b.sock")],
            ),
            (
                "qemu --qmp unix:q.sock,server -display none",
                vec![path("q.sock")],
            ),
            (
                "qemu -chardev socket,id=m,path=/m,server=on -mon chardev=m,mode=control",
                vec![path("/m")],
            ),
            (
                "qemu -mon m,mode=control -chardev socket,fd=17,id=m,server=on",
                vec![Place::Passed(17)],
            ),
            (
                "qemu -chardev socket,id=h,path=/h,server=on -mon chardev=h,mode=readline",
                vec![],
            ),
            (
                "qemu -chardev socket,id=s,path=/s,server=on -serial chardev:s",
                vec![],
            ),
            (
                "qemu -qmp tcp:localhost:4444,server=on",
                vec![Place::Other("tcp:localhost:4444,server=on".into())],
            ),
            ("qemu -qmp", vec![]),
        ];
        for (line, monitors) in table {
            assert_eq!(of(line).monitors, monitors, "{line}");
        }
    }

    #[test]
    fn the_agents_channel_is_the_one_of_its_port() {
        let chardevs =
            "qemu -chardev socket,fd=5,id=a,server=on -chardev socket,path=/o,id=o,server=on";
        let plain = "-device virtserialport,chardev=a,name=org.qemu.guest_agent.0";
        let other = "-device virtserialport,chardev=o,name=org.spice.0";
        let json =
            r#"-device {"driver":"virtserialport","chardev":"o","name":"org.qemu.guest_agent.0"}"#;
        let agent = |devices: &str| of(&format!("{chardevs} {devices}")).agent;
        assert_eq!(agent(plain), Some(Place::Passed(5)));
        assert_eq!(agent(other), None);
        assert_eq!(agent(json), Some(Place::Path("/o".into())));
    }
}
