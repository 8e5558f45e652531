//! The nodes of a loop device and of its partitions, and which files and mounts belong to them.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

use loopd_common::mountinfo;
use rustix::fs::{AtFlags, CWD, FileType, Statx, StatxFlags, statx};

use super::mount_table::is_multi_device;

/// Major and minor number.
type DeviceNumber = (u32, u32);

/// The nodes of a loop device and of its partitions.
#[derive(Clone, Debug, Default)]
pub struct Nodes(BTreeMap<DeviceNumber, String>);

/// Mounts: the node of each, and the mount point.
pub type Mounts = HashSet<(String, PathBuf)>;

impl<const N: usize> From<[(DeviceNumber, String); N]> for Nodes {
    fn from(nodes: [(DeviceNumber, String); N]) -> Self {
        Self(nodes.into())
    }
}

impl Nodes {
    /// The nodes that exist now.
    #[must_use]
    pub fn of(number: u32) -> Self {
        let disk = Path::new("/sys/block").join(format!("loop{number}"));
        let is_partition = |path: &PathBuf| path.join("partition").exists();
        let partitions = entries(&disk).into_iter().filter(is_partition);
        Self(partitions.chain([disk.clone()]).filter_map(|directory| node_of(&directory)).collect())
    }

    /// The node that this file is; `None` if it is another file.
    pub fn is(&self, file: &Statx) -> Option<&String> {
        let is_block_device = FileType::from_raw_mode(file.stx_mode.into()) == FileType::BlockDevice;
        is_block_device.then(|| self.0.get(&(file.stx_rdev_major, file.stx_rdev_minor))).flatten()
    }

    /// The node on whose file system this file is.
    pub fn has(&self, file: &Statx) -> Option<&String> {
        self.0.get(&(file.stx_dev_major, file.stx_dev_minor))
    }

    /// The node with this path, under any name below /dev.
    pub fn at(&self, path: &Path) -> Option<&String> {
        // Nodes are below /dev, and the file system of any other path may hang.
        path.starts_with("/dev").then(|| self.is(&status(path).ok()?)).flatten()
    }

    /// The node with this path.
    pub fn named(&self, path: &[u8]) -> Option<&String> {
        self.0.values().find(|node| node.as_bytes() == path)
    }

    /// The mounts of the nodes in a mount table.
    pub fn mounts(&self, table: &[u8]) -> Mounts {
        let mount = |mount: mountinfo::Mount<'_>| Some((self.mounted(&mount)?.clone(), mount.point));
        mountinfo::mounts(table).filter_map(mount).collect()
    }

    fn mounted(&self, mount: &mountinfo::Mount<'_>) -> Option<&String> {
        if is_multi_device(mount.file_system) {
            return self.named(&mount.source);
        }
        self.0.get(&mount.device)
    }
}

fn node_of(directory: &Path) -> Option<(DeviceNumber, String)> {
    let number = mountinfo::device_number(fs::read_to_string(directory.join("dev")).ok()?.trim_end())?;
    Some((number, format!("/dev/{}", directory.file_name()?.to_str()?)))
}

fn entries(directory: &Path) -> Vec<PathBuf> {
    fs::read_dir(directory).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Device numbers and type of a file, without asking its file system.
pub fn status(path: &Path) -> rustix::io::Result<Statx> {
    statx(CWD, path, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, StatxFlags::TYPE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_of_the_device_are_recognized_by_its_number() {
        let nodes = Nodes::from([((7, 3), "/dev/loop3".to_owned()), ((259, 1), "/dev/loop3p1".to_owned())]);
        let found = nodes.mounts(
            b"1 1 7:3 / /a rw - ext4 x rw\n2 1 259:1 / /b rw - ext4 x rw\n3 1 7:4 / /c rw - ext4 /dev/loop3 rw\n\
              4 1 0:50 / /d rw - btrfs /dev/loop3 rw\n5 1 0:51 / /e rw - fuse /dev/loop3 rw\n",
        );
        let expected = [("/dev/loop3", "/a"), ("/dev/loop3p1", "/b"), ("/dev/loop3", "/d")];
        assert_eq!(found, expected.map(|(node, point)| (node.to_owned(), PathBuf::from(point))).into());
    }
}
