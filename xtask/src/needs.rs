//! What a real guest takes from the machine: QEMU, a guest agent with its libraries, a static
//! busybox, a kernel with its modules, and a `qemu-img` that looks at what became of images. Found
//! where they are, fetched where that is possible, else all that is missing is said at once. What is
//! done with them is not known here.
//!
//! Of each part the first of these is taken: what its variable names (a variable that names
//! nothing usable is an error, never passed over), what the machine has, what was fetched before.

pub(crate) mod agent;
mod debian;
mod kernel;
mod libraries;
pub(crate) mod newer;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::{run, workspace};

pub(crate) use kernel::Kernel;
pub(crate) use libraries::Library;

/// A variable that overrules the search, and what it names.
pub(crate) type Variable = (&'static str, &'static str);

const QEMU: Variable = ("VMWRIGHT_QEMU", "qemu-system-x86_64");
const AGENT: Variable = (
    "VMWRIGHT_QGA",
    "qemu-ga, the agent that runs inside the guest",
);
const BUSYBOX: Variable = ("VMWRIGHT_BUSYBOX", "a statically linked busybox");
const KERNEL: Variable = ("VMWRIGHT_KERNEL", "a Linux image for x86-64 (vmlinuz)");
const MODULES: Variable = (
    "VMWRIGHT_MODULES",
    "its modules, the folder /lib/modules/RELEASE",
);
const IMAGES: Variable = ("VMWRIGHT_QEMU_IMG", "qemu-img, which checks disk images");

/// All of them, for the help text.
pub(crate) const VARIABLES: [Variable; 6] = [QEMU, AGENT, BUSYBOX, KERNEL, MODULES, IMAGES];

/// Everything, found.
#[derive(Debug)]
pub(crate) struct Needs {
    pub(crate) qemu: PathBuf,
    pub(crate) agent: PathBuf,
    pub(crate) libraries: Vec<Library>,
    pub(crate) busybox: PathBuf,
    pub(crate) kernel: Kernel,
    pub(crate) images: PathBuf,
}

/// A part that may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    Qemu,
    Agent,
    Busybox,
    Kernel,
    Images,
}

/// Finds all parts and fetches what is missing; `qemu` overrules the search for QEMU.
pub(crate) fn gather(qemu: Option<&Path>) -> Result<Needs, Failure> {
    let store = workspace::target()?.join("guest/deb");
    let missing = match look(qemu, &store)? {
        Ok(needs) => return Ok(needs),
        Err(missing) => missing,
    };
    let unfetched = debian::fetch(&missing, &store)?;
    match look(qemu, &store)? {
        Ok(needs) => Ok(needs),
        Err(missing) => Err(Failure::wrong(complaint(&missing, &unfetched))),
    }
}

/// What makes two hosts of one machine: `ip`, fetched if it can be. Who needs it says what it does without.
pub(crate) fn network() -> Result<(), Failure> {
    match run::find_program("ip") {
        Some(_) => Ok(()),
        None => debian::install("iproute2"),
    }
}

/// All parts, or the list of those that are missing.
fn look(qemu: Option<&Path>, store: &Path) -> Result<Result<Needs, Vec<Part>>, Failure> {
    let store = Store::open(store);
    let qemu = match qemu {
        Some(path) => Some(path.to_owned()),
        None => named(QEMU, is_file)?.or_else(|| run::find_program("qemu-system-x86_64")),
    };
    let agent = agent(&store)?;
    let busybox = busybox(&store)?;
    let kernel = kernel::find(&store)?;
    let images = match named(IMAGES, is_program)? {
        Some(images) => Some(images),
        None => run::find_program("qemu-img").or_else(|| store.files("usr/bin/qemu-img").next()),
    };

    match (qemu, agent, busybox, kernel, images) {
        (Some(qemu), Some((agent, libraries)), Some(busybox), Some(kernel), Some(images)) => {
            Ok(Ok(Needs {
                qemu,
                agent,
                libraries,
                busybox,
                kernel,
                images,
            }))
        }
        (qemu, agent, busybox, kernel, images) => {
            let parts = [
                (Part::Qemu, qemu.is_none()),
                (Part::Agent, agent.is_none()),
                (Part::Busybox, busybox.is_none()),
                (Part::Kernel, kernel.is_none()),
                (Part::Images, images.is_none()),
            ];
            Ok(Err(parts
                .iter()
                .filter(|(_, missing)| *missing)
                .map(|(part, _)| *part)
                .collect()))
        }
    }
}

/// The agent counts as found only with every library it is linked to.
fn agent(store: &Store) -> Result<Option<(PathBuf, Vec<Library>)>, Failure> {
    if let Some(agent) = named(AGENT, is_program)? {
        return match libraries::of(&agent, store)? {
            Some(libraries) => Ok(Some((agent, libraries))),
            None => Err(Failure::wrong(format!(
                "VMWRIGHT_QGA names {}, which wants libraries that this machine lacks (see ldd)",
                agent.display()
            ))),
        };
    }
    for agent in run::find_program("qemu-ga")
        .into_iter()
        .chain(store.files("usr/sbin/qemu-ga"))
    {
        if let Some(libraries) = libraries::of(&agent, store)? {
            return Ok(Some((agent, libraries)));
        }
    }
    Ok(None)
}

