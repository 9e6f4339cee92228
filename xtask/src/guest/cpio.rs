//! Writes an initramfs: a cpio archive of the kind called newc (kernel: `buffer-format.rst`).
//!
//! Owner and times are fixed, so that equal inputs make equal archives and no root is needed.

use std::collections::BTreeSet;
use std::io::{self, Write};

const DIRECTORY: u32 = 0o040_755;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_777;

/// An archive that is being written. Folders above a file are made as they are needed.
#[must_use = "an archive without `finish` has no end"]
pub(crate) struct Archive<W> {
    out: W,
    written: usize,
    inode: u32,
    folders: BTreeSet<String>,
}

impl<W: Write> Archive<W> {
    pub(crate) fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
            folders: BTreeSet::new(),
        }
    }

    pub(crate) fn folder(&mut self, path: &str) -> io::Result<()> {
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.folders_above(path)?;
        self.folders.insert(path.to_owned());
        self.entry(path, DIRECTORY, &[])
    }

    /// A regular file with the permissions `mode`.
    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.folders_above(path)?;
        self.entry(path, REGULAR | mode, content)
    }

    pub(crate) fn symlink(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.folders_above(path)?;
        self.entry(path, SYMLINK, target.as_bytes())
    }

    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.out)
    }

    fn folders_above(&mut self, path: &str) -> io::Result<()> {
        path.rsplit_once('/')
            .map_or(Ok(()), |(above, _)| self.folder(above))
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        let too_big = |_| io::Error::from(io::ErrorKind::FileTooLarge);
        let size = u32::try_from(content.len()).map_err(too_big)?;
        let name_size = u32::try_from(path.len() + 1).map_err(too_big)?;
        self.inode += 1;
        // inode, mode, uid, gid, links, mtime, size, device and rdevice in two halves each, name, checksum.
        let fields = [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut header = String::from("070701");
        for field in fields {
            header += &format!("{field:08x}");
        }
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.pad()?;
        self.put(content)?;
        self.pad()
    }

    fn put(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len();
        self.out.write_all(bytes)
    }

    /// Headers and contents start at multiples of four.
    fn pad(&mut self) -> io::Result<()> {
        let missing = self.written.next_multiple_of(4) - self.written;
        self.put(&[0; 3][..missing])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Path, mode and content of each entry, read back field by field.
    fn read(mut bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let total = bytes.len();
        let mut entries = Vec::new();
        loop {
            assert_eq!((total - bytes.len()) % 4, 0, "headers are aligned");
            assert_eq!(&bytes[..6], b"070701");
            let field = |index: usize| {
                let text = std::str::from_utf8(&bytes[6 + index * 8..14 + index * 8]).unwrap();
                usize::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6), field(11));
            let name = String::from_utf8(bytes[110..110 + name_size - 1].to_vec()).unwrap();
            let start = (110 + name_size).next_multiple_of(4);
            let content = bytes[start..start + size].to_vec();
            if name == "TRAILER!!!" {
                return entries;
            }
            entries.push((name, u32::try_from(mode).unwrap(), content));
            bytes = &bytes[(start + size).next_multiple_of(4)..];
        }
    }

    #[test]
    fn what_is_written_can_be_read_back_at_any_length() {
        for length in 0..9 {
            let name = "x".repeat(length + 1);
            let content = vec![7; length];
            let mut archive = Archive::new(Vec::new());
            archive.file(&name, 0o755, &content).unwrap();
            archive.symlink("link", "target").unwrap();
            let entries = read(&archive.finish().unwrap());
            assert_eq!(entries[0], (name, 0o100_755, content));
            assert_eq!(entries[1], ("link".into(), 0o120_777, b"target".to_vec()));
        }
    }

    #[test]
    fn folders_come_once_and_before_what_they_hold() {
        let mut archive = Archive::new(Vec::new());
        archive.file("a/b/one", 0o644, b"1").unwrap();
        archive.file("a/b/two", 0o644, b"2").unwrap();
        archive.folder("a").unwrap();
        let names: Vec<_> = read(&archive.finish().unwrap())
            .into_iter()
            .map(|entry| entry.0)
            .collect();
        assert_eq!(names, ["a", "a/b", "a/b/one", "a/b/two"]);
    }

    #[test]
    fn equal_inputs_make_equal_archives() {
        let build = || {
            let mut archive = Archive::new(Vec::new());
            archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
            archive.finish().unwrap()
        };
        assert_eq!(build(), build());
    }
}
