//! Compares the nodes of a device with its partition table, and makes the missing ones.

use std::fs::File;
use std::os::fd::OwnedFd;

use loopd_engine::Error;
use loopd_engine::kernel::{Device, DiskSequence, PartitionNode, Partitioning, ScanReason, node};
use loopd_partition_table::{Reading, Table};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::kernel_scan::{kernel_is_known_to_scan, kernel_scans, known};
use super::nodes;
use super::rescan::{not_scanned, rescan};
use crate::error::failed;
use crate::findings::{self, Nodes};
use crate::partition_table::{self, Bytes};
use crate::shared::Shared;
use crate::sysfs::loop_device;
use crate::{device, ioctl};

fn unknown(number: u32, what: &str, call: &'static str, errno: Errno) -> Error {
    failed(format!("read the {what} of {}", node(number)), call, errno)
}

/// Makes the nodes match the table, if the kernel does not do so itself, and returns the partitions.
pub fn settle(
    shared: &Shared,
    number: u32,
    disk_sequence: DiskSequence,
    reason: ScanReason,
) -> Result<Partitioning, Error> {
    let Some(disk) = device::open_attached(number, disk_sequence)? else {
        return Ok(Partitioning::default());
    };
    let is_rescan = reason == ScanReason::Rescan;
    if is_rescan && !device::is_scanned(&disk) {
        return Err(not_scanned(number));
    }
    let udev_rereads = is_rescan && known(shared) != Some(false) && rescan(number, &disk)?;
    let disk = File::from(disk);
    let (mut bytes, block_size) = contents(number, &disk)?;
    let reading = partition_table::read(number, block_size, &mut bytes);
    let table = reading.table.as_ref();
    let nodes = nodes::read(number)?;
    let is_ours = reason != ScanReason::Foreign && needs_loopd(shared, table, &nodes, false);
    if is_ours && is_rescan {
        nodes::delete_stale_or_none(number, &disk, table, &nodes)?;
    }
    let unmade = is_ours && !nodes::update(number, &disk, table, &nodes);
    let nodes = nodes_of(number, &reading, (reason != ScanReason::Foreign).then_some(&disk))?;
    let outdated = kernel_is_known_to_scan(shared) && is_outdated(table, &nodes);
    // Missing nodes of a foreign device, or of a table that udev reads again, may still appear.
    let incomplete = unmade || udev_rereads || !(is_ours || kernel_is_known_to_scan(shared));
    let wanted = loop_device::is_scanned(number);
    let findings = findings::find(&mut bytes, &reading, Nodes { nodes: &nodes, wanted, incomplete });
    let partitions = partition_table::describe(nodes, table);
    Ok(Partitioning { partitions, missing: false, unmade, outdated, udev_rereads, findings })
}

/// The nodes of the device that are partitions. Nodes that the kernel has made of entries in the boot sector of a volume
/// are left out. If `own` is the disk of an attachment of loopd, they are deleted too.
fn nodes_of(number: u32, reading: &Reading, own: Option<&File>) -> Result<Vec<PartitionNode>, Error> {
    let nodes = nodes::read(number)?;
    if !reading.is_volume {
        return Ok(nodes);
    }
    if let Some(disk) = own {
        nodes::delete_of_volume(number, disk, &nodes);
    }
    Ok(Vec::new())
}

/// The bytes of a device, and its block size.
fn contents(number: u32, disk: &File) -> Result<(Bytes<'_>, u32), Error> {
    let size = ioctl::size(disk).map_err(|errno| unknown(number, "size", "BLKGETSIZE64", errno))?;
    let block_size =
        ioctl::block_size(disk).map_err(|errno| unknown(number, "block size", "BLKSSZGET", errno))?;
    bypass_cache(disk, block_size);
    Ok((Bytes::new(disk, 0, size), block_size))
}

/// Makes reads of the disk return what the file contains now: while a process has the device open, its page cache does
/// not notice that the file has changed.
fn bypass_cache(disk: &File, block_size: u32) {
    if usize::try_from(block_size).is_ok_and(|block_size| block_size <= partition_table::ALIGNMENT) {
        let flags = fcntl(disk, FcntlArg::F_GETFL).map(OFlag::from_bits_retain);
        let _best_effort = flags.and_then(|flags| fcntl(disk, FcntlArg::F_SETFL(flags | OFlag::O_DIRECT)));
    }
}

/// The findings of a device that was attached just now, and its partitions if it is `scanned`. The kernel has made all of
/// its nodes. Reads the table from the file, whose pages are in the page cache; those of the device are not.
pub fn of_new_attach(shared: &Shared, file: &OwnedFd, device: &Device, scanned: bool) -> Partitioning {
    let mut bytes = Bytes::new(file, device.offset, device.size);
    let reading = partition_table::read(device.number, device.block_size, &mut bytes);
    let table = reading.table.as_ref();
    let nodes = if scanned { nodes_of_new(device, &reading) } else { Vec::new() };
    let missing = scanned && needs_loopd(shared, table, &nodes, !nodes.is_empty());
    let seen = Nodes { nodes: &nodes, wanted: scanned, incomplete: missing };
    let findings = findings::find(&mut bytes, &reading, seen);
    let partitions = partition_table::describe(nodes, table);
    Partitioning { partitions, missing, findings, ..Partitioning::default() }
}

/// As [`nodes_of`], of a device that was attached just now. The event of a partition that cannot be read now makes the
/// engine look again.
fn nodes_of_new(device: &Device, reading: &Reading) -> Vec<PartitionNode> {
    let open = || device::open_attached(device.number, device.disk_sequence).ok().flatten().map(File::from);
    let disk = if reading.is_volume { open() } else { None };
    nodes_of(device.number, reading, disk.as_ref()).unwrap_or_default()
}

/// Whether loopd may have to add or delete nodes, because the kernel reads no partition tables.
fn needs_loopd(
    shared: &Shared,
    table: Option<&Table>,
    nodes: &[PartitionNode],
    has_made_nodes: bool,
) -> bool {
    let has_partitions = table.is_some_and(|table| !table.partitions.is_empty());
    (has_partitions || !nodes.is_empty()) && !kernel_scans(shared, has_made_nodes)
}

/// Whether the table is one that the kernel reads, and these are not its nodes.
fn is_outdated(table: Option<&Table>, nodes: &[PartitionNode]) -> bool {
    table.is_some_and(|table| !table.from_backup && !nodes::match_table(table, nodes))
}
