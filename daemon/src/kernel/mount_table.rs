//! `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`): which device is mounted where.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use loopd_common::mountinfo;

use super::multi_device::MultiDevice;

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
    let text = std::fs::read(mountinfo::FILE)?;
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
        for mount in mountinfo::mounts(text) {
            let devices = match mount.device.0 {
                0 => multi_device.devices(mount.file_system, &mount.source),
                _ => vec![mount.device],
            };
            for device in devices {
                put(table.by_device.entry(device).or_default(), mount.point.clone());
            }
            table.all.insert(mount.point);
        }
        table
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
