//! The commands that change something, each with its question and what the answer means.
//!
//! There is none for `getfd`, whose names QEMU does not list (repeating it is harmless: a name
//! is replaced), and none for what only asks the guest, as `system_powerdown`: events tell.

use serde_json::{Map, Value};

use super::{Settle, Settled};
use crate::{
    command::{
        Balloon, BlockExportAdd, BlockExportDel, BlockdevAdd, BlockdevDel, BlockdevSnapshot,
        ChardevAdd, ChardevRemove, Command, Cont, DeviceAdd, DeviceDel, Migrate, MigrateCancel,
        MigrateIncoming, MigrateSetCapabilities, MigrateSetParameters, MigrationInfo,
        MigrationStatus, ObjectAdd, ObjectDel, Property, QomList, QueryBalloon, QueryBlockExports,
        QueryChardev, QueryMigrate, QueryMigrateCapabilities, QueryMigrateParameters,
        QueryNamedBlockNodes, QueryStatus, Quit, RunState, Status, Stop,
    },
    error::{Closed, Error},
};

/// Where the devices with an id are.
const PERIPHERAL: &str = "/machine/peripheral";
/// Where the objects with an id are.
const OBJECTS: &str = "/objects";

/// `Done` if `is_so`, else `NotDone`; without an answer nobody knows.
fn by<T>(answer: Result<T, Error>, is_so: impl FnOnce(&T) -> bool) -> Settled {
    judged(answer, |answer| {
        if is_so(answer) {
            Settled::Done
        } else {
            Settled::NotDone
        }
    })
}

fn judged<T>(answer: Result<T, Error>, judge: impl FnOnce(&T) -> Settled) -> Settled {
    answer.as_ref().map_or(Settled::Unknown, judge)
}

fn id(options: &Map<String, Value>) -> Option<&str> {
    options.get("id")?.as_str()
}

fn lists(properties: &[Property], id: Option<&str>) -> bool {
    properties
        .iter()
        .any(|property| Some(property.name.as_str()) == id)
}

/// The question and its judgement, in two lines a command.
macro_rules! settle {
    ($($command:ty: $question:ty = |$asked:ident| $ask:expr, |$this:ident, $answer:ident| $judge:expr;)+) => {
        $(impl Settle for $command {
            type Question = $question;

            fn question(&self) -> Option<$question> {
                let $asked = self;
                $ask
            }

            fn judge(&self, $answer: Result<<$question as Command>::Reply, Error>) -> Settled {
                let $this = self;
                $judge
            }
        })+
    };
}

settle! {
    DeviceAdd: QomList = |this| id(&this.options).map(|_| QomList::new(PERIPHERAL)),
        |this, answer| by(answer, |found| lists(found, id(&this.options)));

    // It stays until the guest gives it up, so being there says nothing.
    DeviceDel: QomList = |_this| Some(QomList::new(PERIPHERAL)),
        |this, answer| judged(answer, |found| match lists(found, Some(&this.id)) {
            true => Settled::Unknown,
            false => Settled::Done,
        });

    ObjectAdd: QomList = |this| id(&this.options).map(|_| QomList::new(OBJECTS)),
        |this, answer| by(answer, |found| lists(found, id(&this.options)));

    ObjectDel: QomList = |_this| Some(QomList::new(OBJECTS)),
        |this, answer| by(answer, |found| !lists(found, Some(&this.id)));

    BlockdevAdd: QueryNamedBlockNodes = |_this| Some(QueryNamedBlockNodes { flat: Some(true) }),
        |this, answer| by(answer, |nodes| nodes.iter().any(|node| node.is(&this.node_name)));

    BlockdevDel: QueryNamedBlockNodes = |_this| Some(QueryNamedBlockNodes { flat: Some(true) }),
        |this, answer| by(answer, |nodes| !nodes.iter().any(|node| node.is(&this.node_name)));

    // The overlay has something behind it from then on.
    BlockdevSnapshot: QueryNamedBlockNodes = |_this| Some(QueryNamedBlockNodes { flat: Some(true) }),
        |this, answer| by(answer, |nodes| nodes
            .iter()
            .any(|node| node.is(&this.overlay) && node.backing_file.is_some()));

    BlockExportAdd: QueryBlockExports = |_this| Some(QueryBlockExports),
        |this, answer| by(answer, |exports| exports.iter().any(|export| export.id == this.id));

    // It may be there for as long as clients use it.
    BlockExportDel: QueryBlockExports = |_this| Some(QueryBlockExports),
        |this, answer| by(answer, |exports| !exports
            .iter()
            .any(|export| export.id == this.id && !export.shutting_down));

    ChardevAdd: QueryChardev = |_this| Some(QueryChardev),
        |this, answer| by(answer, |all| all.iter().any(|chardev| chardev.label == this.id));

    ChardevRemove: QueryChardev = |_this| Some(QueryChardev),
        |this, answer| by(answer, |all| !all.iter().any(|chardev| chardev.label == this.id));

    Stop: QueryStatus = |_this| Some(QueryStatus), |_this, answer| by(answer, |now| !now.running);

    // Before the guest is there it only says what shall be then.
    Cont: QueryStatus = |_this| Some(QueryStatus),
        |_this, answer| judged(answer, |now: &Status| match now.status {
            RunState::InMigrate => Settled::Unknown,
            _ if now.running => Settled::Done,
            _ => Settled::NotDone,
        });

    // QEMU may answer once more on its way out.
    Quit: QueryStatus = |_this| Some(QueryStatus), |_this, answer| match answer {
        Err(error) if matches!(error.why_closed(), Some(Closed::EndOfStream)) => Settled::Done,
        _ => Settled::Unknown,
    };

    // The guest gives memory back in its own time, or never.
    Balloon: QueryBalloon = |_this| Some(QueryBalloon),
        |this, answer| judged(answer, |now| match now.actual == this.value {
            true => Settled::Done,
            false => Settled::Unknown,
        });

    Migrate: QueryMigrate = |_this| Some(QueryMigrate), |_this, answer| judged(answer, began);

    MigrateIncoming: QueryMigrate = |_this| Some(QueryMigrate),
        |_this, answer| judged(answer, |now| match began(now) {
            // A listener that nobody connected to has no status either.
            Settled::NotDone => Settled::Unknown,
            other => other,
        });

    MigrateCancel: QueryMigrate = |_this| Some(QueryMigrate),
        |_this, answer| by(answer, |now| matches!(
            now.status,
            Some(MigrationStatus::Cancelling | MigrationStatus::Cancelled)
        ));

    MigrateSetCapabilities: QueryMigrateCapabilities = |_this| Some(QueryMigrateCapabilities),
        |this, answer| by(answer, |now| this.capabilities.iter().all(|wanted| now.contains(wanted)));

    MigrateSetParameters: QueryMigrateParameters = |_this| Some(QueryMigrateParameters),
        |this, answer| by(answer, |now| this.holds_in(now));
}

