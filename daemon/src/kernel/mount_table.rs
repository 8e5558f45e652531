//! `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`): which device is mounted where.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::multi_device::MultiDevice;

/// The file that the table is read from. It reports `POLLPRI` when a mount comes or goes.
pub const FILE: &str = "/proc/self/mountinfo";

/// Mount points by device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    /// Every mount point, whatever is mounted there.
    all: BTreeSet<PathBuf>,
    by_device: HashMap<(u32, u32), Vec<PathBuf>>,
}

/// Reads the table of our mount namespace.
///
/// # Errors
/// procfs cannot be read.
pub fn read() -> std::io::Result<MountTable> {
    let text = std::fs::read(FILE)?;
    Ok(MountTable::parse(&text, &MultiDevice::read()))
}

impl MountTable {
    /// Reads the text of the file. Lines that make no sense are passed over.
    ///
    /// The device number decides, which nobody can forge. The source is free text for most file systems:
    /// fusermount passes on whatever a user names. It counts for those over several devices only.
    #[must_use]
    pub fn parse(text: &[u8], multi_device: &MultiDevice) -> Self {
        let mut table = Self::default();
        for line in text.split(|byte| *byte == b'\n') {
            table.parse_line(line, multi_device);
        }
        table
    }

    fn parse_line(&mut self, line: &[u8], multi_device: &MultiDevice) -> Option<()> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = device_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
        let mount_point = PathBuf::from(OsString::from_vec(unescape(fields.nth(1)?)));
        self.all.insert(mount_point.clone());
        let devices = if device.0 == 0 {
            let mut fields = fields.skip_while(|field| *field != b"-").skip(1);
            multi_device.devices(fields.next()?, &unescape(fields.next()?))
        } else {
            vec![device]
        };
        for device in devices {
            put(self.by_device.entry(device).or_default(), mount_point.clone());
        }
        Some(())
    }

    /// Whether something is mounted on this folder.
    #[must_use]
    pub fn has(&self, folder: &Path) -> bool {
        self.all.contains(folder)
    }

    /// The devices that are mounted elsewhere than in another table.
    #[must_use]
    pub fn differences(&self, other: &Self) -> HashSet<(u32, u32)> {
        let devices = self.by_device.keys().chain(other.by_device.keys());
        devices.filter(|device| self.of(**device) != other.of(**device)).copied().collect()
    }

    /// What is mounted below this folder.
    #[must_use]
    pub fn below(&self, folder: &Path) -> Vec<&Path> {
        let is_below = |path: &&Path| *path != folder && path.starts_with(folder);
        self.all.iter().map(PathBuf::as_path).filter(is_below).collect()
    }

    /// Where the device with this number is mounted.
    #[must_use]
    pub fn of(&self, device: (u32, u32)) -> &[PathBuf] {
        self.by_device.get(&device).map_or(&[], Vec::as_slice)
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
    fn devices_and_escapes_are_read() {
        let table = MountTable::parse(
            b"22 1 7:3 / /mnt/a\\040b rw - ext4 /dev/loop3 rw\n\
              23 1 7:3 / /mnt/c\\134d rw shared:7 - ext4 /dev/loop3 rw\n\
              25 1 0:42 / /proc rw - proc proc rw\n\
              nonsense\n\n",
            &MultiDevice::default(),
        );
        assert_eq!(table.of((7, 3)), [PathBuf::from("/mnt/a b"), PathBuf::from("/mnt/c\\d")]);
        assert!(table.of((7, 5)).is_empty());
        assert!(table.has(Path::new("/proc")));
    }

    #[test]
    fn a_file_system_over_two_devices_is_a_mount_of_both() {
        let table = MountTable::parse(
            b"24 1 0:41 / /mnt/btrfs rw - btrfs /dev/loop4 rw\n\
              25 1 0:41 /sub /mnt/sub rw shared:9 master:3 - btrfs /dev/loop4 rw\n",
            &MultiDevice::over(&[4, 5]),
        );
        for number in [4, 5] {
            assert_eq!(table.of((7, number)), [PathBuf::from("/mnt/btrfs"), PathBuf::from("/mnt/sub")]);
        }
        assert!(table.of((7, 6)).is_empty());
    }

    #[test]
    fn a_forged_source_is_no_mount_of_the_device() {
        let table = MountTable::parse(
            b"24 1 0:41 / /home/m/a rw - fuse /dev/loop4 rw,user_id=1000\n\
              25 1 0:42 / /home/m/b rw - fuse.btrfs /dev/loop4 rw,user_id=1000\n\
              26 1 0:43 / /home/m/c rw - tmpfs /dev/loop4 rw\n\
              27 1 0:44 / /home/m/d rw - fuse.x\\040-\\040btrfs /dev/loop4 rw\n\
              28 1 8:1 / /home/m/e rw - ext4 /dev/loop4 rw\n",
            &MultiDevice::over(&[4, 5]),
        );
        assert!(table.of((7, 4)).is_empty() && table.of((7, 5)).is_empty());
        assert!(table.has(Path::new("/home/m/a")));
    }

    #[test]
    fn tables_differ_where_a_mount_came_or_went() {
        let parse =
            |lines: &[&str]| MountTable::parse(lines.join("\n").as_bytes(), &MultiDevice::over(&[4, 5]));
        let ext4 = "22 1 7:3 / /mnt/a rw - ext4 /dev/loop3 rw";
        let btrfs = "24 1 0:41 / /mnt/btrfs rw - btrfs /dev/loop4 rw";
        let proc = "25 1 0:42 / /proc rw - proc proc rw";
        let before = parse(&[ext4, proc]);
        assert!(parse(&[proc, ext4]).differences(&before).is_empty());
        assert!(parse(&[ext4]).differences(&before).is_empty(), "no device is concerned");
        let after = parse(&[btrfs]);
        for differences in [after.differences(&before), before.differences(&after)] {
            assert_eq!(differences, HashSet::from([(7, 3), (7, 4), (7, 5)]));
        }
    }

    #[test]
    fn the_own_table_reads() {
        assert!(read().unwrap().has(Path::new("/proc")));
    }
}
