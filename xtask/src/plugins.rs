//! Builds the transport plugins and stages them where a daemon agrees to load them.
//!
//! The loader trusts a file only if it and every folder above it belong to root or to the
//! daemon's user and nobody else can write there; a sticky folder of root's is tolerated above.
//! `target/transports` mostly is such a place. A checkout that is not (a umask of 002, a folder
//! of another user mounted into a container) gets a private folder under `/tmp` instead.

pub(crate) mod device;

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;

use crate::error::Failure;
use crate::{run, workspace};

const PLUGINS: [&str; 5] = [
    "transport-unix",
    "transport-tcp",
    "transport-vsock",
    "transport-vsock-unix",
    "transport-template",
];

/// Builds all plugins and gives the folder that holds them.
pub(crate) fn stage() -> Result<PathBuf, Failure> {
    let built = build()?;
    let folder = folder(&workspace::target()?.join("transports"))?;
    for library in &built {
        place(library, &folder).map_err(Failure::because(format!(
            "stage {} in {}",
            library.display(),
            folder.display()
        )))?;
    }
    Ok(folder)
}

/// Asks cargo where it put the libraries, since a person may have moved its target directory.
fn build() -> Result<Vec<PathBuf>, Failure> {
    let mut command = run::cargo();
    command
        .current_dir(workspace::root())
        .args(["build", "--message-format=json-render-diagnostics"]);
    for plugin in PLUGINS {
        command.args(["--package", plugin]);
    }
    run::show(&command);
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .map_err(Failure::because("run cargo"))?;
    run::judge(output.status)?;

    let libraries = libraries(&String::from_utf8_lossy(&output.stdout));
    if libraries.len() != PLUGINS.len() {
        return Err(Failure::wrong(format!(
            "cargo built {libraries:?} of {PLUGINS:?}"
        )));
    }
    Ok(libraries)
}

/// The shared libraries of our plugins among cargo's messages.
fn libraries(messages: &str) -> Vec<PathBuf> {
    messages
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .filter(|message| message["reason"] == "compiler-artifact")
        .filter(|message| {
            let name = message["target"]["name"]
                .as_str()
                .unwrap_or_default()
                .replace('_', "-");
            PLUGINS.contains(&name.as_str())
        })
        .flat_map(|message| workspace::list(&message, "filenames").to_vec())
        .filter_map(|file| file.as_str().map(PathBuf::from))
        .filter(|file| file.extension().is_some_and(|extension| extension == "so"))
        .collect()
}

/// `wanted` if a daemon would load from there, else a folder under `/tmp`.
pub(crate) fn folder(wanted: &Path) -> Result<PathBuf, Failure> {
    let doubt = match safe(wanted) {
        Ok(folder) => return Ok(folder),
        Err(doubt) => doubt,
    };
    let me = me().map_err(Failure::because("read /proc/self"))?;
    let instead = PathBuf::from(format!("/tmp/vmwright-transports-{me}"));
    eprintln!(
        "xtask: no daemon would load a plugin from {}: {doubt}; using {}",
        wanted.display(),
        instead.display()
    );
    safe(&instead).map_err(Failure::because(format!(
        "stage plugins in {}",
        instead.display()
    )))
}

/// Makes a folder, and says where it is if the loader would trust it.
fn safe(folder: &Path) -> io::Result<PathBuf> {
    make_private(folder)?;
    let folder = folder.canonicalize()?;
    match untrusted(&folder, me()?)? {
        None => Ok(folder),
        Some(doubtful) => Err(io::Error::other(format!(
            "{} can be changed by others",
            doubtful.display()
        ))),
    }
}

/// The user that runs this, and whose daemons will load the plugins.
fn me() -> io::Result<u32> {
    fs::metadata("/proc/self").map(|facts| facts.uid())
}

/// A folder that only its owner can write; an existing one of ours is narrowed to that.
fn make_private(folder: &Path) -> io::Result<()> {
    if let Some(above) = folder.parent() {
        fs::create_dir_all(above)?;
    }
    match DirBuilder::new().mode(0o755).create(folder) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other?,
    }
    // Not through a link: under /tmp anyone may have put one there.
    if !fs::symlink_metadata(folder)?.is_dir() {
        return Err(io::Error::from(io::ErrorKind::NotADirectory));
    }
    fs::set_permissions(folder, Permissions::from_mode(0o755))
}

