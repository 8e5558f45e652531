//! GUID partition tables (UEFI 2.10, section 5.3), checked as `block/partitions/efi.c` does.

use std::io;

use crc::{CRC_32_ISO_HDLC, Crc, Table as CrcTable};
use uuid::Uuid;

use crate::disk::{Disk, LONGEST_READ, bytes, u32_at, u64_at};
use crate::image::Image;
use crate::table::{MAX_PARTITIONS, Partition, Table, TableKind};
use crate::warning::{Fault, Warning};

static CRC: Crc<u32, CrcTable<16>> = Crc::<u32, CrcTable<16>>::new(&CRC_32_ISO_HDLC);

/// Where the primary header is (UEFI 5.3.2).
const PRIMARY: u64 = 1;
/// The size of the header's fields in bytes.
const HEADER_SIZE: u32 = 92;
/// The only entry size that the kernel and libblkid accept.
const ENTRY_SIZE: u32 = 128;
/// The limit of entries, 1 MiB: more than any tool writes.
const MAX_ENTRIES: u32 = 8192;

/// Why one copy of the table was not loaded.
enum Failure {
    Fault(Fault),
    Io(io::Error),
}

impl From<Fault> for Failure {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// One copy of the table, header and entries, both sound.
struct Gpt {
    header: Header,
    entries: Entries,
}

struct Header {
    alternate: u64,
    first_usable: u64,
    last_usable: u64,
    disk: Uuid,
    /// The first block of the entries.
    entries: u64,
    entry_count: u32,
    entry_size: u32,
    entries_checksum: u32,
}

/// The entries in use.
#[derive(Default)]
struct Entries {
    seen: u32,
    with_node: Vec<Entry>,
    /// Whether there are entries in use whose numbers no node can have.
    more: bool,
}

struct Entry {
    number: u32,
    kind: Uuid,
    uuid: Uuid,
    first: u64,
    last: u64,
    label: String,
}

/// Reads the table: the primary copy, or the backup if that is damaged.
pub fn read(disk: &mut Disk<'_, impl Image>, warnings: &mut Vec<Warning>) -> io::Result<Option<Table>> {
    let fault = match sound_at(disk, PRIMARY)? {
        Ok(primary) => {
            check_backup(disk, &primary.header, warnings)?;
            return Ok(Some(table(disk, primary, false, warnings)));
        }
        Err(fault) => fault,
    };
    warnings.push(Warning::PrimaryDamaged(fault));
    let backup = backup(disk, warnings)?;
    Ok(backup.map(|gpt| table(disk, gpt, true, warnings)))
}

/// The size in bytes of the disk that the primary header was written for; `None` if there is no header with
/// a sound checksum. If the image was cut short, the header does not match its size.
pub fn described_size(disk: &mut Disk<'_, impl Image>) -> io::Result<Option<u64>> {
    let Some(mut block) = disk.read_block(PRIMARY)? else { return Ok(None) };
    let Ok(header) = Header::parse(&mut block, PRIMARY) else { return Ok(None) };
    let blocks = header.alternate.max(header.last_usable).checked_add(1);
    let bytes = blocks.and_then(|blocks| blocks.checked_mul(disk.block_size()));
    // No disk is larger: the kernel's offsets are signed.
    Ok(bytes.filter(|bytes| i64::try_from(*bytes).is_ok()))
}

/// Whether the primary copy is sound for this block size.
pub fn primary_is_sound(disk: &mut Disk<'_, impl Image>) -> io::Result<bool> {
    Ok(sound_at(disk, PRIMARY)?.is_ok())
}

/// Whether there is a sound copy, the backup, in the last block of this size.
pub fn last_block_is_sound(disk: &mut Disk<'_, impl Image>) -> io::Result<bool> {
    let Some(last) = disk.last_block() else { return Ok(false) };
    Ok(sound_at(disk, last)?.is_ok())
}

/// The backup copy in place of a damaged primary: from the last block (UEFI 5.3.2), or from the block that
/// the primary names, which is right for an image that was enlarged. A damaged header may name it too, since the copy
/// there is checked like any other.
fn backup(disk: &mut Disk<'_, impl Image>, warnings: &mut Vec<Warning>) -> io::Result<Option<Gpt>> {
    let alternate = disk
        .read_block(PRIMARY)?
        .filter(|block| has_signature(block))
        .map(|block| u64_at(&block, 32))
        .filter(|alternate| Some(*alternate) != disk.last_block() && *alternate != PRIMARY);
    let mut fault = Fault::PastEnd;
    for block in disk.last_block().into_iter().chain(alternate) {
        match sound_at(disk, block)? {
            Ok(gpt) => {
                warnings.push(Warning::BackupUsed);
                return Ok(Some(gpt));
            }
            Err(found) => fault = fault.or(found),
        }
    }
    warnings.push(Warning::BackupDamaged(fault));
    Ok(None)
}

/// Warns of differences between the backup and a sound primary, as the kernel's `compare_gpts` does.
fn check_backup(
    disk: &mut Disk<'_, impl Image>,
    primary: &Header,
    warnings: &mut Vec<Warning>,
) -> io::Result<()> {
    match sound_at(disk, primary.alternate)? {
        Err(fault) => warnings.push(Warning::BackupDamaged(fault)),
        Ok(_) if Some(primary.alternate) != disk.last_block() => warnings.push(Warning::BackupMisplaced),
        Ok(backup) if !backup.header.describes_the_same(primary) => warnings.push(Warning::BackupDiffers),
        Ok(_) => {}
    }
    Ok(())
}

/// The copy in this block, or its fault.
fn sound_at(disk: &mut Disk<'_, impl Image>, block: u64) -> io::Result<Result<Gpt, Fault>> {
    match load(disk, block) {
        Ok(gpt) => Ok(Ok(gpt)),
        Err(Failure::Fault(fault)) => Ok(Err(fault)),
        Err(Failure::Io(error)) => Err(error),
    }
}

fn load(disk: &mut Disk<'_, impl Image>, block: u64) -> Result<Gpt, Failure> {
    let header = Header::read(disk, block)?;
    let entries = header.read_entries(disk)?;
    Ok(Gpt { header, entries })
}

fn has_signature(block: &[u8]) -> bool {
    block.starts_with(b"EFI PART")
}

impl Header {
    /// The checks of the kernel's `is_gpt_valid`, in its order.
    fn read(disk: &mut Disk<'_, impl Image>, number: u64) -> Result<Self, Failure> {
        let (Some(last), Some(mut block)) = (disk.last_block(), disk.read_block(number)?) else {
            return Err(Fault::PastEnd.into());
        };
        let header = Self::parse(&mut block, number)?;
        if header.last_usable > last || header.first_usable > header.last_usable {
            return Err(Fault::UsableRange.into());
        }
        if header.entry_size != ENTRY_SIZE {
            return Err(Fault::EntrySize(header.entry_size).into());
        }
        if !(1..=MAX_ENTRIES).contains(&header.entry_count) {
            return Err(Fault::EntryCount(header.entry_count).into());
        }
        Ok(header)
    }

