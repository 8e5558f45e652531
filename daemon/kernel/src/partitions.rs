//! The partitions' nodes: made by the kernel where it has parsers, else by us.
//!
//! Which of the two holds is seen, not guessed: the first table with partitions of which the
//! kernel made none has it tried on an image that every parser understands.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::memfd::{MFdFlags, memfd_create};
use tracing::{debug, warn};

use super::bytes::Bytes;
use super::linux::Shared;
use super::{ioctl, linux, sysfs, udev};
use loopd_engine::kernel::{
    Device, DiskSequence, Partition, PartitionNode, Partitioning, ScanReason, TableEntry, node,
};
use loopd_partition_table::{self as partition_table, Table};

/// Makes the nodes what the table says, where the kernel does not do so itself, and tells which
/// partitions there are.
pub fn settle(
    shared: &Arc<Shared>,
    number: u32,
    disk_sequence: DiskSequence,
    reason: ScanReason,
) -> Result<Partitioning, Error> {
    let Some(disk) = linux::open_attached(number, disk_sequence)? else { return Ok(Partitioning::default()) };
    let rescan = reason == ScanReason::Rescan;
    if rescan && !linux::wants_partitions(&disk) {
        return Err(not_read_again(
            number,
            ErrorKind::NotSupported,
            "it was attached without partition-scan",
        ));
    }
    let udev_rereads = rescan && shared.scans_itself() != Some(false) && reread(number, &disk)?;
    let disk = File::from(disk);
    let size = ioctl::size(&disk).map_err(|errno| linux::failed("learn the size", "BLKGETSIZE64", errno))?;
    let block_size = ioctl::block_size(&disk)
        .map_err(|errno| linux::failed("learn the block size", "BLKSSZGET", errno))?;
    let table = read_table(number, block_size, &mut Bytes::new(&disk, 0, size));
    let nodes = sysfs::partitions(number);
    let for_us = reason != ScanReason::Foreign && concerns_us(shared, table.as_ref(), &nodes, false);
    if for_us && rescan {
        delete_all_or_none(number, &disk, table.as_ref(), &nodes)?;
    }
    let unmade = for_us && make(number, &disk, table.as_ref(), &nodes);
    let nodes = sysfs::partitions(number);
    let outdated = shared.scans_itself() == Some(true) && is_outdated(table.as_ref(), &nodes);
    Ok(Partitioning {
        partitions: described(nodes, table.as_ref()),
        missing: false,
        unmade,
        outdated,
        udev_rereads,
    })
}

/// The partitions of a device that was attached just now: nobody but the kernel can have made a
/// node. The table is read from the file, whose pages are at hand; those of the device are not.
pub fn first_look(shared: &Arc<Shared>, file: &OwnedFd, device: &Device) -> Partitioning {
    let table =
        read_table(device.number, device.block_size, &mut Bytes::new(file, device.offset, device.size));
    let nodes = sysfs::partitions(device.number);
    let missing = concerns_us(shared, table.as_ref(), &nodes, !nodes.is_empty());
    Partitioning { partitions: described(nodes, table.as_ref()), missing, ..Partitioning::default() }
}

/// Whether there is a difference between table and nodes that the kernel leaves to us.
fn concerns_us(shared: &Arc<Shared>, table: Option<&Table>, nodes: &[PartitionNode], seen: bool) -> bool {
    let wanted = table.is_some_and(|table| !table.partitions.is_empty());
    (wanted || !nodes.is_empty()) && !shared.kernel_scans(seen)
}

/// Whether these are not the nodes of a table that the kernel understands.
fn is_outdated(table: Option<&Table>, nodes: &[PartitionNode]) -> bool {
    let Some(table) = table.filter(|table| !table.from_backup) else { return false };
    let has_node = |partition| nodes.iter().any(|node| is_node_of(node, partition));
    table.partitions.len() != nodes.len() || !table.partitions.iter().all(has_node)
}

fn described(nodes: Vec<PartitionNode>, table: Option<&Table>) -> Vec<Partition> {
    nodes.into_iter().map(|node| Partition { entry: entry(table, &node), node }).collect()
}

fn read_table(number: u32, block_size: u32, bytes: &mut Bytes<'_>) -> Option<Table> {
    match partition_table::read(bytes, block_size) {
        Ok(reading) => {
            for warning in &reading.warnings {
                warn!(device = node(number), "partition table: {warning}");
            }
            reading.table
        }
        Err(error) => {
            debug!(device = node(number), "the partition table cannot be read: {error}");
            None
        }
    }
}

fn entry(table: Option<&Table>, node: &PartitionNode) -> TableEntry {
    let same =
        |table: &&Table| table.partitions.iter().find(|partition| partition.number == node.number).cloned();
    let Some((table, partition)) = table.and_then(|table| Some((table, same(&table)?))) else {
        return TableEntry::default();
    };
    TableEntry {
        table: table.kind.to_string(),
        kind: partition.kind,
        uuid: partition.uuid,
        label: partition.label,
    }
}

