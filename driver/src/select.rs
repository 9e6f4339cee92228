//! Which rows of a list are wanted, as plain data that a daemon can build from its own requests.

use job_core::Label;

use crate::domain::Row;
use crate::domain::state::Run;

/// Which domains are wanted. Each call narrows it; without any it is all of them.
///
/// ```
/// use driver::Select;
///
/// let paused_web_servers = Select::all().name_has("web").run("paused");
/// let left_alone = Select::all().active().held(false);
/// # let _ = (paused_web_servers, left_alone);
/// ```
#[derive(Clone, Debug, Default)]
#[must_use = "it selects nothing by itself"]
pub struct Select {
    name_has: Option<String>,
    run: Option<String>,
    is_active: Option<bool>,
    is_held: Option<bool>,
    held_by: Option<Label>,
}

impl Select {
    /// All domains.
    pub fn all() -> Self {
        Self::default()
    }

    /// Those with that text in their name.
    pub fn name_has(self, text: impl Into<String>) -> Self {
        let name_has = Some(text.into());
        Self { name_has, ..self }
    }

    /// Those in that state, by the name that [`Run::name`] gives: `off`, `running`, `paused` and so on.
    pub fn run(self, name: impl Into<String>) -> Self {
        let run = Some(name.into());
        Self { run, ..self }
    }

    /// Those that have a QEMU, whatever it does.
    pub fn active(self) -> Self {
        let is_active = Some(true);
        Self { is_active, ..self }
    }

    /// Those that have none.
    pub fn inactive(self) -> Self {
        let is_active = Some(false);
        Self { is_active, ..self }
    }

    /// Those that an operation holds, or those that none does.
    pub fn held(self, is_held: bool) -> Self {
        let is_held = Some(is_held);
        Self { is_held, ..self }
    }

    /// Those that an operation of that owner holds.
    pub fn held_by(self, owner: impl Into<Label>) -> Self {
        let held_by = Some(owner.into());
        Self { held_by, ..self }
    }

    /// Whether that row is one of them.
    #[must_use]
    pub fn fits(&self, row: &Row) -> bool {
        fn as_wanted<T: PartialEq>(wanted: Option<&T>, is: &T) -> bool {
            wanted.is_none_or(|wanted| wanted == is)
        }
        let owner = row.holder.as_ref().map(|holder| &holder.owner);
        let has_name = |text: &String| row.name.contains(text.as_str());
        self.name_has.as_ref().is_none_or(has_name)
            && self.run.as_ref().is_none_or(|run| run == row.run.name())
            && as_wanted(self.is_active.as_ref(), &(row.run != Run::Off))
            && as_wanted(self.is_held.as_ref(), &row.holder.is_some())
            && (self.held_by.is_none() || self.held_by.as_ref() == owner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use job_core::{JobKind, Scheduler};
    use monitor_qmp::command::RunState;
    use std::time::SystemTime;
    use uuid::Uuid;

    fn row(name: &'static str, run: Run, owner: Option<&'static str>) -> Row {
        let scheduler = Scheduler::new(name);
        let job = owner.map(|owner| scheduler.caller(owner).try_begin(JobKind::Modify).unwrap());
        let holder = scheduler.holder();
        drop(job);
        Row {
            id: 1,
            uuid: Uuid::nil(),
            name: name.into(),
            run,
            since: SystemTime::UNIX_EPOCH,
            holder,
        }
    }

    #[test]
    fn each_call_narrows_what_is_wanted() {
        let rows = [
            row("web-1", Run::Off, None),
            row("web-2", Run::Qemu(RunState::Paused), Some("nightly")),
            row("db-1", Run::Qemu(RunState::Running), Some("resize")),
            row("db-2", Run::Lost, None),
        ];
        let chosen = |select: Select| -> Vec<&str> {
            let chosen = rows.iter().filter(|row| select.fits(row));
            chosen.map(|row| &*row.name).collect()
        };
        let table: [(Select, &[&str]); 10] = [
            (Select::all(), &["web-1", "web-2", "db-1", "db-2"]),
            (Select::all().name_has("b-1"), &["web-1", "db-1"]),
            (Select::all().run("paused"), &["web-2"]),
            (Select::all().run("off"), &["web-1"]),
            (Select::all().active(), &["web-2", "db-1", "db-2"]),
            (Select::all().inactive(), &["web-1"]),
            (Select::all().held(true), &["web-2", "db-1"]),
            (Select::all().held(false).active(), &["db-2"]),
            (Select::all().held_by("nightly"), &["web-2"]),
            (Select::all().held_by("nightly").run("running"), &[]),
        ];
        for (select, names) in table {
            assert_eq!(chosen(select.clone()), names, "{select:?}");
        }
    }
}
