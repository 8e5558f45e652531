//! The sector size that a DOS partition table was written for. The table does not contain it, but signatures at the
//! start of the partitions show it.

use std::io;

use crate::disk::Disk;
use crate::dos::BootRecord;
use crate::image::Image;

/// How many bytes are read at the start of a partition.
const START: usize = 4096;
/// Signatures of contents: the offset in the partition, and the bytes there.
const SIGNATURES: [(usize, &[u8]); 7] = [
    (0, b"XFSB"),
    (0, b"hsqs"),
    (0, b"LUKS\xba\xbe"),
    (512, b"LABELONE"),
    (1024 + 56, b"\x53\xef"),
    (4086, b"SWAPSPACE2"),
    (4086, b"SWAP-SPACE"),
];
/// Where btrfs has its signature in the partition.
const BTRFS: u64 = 64 * 1024 + 64;

/// The sector size, other than the block size of the disk, with which a partition starts at known contents;
/// `None` if one does with the block size of the disk, or if none does.
///
/// # Errors
/// The image cannot be read.
pub fn other_size(
    disk: &mut Disk<'_, impl Image>,
    record: &BootRecord,
    sizes: &[u32],
) -> io::Result<Option<u32>> {
    let starts: Vec<u64> = record.first_sectors().filter(|first| *first != 0).map(u64::from).collect();
    let own = disk.block_size();
    if starts_at_contents(disk, &starts, own)? {
        return Ok(None);
    }
    for size in sizes.iter().filter(|size| u64::from(**size) != own) {
        if starts_at_contents(disk, &starts, u64::from(*size))? {
            return Ok(Some(*size));
        }
    }
    Ok(None)
}

/// Nothing overflows: 2³² sectors of 64 KiB.
fn starts_at_contents(disk: &mut Disk<'_, impl Image>, starts: &[u64], size: u64) -> io::Result<bool> {
    for start in starts {
        if has_contents(disk, start * size)? {
            return Ok(true);
        }
    }
    Ok(false)
}

fn has_contents(disk: &mut Disk<'_, impl Image>, offset: u64) -> io::Result<bool> {
    let mut start = [0; START];
    if !disk.read(offset, &mut start)? {
        return Ok(false);
    }
    if SIGNATURES.iter().any(|(place, bytes)| start[*place..].starts_with(bytes)) {
        return Ok(true);
    }
    // A boot sector, or a link of the chain of logical partitions.
    if BootRecord::read(disk, offset)?.is_some_and(|record| record.is_signed()) {
        return Ok(true);
    }
    let mut signature = [0; 8];
    Ok(disk.read(offset + BTRFS, &mut signature)? && signature == *b"_BHRfS_M")
}
