//! What is written down of a guest that arrived, once its journal says that it is ours.
//!
//! Before that nothing changes of what was known of it here: it may come to nothing.

use crate::error::Error;
use crate::guest::Guest;
use crate::ops::AsyncOp;
use crate::ops::start::as_it_runs;
use crate::records::Work;

/// What was known of the guest here before it was taken.
pub(super) struct Before {
    moved_away: bool,
    definition: Option<Guest>,
}

impl Before {
    pub(super) fn of(op: &AsyncOp) -> Self {
        let records = op.domain().records();
        Self {
            moved_away: records.moved_away,
            definition: records.definition.clone(),
        }
    }

    /// It was taken and never ran: nothing has changed of what is known of it, and a daemon that comes back finds a copy.
    pub(super) async fn again(self, op: &AsyncOp) -> Result<(), Error> {
        op.with_state(|records| {
            records.moved_away = self.moved_away;
            records.definition = self.definition;
        })?;
        op.domain().0.store_definition().await?;
        op.note_work(Work::MigrationIn).await
    }
}

/// It is no guest that moved away any more, and a daemon that comes back must not take it for one that never ran. A
/// definition that is kept stays what its owner made of it, but for the files of the disks.
pub(super) async fn taken(op: &AsyncOp) -> Result<(), Error> {
    let guest = as_it_runs(op.domain()).await?;
    let before = Before::of(op);
    let is_news = op.with_state(|records| {
        records.moved_away = false;
        let kept = records.definition.take().filter(|_| records.persistent);
        records.definition = Some(match kept {
            Some(definition) => with_files_of(definition, &guest),
            None => guest,
        });
        before.moved_away || before.definition != records.definition
    })?;
    // The guest stands still meanwhile.
    if is_news {
        op.domain().0.store_definition().await?;
    }
    Ok(op.domain().0.work_is_over().await?)
}

/// The definition, with the files that the guest's disks are now. It may have got overlays or moved to other files where it
/// was: a start from what is behind those would lose what it wrote since, and break the overlays.
fn with_files_of(mut definition: Guest, guest: &Guest) -> Guest {
    for disk in &mut definition.disks {
        if let Some(now) = guest.disks.iter().find(|now| now.name == disk.name) {
            disk.path.clone_from(&now.path);
            disk.format = now.format;
        }
    }
    definition
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::{Disk, DiskFormat};

    #[test]
    fn a_definition_takes_the_files_of_the_disks_it_has_and_nothing_else() {
        let kept = Guest {
            memory_mib: 512,
            disks: vec![
                Disk {
                    read_only: true,
                    ..Disk::new("root", "/base.raw", DiskFormat::Raw)
                },
                Disk::new("own", "/own.raw", DiskFormat::Raw),
            ],
            ..Guest::new("web")
        };
        let came = Guest {
            memory_mib: 1024,
            disks: vec![
                Disk::new("more", "/more.raw", DiskFormat::Raw),
                Disk::new("root", "/overlay.qcow2", DiskFormat::Qcow2),
            ],
            ..kept.clone()
        };
        let mut expected = kept.clone();
        expected.disks[0].path = "/overlay.qcow2".into();
        expected.disks[0].format = DiskFormat::Qcow2;
        assert_eq!(with_files_of(kept, &came), expected);
    }
}
