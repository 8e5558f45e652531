//! Who uses a disk or its partitions: mounts, devices that are stacked on it, swap.

use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use loopd_common::swaps;
use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Users, node};
use loopd_engine::mount_table::MountTable;
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::makedev;

use crate::sysfs::{Block, DeviceNumber};
use crate::{device, mounts};

/// How far stacked devices are followed.
const DEEPEST: usize = 16;

fn unknown(number: u32, source: std::io::Error) -> Error {
    Error::Io { operation: format!("determine the users of {}", node(number)), source }
}

/// The users of a loop device that the kernel lists.
///
/// # Errors
/// `Kernel` if the mount table cannot be read.
pub fn of_loop(number: u32) -> Result<Users, Error> {
    let mounts = mounts::read().map_err(|error| unknown(number, error))?;
    // The sandbox of the unit hides the file.
    let swaps = fs::read(swaps::FILE).unwrap_or_default();
    Ok(listed(&Block::of_loop(number), &mounts, &swaps::devices(&swaps).collect::<Vec<_>>()))
}

fn listed(disk: &Block, mounts: &MountTable, swaps: &[PathBuf]) -> Users {
    let mut users = Users::default();
    for block in disk.with_partitions() {
        users.mount_points.extend(block.number().iter().flat_map(|number| mounts.of(*number)).cloned());
        users.holders.extend(block.holders().iter().filter_map(shown));
        let is_swap = swaps.iter().any(|path| is_node_of(path, &block));
        users.holders.extend(block.node().filter(|_| is_swap).map(|node| format!("swap on {node}")));
    }
    users
}

/// The node of a device, and the name of a mapped one.
fn shown(block: &Block) -> Option<String> {
    let node = block.node()?;
    Some(match block.bytes("dm/name").filter(|name| !name.is_empty()) {
        Some(name) => format!("{node} ({})", printable(&name)),
        None => node,
    })
}

/// Whether the path is a node of the device. Only paths below /dev are looked up: others can hang.
fn is_node_of(path: &Path, block: &Block) -> bool {
    if block.node().is_some_and(|node| path == Path::new(&node)) {
        return true;
    }
    let Some((major, minor)) = block.number().filter(|_| path.starts_with("/dev")) else { return false };
    let metadata = fs::symlink_metadata(path);
    metadata.is_ok_and(|metadata| {
        metadata.file_type().is_block_device() && metadata.rdev() == makedev(major.into(), minor.into())
    })
}

/// Whether a loop device or a partition of it is claimed. Claims it for a moment.
pub fn is_claimed(number: u32) -> bool {
    // A claim of a partition excludes one of the disk (`bd_may_claim`, block/bdev.c), and the sandbox of the unit
    // allows to open the disk only.
    device::open(number, OFlag::O_RDONLY | OFlag::O_EXCL).is_err_and(|errno| errno == Errno::EBUSY)
}

/// The users of a disk in words, with those of the devices that are stacked on it.
pub fn of_disk(disk: DeviceNumber) -> Vec<String> {
    let Ok(mounts) = mounts::read() else {
        return vec!["possibly mounted: the mount table cannot be read".to_owned()];
    };
    let blocks = Block::numbered(disk).with_partitions();
    let mut users: Vec<String> = blocks.iter().flat_map(|block| mounts_of(&mounts, block)).collect();
    for holder in blocks.iter().flat_map(|block| stacked_on(block, 0)) {
        let Some(node) = shown(&holder) else { continue };
        users.push([vec![format!("held by {node}")], mounts_of(&mounts, &holder)].concat().join(", "));
    }
    users.dedup();
    users
}

/// Whether the disk or a partition of it is mounted in our mount namespace, or may be: the table cannot be read.
pub fn is_mounted(disk: DeviceNumber) -> bool {
    let Ok(mounts) = mounts::read() else { return true };
    Block::numbered(disk).with_partitions().iter().any(|block| !mounts_of(&mounts, block).is_empty())
}

fn mounts_of(mounts: &MountTable, block: &Block) -> Vec<String> {
    let points = block.number().map_or(&[][..], |number| mounts.of(number));
    points
        .iter()
        .map(|path| format!("mounted on {}", printable(path.as_os_str().as_encoded_bytes())))
        .collect()
}

fn stacked_on(block: &Block, depth: usize) -> Vec<Block> {
    if depth > DEEPEST {
        return Vec::new();
    }
    let mut all = block.holders();
    let above: Vec<Block> = all.iter().flat_map(|holder| stacked_on(holder, depth + 1)).collect();
    all.extend(above);
    all
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A directory of sysfs: its attributes, and the devices that are stacked on it.
    fn device(directory: &Path, number: &str, name: Option<&str>, above: &[&Path]) {
        fs::create_dir_all(directory.join("holders")).unwrap();
        fs::write(directory.join("dev"), format!("{number}\n")).unwrap();
        if let Some(name) = name {
            fs::create_dir(directory.join("dm")).unwrap();
            fs::write(directory.join("dm/name"), format!("{name}\n")).unwrap();
        }
        for holder in above {
            symlink(holder, directory.join("holders").join(holder.file_name().unwrap())).unwrap();
        }
    }

    #[test]
    fn users_of_a_disk_and_of_its_partitions_are_listed() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        let (disk, partition) = (path("loop3"), path("loop3/loop3p1"));
        device(&path("dm-0"), "253:0", Some("vg-\u{1b}root"), &[]);
        device(&path("md127"), "9:127", None, &[]);
        device(&disk, "7:3", None, &[&path("dm-0")]);
        device(&partition, "259:1", None, &[&path("md127")]);
        fs::write(partition.join("partition"), "1\n").unwrap();

        let mounts = MountTable::parse(
            b"1 1 7:3 / /whole rw - ext4 x rw\n2 1 259:1 / /first rw - ext4 x rw\n3 1 7:4 / /other rw - ext4 x rw\n",
            |_| Vec::new(),
        );
        let swaps = ["/dev/loop3p1", "/dev/loop3p2", "/dev/loop4"].map(PathBuf::from);
        let users = listed(&Block::at(&disk), &mounts, &swaps);
        assert_eq!(users.mount_points, ["/first", "/whole"].map(PathBuf::from));
        assert_eq!(users.holders, ["/dev/md127", "swap on /dev/loop3p1", "/dev/dm-0 (vg-\\u{1b}root)"]);
        assert_eq!(users.claim, None);
    }

    #[test]
    fn a_device_without_users_has_none() {
        let root = tempfile::tempdir().unwrap();
        device(&root.path().join("loop3"), "7:3", None, &[]);
        let block = Block::at(&root.path().join("loop3"));
        assert!(listed(&block, &MountTable::default(), &["/dev/loop30".into()]).is_empty());
        assert!(!is_node_of(Path::new("/dev/null"), &block));
    }
}
