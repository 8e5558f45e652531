//! Who uses a disk or its partitions: mounts, devices that are stacked on it, swap.

use std::fs;

use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Users, node};
use loopd_engine::mount_table::MountTable;

use crate::mounts;
use crate::sysfs::{Block, DeviceNumber};

/// How far stacked devices are followed.
const DEEPEST: usize = 16;

fn unknown(number: u32, source: std::io::Error) -> Error {
    Error::Io { operation: format!("determine the users of {}", node(number)), source }
}

/// The users of a loop device.
///
/// # Errors
/// `Kernel` if the mount table cannot be read.
pub fn of_loop(number: u32) -> Result<Users, Error> {
    let mounts = mounts::read().map_err(|error| unknown(number, error))?;
    let swaps = swap_devices();
    let mut users = Users::default();
    for block in Block::of_loop(number).with_partitions() {
        users.mount_points.extend(block.number().iter().flat_map(|number| mounts.of(*number)).cloned());
        users.holders.extend(block.holders().iter().filter_map(Block::node));
        users
            .holders
            .extend(block.node().filter(|node| swaps.contains(node)).map(|node| format!("swap on {node}")));
    }
    Ok(users)
}

fn swap_devices() -> Vec<String> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()).map(str::to_owned).collect()
}

/// The users of a disk in words, with those of the devices that are stacked on it.
pub fn of_disk(disk: DeviceNumber) -> Vec<String> {
    let Ok(mounts) = mounts::read() else {
        return vec!["possibly mounted: the mount table cannot be read".to_owned()];
    };
    let blocks = Block::numbered(disk).with_partitions();
    let mut users: Vec<String> = blocks.iter().flat_map(|block| mounts_of(&mounts, block)).collect();
    for holder in blocks.iter().flat_map(|block| stacked_on(block, 0)) {
        let Some(node) = holder.node() else { continue };
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
