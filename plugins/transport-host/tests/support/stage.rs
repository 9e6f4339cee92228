//! A folder that plugins may be loaded from, and what to put into it: built plugins, compiled C,
//! anything.

#![allow(
    dead_code,
    clippy::unwrap_used,
    reason = "each suite uses a part of it, and may stop at the first surprise"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use transport_host::{Builder, Deadline, Transports};

/// Ours, with mode 0755, below a fresh folder of ours below the system's sticky one.
pub(crate) struct Stage {
    root: tempfile::TempDir,
    dir: PathBuf,
}

impl Stage {
    pub(crate) fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("plugins");
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o755)).unwrap();
        Self { root, dir }
    }

    /// The folder of plugins.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// A place for sockets and other files.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A place for a socket, as a target.
    pub(crate) fn unix(&self, name: &str) -> String {
        format!("unix:{}", self.path(name).display())
    }

    pub(crate) fn write(&self, name: &str, contents: &[u8]) -> PathBuf {
        let path = self.dir.join(name);
        fs::write(&path, contents).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    /// A copy of the plugin that cargo built beside this test, as it does for every dev-dependency.
    pub(crate) fn built(&self, name: &str) -> PathBuf {
        let file = format!("libtransport_{name}.so");
        let beside = std::env::current_exe().unwrap().with_file_name(&file);
        self.write(&file, &fs::read(beside).unwrap())
    }

    /// A plugin in C. The source gets the header before it.
    pub(crate) fn compiled(&self, name: &str, source: &str) -> PathBuf {
        self.compiled_alone(
            name,
            &format!("#include \"vmwright_transport.h\"\n{source}"),
        )
    }

    /// A plugin in C that includes all it needs.
    pub(crate) fn compiled_alone(&self, name: &str, source: &str) -> PathBuf {
        let (c, so) = (
            self.path(&format!("{name}.c")),
            self.dir.join(format!("libtransport_{name}.so")),
        );
        fs::write(&c, source).unwrap();
        let include = concat!(
            "-I",
            env!("CARGO_MANIFEST_DIR"),
            "/../transport-abi/include"
        );
        let cc = Command::new("cc")
            .args(["-shared", "-fPIC", "-Wall", "-Werror", include, "-o"])
            .arg(&so)
            .arg(&c)
            .output();
        let output = cc.expect("a C compiler called cc is installed");
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        fs::set_permissions(&so, fs::Permissions::from_mode(0o755)).unwrap();
        so
    }

    /// All three transports, loaded from files.
    pub(crate) fn loaded(&self) -> Transports {
        let mut builder = Transports::builder();
        for name in ["tcp", "unix", "vsock"] {
            builder.load(self.built(name)).unwrap();
        }
        builder.build().unwrap()
    }
}

/// Far enough away that a test that works never meets it.
pub(crate) fn later() -> Deadline {
    Deadline::now() + Duration::from_secs(30)
}

/// All three transports, linked in.
pub(crate) fn linked() -> Builder {
    Transports::builder()
        .register_table(&transport_tcp::TABLE)
        .register_table(&transport_unix::TABLE)
        .register_table(&transport_vsock::TABLE)
}

pub(crate) fn open_descriptors() -> usize {
    fs::read_dir("/proc/self/fd").unwrap().count()
}

pub(crate) fn threads() -> usize {
    fs::read_dir("/proc/self/task").unwrap().count()
}
