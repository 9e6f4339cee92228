//! The guest's agent as a program of this machine, for the tests that talk to one without a guest. One that was fetched
//! may want libraries that were fetched with it, where the loader does not look.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::{Library, Needs};
use crate::error::Failure;
use crate::workspace;

/// What to call to run the agent here: itself, or a script that tells the loader where its libraries are.
pub(crate) fn here(needs: &Needs) -> Result<PathBuf, Failure> {
    let guest = workspace::target()?.join("guest");
    let Some(text) = script(&needs.agent, &needs.libraries, &guest.join("deb")) else {
        return Ok(needs.agent.clone());
    };
    let path = guest.join("qemu-ga");
    let failed = Failure::because(format!("write {}", path.display()));
    put(&path, &text).map_err(failed)?;
    Ok(path)
}

/// Appears whole, and not under a shell that reads it: another command may be running it.
pub(super) fn put(path: &Path, text: &str) -> io::Result<()> {
    if fs::read_to_string(path).is_ok_and(|known| known == text) {
        return Ok(());
    }
    let draft = path.with_extension(std::process::id().to_string());
    fs::write(&draft, text)?;
    fs::set_permissions(&draft, fs::Permissions::from_mode(0o755))?;
    fs::rename(&draft, path)
}

/// The script, if a library of the agent is one that was fetched.
fn script(agent: &Path, libraries: &[Library], fetched: &Path) -> Option<String> {
    let is_fetched = |library: &&Library| library.path.starts_with(fetched);
    let folders = libraries.iter().filter(is_fetched);
    let mut folders: Vec<_> = folders
        .filter_map(|library| library.path.parent())
        .collect();
    folders.sort_unstable();
    folders.dedup();
    if folders.is_empty() {
        return None;
    }
    let quoted = |path: &Path| format!("'{}'", path.display().to_string().replace('\'', r"'\''"));
    let path: Vec<_> = folders.into_iter().map(quoted).collect();
    // Its process becomes the agent, so that whoever started it knows the agent's number.
    let agent = quoted(agent);
    let path = path.join(":");
    Some(format!(
        "#!/bin/sh\nLD_LIBRARY_PATH={path} exec {agent} \"$@\"\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn library(path: &str) -> Library {
        Library {
            name: "lib".into(),
            path: path.into(),
        }
    }

    #[test]
    fn an_agent_whose_libraries_the_machine_has_is_run_as_it_is() {
        let libraries = [library("/lib/x86_64-linux-gnu/libc.so.6")];
        assert_eq!(script(Path::new("/a"), &libraries, Path::new("/deb")), None);
    }

    #[test]
    fn the_loader_is_told_of_each_folder_of_fetched_libraries_once() {
        let libraries = [
            "/deb/it's/a.so",
            "/deb/it's/b.so",
            "/lib/c.so",
            "/deb/x/d.so",
        ]
        .map(library);
        let text = script(Path::new("/deb/q/qemu-ga"), &libraries, Path::new("/deb"));
        let wanted =
            "#!/bin/sh\nLD_LIBRARY_PATH='/deb/it'\\''s':'/deb/x' exec '/deb/q/qemu-ga' \"$@\"\n";
        assert_eq!(text.as_deref(), Some(wanted));
    }
}
