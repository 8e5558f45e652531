//! `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`): which device is mounted where.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

/// The file that the table is read from. It reports `POLLPRI` when a mount comes or goes.
pub const FILE: &str = "/proc/self/mountinfo";

/// Mount points by device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    /// Every mount point, whatever is mounted there.
    all: BTreeSet<PathBuf>,
    by_device: HashMap<(u32, u32), Vec<PathBuf>>,
    /// File systems over several devices (btrfs) have a device number of their own, and name the
    /// device only as their source.
    by_source: HashMap<String, Vec<PathBuf>>,
}

/// Reads the table of our mount namespace.
///
/// # Errors
/// procfs cannot be read.
pub fn read() -> std::io::Result<MountTable> {
    Ok(MountTable::parse(&std::fs::read(FILE)?))
}

impl MountTable {
    /// Reads the text of the file. Lines that make no sense are passed over.
    #[must_use]
    pub fn parse(text: &[u8]) -> Self {
        let mut table = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            table.parse_line(line);
        }
        table
    }

    fn parse_line(&mut self, line: &[u8]) -> Option<()> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = device_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
        let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
        self.all.insert(mount_point.clone());
        if device.0 != 0 {
            put(self.by_device.entry(device).or_default(), mount_point);
            return Some(());
        }
        let source = fields.skip_while(|field| *field != b"-").nth(2)?;
        if source.starts_with(b"/dev/") {
            let source = String::from_utf8(unescape(source)).ok()?;
            put(self.by_source.entry(source).or_default(), mount_point);
        }
        Some(())
    }

    /// Whether something is mounted on this folder.
    #[must_use]
    pub fn has(&self, folder: &Path) -> bool {
        self.all.contains(folder)
    }

    /// What is mounted below this folder.
    #[must_use]
    pub fn below(&self, folder: &Path) -> Vec<&Path> {
        let is_below = |path: &&Path| *path != folder && path.starts_with(folder);
        self.all.iter().map(PathBuf::as_path).filter(is_below).collect()
    }

    /// Where the device with this number and node is mounted.
    #[must_use]
    pub fn of(&self, device: (u32, u32), node: &str) -> &[PathBuf] {
        let found = self.by_device.get(&device).or_else(|| self.by_source.get(node));
        found.map_or(&[], Vec::as_slice)
    }
}

/// A mount can be seen twice in one place: below a folder that the sandbox has mounted on itself.
fn put(points: &mut Vec<PathBuf>, point: PathBuf) {
    if !points.contains(&point) {
        points.push(point);
    }
}

/// Reads `MAJOR:MINOR`.
#[must_use]
pub fn device_number(text: &str) -> Option<(u32, u32)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// Undoes the kernel's octal escapes of space, tab, newline and backslash.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = if *first == b'\\' { tail.get(..3).and_then(octal) } else { None };
        match escaped {
            Some(byte) => {
                bytes.push(byte);
                rest = &tail[3..];
            }
            None => {
                bytes.push(*first);
                rest = tail;
            }
        }
    }
    bytes
}

fn octal(digits: &[u8]) -> Option<u8> {
    if !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_sources_and_escapes_are_read() {
        let table = MountTable::parse(
            b"22 1 7:3 / /mnt/a\\040b rw - ext4 /dev/loop3 rw\n\
              23 1 7:3 / /mnt/c\\134d rw shared:7 - ext4 /dev/loop3 rw\n\
              24 1 0:41 / /mnt/btrfs rw - btrfs /dev/loop4 rw\n\
              25 1 0:42 / /proc rw - proc proc rw\n\
              nonsense\n\n",
        );
        let paths = |device, node| table.of(device, node).to_vec();
        assert_eq!(paths((7, 3), "/dev/loop3"), [PathBuf::from("/mnt/a b"), PathBuf::from("/mnt/c\\d")]);
        assert_eq!(paths((7, 4), "/dev/loop4"), [PathBuf::from("/mnt/btrfs")]);
        assert!(paths((7, 5), "/dev/loop5").is_empty());
    }

    #[test]
    fn the_own_table_reads() {
        assert!(!read().unwrap().by_device.is_empty() || !read().unwrap().by_source.is_empty());
    }
}
