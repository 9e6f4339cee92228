//! The plugin under test, where it can listen, and what of it can be tried on this machine.

use std::fmt;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use tokio::runtime::{Builder, Runtime};
use transport_abi::{Status, Verified};
use transport_host::{Deadline, Error, Listener, Loaded, Stream, Transports};

use crate::process::{Manners, beat};
use crate::raw::{Answer, ROOM, Raw};
use crate::report::Trouble;

/// What works, works within this on a busy machine too.
const LIMIT: Duration = Duration::from_secs(15);
const ROUNDS: u32 = 10_000;
const SHORT_ROUNDS: u32 = 300;

/// The command line.
pub(crate) struct Arguments {
    path: PathBuf,
    target: String,
    short: bool,
    unreachable: Option<String>,
}

impl Arguments {
    pub(crate) fn parse(words: impl Iterator<Item = String>) -> Result<Self, String> {
        let (mut plain, mut short, mut unreachable) = (Vec::new(), false, None);
        let mut words = words;
        while let Some(word) = words.next() {
            match word.as_str() {
                "--short" => short = true,
                "--unreachable" => {
                    unreachable = Some(words.next().ok_or("--unreachable wants a target")?);
                }
                other if other.starts_with('-') => return Err(format!("no option {other:?}")),
                _ => plain.push(word),
            }
        }
        let [path, target] =
            <[String; 2]>::try_from(plain).map_err(|_| "a path and a target are wanted")?;
        let path = Path::new(&path)
            .canonicalize()
            .map_err(|error| format!("{path}: {error}"))?;
        Ok(Self {
            path,
            target,
            short,
            unreachable,
        })
    }
}

/// What a clause cannot do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    Dial,
    Listen,
    /// A listener whose address can be dialed.
    Both,
    /// A target that is a live server, of a plugin that only dials.
    Server,
}

pub(crate) struct Subject {
    pub(crate) loaded: Loaded,
    pub(crate) raw: Raw,
    pub(crate) transports: Transports,
    pub(crate) target: String,
    pub(crate) unreachable: Option<String>,
    pub(crate) rounds: u32,
    /// As the process was before the plugin was called for the first time.
    pub(crate) manners: Manners,
    runtime: Runtime,
    scratch: Scratch,
    no_listening: Option<String>,
    no_meeting: Option<String>,
}

impl Subject {
    /// Loads the plugin as a daemon would, and finds out whether it can listen here and be dialed.
    pub(crate) fn new(arguments: &Arguments) -> Result<Self, Box<dyn std::error::Error>> {
        let mut builder = Transports::builder();
        let loaded = builder.load(&arguments.path)?;
        let transports = builder.build()?;
        let address = arguments.target.strip_prefix(&format!("{}:", loaded.name));
        let address = address.ok_or_else(|| {
            let (target, name) = (&arguments.target, &loaded.name);
            format!("{target:?} is no target of this plugin, {name:?} comes first in one")
        })?;
        let raw = Raw::open(&loaded.path)?;
        if raw.table().resolves_names() && address.parse::<SocketAddr>().is_err() {
            return Err(format!("{address:?} is a name; the kit wants numbers").into());
        }
        let mut subject = Self {
            loaded,
            raw,
            transports,
            target: arguments.target.clone(),
            unreachable: arguments.unreachable.clone(),
            rounds: if arguments.short {
                SHORT_ROUNDS
            } else {
                ROUNDS
            },
            manners: Manners::now()?,
            runtime: Builder::new_current_thread().enable_all().build()?,
            scratch: Scratch::new()?,
            no_listening: None,
            no_meeting: None,
        };
        subject
            .explore()
            .map_err(|trouble| format!("{trouble:?}"))?;
        Ok(subject)
    }