/// Adds what is missing and deletes what is wrong; true where that is not allowed.
fn make(number: u32, disk: &File, table: Option<&Table>, nodes: &[PartitionNode]) -> bool {
    delete_other(number, disk, table, nodes);
    for partition in table.iter().flat_map(|table| &table.partitions) {
        if nodes.iter().any(|node| is_node_of(node, partition)) {
            continue;
        }
        match ioctl::add_partition(disk, partition.number, partition.start, partition.size) {
            Ok(()) => {}
            Err(Errno::EPERM | Errno::EACCES) => {
                warn!(
                    device = node(number),
                    "its partitions were not made: this kernel reads no partition tables, and loopd may not add \
                     partitions itself; partitions.conf among loopd's documents, put into \
                     /etc/systemd/system/loopd.service.d, allows it"
                );
                return true;
            }
            Err(errno) => warn!(
                device = node(number),
                partition = partition.number,
                "this partition was not made: {} ({errno:?}); does it overlap another one?",
                errno.desc()
            ),
        }
    }
    false
}

fn is_node_of(node: &PartitionNode, partition: &partition_table::Partition) -> bool {
    (node.number, node.start, node.size) == (partition.number, partition.start, partition.size)
}

/// The nodes that the table does not have.
fn stale<'a>(table: Option<&Table>, nodes: &'a [PartitionNode]) -> Vec<&'a PartitionNode> {
    let is_right = |node: &PartitionNode| {
        table.is_some_and(|table| table.partitions.iter().any(|partition| is_node_of(node, partition)))
    };
    nodes.iter().filter(|node| !is_right(node)).collect()
}

fn delete_other(number: u32, disk: &File, table: Option<&Table>, nodes: &[PartitionNode]) {
    for stale in stale(table, nodes) {
        match ioctl::delete_partition(disk, stale.number) {
            // Deleted already.
            Ok(()) | Err(Errno::ENXIO) => {}
            Err(errno) => warn!(
                device = node(number),
                partition = stale.number,
                "a stale partition stays: {}",
                errno.desc()
            ),
        }
    }
}

/// Deletes what the table does not have, or, where one of them is in use, nothing: as BLKRRPART.
fn delete_all_or_none(
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
            let why = format!("its partition {} is in use; unmount or close it first", stale.number);
            return Err(not_read_again(number, ErrorKind::Busy, &why));
        }
        deleted.push(stale);
    }
    Ok(())
}

fn not_read_again(number: u32, kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, format!("cannot read the partition table of {} again: {why}", node(number)))
}

/// Has the kernel read the table again. Without the privilege for that, udev is made to: it does so
/// when a descriptor that was open for writing is closed. True where udev's answer is to come.
fn reread(number: u32, disk: &OwnedFd) -> Result<bool, Error> {
    let refused = |kind, why| Err(not_read_again(number, kind, why));
    match ioctl::reread_partitions(disk) {
        Ok(()) => Ok(false),
        Err(Errno::EPERM | Errno::EACCES) if udev::runs() => {
            let closed = linux::open(number, OFlag::O_RDWR).map(drop);
            closed.map(|()| true).or_else(|errno| refused(ErrorKind::Kernel, errno.desc()))
        }
        Err(Errno::EBUSY) => refused(ErrorKind::Busy, "a partition is in use; unmount or close it first"),
        Err(Errno::EINVAL) => refused(ErrorKind::NotSupported, "it was attached without partition-scan"),
        Err(errno) => refused(ErrorKind::Kernel, errno.desc()),
    }
}

/// Deletes partitions that an earlier user of a free number left; false where some stay.
pub fn sweep(number: u32) -> bool {
    let left = sysfs::partitions(number);
    if left.is_empty() {
        return true;
    }
    let Ok(disk) = linux::open(number, OFlag::O_RDONLY) else { return false };
    for partition in left {
        warn!(
            device = node(number),
            partition = partition.number,
            "a partition of an earlier attach is swept"
        );
        if ioctl::delete_partition(&disk, partition.number).is_err() {
            return false;
        }
    }
    true
}

/// The sector size that an image's table was written for; `None` where any will do.
pub fn sector_size(file: impl AsFd, offset: u64, size: u64) -> Option<u32> {
    partition_table::sector_size(&mut Bytes::new(&file, offset, size)).ok().flatten()
}

/// An image with one DOS partition of 8 sectors: every kernel with any parser knows that table.
pub fn sample_image() -> io::Result<OwnedFd> {
    const SECTOR: usize = 512;
    let mut image = vec![0; 64 * SECTOR];
    let entry = [0, 0, 0, 0, 0x83, 0, 0, 0, 8, 0, 0, 0, 8, 0, 0, 0];
    image[446..462].copy_from_slice(&entry);
    image[510..512].copy_from_slice(&[0x55, 0xaa]);
    let mut file = File::from(memfd_create(c"loopd-partition-sample", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(&image)?;
    Ok(file.into())
}
