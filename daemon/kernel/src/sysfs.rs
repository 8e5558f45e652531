//! What sysfs and procfs say of loop devices. None of these reads can block on a backing file.

use std::collections::HashSet;
use std::fs;
use std::path::PathBuf;

use super::mounts;
use loopd_engine::kernel::{DiskSequence, PartitionNode, Users};

fn attribute_path(number: u32, attribute: &str) -> PathBuf {
    PathBuf::from(format!("/sys/block/loop{number}/{attribute}"))
}

fn number_in<T: std::str::FromStr>(number: u32, attribute: &str) -> Option<T> {
    fs::read_to_string(attribute_path(number, attribute)).ok()?.trim_ascii_end().parse().ok()
}

/// Whether the device exists.
pub fn exists(number: u32) -> bool {
    attribute_path(number, "").exists()
}

/// Whether something is attached, or still being taken down.
pub fn is_bound(number: u32) -> bool {
    attribute_path(number, "loop").exists()
}

/// The disk sequence, bound or not.
pub fn disk_sequence(number: u32) -> Option<DiskSequence> {
    number_in(number, "diskseq").map(DiskSequence)
}

/// The disk sequences of all loop devices, bound or not.
pub fn disk_sequences() -> HashSet<DiskSequence> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return HashSet::new() };
    let number = |entry: std::io::Result<fs::DirEntry>| {
        entry.ok()?.file_name().to_str()?.strip_prefix("loop")?.parse().ok()
    };
    entries.filter_map(number).filter_map(disk_sequence).collect()
}

/// Where in its backing file the device begins.
pub fn offset(number: u32) -> Option<u64> {
    number_in(number, "loop/offset")
}

/// Path of the backing file, to the byte: only the newline that the kernel adds is taken off.
pub fn backing_file(number: u32) -> Option<Vec<u8>> {
    let mut path = fs::read(attribute_path(number, "loop/backing_file")).ok()?;
    if path.last() == Some(&b'\n') {
        path.pop();
    }
    Some(path)
}

/// The numbers of all loop devices with something attached.
pub fn bound_numbers() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/sys/block") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("loop")?.parse().ok())
        .filter(|number| is_bound(*number))
        .collect()
}

/// Names of the device and of its partitions, as in `/dev`.
fn block_names(number: u32) -> Vec<String> {
    let disk = format!("loop{number}");
    let partition = format!("{disk}p");
    let Ok(entries) = fs::read_dir(attribute_path(number, "")) else { return vec![disk] };
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with(&partition))
        .collect();
    names.push(disk);
    names
}

/// The partitions' nodes of a device, by number.
pub fn partitions(number: u32) -> Vec<PartitionNode> {
    let prefix = format!("loop{number}p");
    let mut nodes: Vec<PartitionNode> = block_names(number)
        .iter()
        .filter_map(|name| Some((name, name.strip_prefix(&prefix)?.parse().ok()?)))
        .filter_map(|(name, partition)| partition_node(name, partition))
        .collect();
    nodes.sort_unstable_by_key(|node| node.number);
    nodes
}

/// One partition's node.
pub fn partition(number: u32, partition: u32) -> Option<PartitionNode> {
    partition_node(&format!("loop{number}p{partition}"), partition)
}

fn partition_node(name: &str, number: u32) -> Option<PartitionNode> {
    let sectors = |attribute: &str| -> Option<u64> {
        let text = fs::read_to_string(format!("/sys/class/block/{name}/{attribute}")).ok()?;
        text.trim_ascii_end().parse::<u64>().ok()?.checked_mul(512)
    };
    Some(PartitionNode {
        number,
        device_number: device_number(name)?,
        start: sectors("start")?,
        size: sectors("size")?,
    })
}

/// What is stacked on a block device, as nodes.
pub fn holders(block_name: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(format!("/sys/class/block/{block_name}/holders")) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .map(|holder| format!("/dev/{holder}"))
        .collect()
}

/// `MAJOR:MINOR` of a block device.
pub fn device_number(block_name: &str) -> Option<(u32, u32)> {
    let text = fs::read_to_string(format!("/sys/class/block/{block_name}/dev")).ok()?;
    loopd_common::mountinfo::device_number(text.trim_ascii_end())
}

/// The nodes of the mounted btrfs with this UUID.
pub fn mounted_btrfs(uuid: &str) -> Vec<String> {
    let file_system = format!("/sys/fs/btrfs/{uuid}");
    let Ok(devices) = fs::read_dir(format!("{file_system}/devices")) else {
        // It is there without devices that can be read.
        return if fs::exists(&file_system).unwrap_or(true) { vec![file_system] } else { Vec::new() };
    };
    devices.filter_map(|entry| Some(format!("/dev/{}", entry.ok()?.file_name().to_str()?))).collect()
}

fn swap_devices() -> Vec<String> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next()).map(str::to_owned).collect()
}

/// Who uses the device or a partition of it.
pub fn users(number: u32) -> std::io::Result<Users> {
    let mounts = mounts::read()?;
    let swaps = swap_devices();
    let mut users = Users::default();
    for name in block_names(number) {
        let device_node = format!("/dev/{name}");
        if let Some(device) = device_number(&name) {
            users.mount_points.extend(mounts.of(device).iter().cloned());
        }
        users.holders.extend(holders(&name));
        if swaps.contains(&device_node) {
            users.holders.push(format!("swap on {device_node}"));
        }
    }
    Ok(users)
}
