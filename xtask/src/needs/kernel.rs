//! A kernel image with the modules of the very same build.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use crate::error::Failure;
use crate::needs::{KERNEL, MODULES, Store, is_file, named};

/// An image and its modules: the folder `lib/modules/RELEASE` of the same build.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) image: PathBuf,
    pub(crate) modules: PathBuf,
}

pub(crate) fn find(store: &Store) -> Result<Option<Kernel>, Failure> {
    let modules = named(MODULES, holds_modules)?;
    if let Some(image) = named(KERNEL, is_file)? {
        let modules = modules.or_else(|| Some(Path::new("/lib/modules").join(release(&image)?)));
        return match modules.filter(|folder| holds_modules(folder).is_ok()) {
            Some(modules) => Ok(Some(Kernel { image, modules })),
            None => Err(Failure::wrong(format!(
                "VMWRIGHT_KERNEL names {}, but its modules are not in /lib/modules: \
                 VMWRIGHT_MODULES must name their folder",
                image.display()
            ))),
        };
    }
    if let Some(modules) = modules {
        return Err(Failure::wrong(format!(
            "VMWRIGHT_MODULES names {}, but VMWRIGHT_KERNEL does not name their kernel",
            modules.display()
        )));
    }

    let mut kernels = in_root(Path::new("/"));
    for package in &store.packages {
        kernels.extend(in_root(package));
    }
    // One built for virtual machines boots fastest; else any of a distribution will do.
    kernels.sort_by_key(|kernel| {
        Reverse((
            release(&kernel.image).is_some_and(|name| name.contains("cloud")),
            kernel.image.clone(),
        ))
    });
    Ok(kernels.into_iter().next())
}

/// Readable kernels below a root that have their modules there too. On some systems images may
/// be read by root only: those are as good as absent.
fn in_root(root: &Path) -> Vec<Kernel> {
    let images = fs::read_dir(root.join("boot"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let mut kernels = Vec::new();
    for image in images {
        let Some(release) = release(&image).filter(|_| is_file(&image).is_ok()) else {
            continue;
        };
        let folders =
            ["lib/modules", "usr/lib/modules"].map(|folder| root.join(folder).join(&release));
        if let Some(modules) = folders
            .into_iter()
            .find(|folder| holds_modules(folder).is_ok())
        {
            kernels.push(Kernel { image, modules });
        }
    }
    kernels
}

/// `6.1.0-56-cloud-amd64` of `vmlinuz-6.1.0-56-cloud-amd64`.
fn release(image: &Path) -> Option<String> {
    image
        .file_name()?
        .to_str()?
        .strip_prefix("vmlinuz-")
        .map(str::to_owned)
}

/// `modules.dep` is not asked for: a package does not ship it, and each module names its own needs.
fn holds_modules(folder: &Path) -> Result<(), String> {
    if folder.join("kernel").is_dir() {
        Ok(())
    } else {
        Err("holds no folder 'kernel' with modules".into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_counts_only_with_the_modules_of_its_release() {
        let root =
            std::env::temp_dir().join(format!("vmwright-xtask-kernel-{}", std::process::id()));
        fs::create_dir_all(root.join("boot")).unwrap();
        fs::create_dir_all(root.join("lib/modules/6.2/kernel")).unwrap();
        for image in ["vmlinuz-6.1", "vmlinuz-6.2", "initrd.img-6.2", "vmlinuz"] {
            fs::write(root.join("boot").join(image), "").unwrap();
        }
        let wanted = Kernel {
            image: root.join("boot/vmlinuz-6.2"),
            modules: root.join("lib/modules/6.2"),
        };
        assert_eq!(in_root(&root), [wanted]);
        fs::remove_dir_all(&root).unwrap();
    }
}
