//! By what a copy of a disk and the bitmap that goes on from it know each other. Decides nothing of a backup; knows no QEMU.
//!
//! Each copy of a chain has a mark of its own: the chain's name and a number that is drawn for it. Two bitmaps have that
//! mark for a name. One is in the image that was copied, and holds what was written there since that instant. The other
//! is in the copy, holds nothing, and is put there once the copy is whole: it says which copy this is.
//!
//! What changed since a copy is told by the bitmap of its mark, and by no other. So it does not matter what came between:
//!
//! | what came between | what is at the disk now | a copy of what changed since |
//! |---|---|---|
//! | an overlay, and a copy of it | the overlay | the copy of the overlay: told. One before: refused |
//! | then a start from the image behind it | that image | the copy before the overlay: told. Of the overlay: refused |
//! | then the overlay went back into it | that image, and its bitmap holds what came | the same |
//! | an overlay took in what is behind it | the overlay | its own copy: told, and some of it twice |
//! | a mirror that the guest went over to | an image without bitmaps | refused |
//! | another backup of that chain | the image with the bitmap of the newer copy | the newer: told. The older: refused |
//! | a backup that failed or was cancelled | as before it | the last good one: told |
//! | its daemon died | the next one brings it to its end, or undoes it | as that says |
//! | QEMU was killed | a bitmap that QEMU calls inconsistent | refused |
//! | QEMU ended by itself in a copy | bitmaps in good order, a copy without a mark | the last good one: told |
//! | going back inside the image | QEMU refuses it while the disk has bitmaps | told |
//! | somebody wrote who knows bitmaps | the bitmap holds that, too | told |
//! | somebody wrote who does not | bitmaps that qcow2 calls void | refused |
//! | off and on, unplugged and plugged, saved and restored, moved with its image | the image, put away in good order | told |
//!
//! A copy is read as the qcow2 format describes it, and not by a QEMU of the guest, so that nothing of it is open there.

use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use uuid::Uuid;

/// As much of an image as is read for its header; the extensions lie in the first cluster, ahead of the backing file's name.
const HEAD: u64 = 64 << 10;
/// The most that is read of the list of bitmaps: a copy has one.
const DIRECTORY: u64 = 1 << 20;
/// The extension of the header that tells of bitmaps.
const BITMAPS: u32 = 0x2385_2875;
/// The autoclear bit that says that the bitmaps are as the image is.
const ARE_VALID: u64 = 1;
/// The flag of a bitmap that was not put away.
const IN_USE: u32 = 1;

/// The mark of a new copy of that chain.
pub(crate) fn fresh(chain: &str) -> String {
    format!("{chain}.{}", Uuid::new_v4().simple())
}

/// Whether a bitmap has a mark of that chain for a name.
pub(crate) fn is_of(bitmap: &str, chain: &str) -> bool {
    let number = bitmap.strip_prefix(chain);
    let number = number.and_then(|rest| rest.strip_prefix('.'));
    number.is_some_and(|number| {
        let is_digit = |digit: u8| matches!(digit, b'0'..=b'9' | b'a'..=b'f');
        number.len() == 32 && number.bytes().all(is_digit)
    })
}

/// The mark of that chain which the copy there has; none if it is no copy of it, or not whole.
pub(crate) fn of_copy(path: &Path, chain: &str) -> io::Result<Option<String>> {
    let file = OpenOptions::new()
        .read(true)
        // Whatever lies there, it is not waited for.
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Ok(None);
    }
    let mut head = Vec::new();
    (&file).take(HEAD).read_to_end(&mut head)?;
    let is_in_it = |directory: &Directory| {
        let end = directory.offset.checked_add(directory.size as u64);
        end.is_some_and(|end| end <= metadata.len())
    };
    let Some(directory) = directory(&head).filter(is_in_it) else {
        return Ok(None);
    };
    let mut list = vec![0; directory.size];
    file.read_exact_at(&mut list, directory.offset)?;
    let names = names(&list, directory.bitmaps).unwrap_or_default();
    let mut marks = names.into_iter().filter(|name| is_of(name, chain));
    let mark = marks.next();
    // With two of them it does not say which copy it is.
    Ok(mark.filter(|_| marks.next().is_none()))
}

/// Where an image lists its bitmaps.
#[derive(Debug, PartialEq, Eq)]
struct Directory {
    offset: u64,
    size: usize,
    bitmaps: u32,
}

/// As the header says; none if it is no qcow2 image, or its bitmaps are void.
fn directory(head: &[u8]) -> Option<Directory> {
    let is_qcow2 = head.starts_with(b"QFI\xfb") && u32_at(head, 4)? >= 3;
    if !is_qcow2 || u64_at(head, 88)? & ARE_VALID == 0 {
        return None;
    }
    let mut at = usize::try_from(u32_at(head, 100)?).ok()?;
    loop {
        let (kind, length) = (u32_at(head, at)?, u32_at(head, at + 4)?);
        if kind == 0 {
            return None;
        }
        if kind == BITMAPS {
            let size = u64_at(head, at + 16)?;
            return Some(Directory {
                offset: u64_at(head, at + 24)?,
                size: usize::try_from(size).ok().filter(|_| size <= DIRECTORY)?,
                bitmaps: u32_at(head, at + 8)?,
            });
        }
        at = at.checked_add(8 + usize::try_from(length).ok()?.next_multiple_of(8))?;
    }
}

