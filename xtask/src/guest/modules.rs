//! Which kernel modules the guest loads, and in which order.
//!
//! The order comes from the modules themselves: each carries the names it depends on. A name
//! that the kernel has built in needs no file.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::error::Failure;
use crate::run;

/// What the guest uses; a kernel may lack those that are not essential.
const WANTED: &[Wanted] = &[
    Wanted {
        name: "virtio_pci",
        essential: true,
    },
    Wanted {
        name: "virtio_console",
        essential: true,
    },
    Wanted {
        name: "virtio_balloon",
        essential: false,
    },
    Wanted {
        name: "virtio_blk",
        essential: false,
    },
    Wanted {
        name: "virtio_net",
        essential: false,
    },
    Wanted {
        name: "ext4",
        essential: false,
    },
    // Vsock inside the guest alone, and to whatever QEMU has it end at.
    Wanted {
        name: "vsock_loopback",
        essential: false,
    },
    Wanted {
        name: "vmw_vsock_virtio_transport",
        essential: false,
    },
    // The power button, and the device that acpid reads it from.
    Wanted {
        name: "button",
        essential: false,
    },
    Wanted {
        name: "evdev",
        essential: false,
    },
];

struct Wanted {
    name: &'static str,
    essential: bool,
}

/// A module ready to be packed.
pub(crate) struct Module {
    /// `NAME.ko`.
    pub(crate) file: String,
    pub(crate) content: Vec<u8>,
}

/// All modules the guest needs from a `lib/modules/RELEASE`, dependencies first.
pub(crate) fn collect(folder: &Path) -> Result<Vec<Module>, Failure> {
    let files = index(&folder.join("kernel"))?;
    let built_in = fs::read_to_string(folder.join("modules.builtin")).unwrap_or_default();
    let built_in: Vec<_> = built_in
        .lines()
        .filter_map(|line| name_of(Path::new(line)))
        .collect();

    let mut modules = Modules {
        files,
        built_in,
        loaded: Vec::new(),
        contents: BTreeMap::new(),
    };
    for Wanted { name, essential } in WANTED {
        if !modules.add(name)? && *essential {
            return Err(Failure::wrong(format!(
                "the kernel of {} has no {name}",
                folder.display()
            )));
        }
    }
    let Modules {
        loaded,
        mut contents,
        ..
    } = modules;
    let module = |name: String| {
        let content = contents.remove(&name).expect("a loaded module was read");
        Module {
            file: format!("{name}.ko"),
            content,
        }
    };
    Ok(loaded.into_iter().map(module).collect())
}

struct Modules {
    files: BTreeMap<String, PathBuf>,
    built_in: Vec<String>,
    loaded: Vec<String>,
    contents: BTreeMap<String, Vec<u8>>,
}

impl Modules {
    /// Adds a module after those it depends on. False if the kernel does not have it.
    fn add(&mut self, name: &str) -> Result<bool, Failure> {
        if self.contents.contains_key(name) {
            return Ok(true);
        }
        let Some(file) = self.files.get(name) else {
            return Ok(self.built_in.iter().any(|known| known == name));
        };
        let content = read(file)?;
        let needs = depends(&content);
        self.contents.insert(name.to_owned(), content);
        for need in needs {
            self.add(&need)?;
        }
        self.loaded.push(name.to_owned());
        Ok(true)
    }
}

/// Every module file below a folder, by its name.
fn index(folder: &Path) -> Result<BTreeMap<String, PathBuf>, Failure> {
    let mut files = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let entries = fs::read_dir(&folder)
            .map_err(Failure::because(format!("list {}", folder.display())))?;
        for path in entries.flatten().map(|entry| entry.path()) {
            if path.is_dir() {
                folders.push(path);
            } else if let Some(name) = name_of(&path) {
                files.insert(name, path);
            }
        }
    }
    Ok(files)
}

/// `virtio_net` of `…/virtio-net.ko.xz`: the kernel takes a dash for an underscore.
fn name_of(path: &Path) -> Option<String> {
    let (name, _) = path.file_name()?.to_str()?.split_once(".ko")?;
    Some(name.replace('-', "_"))
}

/// A module's bytes, unpacked: busybox does not know each packing.
fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).map_err(Failure::because(format!("read {}", path.display()))),
    };
    run::ask(Command::new(tool).args(["-d", "-c"]).arg(path))
}

/// The value of `depends=` in a module's list of facts, where each ends with a zero byte.
fn depends(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(start) = module.windows(KEY.len()).position(|window| window == KEY) else {
        return Vec::new();
    };
    let value = module[start + KEY.len()..]
        .split(|byte| *byte == 0)
        .next()
        .unwrap_or_default();
    let names = String::from_utf8_lossy(value);
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(name: &str, modules: &[(&str, &str)], built_in: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("vmwright-xtask-{name}-{}", std::process::id()));
        fs::create_dir_all(folder.join("kernel/drivers")).unwrap();
        for (file, depends) in modules {
            let facts = format!("ELF\0license=GPL\0depends={depends}\0name=x\0");
            fs::write(folder.join("kernel/drivers").join(file), facts).unwrap();
        }
        fs::write(folder.join("modules.builtin"), built_in).unwrap();
        folder
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let modules = [
            ("virtio-pci.ko", "virtio_ring,virtio"),
            ("virtio_ring.ko", "virtio"),
            ("virtio.ko", ""),
            ("virtio_console.ko", "virtio,virtio_ring"),
            ("unrelated.ko", "virtio"),
        ];
        let folder = kernel("order", &modules, "kernel/fs/ext4/ext4.ko\n");
        let files: Vec<_> = collect(&folder)
            .unwrap()
            .into_iter()
            .map(|module| module.file)
            .collect();
        assert_eq!(
            files,
            [
                "virtio.ko",
                "virtio_ring.ko",
                "virtio_pci.ko",
                "virtio_console.ko"
            ]
        );
        fs::remove_dir_all(&folder).unwrap();
    }

    #[test]
    fn what_is_built_in_needs_no_file_and_what_is_essential_must_be_there() {
        let built_in = "kernel/drivers/virtio/virtio_pci.ko\n";
        let folder = kernel("builtin", &[("virtio_console.ko", "")], built_in);
        assert_eq!(collect(&folder).unwrap().len(), 1);
        fs::remove_file(folder.join("kernel/drivers/virtio_console.ko")).unwrap();
        assert!(
            collect(&folder).is_err_and(|failure| failure.summary().contains("virtio_console"))
        );
        fs::remove_dir_all(&folder).unwrap();
    }
}
