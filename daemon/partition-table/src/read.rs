//! Finds the partition table of an image, and how Linux treats it.

use std::io;

use crate::disk::Disk;
use crate::dos::{self, BootRecord, Protection};
use crate::dos_sectors;
use crate::gpt;
use crate::image::Image;
use crate::table::{Partition, Refusal, Table, TableKind};
use crate::warning::Warning;

/// Sector sizes that a GPT may have been written for.
const SECTOR_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// The partition table of an image, and its faults.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// The partition table; `None` if there is none, or none that is sound.
    pub table: Option<Table>,
    /// Structures that were not used, and anything unusual about the others.
    pub warnings: Vec<Warning>,
    /// The size in bytes of the image that the table was written for, even if the table is damaged. It is larger than the
    /// image if that was cut short. `None` if there is no table, or if it was written for another sector size.
    pub described: Option<u64>,
    /// Whether the first sector is the boot sector of a volume, which may read as a table too. A kernel that reads
    /// tables makes nodes of its entries: they are not partitions, and the disk is one volume.
    pub is_volume: bool,
}

/// Reads the partition table for a device of the given logical block size.
///
/// # Errors
/// The image cannot be read, or the block size is no power of two from 512 to 65536.
pub fn read(image: &mut impl Image, block_size: u32) -> io::Result<Reading> {
    let mut disk = Disk::new(image, block_size)?;
    let Some(record) = BootRecord::read(&mut disk, 0)? else { return Ok(Reading::default()) };
    let mut warnings = Vec::new();
    let is_volume = record.protection() == Protection::Absent && record.is_boot_sector(&disk);
    let (mut table, mut described) = match record.protection() {
        Protection::Protective => (read_gpt(&mut disk, &record, &mut warnings)?, None),
        Protection::Misplaced => {
            warnings.push(Warning::MisplacedProtection);
            (None, None)
        }
        Protection::Absent => {
            if gpt::primary_is_sound(&mut disk)? {
                warnings.push(Warning::UnprotectedGpt);
            }
            if is_volume { (None, None) } else { dos::read(&mut disk, &record, &mut warnings)?.unzip() }
        }
    };
    // A table without entries fits an image of any size.
    described = described.filter(|end| *end != 0);
    if let Some(table) = &mut table {
        mark_refusals(&mut table.partitions, u64::from(block_size), &mut warnings);
    }
    let other = match table.as_ref().map(|table| table.kind) {
        Some(TableKind::Gpt) => None,
        Some(TableKind::Dos) => dos_sectors::other_size(&mut disk, &record, &SECTOR_SIZES)?,
        None => sector_size(image)?.filter(|written| *written != block_size),
    };
    if let Some(written) = other {
        let table = table.as_ref().map_or(TableKind::Gpt, |table| table.kind);
        warnings.push(Warning::OtherSectorSize { table, written, read: block_size });
        described = None;
    } else if record.protection() == Protection::Protective {
        described = gpt_size(image, block_size)?;
    }
    Ok(Reading { table, warnings, described, is_volume })
}

fn read_gpt(
    disk: &mut Disk<'_, impl Image>,
    record: &BootRecord,
    warnings: &mut Vec<Warning>,
) -> io::Result<Option<Table>> {
    let table = gpt::read(disk, warnings)?;
    if let Some(table) = &table {
        let starts_there = |first: u32| {
            let start = u64::from(first) * disk.block_size();
            table.partitions.iter().any(|partition| partition.start == start)
        };
        if !record.first_sectors().all(starts_there) {
            warnings.push(Warning::HybridMbr);
        }
    }
    Ok(table)
}

/// The size in bytes of the image that the GPT was written for. If it does not match the image, only the place of its
/// header shows its sector size.
fn gpt_size(image: &mut impl Image, block_size: u32) -> io::Result<Option<u64>> {
    for size in [block_size].into_iter().chain(SECTOR_SIZES) {
        let described = gpt::described_size(&mut Disk::new(image, size)?)?;
        if described.is_some() {
            return Ok(described);
        }
    }
    Ok(None)
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
    // A primary takes precedence over any backup: the end of the image may be older than its start.
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
