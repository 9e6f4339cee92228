//! What a fake agent does when it is left to itself: for each command a list of acts, and the one
//! state that changes all answers, the freeze. It knows no stream.

use std::collections::HashMap;
use std::fmt;
use std::time::Duration;

use serde_json::{Value, json};

use super::Request;

/// What a real agent has of itself, whatever the script says.
const BUILT_IN: [&str; 7] = [
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-freeze",
    "guest-fsfreeze-freeze-list",
    "guest-fsfreeze-thaw",
];

/// What a real agent answers only if it fails.
const SILENT: [&str; 4] = [
    "guest-shutdown",
    "guest-suspend-ram",
    "guest-suspend-disk",
    "guest-suspend-hybrid",
];

/// What a real agent still does while the file systems are frozen.
const WHILE_FROZEN: [&str; 6] = [
    "guest-ping",
    "guest-info",
    "guest-sync",
    "guest-sync-delimited",
    "guest-fsfreeze-status",
    "guest-fsfreeze-thaw",
];

/// One thing that the agent does about a request.
///
/// None at all is silence; two answers in a row arrive glued; `Wait` before an answer makes it late.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Act {
    /// Answers well.
    Return(Value),
    /// Answers with an error.
    Refuse {
        /// Such as `GenericError`.
        class: String,
        /// For people.
        desc: String,
    },
    /// Sends any bytes: half an answer, a lie, somebody else's answer.
    Raw(Vec<u8>),
    /// Does nothing else for a while: an agent does one thing at a time.
    Wait(Duration),
    /// From here on the file systems are frozen, or are not.
    Freeze(bool),
    /// Sends so many bytes without a line end.
    Flood(usize),
    /// Ends the connection.
    HangUp,
}

impl Act {
    /// Answers with an error.
    #[must_use]
    pub fn refuse(class: &str, desc: &str) -> Self {
        Self::Refuse {
            class: class.into(),
            desc: desc.into(),
        }
    }

    /// What an agent says about a command that it does not have.
    #[must_use]
    pub fn not_found(command: &str) -> Self {
        Self::refuse(
            "CommandNotFound",
            &format!("The command {command} has not been found"),
        )
    }
}

type Answer = Box<dyn FnMut(&Request) -> Vec<Act> + Send>;

/// What to do about each command.
#[derive(Default)]
pub struct Table {
    answers: HashMap<String, Answer>,
    frozen: bool,
}

impl Table {
    /// Knows the freeze commands and `guest-info`, and no other.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An agent in a small Linux guest: ping, info, the plain queries, and silence about shutdown
    /// and suspend.
    #[must_use]
    pub fn typical() -> Self {
        let answered = [
            ("guest-ping", json!({})),
            (
                "guest-get-osinfo",
                json!({ "id": "debian", "version-id": "12", "machine": "x86_64" }),
            ),
            ("guest-get-host-name", json!({ "host-name": "fake" })),
            ("guest-get-time", json!(1_700_000_000_000_000_000_i64)),
            (
                "guest-get-vcpus",
                json!([{ "logical-id": 0, "online": true, "can-offline": false }]),
            ),
            ("guest-network-get-interfaces", json!([])),
            ("guest-get-fsinfo", json!([])),
        ];
        let table = SILENT
            .into_iter()
            .fold(Self::new(), |table, name| table.on(name, []));
        answered.into_iter().fold(table, |table, (name, value)| {
            table.on(name, [Act::Return(value)])
        })
    }

    /// The same, with `acts` for each `command` of that name.
    #[must_use]
    pub fn on(self, command: &str, acts: impl Into<Vec<Act>>) -> Self {
        let acts = acts.into();
        self.on_call(command, move |_| acts.clone())
    }

    /// The same, with what `answer` says for each `command` of that name.
    #[must_use]
    pub fn on_call(
        mut self,
        command: &str,
        answer: impl FnMut(&Request) -> Vec<Act> + Send + 'static,
    ) -> Self {
        self.answers.insert(command.to_owned(), Box::new(answer));
        self
    }

    /// Whether the file systems are frozen now.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.frozen
    }

    /// Freezes or thaws the file systems, as somebody beside the client would.
    pub fn set_frozen(&mut self, frozen: bool) {
        self.frozen = frozen;
    }

    fn knows(&self, command: &str) -> bool {
        BUILT_IN.contains(&command) || self.answers.contains_key(command)
    }

    fn info(&self) -> Value {
        let mut names: Vec<&str> = self.answers.keys().map(String::as_str).collect();
        names.extend(BUILT_IN);
        names.sort_unstable();
        names.dedup();
        let commands: Vec<Value> = names
            .into_iter()
            .map(|name| {
                json!({
                    "name": name,
                    "enabled": !self.frozen || WHILE_FROZEN.contains(&name),
                    "success-response": !SILENT.contains(&name),
                })
            })
            .collect();
        json!({ "version": "7.2.22", "supported_commands": commands })
    }

    /// What to do about this request.
    pub fn respond(&mut self, request: &Request) -> Vec<Act> {
        let name = &*request.name;
        if self.frozen && self.knows(name) && !WHILE_FROZEN.contains(&name) {
            let desc = format!("Command {name} has been disabled: the agent is in frozen state");
            return vec![Act::refuse("CommandNotFound", &desc)];
        }
        if let Some(answer) = self.answers.get_mut(name) {
            return answer(request);
        }
        let value = match name {
            "guest-fsfreeze-status" if self.frozen => json!("frozen"),
            "guest-fsfreeze-status" => json!("thawed"),
            "guest-fsfreeze-freeze" | "guest-fsfreeze-freeze-list" => {
                self.frozen = true;
                json!(1)
            }
            "guest-info" => self.info(),
            "guest-fsfreeze-thaw" => json!(i64::from(std::mem::take(&mut self.frozen))),
            _ => return vec![Act::not_found(name)],
        };
        vec![Act::Return(value)]
    }
}

impl fmt::Debug for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table")
            .field("commands", &self.answers.keys())
            .field("frozen", &self.frozen)
            .finish()
    }
}
