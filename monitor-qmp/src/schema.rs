//! What a live QEMU can do, and how that differs from what this crate's types say.
//!
//! [`QueryQmpSchema`] names every command, event, member and enum value. Our side of the
//! comparison is not written down anywhere: the types themselves are asked, by letting serde
//! fill them from samples that the schema gives (`walk`). Knows nothing of the connection.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::de::DeserializeOwned;

use crate::{
    command::{self, Command, QueryQmpSchema, SchemaEntry},
    error::Error,
    event,
    qmp::{Deadline, Qmp, Release},
};

mod later;
mod walk;

use self::walk::{Sample, Walk, fill};

/// How many samples are taken of a type whose shape depends on a tag: more than any union of
/// commands' arguments has cases (46 in QEMU 7.2).
const SAMPLES: usize = 64;

/// The schema of one QEMU. It does not change while that QEMU runs: ask once and keep it.
#[derive(Clone, Debug)]
pub struct Schema {
    entries: BTreeMap<String, SchemaEntry>,
}

/// Something that this crate's types and a schema do not agree on.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub struct Difference {
    /// The command or event, as `migrate-incoming`.
    pub subject: &'static str,
    /// What about it: a member, a value, or for people what does not fit. Empty if all of it.
    pub what: String,
    /// What kind of difference it is.
    pub kind: DifferenceKind,
    /// The QEMU that brought it, where that is known.
    pub since: Option<(u32, u32)>,
    /// Whether it depends on how QEMU was built or on what it emulates.
    pub optional: bool,
}

/// What kind a [`Difference`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum DifferenceKind {
    /// This QEMU has no such command.
    Command,
    /// This QEMU has no such event.
    Event,
    /// This QEMU does not take such an argument.
    Argument,
    /// This QEMU never says such a member.
    Member,
    /// This QEMU knows no such value.
    Value,
    /// Ours is wrong: with this QEMU the command cannot be sent, or its reply not be read.
    Contradiction,
}

/// One typed command or event. Its types are behind functions, so that the comparison itself is
/// compiled once and not for each.
pub(crate) struct Typed {
    pub(crate) name: &'static str,
    says: Says,
    /// Fills the type of what QEMU says: a reply, or what an event carries.
    said: Fill,
}

enum Says {
    Command { oob: bool, arguments: Fill },
    Event,
}