/// Whether a migration began. One that is over may be an earlier one.
fn began(now: &MigrationInfo) -> Settled {
    match &now.status {
        None | Some(MigrationStatus::None) => Settled::NotDone,
        Some(
            MigrationStatus::Completed
            | MigrationStatus::Failed
            | MigrationStatus::Cancelled
            | MigrationStatus::Cancelling
            | MigrationStatus::Other(_),
        ) => Settled::Unknown,
        Some(_) => Settled::Done,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{from_value, json};

    use super::*;

    fn after<C: Settle>(command: &C, answer: Value) -> Settled {
        command.judge(Ok(from_value(answer).unwrap()))
    }

    #[test]
    fn what_is_there_was_added_and_what_is_gone_was_removed() {
        let there = || json!([{"name": "d0", "type": "child<virtio-rng-pci>"}]);
        let add = DeviceAdd::new("virtio-rng-pci").with("id", "d0");
        assert_eq!(after(&add, there()), Settled::Done);
        assert_eq!(after(&add, json!([])), Settled::NotDone);
        assert!(DeviceAdd::new("virtio-rng-pci").question().is_none());
        assert_eq!(after(&DeviceDel::new("d0"), json!([])), Settled::Done);
        assert_eq!(after(&DeviceDel::new("d0"), there()), Settled::Unknown);
        assert_eq!(after(&ObjectDel::new("d0"), there()), Settled::NotDone);
    }

    #[test]
    fn a_migration_that_is_over_may_be_an_earlier_one() {
        let migrate = Migrate::new("fd:out");
        assert_eq!(after(&migrate, json!({})), Settled::NotDone);
        assert_eq!(after(&migrate, json!({"status": "active"})), Settled::Done);
        assert_eq!(
            after(&migrate, json!({"status": "failed"})),
            Settled::Unknown
        );
        assert_eq!(
            after(&migrate, json!({"status": "brand-new"})),
            Settled::Unknown
        );
        assert_eq!(
            after(&MigrateCancel, json!({"status": "active"})),
            Settled::NotDone
        );
    }

    #[test]
    fn parameters_are_set_when_all_that_were_given_are() {
        let wanted = MigrateSetParameters {
            downtime_limit: Some(200),
            ..Default::default()
        };
        let now = |limit: u64| json!({"downtime-limit": limit, "max-bandwidth": 7});
        assert_eq!(after(&wanted, now(200)), Settled::Done);
        assert_eq!(after(&wanted, now(300)), Settled::NotDone);
    }

    #[test]
    fn a_question_without_answer_settles_nothing() {
        let refused = |name| Error::refused(name, crate::ErrorClass::GenericError, "no");
        assert_eq!(Stop.judge(Err(refused("query-status"))), Settled::Unknown);
        let gone = Error::closed("query-status", Closed::EndOfStream, true);
        assert_eq!(Quit.judge(Err(gone)), Settled::Done);
    }
}
