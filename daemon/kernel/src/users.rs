//! Who uses a disk or its partitions: mounts, devices that are stacked on it, swap.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use loopd_common::swaps;
use loopd_common::text::printable;
use loopd_engine::kernel::{Users, node};
use loopd_engine::mount_table::MountTable;
use loopd_engine::{Error, Mapping};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::makedev;

use crate::sysfs::{Block, DeviceNumber};
use crate::{device, mounts};

/// How far stacked devices are followed.
const DEEPEST: usize = 16;

fn unknown(node: &str, source: io::Error) -> Error {
    Error::Io { operation: format!("determine the users of {node}"), source }
}

/// The users of a loop device that the kernel lists.
///
/// # Errors
/// `Kernel` if the mount table or sysfs cannot be read.
pub fn of_loop(number: u32) -> Result<Users, Error> {
    of_block(&Block::of_loop(number)).map_err(|error| unknown(&node(number), error))
}

/// The users of a mapping that the kernel lists; none if it is gone.
///
/// # Errors
/// `Kernel` if the mount table or sysfs cannot be read.
pub fn of_mapping(mapping: &Mapping) -> Result<Users, Error> {
    let block = Block::named(&format!("dm-{}", mapping.number));
    let users = match block.read_value("diskseq") {
        Ok(sequence) if sequence == Some(mapping.disk_sequence.0) => of_block(&block),
        Ok(_) => Ok(Users::default()),
        Err(error) => Err(error),
    };
    users.map_err(|error| unknown(&mapping.node(), error))
}

fn of_block(disk: &Block) -> io::Result<Users> {
    // The sandbox of the unit hides the file.
    let swaps = fs::read(swaps::FILE).unwrap_or_default();
    let swaps: Vec<PathBuf> = swaps::devices(&swaps).collect();
    listed(disk, &mounts::read()?, &swaps)
}

fn listed(disk: &Block, mounts: &MountTable, swaps: &[PathBuf]) -> io::Result<Users> {
    let mut users = Users::default();
    for block in disk.with_partitions()? {
        users.mount_points.extend(block.number()?.iter().flat_map(|number| mounts.of(*number)).cloned());
        users.holders.extend(block.holders()?.iter().filter_map(display_name));
        let is_swap = swaps.iter().any(|path| is_node_of(path, &block));
        users.holders.extend(block.node().filter(|_| is_swap).map(|node| format!("swap on {node}")));
    }
    Ok(users)
}

/// The node of a device, and the name of a mapped one.
fn display_name(block: &Block) -> Option<String> {
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
    let number = block.number().ok().flatten().filter(|_| path.starts_with("/dev"));
    let Some((major, minor)) = number else { return false };
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

/// The users of a disk in words, with those of the devices that are stacked on it. If they cannot be determined,
/// the result is a text with the reason.
pub fn of_disk(disk: DeviceNumber) -> Vec<String> {
    known_of_disk(disk)
        .unwrap_or_else(|error| vec![format!("possibly in use: its users are unknown: {error}")])
}

fn known_of_disk(disk: DeviceNumber) -> io::Result<Vec<String>> {
    let mounts = mounts::read()?;
    let blocks = Block::numbered(disk).with_partitions()?;
    let mut users = Vec::new();
    for block in &blocks {
        users.extend(mounts_of(&mounts, block)?);
    }
    for block in &blocks {
        for holder in stacked_on(block, 0)? {
            let Some(node) = display_name(&holder) else { continue };
            let mounted = mounts_of(&mounts, &holder)?;
            users.push([vec![format!("held by {node}")], mounted].concat().join(", "));
        }
    }
    users.dedup();
    Ok(users)
}

/// Whether the disk or a partition of it is mounted in our mount namespace.
///
/// # Errors
/// The mount table or sysfs cannot be read.
pub fn is_mounted(disk: DeviceNumber) -> io::Result<bool> {
    let mounts = mounts::read()?;
    for block in Block::numbered(disk).with_partitions()? {
        if !mounts_of(&mounts, &block)?.is_empty() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn mounts_of(mounts: &MountTable, block: &Block) -> io::Result<Vec<String>> {
    let points = block.number()?.map_or(&[][..], |number| mounts.of(number));
    let mounted = |path: &PathBuf| format!("mounted on {}", printable(path.as_os_str().as_encoded_bytes()));
    Ok(points.iter().map(mounted).collect())
}

fn stacked_on(block: &Block, depth: usize) -> io::Result<Vec<Block>> {
    if depth > DEEPEST {
        return Ok(Vec::new());
    }
    let mut all = block.holders()?;
    for direct in 0..all.len() {
        let above = stacked_on(&all[direct], depth + 1)?;
        all.extend(above);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::test_descriptors::without_descriptors;

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
        let users = listed(&Block::at(&disk), &mounts, &swaps).unwrap();
        assert_eq!(users.mount_points, ["/first", "/whole"].map(PathBuf::from));
        assert_eq!(users.holders, ["/dev/md127", "swap on /dev/loop3p1", "/dev/dm-0 (vg-\\u{1b}root)"]);
        assert_eq!(users.claim, None);
    }

    #[test]
    fn a_device_without_users_has_none() {
        let root = tempfile::tempdir().unwrap();
        device(&root.path().join("loop3"), "7:3", None, &[]);
        let block = Block::at(&root.path().join("loop3"));
        assert!(listed(&block, &MountTable::default(), &["/dev/loop30".into()]).unwrap().is_empty());
        assert!(!is_node_of(Path::new("/dev/null"), &block));
    }

    #[test]
    fn unreadable_users_are_not_taken_for_none() {
        let disk = (7, 900_001);
        assert!(of_disk(disk).is_empty() && !is_mounted(disk).unwrap());
        without_descriptors(|| {
            assert!(of_loop(900_001).is_err() && is_mounted(disk).is_err());
            assert!(of_disk(disk)[0].starts_with("possibly in use"), "{:?}", of_disk(disk));
        });
    }
}
