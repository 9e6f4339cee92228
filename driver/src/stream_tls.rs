//! A guest's memory under TLS on its way: what each side shows, and its QEMU told to use it.
//!
//! QEMU shakes hands itself, with the certificates that the daemons know each other by, and checks the other side's against
//! the same authority and, where the guest leaves, against the other daemon's name. It reads them from a folder as it is
//! given them and never again, so that the key lies there for that moment alone, readable by the same user.
//!
//! ```text
//!  put on ──► folder written ──► object-add ──► folder removed ──► parameters name the object
//!  take off ◄── once the migration is over, however; and before anything else that QEMU streams
//! ```
//!
//! The side that sends believes the one daemon that it was told the name of. The side that waits believes whoever holds a
//! certificate of the authority, and no fewer: QEMU can be told of one alone (`tls-authz`), but it looks at the subject of the
//! certificate, in the words of GnuTLS, while the daemons know each other by the DNS names beside it. An authority may give
//! all its certificates the same subject, or none, so that a check of it would hold for some and look as if it did for all.
//! Whoever holds another certificate, and saw the ticket on its way, can therefore come first and feed the QEMU that waits;
//! where a guest comes over several connections there is no ticket to be seen. It finds what QEMU does with a hostile stream.
//! No guest is started from that: the connections of the one who brings it are not taken then, its migration does not
//! complete, and nothing runs without its word.
//!
//! Must not know when a migration begins or ends.

use std::fs::{DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use monitor_qmp::command;
use remote_migrate::wire::{Pem, Tls};

use crate::access::Monitor;
use crate::error::{Error, io as failed_to};

/// The name of QEMU's object.
const ID: &str = "vmwright-tls";
/// Where QEMU keeps what it was given by `object-add`.
const OBJECTS: &str = "/objects";

/// Which end of the stream this is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum End<'a> {
    /// The guest leaves for a daemon with this DNS name.
    Leaves(&'a str),
    Arrives,
}

/// Has QEMU use TLS for whatever it streams from now on. `directory` is that of the guest.
pub(crate) async fn put_on(
    monitor: &Monitor<'_>,
    directory: &Path,
    tls: &Tls,
    end: End<'_>,
) -> Result<(), Error> {
    take_off(monitor).await?;
    let folder = Folder::write(directory, tls.pem(), end)?;
    let endpoint = match end {
        End::Leaves(_) => "client",
        End::Arrives => "server",
    };
    let object = command::ObjectAdd::new("tls-creds-x509")
        .with("id", ID)
        .with("endpoint", endpoint)
        .with("dir", folder.0.to_string_lossy())
        .with("verify-peer", true);
    monitor.execute(object).await?;
    drop(folder);
    let mut parameters = command::MigrateSetParameters::default();
    parameters.tls_creds = Some(ID.into());
    if let End::Leaves(name) = end {
        parameters.tls_hostname = Some(name.into());
    }
    monitor.execute(parameters).await?;
    Ok(())
}

/// Has QEMU stream in plain again, a save say, and forget the key. Nothing to take off is success, also of what an earlier
/// daemon put on, or only half put on.
pub(crate) async fn take_off(monitor: &Monitor<'_>) -> Result<(), Error> {
    let now = monitor.execute(command::QueryMigrateParameters).await?;
    if now.tls_creds.is_some_and(|creds| !creds.is_empty()) {
        let mut none = command::MigrateSetParameters::default();
        none.tls_creds = Some(String::new());
        none.tls_hostname = Some(String::new());
        monitor.execute(none).await?;
    }
    forget(monitor).await
}

async fn forget(monitor: &Monitor<'_>) -> Result<(), Error> {
    let objects = monitor.execute(command::QomList::new(OBJECTS)).await?;
    if objects.iter().any(|object| object.name == ID) {
        monitor.execute(command::ObjectDel::new(ID)).await?;
    }
    Ok(())
}

/// The certificates under the names that QEMU looks for. Removed with this value.
struct Folder(PathBuf);

impl Folder {
    fn write(directory: &Path, pem: &Pem, end: End<'_>) -> Result<Self, Error> {
        let folder = directory.join("tls");
        let failed = |error| failed_to("write certificates to", &folder)(error);
        match std::fs::remove_dir_all(&folder) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(failed(error).into());
            }
            // A daemon that was killed at this moment has left it.
            _ => {}
        }
        DirBuilder::new()
            .mode(0o700)
            .create(&folder)
            .map_err(failed)?;
        let folder = Self(folder);
        let (certificate, key) = match end {
            End::Leaves(_) => ("client-cert.pem", "client-key.pem"),
            End::Arrives => ("server-cert.pem", "server-key.pem"),
        };
        let files = [
            ("ca-cert.pem", &pem.authority),
            (certificate, &pem.chain),
            (key, &pem.key),
        ];
        for (name, bytes) in files {
            let mut options = OpenOptions::new();
            let path = folder.0.join(name);
            options
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(&path)
                .and_then(|mut file| file.write_all(bytes))
                .map_err(failed_to("write", &path))?;
        }
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _gone = std::fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn pem() -> Pem {
        let bytes = |text: &str| text.as_bytes().to_vec();
        Pem {
            authority: bytes("authority"),
            chain: bytes("chain"),
            key: bytes("key"),
        }
    }

    #[test]
    fn the_key_lies_where_qemu_looks_for_it_for_nobody_else_and_no_longer_than_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        for (end, key) in [
            (End::Leaves("b.example"), "client-key.pem"),
            (End::Arrives, "server-key.pem"),
        ] {
            let folder = Folder::write(dir.path(), &pem(), end).unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!(mode(&folder.0), 0o700);
            assert_eq!(mode(&folder.0.join(key)), 0o600);
            assert_eq!(std::fs::read(folder.0.join(key)).unwrap(), b"key");
            drop(folder);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn a_folder_that_a_daemon_left_as_it_was_killed_is_not_in_the_way() {
        let dir = tempfile::tempdir().unwrap();
        std::mem::forget(Folder::write(dir.path(), &pem(), End::Arrives).unwrap());
        let _again = Folder::write(dir.path(), &pem(), End::Arrives).unwrap();
    }
}
