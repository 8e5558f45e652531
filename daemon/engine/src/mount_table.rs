//! Which device is mounted where.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use loopd_common::mountinfo::{self, Mount};

/// Mount points by device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountTable {
    /// Every mount point, whatever is mounted there.
    all: BTreeSet<PathBuf>,
    by_device: HashMap<(u32, u32), Vec<PathBuf>>,
}

impl MountTable {
    /// Reads the text of `/proc/self/mountinfo` (`proc_pid_mountinfo(5)`).
    ///
    /// The device number decides, which nobody can forge. `members` gives the devices of a mount without one
    /// block device.
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
