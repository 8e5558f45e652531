//! Which table an image has, and what Linux makes of it.

use std::io;

use crate::disk::Disk;
use crate::dos::{self, BootRecord, Protection};
use crate::gpt;
use crate::image::Image;
use crate::table::{Partition, Refusal, Table};
use crate::warning::Warning;

/// Sector sizes that a GPT may have been written for.
const SECTOR_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// What was found in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// The partition table; `None` if there is none, or none that is sound.
    pub table: Option<Table>,
    /// What was not used, and what is unusual about the rest.
    pub warnings: Vec<Warning>,
}

/// Reads the partition table for a device of the given logical block size.
///
/// # Errors
/// The image cannot be read, or the block size is no power of two from 512 to 65536.
pub fn read(image: &mut impl Image, block_size: u32) -> io::Result<Reading> {
    let mut disk = Disk::new(image, block_size)?;
    let Some(record) = BootRecord::read(&mut disk, 0)? else { return Ok(Reading::default()) };
    let mut warnings = Vec::new();
    let mut table = match record.protection() {
        Protection::Protective => gpt::read(&mut disk, &mut warnings)?,
        Protection::Misplaced => {
            warnings.push(Warning::MisplacedProtection);
            None
        }
        Protection::Absent => {
            if gpt::primary_is_sound(&mut disk)? {
                warnings.push(Warning::UnprotectedGpt);
            }
            dos::read(&mut disk, &record, &mut warnings)?
        }
    };
    if let Some(table) = &mut table {
        mark_refusals(&mut table.partitions, u64::from(block_size), &mut warnings);
    } else if let Some(written) = sector_size(image)?.filter(|written| *written != block_size) {
        warnings.push(Warning::OtherSectorSize { written, read: block_size });
    }
    Ok(Reading { table, warnings })
}

/// The sector size in bytes that the image's GPT was written with: a device needs it as its block
/// size to show the partitions. `None` if there is no sound GPT behind a protective MBR.
///
/// # Errors
/// The image cannot be read.
pub fn sector_size(image: &mut impl Image) -> io::Result<Option<u32>> {
    let record = BootRecord::read(&mut Disk::new(image, 512)?, 0)?;
    if !record.is_some_and(|record| record.protection() == Protection::Protective) {
        return Ok(None);
    }
    // A primary counts for more than any backup: the end of the image may be older than its start.
    for size in SECTOR_SIZES {
        if gpt::primary_is_sound(&mut Disk::new(image, size)?)? {
            return Ok(Some(size));
        }
    }
    for size in SECTOR_SIZES {
        if gpt::last_block_is_sound(&mut Disk::new(image, size)?)? {
            return Ok(Some(size));
        }
    }
    Ok(None)
}

/// Marks the partitions that BLKPG refuses when they are added one after the other.
fn mark_refusals(partitions: &mut [Partition], block_size: u64, warnings: &mut Vec<Warning>) {
    for index in 0..partitions.len() {
        let (before, rest) = partitions.split_at_mut(index);
        let partition = &mut rest[0];
        let overlapped = before.iter().find(|other| other.refusal.is_none() && other.overlaps(partition));
        partition.refusal = if !(partition.start | partition.size).is_multiple_of(block_size) {
            Some(Refusal::Unaligned)
        } else {
            overlapped.map(|other| Refusal::Overlaps(other.number))
        };
        match partition.refusal {
            Some(Refusal::Overlaps(other)) => {
                warnings.push(Warning::Overlap { number: partition.number, other });
            }
            Some(Refusal::Unaligned) => warnings.push(Warning::Unaligned { number: partition.number }),
            None => {}
        }
    }
}