type Fill = fn(&Walk<'_>, &str) -> Result<(), String>;

/// What the walks found so far.
#[derive(Default)]
struct Findings {
    differences: BTreeSet<Difference>,
    /// Members of our types for replies and events: whether any schema type had them, and the
    /// subject where they were looked for. Events share types, and not all have all members.
    members: BTreeMap<(&'static str, &'static str), (bool, &'static str)>,
}

impl Schema {
    /// From a reply to [`QueryQmpSchema`].
    #[must_use]
    pub fn new(entries: Vec<SchemaEntry>) -> Self {
        let entries = entries.into_iter().map(|entry| (entry.name.clone(), entry));
        Self {
            entries: entries.collect(),
        }
    }

    /// Asks QEMU. That takes it some 30 ms (7.2), so keep the answer.
    ///
    /// # Errors
    ///
    /// As [`Qmp::call`], and [`ErrorKind::Decode`](crate::ErrorKind::Decode).
    ///
    /// # Cancel safety
    ///
    /// As [`Qmp::call`]; the command changes nothing.
    pub async fn ask(qmp: &dyn Qmp, deadline: Deadline) -> Result<Self, Error> {
        Ok(Self::new(qmp.execute(QueryQmpSchema, deadline).await?))
    }

    /// Whether this QEMU has a command.
    #[must_use]
    pub fn has_command(&self, name: &str) -> bool {
        self.entry(name, "command").is_some()
    }

    /// Whether this QEMU has an event.
    #[must_use]
    pub fn has_event(&self, name: &str) -> bool {
        self.entry(name, "event").is_some()
    }

    /// Whether a command takes an argument. Those that depend on another argument's value count.
    #[must_use]
    pub fn has_argument(&self, command: &str, argument: &str) -> bool {
        let arguments = self
            .entry(command, "command")
            .and_then(|entry| entry.arg_type.as_deref());
        arguments.is_some_and(|arguments| self.members(arguments).contains(argument))
    }

    /// What this crate's types know and this QEMU does not.
    ///
    /// ```
    /// # use monitor_qmp::{Deadline, Error, Monitor, Schema};
    /// # async fn start(monitor: &Monitor, deadline: Deadline) -> Result<(), Error> {
    /// let schema = Schema::ask(monitor, deadline).await?;
    /// for lack in schema.lacks() {
    ///     println!("this QEMU has no {lack}");
    /// }
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn lacks(&self) -> Vec<Difference> {
        let mut differences = self.compare();
        differences.retain(|difference| difference.kind != DifferenceKind::Contradiction);
        differences
    }

    /// All that this crate's types and this QEMU do not agree on.
    #[must_use]
    pub fn compare(&self) -> Vec<Difference> {
        let mut findings = Findings::default();
        for typed in command::ALL.iter().copied().flatten().chain(event::ALL) {
            findings.compare(self, typed);
        }
        findings.end()
    }

    /// How many commands and events [`compare`](Self::compare) looks at.
    #[must_use]
    pub fn compared() -> (usize, usize) {
        let commands = command::ALL.iter().map(|area| area.len()).sum();
        (commands, event::ALL.len())
    }

    fn entry(&self, name: &str, meta_type: &str) -> Option<&SchemaEntry> {
        self.entries
            .get(name)
            .filter(|entry| entry.meta_type == meta_type)
    }

    /// The names of an object's members, its variants' included.
    fn members(&self, object: &str) -> BTreeSet<&str> {
        let Some(entry) = self.entries.get(object) else {
            return BTreeSet::new();
        };
        let own = entry.members.iter().map(|member| member.name.as_str());
        let variants = entry.variants.iter();
        own.chain(variants.flat_map(|variant| self.members(&variant.variant_type)))
            .collect()
    }
}

impl Typed {
    pub(crate) const fn command<C: Command + DeserializeOwned>() -> Self {
        Self {
            name: C::NAME,
            says: Says::Command {
                oob: C::OOB,
                arguments: fill::<C>,
            },
            said: fill::<C::Reply>,
        }
    }

    pub(crate) const fn event<T: DeserializeOwned>(name: &'static str) -> Self {
        Self {
            name,
            says: Says::Event,
            said: fill::<T>,
        }
    }
}

impl Findings {
    fn compare(&mut self, schema: &Schema, typed: &Typed) {
        let (meta_type, absent) = match typed.says {
            Says::Command { .. } => ("command", DifferenceKind::Command),
            Says::Event => ("event", DifferenceKind::Event),
        };
        let Some(entry) = schema.entry(typed.name, meta_type) else {
            return self.add(typed.name, String::new(), absent);
        };
        let said = match typed.says {
            Says::Event => &entry.arg_type,
            Says::Command { oob, arguments } => {
                if entry.allow_oob != oob {
                    let may = if entry.allow_oob { "may" } else { "may not" };
                    self.contradict(typed.name, format!("it {may} run out of band"));
                }
                if let Some(taken) = entry.arg_type.as_deref() {
                    self.compare_arguments(schema, typed.name, taken, arguments);
                }
                &entry.ret_type
            }
        };
        if let Some(said) = said {
            self.compare_said(schema, typed.name, said, typed.said);
        }
    }

    /// What we say: QEMU must know all of it, and miss nothing.
    fn compare_arguments(
        &mut self,
        schema: &Schema,
        subject: &'static str,
        taken: &str,
        fill: Fill,
    ) {
        let mut is_closed = false;
        for choice in 0..SAMPLES {
            let walk = Walk::new(schema, Sample::Full, choice);
            if let Err(error) = fill(&walk, taken) {
                self.contradict(subject, format!("arguments: {error}"));
            }
            is_closed |= walk.top_is_closed();
            for (owner, member, known) in walk.members() {
                if !known {
                    let what = format!("{owner}.{member}");
                    self.add(subject, what, DifferenceKind::Argument);
                }
            }
            self.values(subject, &walk);
        }
        if !is_closed {
            // It takes any argument besides: what is required is up to the caller.
            return;
        }
        let required = schema.entries.get(taken).into_iter();
        let required = required.flat_map(|entry| &entry.members);
        for member in required.filter(|member| member.default.is_none()) {
            let walk = Walk::new(schema, Sample::Without(&member.name), 0);
            if fill(&walk, taken).is_ok() {
                self.contradict(subject, format!("arguments: `{}` is required", member.name));
            }
        }
    }

    /// What QEMU says: we must be able to read it, with all that is optional and without.
    fn compare_said(&mut self, schema: &Schema, subject: &'static str, said: &str, fill: Fill) {
        for choice in 0..SAMPLES {
            for sample in [Sample::Full, Sample::Required] {
                let walk = Walk::new(schema, sample, choice);
                if let Err(error) = fill(&walk, said) {
                    self.contradict(subject, format!("reading: {error}"));
                }
                for (owner, member, known) in walk.members() {
                    let found = self.members.entry((owner, member));
                    found.or_insert((false, subject)).0 |= known;
                }
                self.values(subject, &walk);
            }
        }
    }

    fn add(&mut self, subject: &'static str, what: String, kind: DifferenceKind) {
        self.differences.insert(Difference {
            since: later::since(subject, &what),
            optional: later::depends_on_build(subject),
            subject,
            what,
            kind,
        });
    }

    fn contradict(&mut self, subject: &'static str, what: String) {
        self.add(subject, what, DifferenceKind::Contradiction);
    }

    fn values(&mut self, subject: &'static str, walk: &Walk<'_>) {
        for (owner, value) in walk.unknown_values() {
            self.add(subject, format!("{owner}.{value}"), DifferenceKind::Value);
        }
    }

    fn end(mut self) -> Vec<Difference> {
        for ((owner, member), (found, subject)) in std::mem::take(&mut self.members) {
            if !found {
                self.add(subject, format!("{owner}.{member}"), DifferenceKind::Member);
            }
        }
        self.differences.into_iter().collect()
    }
}

impl Difference {
    /// Whether a QEMU of this release was bound to differ so.
    #[must_use]
    pub fn is_expected_of(&self, release: Release) -> bool {
        let is_older = |(major, minor)| (release.major, release.minor) < (major, minor);
        self.kind != DifferenceKind::Contradiction
            && (self.optional || self.since.is_some_and(is_older))
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { subject, what, .. } = self;
        match self.kind {
            DifferenceKind::Command => write!(f, "command {subject}")?,
            DifferenceKind::Event => write!(f, "event {subject}")?,
            DifferenceKind::Argument => write!(f, "argument {what} of {subject}")?,
            DifferenceKind::Member => write!(f, "member {what} in {subject}")?,
            DifferenceKind::Value => write!(f, "value {what} in {subject}")?,
            DifferenceKind::Contradiction => write!(f, "agreement on {subject}: {what}")?,
        }
        match self.since {
            Some((major, minor)) => write!(f, " (since QEMU {major}.{minor})"),
            None if self.optional => f.write_str(" (depends on the build)"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