    /// By the C functions, since a host would trust the descriptors that it is handed.
    fn explore(&mut self) -> Result<(), Trouble> {
        if self.table().listen().is_none() {
            self.no_listening = Some(DOES_NOT_LISTEN.to_owned());
            return Ok(());
        }
        let mut listener = match self.raw.listen(self.address())? {
            Ok(listener) => listener,
            Err(answer) => {
                self.no_listening = if answer.status == Status::UNSUPPORTED {
                    Some(DOES_NOT_LISTEN.to_owned())
                } else {
                    is_the_kernels_no(&answer).then(|| reason("listen", &answer))
                };
                return Ok(()); // whatever else is wrong is for the clauses to find
            }
        };
        let Ok(address) = listener.address(ROOM)? else {
            return Ok(());
        };
        if self.table().dial().is_none() {
            return Ok(());
        }
        // What a dial hands over here stays open: whether it may be closed is yet to be found out.
        let answer = match self.raw.dial(&address)? {
            Ok(mut dial) => dial.step()?,
            Err(answer) => answer,
        };
        if answer.status == Status::BAD_ADDRESS {
            let why = &answer.text;
            self.no_meeting = Some(format!("the target is for listening only: {why}"));
        } else if is_the_kernels_no(&answer) {
            self.no_meeting = Some(reason("dial", &answer));
        }
        Ok(())
    }

    /// Whether clauses with these needs are for a plugin like this.
    pub(crate) fn is_about(&self, needs: Needs) -> bool {
        needs != Needs::Server || self.no_listening.as_deref() == Some(DOES_NOT_LISTEN)
    }

    /// Why a clause with these needs cannot be tried.
    pub(crate) fn lacks(&self, needs: Needs) -> Option<String> {
        let no_dialing = || {
            let dials = self.table().dial().is_some();
            (!dials).then(|| "the plugin does not dial".to_owned())
        };
        match needs {
            Needs::Nothing => None,
            Needs::Dial | Needs::Server => no_dialing(),
            Needs::Listen => self.no_listening.clone(),
            Needs::Both => no_dialing()
                .or_else(|| self.no_listening.clone())
                .or_else(|| self.no_meeting.clone()),
        }
    }

    pub(crate) fn table(&self) -> &Verified {
        self.raw.table()
    }

    pub(crate) fn scheme(&self) -> &str {
        &self.loaded.name
    }

    /// The target without its scheme.
    pub(crate) fn address(&self) -> &str {
        &self.target[self.scheme().len() + 1..]
    }

    /// A folder from which plugins may be loaded.
    pub(crate) fn scratch(&self) -> &Path {
        &self.scratch.0
    }

    /// What drop does, before an end without one.
    pub(crate) fn remove_scratch(&self) {
        self.scratch.remove();
    }

    pub(crate) fn run<T>(&self, work: impl AsyncFnOnce(&Self) -> T) -> T {
        self.runtime.block_on(work(self))
    }

    pub(crate) async fn listen(&self) -> Result<Listener, Error> {
        self.transports.listen(&self.target, soon()).await
    }

    pub(crate) async fn join(&self, listener: &Listener) -> Result<(Stream, Stream), Error> {
        beat();
        tokio::try_join!(
            self.transports.dial(listener.target(), soon()),
            listener.accept(soon())
        )
    }

    /// A listener and both ends of a connection through it.
    pub(crate) async fn meet(&self) -> Result<(Listener, Stream, Stream), Error> {
        let listener = self.listen().await?;
        let (dialed, accepted) = self.join(&listener).await?;
        Ok((listener, dialed, accepted))
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Loaded {
            name,
            version,
            abi: (major, minor),
            path,
            ..
        } = &self.loaded;
        write!(
            f,
            "transport {name} {version}, ABI {major}.{minor}, from {}",
            path.display()
        )
    }
}

/// Far enough away that a plugin that works never meets it.
pub(crate) fn soon() -> Deadline {
    Deadline::now() + LIMIT
}

const DOES_NOT_LISTEN: &str = "the plugin does not listen";

/// Whether the family or the address does not exist on this machine.
fn is_the_kernels_no(answer: &Answer) -> bool {
    answer.is_failure()
        && matches!(
            Errno::from_raw_os_error(answer.os_error),
            Errno::AFNOSUPPORT | Errno::ADDRNOTAVAIL | Errno::NODEV
        )
}

fn reason(action: &str, answer: &Answer) -> String {
    let system = std::io::Error::from_raw_os_error(answer.os_error);
    format!("this machine cannot {action}: {}: {system}", answer.text)
}

/// Ours alone, and removed on drop.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> std::io::Result<Self> {
        // The time too: a run that was killed leaves its folder, and its process id comes again.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(0, |since| since.as_nanos());
        let name = format!("vmwright-conformance-{}-{now}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::DirBuilder::new().mode(0o700).create(&path)?;
        path.canonicalize().map(Self)
    }

    fn remove(&self) {
        let _stays_in_the_way_of_nobody = fs::remove_dir_all(&self.0);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        self.remove();
    }
}