    /// The header in this block, if it was written for this place. Its other fields are not checked against the disk.
    fn parse(block: &mut [u8], number: u64) -> Result<Self, Fault> {
        if !has_signature(block) {
            return Err(Fault::NoSignature);
        }
        check_header_checksum(block)?;
        if u64_at(block, 24) != number {
            return Err(Fault::Elsewhere);
        }
        Ok(Self {
            alternate: u64_at(block, 32),
            first_usable: u64_at(block, 40),
            last_usable: u64_at(block, 48),
            disk: Uuid::from_bytes_le(bytes(block, 56)),
            entries: u64_at(block, 72),
            entry_count: u32_at(block, 80),
            entry_size: u32_at(block, 84),
            entries_checksum: u32_at(block, 88),
        })
    }

    /// Reads the entries piece by piece, and checks their checksum.
    fn read_entries(&self, disk: &mut Disk<'_, impl Image>) -> Result<Entries, Failure> {
        if disk.last_block().is_none_or(|last| self.entries > last) {
            return Err(Fault::EntriesPastEnd.into());
        }
        let mut offset = self.entries * disk.block_size();
        let mut left = (self.entry_count * ENTRY_SIZE) as usize;
        let mut buffer = vec![0; left.min(LONGEST_READ)];
        let (mut entries, mut digest) = (Entries::default(), CRC.digest());
        while left > 0 {
            let length = left.min(LONGEST_READ);
            let piece = &mut buffer[..length];
            if !disk.read(offset, piece)? {
                return Err(Fault::EntriesPastEnd.into());
            }
            digest.update(piece);
            entries.collect(piece);
            offset += length as u64;
            left -= length;
        }
        if digest.finalize() != self.entries_checksum {
            return Err(Fault::EntriesChecksum.into());
        }
        Ok(entries)
    }