/// The first folder, from `path` upwards, that the loader would not trust.
fn untrusted(path: &Path, me: u32) -> io::Result<Option<&Path>> {
    const STICKY: u32 = 0o1000;
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    for folder in path.ancestors() {
        let facts = fs::symlink_metadata(folder)?;
        let ours = facts.uid() == 0 || facts.uid() == me;
        let open = facts.mode() & WRITABLE_BY_OTHERS != 0;
        let tolerated = folder != path && facts.uid() == 0 && facts.mode() & STICKY != 0;
        if !ours || (open && !tolerated) {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}

/// Copies beside and renames over: a process that has the old library loaded keeps the old one.
pub(crate) fn place(library: &Path, folder: &Path) -> io::Result<()> {
    let name = library.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let draft = folder.join(format!(
        ".{}.{}",
        name.to_string_lossy(),
        std::process::id()
    ));
    fs::copy(library, &draft)?;
    fs::set_permissions(&draft, Permissions::from_mode(0o755))?;
    fs::rename(&draft, folder.join(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temporary(name: &str) -> PathBuf {
        let path =
            std::env::temp_dir().join(format!("vmwright-xtask-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        path.canonicalize().unwrap()
    }

    #[test]
    fn only_shared_libraries_of_our_plugins_are_taken() {
        let messages = concat!(
            r#"{"reason":"compiler-artifact","target":{"name":"libc"},"filenames":["/t/libc.so"]}"#,
            "\nnot json\n",
            r#"{"reason":"compiler-artifact","target":{"name":"transport_tcp"},"filenames":["/t/libtransport_tcp.so","/t/libtransport_tcp.rlib"]}"#,
            "\n",
            r#"{"reason":"build-finished","success":true}"#,
        );
        assert_eq!(
            libraries(messages),
            [PathBuf::from("/t/libtransport_tcp.so")]
        );
    }

    #[test]
    fn a_folder_below_one_that_others_can_write_is_untrusted() {
        let base = temporary("trust");
        let me = fs::metadata(&base).unwrap().uid();
        let open = base.join("open");
        let inner = open.join("inner");
        make_private(&inner).unwrap();
        assert_eq!(untrusted(&inner, me).unwrap(), None);
        fs::set_permissions(&open, Permissions::from_mode(0o775)).unwrap();
        assert_eq!(untrusted(&inner, me).unwrap(), Some(open.as_path()));
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn an_open_folder_of_root_is_tolerated_above_only_if_sticky() {
        let base = temporary("sticky");
        let me = fs::metadata(&base).unwrap().uid();
        make_private(&base).unwrap();
        assert_eq!(
            untrusted(&base, me).unwrap(),
            None,
            "/tmp above is sticky and root's"
        );
        assert_eq!(
            untrusted(Path::new("/tmp"), me).unwrap(),
            Some(Path::new("/tmp"))
        );
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn a_link_is_not_taken_for_a_folder_of_ours() {
        let base = temporary("link");
        std::os::unix::fs::symlink("/etc", base.join("link")).unwrap();
        assert!(make_private(&base.join("link")).is_err());
        fs::remove_dir_all(&base).unwrap();
    }

    #[test]
    fn placing_leaves_the_old_file_to_those_who_have_it_open() {
        use std::io::Read;
        let base = temporary("place");
        let folder = base.join("out");
        make_private(&folder).unwrap();
        let library = base.join("lib.so");
        fs::write(&library, "old").unwrap();
        place(&library, &folder).unwrap();
        let mut running = fs::File::open(folder.join("lib.so")).unwrap();
        fs::write(&library, "new").unwrap();
        place(&library, &folder).unwrap();
        let mut seen = String::new();
        running.read_to_string(&mut seen).unwrap();
        assert_eq!(seen, "old");
        assert_eq!(fs::read_to_string(folder.join("lib.so")).unwrap(), "new");
        assert_eq!(
            fs::metadata(folder.join("lib.so")).unwrap().mode() & 0o777,
            0o755
        );
        assert_eq!(
            fs::read_dir(&folder).unwrap().count(),
            1,
            "no draft is left"
        );
        fs::remove_dir_all(&base).unwrap();
    }
}
