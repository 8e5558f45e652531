//! DOS partition tables (master boot records), read as `block/partitions/msdos.c` does.
//!
//! The boot sector of a FAT, exFAT, NTFS or `BitLocker` volume has the same signature, and may have entries: `mkfs.fat`
//! writes one that starts at sector 0 and covers the disk (`--mbr`). The kernel reads any such entries as partitions;
//! libblkid reads none in a boot sector of FAT, and in newer versions none in one of NTFS or exFAT. Here the sector is a
//! table if its entries are plausible: at least one is in use, and each of them has a type, starts behind the sector, ends
//! within the disk and overlaps no other. Otherwise the disk is one volume. A plausible table is newer than the volume:
//! formatting replaces the whole sector, while sfdisk keeps the other bytes of a sector that reads as an empty table.

use std::io;

use crate::boot_sector;
use crate::disk::{Disk, u32_at};
use crate::image::Image;
use crate::table::{MAX_PARTITIONS, Partition, Table, TableKind};
use crate::warning::Warning;

/// The type of the entry that protects a GPT (UEFI 5.2.3).
const PROTECTIVE: u8 = 0xee;
/// The number of the first logical partition.
const FIRST_LOGICAL: u32 = 5;
/// How the disks of AIX start: `IBMA` in EBCDIC.
const AIX: [u8; 4] = [0xc9, 0xc2, 0xd4, 0xc1];
/// The offset in bytes where such a disk is marked as one with logical volumes.
const AIX_DESCRIPTOR: u64 = 7 * 512;
/// The limit of consecutive links without a partition, as in the kernel's `parse_extended`.
const MAX_EMPTY_LINKS: u32 = 100;
/// The limit of all links; the kernel has none.
const MAX_LINKS: usize = 512;

/// A boot record: the first sector of a disk, or a link of the chain of logical partitions.
pub struct BootRecord([u8; 512]);

/// The entry of a boot record for a GPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// There is none.
    Absent,
    /// A GPT follows the boot record.
    Protective,
    /// It names a place where the kernel does not look for a GPT.
    Misplaced,
}

#[derive(Clone, Copy)]
struct Entry {
    flag: u8,
    kind: u8,
    first: u32,
    sectors: u32,
}

impl Entry {
    fn parse(bytes: &[u8]) -> Self {
        Self { flag: bytes[0], kind: bytes[4], first: u32_at(bytes, 8), sectors: u32_at(bytes, 12) }
    }

    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }

    fn holds_partition(self) -> bool {
        self.sectors != 0 && !self.is_extended()
    }

    fn is_link(self) -> bool {
        self.sectors != 0 && self.is_extended()
    }

    /// The system whose tables the kernel also reads in partitions of this type. Solaris' old type is
    /// left out: it is Linux' swap.
    fn nested_system(self) -> Option<&'static str> {
        match self.kind {
            0x42 => Some("a Windows dynamic disk"),
            0x63 => Some("Unixware"),
            0xa5 => Some("FreeBSD"),
            0xa6 => Some("OpenBSD"),
            0xa9 => Some("NetBSD"),
            0xbf => Some("Solaris"),
            _ => None,
        }
    }
}

impl BootRecord {
    /// Reads the sector at a byte offset; `None` if the image ends before it.
    pub fn read(disk: &mut Disk<'_, impl Image>, offset: u64) -> io::Result<Option<Self>> {
        let mut sector = [0; 512];
        Ok(disk.read(offset, &mut sector)?.then_some(Self(sector)))
    }

    /// The kernel's `is_pmbr_valid` (`block/partitions/efi.c`). There may be other entries, as in a hybrid MBR.
    pub fn protection(&self) -> Protection {
        let mut protective = self.entries().into_iter().filter(|entry| entry.kind == PROTECTIVE).peekable();
        if !self.is_signed() || protective.peek().is_none() {
            Protection::Absent
        } else if protective.any(|entry| entry.first == 1) {
            Protection::Protective
        } else {
            Protection::Misplaced
        }
    }

