//! Bytes of an image in, partitions out.
//!
//! Reads GPT and DOS partition tables, and lists the partitions that the kernel makes nodes for
//! when it scans the same bytes (`block/partitions/{core,efi,msdos}.c`), with the names that
//! libblkid gives them. The bytes come from strangers: every number in them is checked before it is
//! used, every read lies within the image, and what is read, allocated and returned is bounded. What
//! cannot be used is named in a [`Warning`].
//!
//! Where this differs from the kernel's scan (`tests/kernel.rs` compares the two):
//! - A damaged primary GPT is replaced by the backup, as libblkid does. The kernel does so only
//!   when booted with `gpt`; see [`Table::from_backup`].
//! - GPT entries that end before they start are left out. The kernel makes a node of absurd size.
//! - A chain of logical partitions ends where it comes back to itself. The kernel goes round until
//!   all numbers are used up.
//! - A GPT may have at most 8192 entries; the kernel takes about four times as many.
//! - Tables within DOS partitions (BSD, Solaris, Unixware), Windows' dynamic disks and the tables
//!   of other machines (SGI, AIX, Apple) are not read. The first two are named in a warning.
//!
//! Why no library: `gptman` 3.1.1 and `mbrman` 0.6.1 were tried. `gptman` aborts on a header that
//! claims 2³²−1 entries (it allocates 653 GB), panics on entry sizes other than 128 (release) and on
//! an entry array near 2⁶⁴ (debug), takes headers that lie elsewhere than they say or end past the
//! image, refuses headers longer than 92 bytes, and looks for the backup in the last sector only.
//! `mbrman` wraps around in release builds where a logical partition's start passes 2³², which gives
//! a wrong partition, loses all partitions when one link of the chain is bad or has an odd boot
//! flag, and follows chains without bound (98 MB for 200,000 links).

#![forbid(unsafe_code)]

use std::io;

mod disk;
mod dos;
mod gpt;
#[cfg(test)]
mod tests;
mod warning;

pub use warning::{Fault, Warning};

use disk::Disk;
use dos::{BootRecord, Protection};

/// The highest partition number of Linux (`DISK_MAX_PARTS` − 1, `include/linux/blkdev.h`).
pub const MAX_PARTITIONS: u32 = 255;

/// Sector sizes that a GPT is looked for in.
const SECTOR_SIZES: [u32; 4] = [512, 1024, 2048, 4096];

/// The bytes of a disk image: of what a device shows, that is, from the attachment's offset up to
/// its size limit.
pub trait Image {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer, of at most 64 KiB, with the bytes from `offset` on. Is never asked for
    /// bytes past [`Image::size`].
    ///
    /// # Errors
    /// The bytes cannot be read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// What was found in an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reading {
    /// The partition table; `None` where there is none, or none that is sound.
    pub table: Option<Table>,
    /// What was not used, and what is unusual about the rest.
    pub warnings: Vec<Warning>,
}

/// Kinds of partition tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableKind {
    /// GUID partition table.
    Gpt,
    /// Master boot record.
    Dos,
}

/// The name that libblkid and the D-Bus property `Table` have for it.
impl std::fmt::Display for TableKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Gpt => "gpt",
            Self::Dos => "dos",
        })
    }
}

/// A partition table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Table {
    /// GPT or DOS.
    pub kind: TableKind,
    /// GPT: the disk's GUID. DOS: the disk signature as eight hexadecimal digits, empty where it is
    /// zero. Lower case.
    pub uuid: String,
    /// Whether the primary GPT is damaged. The kernel's own scan makes no nodes then
    /// (`block/partitions/efi.c`, `find_valid_gpt`); BLKPG does.
    pub from_backup: bool,
    /// By number, rising.
    pub partitions: Vec<Partition>,
}

/// A partition that the kernel makes a node for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// 1 to [`MAX_PARTITIONS`].
    pub number: u32,
    /// First byte.
    pub start: u64,
    /// Bytes; never zero, never past the end of the image. An extended DOS partition has the size
    /// of its node: 1 KiB, or one block where blocks are larger.
    pub size: u64,
    /// GPT: the type's GUID. DOS: as libblkid prints it, `0x83`. Lower case.
    pub kind: String,
    /// What `/dev/disk/by-partuuid` has. GPT: the partition's GUID. DOS: `1a2b3c4d-01`, empty where
    /// the disk signature is zero. Lower case.
    pub uuid: String,
    /// GPT: the name, up to its first NUL. It may hold any other character. DOS: empty.
    pub label: String,
    /// Why BLKPG refuses this partition when all are added in the order of their numbers. The
    /// kernel's own scan makes a node nevertheless.
    pub refusal: Option<Refusal>,
}

impl Partition {
    /// The first byte after it.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.start + self.size
    }

    fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end() && other.start < self.end()
    }
}

/// Why `BLKPG_ADD_PARTITION` refuses a partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// EBUSY: it shares bytes with the partition of this number (`block/partitions/core.c`,
    /// `bdev_add_partition`).
    Overlaps(u32),
    /// EINVAL: its start or its size is no multiple of the block size (`block/ioctl.c`,
    /// `blkpg_do_ioctl`). Only an image that ends in the midst of a block has such partitions.
    Unaligned,
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
/// size to show the partitions. `None` where there is no sound GPT behind a protective MBR.
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

/// Plays what BLKPG does when the partitions are added one after the other.
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