    fn describes_the_same(&self, other: &Self) -> bool {
        self.disk == other.disk
            && self.first_usable == other.first_usable
            && self.last_usable == other.last_usable
            && self.entry_count == other.entry_count
            && self.entries_checksum == other.entries_checksum
    }
}

/// Checks the header's size and, with the checksum's own field zeroed, its checksum.
fn check_header_checksum(block: &mut [u8]) -> Result<(), Fault> {
    let size = u32_at(block, 12);
    if size < HEADER_SIZE || size as usize > block.len() {
        return Err(Fault::HeaderSize(size));
    }
    let expected = u32_at(block, 16);
    block[16..20].fill(0);
    if CRC.checksum(&block[..size as usize]) != expected {
        return Err(Fault::HeaderChecksum);
    }
    Ok(())
}

impl Entries {
    fn collect(&mut self, piece: &[u8]) {
        for entry in piece.chunks_exact(ENTRY_SIZE as usize) {
            self.seen += 1;
            if entry[..16] == [0; 16] {
                continue;
            }
            if self.seen <= MAX_PARTITIONS {
                self.with_node.push(Entry::parse(self.seen, entry));
            } else {
                self.more = true;
            }
        }
    }
}

impl Entry {
    fn parse(number: u32, entry: &[u8]) -> Self {
        Self {
            number,
            kind: Uuid::from_bytes_le(bytes(entry, 0)),
            uuid: Uuid::from_bytes_le(bytes(entry, 16)),
            first: u64_at(entry, 32),
            last: u64_at(entry, 40),
            label: label(&entry[56..128]),
        }
    }

    /// The partition, if the kernel's `is_pte_valid` accepts the entry.
    fn partition(
        self,
        disk: &Disk<'_, impl Image>,
        header: &Header,
        warnings: &mut Vec<Warning>,
    ) -> Option<Partition> {
        let number = self.number;
        if disk.last_block().is_none_or(|last| self.first > last || self.last > last) {
            warnings.push(Warning::PastEnd { number });
            return None;
        }
        if self.last < self.first {
            warnings.push(Warning::EndsBeforeStart { number });
            return None;
        }
        if self.first < header.first_usable || self.last > header.last_usable {
            warnings.push(Warning::OutsideUsable { number });
        }
        Some(Partition {
            number,
            start: self.first * disk.block_size(),
            size: (self.last - self.first + 1) * disk.block_size(),
            kind: self.kind.to_string(),
            uuid: self.uuid.to_string(),
            label: self.label,
            refusal: None,
        })
    }
}

/// UTF-16LE up to the first NUL.
fn label(bytes: &[u8]) -> String {
    let units = bytes.chunks_exact(2).map(|unit| u16::from_le_bytes([unit[0], unit[1]]));
    char::decode_utf16(units.take_while(|unit| *unit != 0))
        .map(|char| char.unwrap_or(char::REPLACEMENT_CHARACTER))
        .collect()
}

fn table(disk: &Disk<'_, impl Image>, gpt: Gpt, from_backup: bool, warnings: &mut Vec<Warning>) -> Table {
    let Gpt { header, entries } = gpt;
    if entries.more {
        warnings.push(Warning::TooManyPartitions);
    }
    let partitions =
        entries.with_node.into_iter().filter_map(|entry| entry.partition(disk, &header, warnings)).collect();
    Table { kind: TableKind::Gpt, uuid: header.disk.to_string(), from_backup, partitions }
}