    /// The first sectors of the entries in use, apart from those for a GPT.
    pub fn first_sectors(&self) -> impl Iterator<Item = u32> {
        // xorriso adds an entry without a type, which some firmware needs.
        let in_use = |entry: &Entry| entry.sectors != 0 && !matches!(entry.kind, 0 | PROTECTIVE);
        self.entries().into_iter().filter(in_use).map(|entry| entry.first)
    }

    pub fn is_signed(&self) -> bool {
        self.0[510..] == [0x55, 0xaa]
    }

    fn entries(&self) -> [Entry; 4] {
        [446, 462, 478, 494].map(|offset| Entry::parse(&self.0[offset..offset + 16]))
    }

    /// Whether the kernel reads this as a table. The boot sector of a file system may have the same signature, but most
    /// likely has code in place of the entries' flags.
    fn is_table(&self) -> bool {
        self.is_signed() && self.entries().iter().all(|entry| matches!(entry.flag, 0 | 0x80))
    }

    /// Whether this is the boot sector of a volume, and no table; see [the module](self).
    pub fn is_boot_sector(&self, disk: &Disk<'_, impl Image>) -> bool {
        self.is_signed() && boot_sector::is_of_volume(&self.0) && !self.is_plausible_table(disk)
    }

    /// Whether there are partitions, and each has a type, is behind this sector and within the disk, and overlaps no other.
    fn is_plausible_table(&self, disk: &Disk<'_, impl Image>) -> bool {
        let mut extents: Vec<Extent> = Vec::new();
        for entry in self.entries().into_iter().filter(|entry| entry.sectors != 0) {
            let extent = Extent::of(disk, 0, entry);
            let is_apart =
                extents.iter().all(|other| extent.end() <= other.start || other.end() <= extent.start);
            if entry.kind == 0 || entry.first == 0 || extent.end() > disk.size() || !is_apart {
                return false;
            }
            extents.push(extent);
        }
        !extents.is_empty() && self.is_table()
    }

    /// Whether the disk is one of AIX, which has no DOS partitions: the kernel's `aix_magic_present`.
    fn is_aix(&self, disk: &mut Disk<'_, impl Image>) -> io::Result<bool> {
        let is_of_linux =
            |entry: &Entry| entry.is_extended() || matches!(entry.kind, 0x82 | 0x83 | 0x8e | 0xfd);
        if self.0[..4] != AIX || self.entries().iter().any(is_of_linux) {
            return Ok(false);
        }
        let mut descriptor = [0; 4];
        Ok(disk.read(AIX_DESCRIPTOR, &mut descriptor)? && descriptor == *b"_LVM")
    }

    fn disk_signature(&self) -> u32 {
        u32_at(&self.0, 440)
    }
}

/// Reads the table in this boot record.
///
/// Returns the table and the end in bytes of the last partition, as written, which may lie past the image.
pub fn read(
    disk: &mut Disk<'_, impl Image>,
    record: &BootRecord,
    warnings: &mut Vec<Warning>,
) -> io::Result<Option<(Table, u64)>> {
    if !record.is_table() || record.is_aix(disk)? {
        return Ok(None);
    }
    let mut reader = Reader {
        disk,
        signature: record.disk_signature(),
        next: FIRST_LOGICAL,
        // An extended partition from sector 0 on leads back to this record.
        visited: vec![0],
        end: 0,
        partitions: Vec::new(),
        warnings: Vec::new(),
    };
    reader.read_primaries(record)?;
    let Reader { signature, end, mut partitions, warnings: found, .. } = reader;
    warnings.extend(found);
    partitions.sort_by_key(|partition| partition.number);
    let uuid = if signature == 0 { String::new() } else { format!("{signature:08x}") };
    Ok(Some((Table { kind: TableKind::Dos, uuid, from_backup: false, partitions }, end)))
}

struct Reader<'a, 'b, I> {
    disk: &'a mut Disk<'b, I>,
    signature: u32,
    /// The number of the next logical partition.
    next: u32,
    /// Byte offsets of the boot record and of the links of all chains.
    visited: Vec<u64>,
    /// The end of the last partition in bytes.
    end: u64,
    partitions: Vec<Partition>,
    warnings: Vec<Warning>,
}

