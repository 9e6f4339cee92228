//! Which of a guest's disks an operation is about: each is there, is named once, may be written to, and no block job is at
//! it.

use crate::domain::Domain;
use crate::error::{Cause, Error};
use crate::guest::{Disk, Guest};
use crate::ops::block_jobs::refuse_beside;
use crate::ops::start::as_it_runs;

/// The disks of these names, in this order, as the guest has them now.
pub(crate) async fn chosen<'a>(
    domain: &Domain,
    names: impl Iterator<Item = &'a str> + Clone,
) -> Result<Vec<Disk>, Error> {
    for name in names.clone() {
        refuse_beside(domain, Some(name)).await?;
    }
    let guest = as_it_runs(domain).await?;
    Ok(named(&guest, names).map_err(Cause::BadRequest)?)
}

/// Else why they cannot be.
fn named<'a>(guest: &Guest, names: impl Iterator<Item = &'a str>) -> Result<Vec<Disk>, String> {
    let mut chosen = Vec::<Disk>::new();
    for name in names {
        let mut disks = guest.disks.iter();
        let Some(disk) = disks.find(|disk| disk.name == name) else {
            return Err(format!("there is no disk \"{name}\""));
        };
        if disk.read_only {
            return Err(format!("disk \"{name}\" is read-only"));
        }
        if chosen.iter().any(|other| other.name == name) {
            return Err(format!("disk \"{name}\" is named twice"));
        }
        chosen.push(disk.clone());
    }
    if chosen.is_empty() {
        return Err("no disk is named".to_owned());
    }
    Ok(chosen)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::DiskFormat;

    fn choose(names: &[&str]) -> Result<Vec<String>, String> {
        let disk = |name| Disk::new(name, format!("/{name}"), DiskFormat::Raw);
        let guest = Guest {
            disks: vec![
                disk("root"),
                disk("data"),
                Disk {
                    read_only: true,
                    ..disk("cd")
                },
            ],
            ..Guest::new("web")
        };
        let chosen = named(&guest, names.iter().copied())?;
        Ok(chosen.into_iter().map(|disk| disk.name).collect())
    }

    #[test]
    fn disks_are_chosen_in_the_order_they_are_named_in() {
        let names = ["data", "root"];
        assert_eq!(choose(&names), Ok(names.map(str::to_owned).to_vec()));
    }

    #[test]
    fn what_cannot_be_chosen_is_refused_by_name() {
        for (names, why) in [
            (&[][..], "no disk is named"),
            (&["root", "swap"], "there is no disk \"swap\""),
            (&["root", "cd"], "disk \"cd\" is read-only"),
            (&["root", "data", "root"], "disk \"root\" is named twice"),
        ] {
            assert_eq!(choose(names), Err(why.to_owned()));
        }
    }
}
