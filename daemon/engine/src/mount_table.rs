//! The mount table.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use loopd_common::mountinfo::{self, Mount};

/// Mount points by device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    /// All mount points, of any file system.
    all: BTreeSet<PathBuf>,
    by_device: HashMap<(u32, u32), Vec<PathBuf>>,
}

impl MountTable {
    /// Reads the text of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).
    ///
    /// A mount is identified by its device number, which no user can forge. `members` returns the devices of a mount
    /// that has no single block device.
    #[must_use]
    pub fn parse(text: &[u8], members: impl Fn(&Mount<'_>) -> Vec<(u32, u32)>) -> Self {
        let mut table = Self::default();
        for mount in mountinfo::mounts(text) {
            let devices = match mount.device.0 {
                0 => members(&mount),
                _ => vec![mount.device],
            };
            for device in devices {
                put(table.by_device.entry(device).or_default(), mount.point.clone());
            }
            table.all.insert(mount.point);
        }
        table
    }

    /// Whether something is mounted on this directory.
    #[must_use]
    pub fn has(&self, directory: &Path) -> bool {
        self.all.contains(directory)
    }

    /// The devices whose mount points differ from those in another table.
    #[must_use]
    pub fn differences(&self, other: &Self) -> HashSet<(u32, u32)> {
        let devices = self.by_device.keys().chain(other.by_device.keys());
        devices.filter(|device| self.of(**device) != other.of(**device)).copied().collect()
    }

    /// The mount points below this directory.
    #[must_use]
    pub fn below(&self, directory: &Path) -> Vec<&Path> {
        let is_below = |path: &&Path| *path != directory && path.starts_with(directory);
        self.all.iter().map(PathBuf::as_path).filter(is_below).collect()
    }

    /// The mount points of the device with this number.
    #[must_use]
    pub fn of(&self, device: (u32, u32)) -> &[PathBuf] {
        self.by_device.get(&device).map_or(&[], Vec::as_slice)
    }
}

/// A mount can appear twice with the same path: below a directory that the sandbox has mounted on itself.
fn put(points: &mut Vec<PathBuf>, point: PathBuf) {
    if !points.contains(&point) {
        points.push(point);
    }
}