/// A range of the disk in bytes.
#[derive(Clone, Copy)]
struct Extent {
    start: u64,
    size: u64,
}

impl Extent {
    /// Sectors are as large as the device's blocks. Nothing overflows: 2³² sectors of 64 KiB.
    fn of(disk: &Disk<'_, impl Image>, base: u64, entry: Entry) -> Self {
        let block_size = disk.block_size();
        Self {
            start: base + u64::from(entry.first) * block_size,
            size: u64::from(entry.sectors) * block_size,
        }
    }

    fn end(self) -> u64 {
        self.start + self.size
    }
}

impl<I: Image> Reader<'_, '_, I> {
    fn read_primaries(&mut self, record: &BootRecord) -> io::Result<()> {
        for (number, entry) in (1..).zip(record.entries()) {
            if entry.sectors == 0 {
                continue;
            }
            let mut extent = Extent::of(self.disk, 0, entry);
            self.end = self.end.max(extent.end());
            if entry.is_extended() {
                self.follow_chain(extent)?;
                // Enough for a boot loader, and too small to make a file system there by mistake.
                extent.size = extent.size.min(self.disk.block_size().max(1024));
            }
            self.add(number, entry, extent);
        }
        Ok(())
    }

    /// Reads the logical partitions of an extended one: a chain of boot records that hold one
    /// partition each, relative to the link, and the next link, relative to the extended partition.
    fn follow_chain(&mut self, extended: Extent) -> io::Result<()> {
        let (mut link, mut empty_links) = (extended, 0);
        while self.next <= MAX_PARTITIONS {
            if self.visited.contains(&link.start) {
                self.warnings.push(Warning::ChainLoop);
                return Ok(());
            }
            if empty_links == MAX_EMPTY_LINKS || self.visited.len() > MAX_LINKS {
                self.warnings.push(Warning::ChainTooLong);
                return Ok(());
            }
            self.visited.push(link.start);
            let Some(record) = BootRecord::read(self.disk, link.start)?.filter(BootRecord::is_signed) else {
                // An empty extended partition needs no link.
                if link.start != extended.start {
                    self.warnings.push(Warning::ChainBroken);
                }
                return Ok(());
            };
            empty_links = if self.add_logicals(&record, link, extended) { 0 } else { empty_links + 1 };
            let Some(next) = record.entries().into_iter().find(|entry| entry.is_link()) else {
                return Ok(());
            };
            link = Extent::of(self.disk, extended.start, next);
        }
        self.warnings.push(Warning::TooManyPartitions);
        Ok(())
    }

    /// Adds the partitions of a link; returns whether there are any. A partition that is left out
    /// has a number too.
    fn add_logicals(&mut self, record: &BootRecord, link: Extent, extended: Extent) -> bool {
        let mut found = false;
        for (index, entry) in record.entries().into_iter().enumerate() {
            if !entry.holds_partition() || self.next > MAX_PARTITIONS {
                continue;
            }
            let extent = Extent::of(self.disk, link.start, entry);
            // The third and the fourth entry are sometimes garbage.
            if index >= 2 && (extent.end() > link.end() || extent.end() > extended.end()) {
                continue;
            }
            self.add(self.next, entry, extent);
            self.next += 1;
            found = true;
        }
        found
    }

    /// Adds the part within the disk, as `blk_add_partition` of `block/partitions/core.c`.
    fn add(&mut self, number: u32, entry: Entry, extent: Extent) {
        self.end = self.end.max(extent.end());
        let end = extent.end().min(self.disk.size());
        if extent.start >= end {
            self.warnings.push(Warning::PastEnd { number });
            return;
        }
        if end < extent.end() {
            self.warnings.push(Warning::Truncated { number });
        }
        if let Some(system) = entry.nested_system() {
            self.warnings.push(Warning::NestedTable { number, system });
        }
        let signature = self.signature;
        self.partitions.push(Partition {
            number,
            start: extent.start,
            size: end - extent.start,
            kind: format!("{:#x}", entry.kind),
            uuid: if signature == 0 { String::new() } else { format!("{signature:08x}-{number:02x}") },
            label: String::new(),
            refusal: None,
        });
    }
}
