//! Adds and deletes the nodes of partitions (BLKPG).

use std::fs::File;

use loopd_engine::Error;
use loopd_engine::kernel::{PartitionNode, node};
use loopd_partition_table::{Partition, Table};
use nix::errno::Errno;
use tracing::{debug, warn};

use super::rescan::reading;
use crate::error::state_unreadable;
use crate::ioctl;
use crate::sysfs::loop_device;

fn in_use(number: u32, partition: u32) -> Error {
    let reason = format!("its partition {partition} is in use; unmount or close it first");
    Error::Busy { operation: reading(number), reason }
}

/// The nodes of a device's partitions.
pub fn read(number: u32) -> Result<Vec<PartitionNode>, Error> {
    loop_device::partitions(number).map_err(|source| state_unreadable(number, source))
}

/// Whether the table has the same partitions as these nodes.
pub fn match_table(table: &Table, nodes: &[PartitionNode]) -> bool {
    let has_node = |partition| nodes.iter().any(|node| is_node_of(node, partition));
    table.partitions.len() == nodes.len() && table.partitions.iter().all(has_node)
}

fn is_node_of(node: &PartitionNode, partition: &Partition) -> bool {
    (node.number, node.start, node.size) == (partition.number, partition.start, partition.size)
}

/// The nodes without an entry in the table.
fn stale<'a>(table: Option<&Table>, nodes: &'a [PartitionNode]) -> Vec<&'a PartitionNode> {
    let has_entry = |node: &PartitionNode| {
        table.is_some_and(|table| table.partitions.iter().any(|partition| is_node_of(node, partition)))
    };
    nodes.iter().filter(|node| !has_entry(node)).collect()
}

/// Deletes stale nodes and adds missing ones; false if loopd lacks the privilege to add them.
pub fn update(number: u32, disk: &File, table: Option<&Table>, nodes: &[PartitionNode]) -> bool {
    delete_stale(number, disk, table, nodes);
    let partitions = table.iter().flat_map(|table| &table.partitions);
    let mut missing = partitions.filter(|partition| !nodes.iter().any(|node| is_node_of(node, partition)));
    missing.all(|partition| add(number, disk, partition))
}

/// Adds the node of a partition; false without the privilege for it.
fn add(number: u32, disk: &File, partition: &Partition) -> bool {
    match ioctl::add_partition(disk, partition.number, partition.start, partition.size) {
        Ok(()) => true,
        Err(Errno::EPERM | Errno::EACCES) => {
            warn!(
                device = node(number),
                "its partitions were not added: this kernel reads no partition tables, and loopd may not add \
                 partitions itself; partitions.conf among loopd's documents, put into \
                 /etc/systemd/system/loopd.service.d, allows it"
            );
            false
        }
        Err(errno) => {
            warn!(
                device = node(number),
                partition = partition.number,
                "this partition was not added: {} ({errno:?}); does it overlap another one?",
                errno.desc()
            );
            true
        }
    }
}

fn delete_stale(number: u32, disk: &File, table: Option<&Table>, nodes: &[PartitionNode]) {
    for stale in stale(table, nodes) {
        match ioctl::delete_partition(disk, stale.number) {
            // Deleted already.
            Ok(()) | Err(Errno::ENXIO) => {}
            Err(errno) => warn!(
                device = node(number),
                partition = stale.number,
                "a stale partition cannot be deleted: {}",
                errno.desc()
            ),
        }
    }
}

/// Deletes the nodes of a volume. Nodes in use stay, and so do all if loopd lacks the privilege.
pub fn delete_of_volume(number: u32, disk: &File, nodes: &[PartitionNode]) {
    for found in nodes {
        if let Err(errno) = ioctl::delete_partition(disk, found.number) {
            debug!(
                device = node(number),
                partition = found.number,
                "this node of the whole volume is not deleted: {}",
                errno.desc()
            );
        }
    }
}

/// Deletes the stale nodes, or none if one of them is in use, as BLKRRPART does.
pub fn delete_stale_or_none(
    number: u32,
    disk: &File,
    table: Option<&Table>,
    nodes: &[PartitionNode],
) -> Result<(), Error> {
    let mut deleted: Vec<&PartitionNode> = Vec::new();
    for stale in stale(table, nodes) {
        if ioctl::delete_partition(disk, stale.number) == Err(Errno::EBUSY) {
            for partition in deleted {
                let _best_effort =
                    ioctl::add_partition(disk, partition.number, partition.start, partition.size);
            }
            return Err(in_use(number, stale.number));
        }
        deleted.push(stale);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use loopd_partition_table::TableKind;

    use super::*;

    fn table(partitions: &[(u32, u64, u64)]) -> Table {
        let partition = |&(number, start, size): &(u32, u64, u64)| Partition {
            number,
            start,
            size,
            kind: String::new(),
            uuid: String::new(),
            label: String::new(),
            refusal: None,
        };
        Table {
            kind: TableKind::Gpt,
            uuid: String::new(),
            from_backup: false,
            partitions: partitions.iter().map(partition).collect(),
        }
    }

    fn nodes(partitions: &[(u32, u64, u64)]) -> Vec<PartitionNode> {
        let node = |&(number, start, size): &(u32, u64, u64)| PartitionNode {
            number,
            start,
            size,
            ..PartitionNode::default()
        };
        partitions.iter().map(node).collect()
    }

    #[test]
    fn nodes_match_a_table_with_the_same_partitions_only() {
        let table = table(&[(1, 0, 512), (2, 512, 512)]);
        assert!(match_table(&table, &nodes(&[(1, 0, 512), (2, 512, 512)])));
        for other in [&[][..], &[(1, 0, 512)], &[(1, 0, 512), (2, 512, 1024)], &[(1, 0, 512), (3, 512, 512)]]
        {
            assert!(!match_table(&table, &nodes(other)), "{other:?}");
        }
    }

    #[test]
    fn nodes_that_differ_from_the_table_are_stale() {
        let all = nodes(&[(1, 0, 512), (2, 512, 512), (3, 1024, 512)]);
        let numbers = |table: Option<&Table>| -> Vec<u32> {
            stale(table, &all).iter().map(|node| node.number).collect()
        };
        assert_eq!(numbers(Some(&table(&[(1, 0, 512), (2, 512, 1024)]))), [2, 3]);
        assert_eq!(numbers(None), [1, 2, 3]);
    }
}
