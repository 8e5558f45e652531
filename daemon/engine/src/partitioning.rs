//! The partitions of a device: their nodes, and their entries in the partition table.

use crate::findings::Findings;

/// A partition's node, as sysfs shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionNode {
    /// N of `/dev/loop0pN`.
    pub number: u32,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// Where it starts on the device, in bytes.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// The entry of a partition in the partition table. Strings are empty if they are unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableEntry {
    /// The kind of the table: `gpt`, `dos`, or libblkid's name of another one.
    pub table: String,
    /// The type: a GUID, or `0x83`.
    pub kind: String,
    /// The partition's UUID.
    pub uuid: String,
    /// The partition's name.
    pub label: String,
}

/// A partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partition {
    /// Its node.
    pub node: PartitionNode,
    /// Its entry in the table.
    pub entry: TableEntry,
}

/// The partitions of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partitioning {
    /// Those that have nodes, by number.
    pub partitions: Vec<Partition>,
    /// Whether nodes are still to be made.
    pub missing: bool,
    /// Whether nodes are missing that loopd has no privilege to make.
    pub unmade: bool,
    /// Whether the kernel, which reads tables itself, has other partitions than the table.
    pub outdated: bool,
    /// Whether udev was asked to make the kernel read the table again: udev's event for the device follows.
    pub udev_rereads: bool,
    /// What was found in the image when the table was read.
    pub findings: Findings,
}

/// Why the partitions of a device are scanned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanReason {
    /// The table may have changed: nodes may have to be made or deleted.
    Changed,
    /// A client requested that the table is read again.
    Rescan,
    /// The nodes are not loopd's to make.
    Foreign,
}