fn busybox(store: &Store) -> Result<Option<PathBuf>, Failure> {
    if let Some(busybox) = named(BUSYBOX, suits_the_guest)? {
        return Ok(Some(busybox));
    }
    let mut candidates = run::find_program("busybox")
        .into_iter()
        .chain(store.files("usr/bin/busybox"))
        .chain(store.files("bin/busybox"));
    Ok(candidates.find(|busybox| suits_the_guest(busybox).is_ok()))
}

/// What a variable names, if it is set. `check` says what is wrong with it.
fn named(
    (variable, _): Variable,
    check: fn(&Path) -> Result<(), String>,
) -> Result<Option<PathBuf>, Failure> {
    let Some(value) = std::env::var_os(variable).filter(|value| !value.is_empty()) else {
        return Ok(None);
    };
    let path = std::path::absolute(value).map_err(Failure::because(format!("read {variable}")))?;
    match check(&path) {
        Ok(()) => Ok(Some(path)),
        Err(flaw) => Err(Failure::wrong(format!(
            "{variable} names {}, which {flaw}",
            path.display()
        ))),
    }
}

fn is_file(path: &Path) -> Result<(), String> {
    match fs::File::open(path).and_then(|file| file.metadata()) {
        Ok(facts) if facts.is_file() => Ok(()),
        Ok(_) => Err("is no file".into()),
        Err(error) => Err(format!("cannot be read: {error}")),
    }
}

fn is_program(path: &Path) -> Result<(), String> {
    is_file(path)?;
    let content = fs::read(path).map_err(|error| format!("cannot be read: {error}"))?;
    if content.starts_with(b"\x7fELF") {
        return Ok(());
    }
    Err("is no program (ELF)".into())
}

/// The initramfs holds no C library for busybox, and the guest's init uses these applets.
fn suits_the_guest(busybox: &Path) -> Result<(), String> {
    is_program(busybox)?;
    let program = fs::read(busybox).map_err(|error| format!("cannot be read: {error}"))?;
    if libraries::wants_loader(&program) {
        return Err("is not statically linked".into());
    }
    let applets = applets(busybox).map_err(|failure| failure.summary())?;
    let lacking = ["acpid", "ifconfig", "insmod", "poweroff", "sh"]
        .iter()
        .find(|wanted| !applets.iter().any(|applet| applet == *wanted));
    lacking.map_or(Ok(()), |applet| Err(format!("lacks the applet {applet}")))
}

/// The names a busybox answers to.
pub(crate) fn applets(busybox: &Path) -> Result<Vec<String>, Failure> {
    let listed = run::ask(Command::new(busybox).arg("--list"))?;
    Ok(String::from_utf8_lossy(&listed)
        .lines()
        .map(str::to_owned)
        .collect())
}

/// One message: what is missing, what names it, and why it could not be fetched.
fn complaint(missing: &[Part], unfetched: &str) -> String {
    let mut text = String::from("this machine lacks what a real guest takes:\n");
    for part in missing {
        for (variable, meaning) in part.variables() {
            text += &format!("  {meaning}: {variable}=PATH\n");
        }
        text += &format!("      on Debian it is in the package {}\n", part.package());
    }
    text + unfetched
}

impl Part {
    fn variables(self) -> &'static [Variable] {
        match self {
            Self::Qemu => &[QEMU],
            Self::Agent => &[AGENT],
            Self::Busybox => &[BUSYBOX],
            Self::Kernel => &[KERNEL, MODULES],
            Self::Images => &[IMAGES],
        }
    }

    fn package(self) -> &'static str {
        match self {
            Self::Qemu => "qemu-system-x86",
            Self::Agent => "qemu-guest-agent",
            Self::Busybox => "busybox-static",
            Self::Kernel => "linux-image-cloud-amd64",
            Self::Images => "qemu-utils",
        }
    }
}

/// Fetched packages, each unpacked in a folder of its own.
#[derive(Debug)]
pub(crate) struct Store {
    packages: Vec<PathBuf>,
}

impl Store {
    fn open(folder: &Path) -> Self {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let mut packages: Vec<_> = entries
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect();
        packages.sort();
        Self { packages }
    }

    /// `inside` in each package that has it.
    fn files(&self, inside: &str) -> impl Iterator<Item = PathBuf> {
        self.packages
            .iter()
            .map(move |package| package.join(inside))
            .filter(|path| path.exists())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_complaint_names_all_that_is_missing_with_its_variable() {
        let text = complaint(&[Part::Qemu, Part::Kernel], "no apt-get here");
        for wanted in [
            "VMWRIGHT_QEMU",
            "VMWRIGHT_KERNEL",
            "VMWRIGHT_MODULES",
            "qemu-system-x86",
            "no apt-get here",
        ] {
            assert!(text.contains(wanted), "{wanted} is not in: {text}");
        }
        assert!(!text.contains("VMWRIGHT_BUSYBOX"), "{text}");
    }

    #[test]
    fn a_program_with_a_loader_is_no_busybox_for_the_guest() {
        let own = std::env::current_exe().unwrap();
        assert_eq!(
            suits_the_guest(&own),
            Err("is not statically linked".into())
        );
        assert!(
            suits_the_guest(Path::new("/nowhere"))
                .unwrap_err()
                .starts_with("cannot be read")
        );
    }
}