/// The bitmaps of a list that were put away in good order; none if it is not whole.
fn names(list: &[u8], bitmaps: u32) -> Option<Vec<String>> {
    let mut names = Vec::new();
    let mut at = 0;
    for _ in 0..bitmaps {
        let flags = u32_at(list, at + 12)?;
        let name = usize::from(u16::from_be_bytes(bytes(list, at + 18)?));
        let extra = usize::try_from(u32_at(list, at + 20)?).ok()?;
        let begin = (at + 24).checked_add(extra)?;
        let end = begin.checked_add(name)?;
        let name = str::from_utf8(list.get(begin..end)?).ok()?;
        if flags & IN_USE == 0 {
            names.push(name.to_owned());
        }
        at = end.next_multiple_of(8);
    }
    Some(names)
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> Option<[u8; N]> {
    from.get(at..)?.first_chunk().copied()
}

fn u32_at(from: &[u8], at: usize) -> Option<u32> {
    bytes(from, at).map(u32::from_be_bytes)
}

fn u64_at(from: &[u8], at: usize) -> Option<u64> {
    bytes(from, at).map(u64::from_be_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An image with these bitmaps, as far as it is read: names and flags.
    fn image(bitmaps: &[(&str, u32)]) -> Vec<u8> {
        let mut list = Vec::new();
        for (name, flags) in bitmaps {
            list.extend([0; 12]);
            list.extend(flags.to_be_bytes());
            list.extend([1, 16]);
            list.extend(u16::try_from(name.len()).unwrap().to_be_bytes());
            list.extend([0; 4]);
            list.extend(name.as_bytes());
            list.resize(list.len().next_multiple_of(8), 0);
        }
        let mut image = b"QFI\xfb\0\0\0\x03".to_vec();
        image.resize(88, 0);
        image.extend(ARE_VALID.to_be_bytes());
        image.extend([0, 0, 0, 4, 0, 0, 0, 104]);
        // One that is of no concern, and not a multiple of eight long.
        image.extend([0x68, 0x03, 0xf8, 0x57, 0, 0, 0, 3, 1, 1, 1, 0, 0, 0, 0, 0]);
        image.extend(BITMAPS.to_be_bytes());
        image.extend(24_u32.to_be_bytes());
        image.extend(u32::try_from(bitmaps.len()).unwrap().to_be_bytes());
        image.extend([0; 4]);
        image.extend((list.len() as u64).to_be_bytes());
        image.extend(4096_u64.to_be_bytes());
        image.resize(4096, 0);
        image.extend(list);
        image
    }

    fn read(image: &[u8]) -> Option<String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("copy");
        std::fs::write(&path, image).unwrap();
        of_copy(&path, "nightly").unwrap()
    }

    #[test]
    fn a_copy_has_the_mark_of_its_chain() {
        let mark = fresh("nightly");
        assert_eq!(read(&image(&[(&mark, 0)])), Some(mark.clone()));
        let others = [("theirs", 0), (&fresh("weekly"), 0), (&mark, 0)];
        assert_eq!(read(&image(&others)), Some(mark));
    }

    #[test]
    fn what_does_not_say_which_copy_it_is_has_no_mark() {
        let mark = fresh("nightly");
        let mut void = image(&[(&mark, 0)]);
        void[95] = 0;
        for image in [
            image(&[]),
            image(&[("nightly", 0)]),
            image(&[(&mark, IN_USE)]),
            image(&[(&mark, 0), (&fresh("nightly"), 0)]),
            void,
            b"raw".to_vec(),
            vec![0; 1 << 20],
        ] {
            assert_eq!(read(&image), None);
        }
    }

    #[test]
    fn an_image_that_is_cut_anywhere_or_lies_about_a_length_has_no_mark() {
        let mark = fresh("nightly");
        let whole = image(&[(&mark, 0)]);
        let end = 4096 + 24 + mark.len();
        for length in 0..end {
            assert_eq!(read(&whole[..length]), None, "{length}");
        }
        for at in (0..4)
            .map(|byte| 100 + byte)
            .chain(104..152)
            .chain(4096..4120)
        {
            let mut wrong = whole.clone();
            wrong[at] = 0xff;
            // Whatever is made of it, nothing is made up.
            assert!(read(&wrong).is_none_or(|found| found == mark), "{at}");
        }
    }

    #[test]
    fn chains_of_like_names_are_told_apart() {
        let (short, long) = (fresh("a"), fresh("a.b"));
        assert!(is_of(&short, "a") && is_of(&long, "a.b"));
        assert!(!is_of(&long, "a") && !is_of(&short, "a.b") && !is_of("a", "a"));
        let twice = fresh(&short);
        assert!(!is_of(&twice, "a") && is_of(&twice, &short));
    }
}
