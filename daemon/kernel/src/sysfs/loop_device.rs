//! A loop device in sysfs, by number.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use loopd_engine::kernel::{Device, DiskSequence, PartitionNode};

use super::block::{Block, DeviceNumber, entries};

/// Whether the device exists.
pub fn exists(number: u32) -> bool {
    Block::of_loop(number).exists()
}

/// Whether a file is attached, or being detached.
pub fn is_bound(number: u32) -> bool {
    Block::of_loop(number).has("loop")
}

/// The disk sequence, bound or not; `None` if the device does not exist.
///
/// # Errors
/// sysfs cannot be read.
pub fn disk_sequence(number: u32) -> io::Result<Option<DiskSequence>> {
    Ok(Block::of_loop(number).read_value("diskseq")?.map(DiskSequence))
}

/// The disk sequence of a device that is bound; `None` if nothing is attached.
///
/// # Errors
/// sysfs cannot be read.
pub fn bound(number: u32) -> io::Result<Option<DiskSequence>> {
    if is_bound(number) { disk_sequence(number) } else { Ok(None) }
}

/// The disk sequences of all loop devices, bound or not.
///
/// # Errors
/// One of them cannot be read.
pub fn disk_sequences() -> io::Result<HashSet<DiskSequence>> {
    let sequences = numbers()?.into_iter().map(|number| Block::of_loop(number).read_value("diskseq"));
    sequences.filter_map(|sequence| Some(sequence.transpose()?.map(DiskSequence))).collect()
}

/// The numbers of all loop devices that are bound.
///
/// # Errors
/// sysfs cannot be read.
pub fn bound_numbers() -> io::Result<Vec<u32>> {
    Ok(numbers()?.into_iter().filter(|number| is_bound(*number)).collect())
}

fn numbers() -> io::Result<Vec<u32>> {
    let number = |path: &Path| path.file_name()?.to_str()?.strip_prefix("loop")?.parse().ok();
    Ok(entries(Path::new("/sys/block"))?.iter().filter_map(|path| number(path)).collect())
}

/// Where the device starts in its backing file, in bytes; `None` if nothing is attached.
///
/// # Errors
/// sysfs cannot be read.
pub fn offset(number: u32) -> io::Result<Option<u64>> {
    Block::of_loop(number).read_value("loop/offset")
}

/// The device number of the device or of a partition.
pub fn device_number(number: u32, partition: Option<u32>) -> Option<DeviceNumber> {
    let block = match partition {
        None => Block::of_loop(number),
        Some(partition) => Block::named(&format!("loop{number}p{partition}")),
    };
    block.number().ok().flatten()
}

/// Whether the device was attached with `LO_FLAGS_PARTSCAN`.
pub fn is_scanned(number: u32) -> bool {
    Block::of_loop(number).value("loop/partscan") == Some(1)
}

/// What sysfs shows of a device that is bound, without the path of its backing file.
#[derive(Debug, PartialEq, Eq)]
pub struct Attributes {
    disk_sequence: DiskSequence,
    size: u64,
    offset: u64,
    size_limit: u64,
    block_size: u32,
    read_only: bool,
    direct_io: bool,
    partition_scan: bool,
    autoclear: bool,
}

impl Attributes {
    /// Reads them; `None` if nothing is attached any more.
    ///
    /// # Errors
    /// sysfs cannot be read.
    pub fn read(number: u32) -> io::Result<Option<Self>> {
        let block = Block::of_loop(number);
        let numbers = ["loop/offset", "loop/sizelimit", "ro", "loop/dio", "loop/partscan", "loop/autoclear"];
        let mut values = [0; 6];
        for (name, value) in numbers.iter().zip(&mut values) {
            let Some(read) = block.read_value(name)? else { return Ok(None) };
            *value = read;
        }
        let [offset, size_limit, read_only, direct_io, partition_scan, autoclear] = values;
        let sequence = disk_sequence(number)?;
        let (Some(disk_sequence), Some(size), Some(block_size)) =
            (sequence, block.size()?, block.read_value("queue/logical_block_size")?)
        else {
            return Ok(None);
        };
        Ok(Some(Self {
            disk_sequence,
            size,
            offset,
            size_limit,
            block_size,
            read_only: read_only == 1,
            direct_io: direct_io == 1,
            partition_scan: partition_scan == 1,
            autoclear: autoclear == 1,
        }))
    }

    /// What sysfs would show of this device.
    pub fn of(device: &Device) -> Self {
        Self {
            disk_sequence: device.disk_sequence,
            size: device.size,
            offset: device.offset,
            size_limit: device.size_limit,
            block_size: device.block_size,
            read_only: device.read_only,
            direct_io: device.direct_io,
            partition_scan: device.partition_scan,
            autoclear: device.autoclear,
        }
    }
}

/// The path of the backing file.
pub fn backing_file(number: u32) -> Option<Vec<u8>> {
    Block::of_loop(number).bytes("loop/backing_file")
}

/// The nodes of the device's partitions, by number.
///
/// # Errors
/// sysfs cannot be read.
pub fn partitions(number: u32) -> io::Result<Vec<PartitionNode>> {
    let prefix = format!("loop{number}p");
    let mut nodes = Vec::new();
    for block in Block::of_loop(number).partitions()? {
        let partition = block.file_name().and_then(|name| name.strip_prefix(&prefix)?.parse().ok());
        if let Some(partition) = partition {
            nodes.extend(partition_node(&block, partition)?);
        }
    }
    nodes.sort_unstable_by_key(|node| node.number);
    Ok(nodes)
}

/// The node of one partition; `None` if it does not exist.
///
/// # Errors
/// sysfs cannot be read.
pub fn partition(number: u32, partition: u32) -> io::Result<Option<PartitionNode>> {
    partition_node(&Block::named(&format!("loop{number}p{partition}")), partition)
}

fn partition_node(block: &Block, number: u32) -> io::Result<Option<PartitionNode>> {
    let (Some(device_number), Some(start), Some(size)) = (block.number()?, block.start()?, block.size()?)
    else {
        return Ok(None);
    };
    Ok(Some(PartitionNode { number, device_number, start, size }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_descriptors::without_descriptors;

    #[test]
    fn a_device_that_cannot_be_read_is_not_taken_for_free() {
        let number = numbers().unwrap()[0];
        assert!(disk_sequence(number).unwrap().is_some());
        let unreadable = without_descriptors(|| disk_sequence(number));
        assert!(without_descriptors(|| partitions(number)).is_err());
        assert_eq!(unreadable.unwrap_err().raw_os_error(), Some(nix::libc::EMFILE));
        assert!(disk_sequence(u32::MAX).unwrap().is_none(), "it does not exist");
    }
}
