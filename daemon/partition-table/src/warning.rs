//! Warnings about the partition table of an image, and their texts.

use std::fmt;

use crate::table::{MAX_PARTITIONS, TableKind};

/// Something about an image's partition table that its user may want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Warning {
    /// The primary GPT cannot be used.
    PrimaryDamaged(Fault),
    /// The backup GPT is used in place of the primary one.
    BackupUsed,
    /// The backup GPT cannot be used.
    BackupDamaged(Fault),
    /// The backup GPT is sound and not in the last block.
    BackupMisplaced,
    /// Both copies of the GPT are sound and differ.
    BackupDiffers,
    /// The table was written for another sector size than that of the device.
    OtherSectorSize {
        /// The kind of the table.
        table: TableKind,
        /// The size it was written for, in bytes.
        written: u32,
        /// The size it was read with, in bytes.
        read: u32,
    },
    /// The MBR's entry for the GPT does not start at sector 1.
    MisplacedProtection,
    /// There is a sound GPT, and the MBR has no entry for it.
    UnprotectedGpt,
    /// Other entries of the MBR than that for the GPT start where no GPT partition does.
    HybridMbr,
    /// Entries are in use whose numbers no node can have.
    TooManyPartitions,
    /// A partition ends (GPT) or starts (DOS) past the end of the image.
    PastEnd {
        /// The partition.
        number: u32,
    },
    /// A partition was cut off at the end of the image.
    Truncated {
        /// The partition.
        number: u32,
    },
    /// A partition's last sector comes before its first.
    EndsBeforeStart {
        /// The partition.
        number: u32,
    },
    /// A partition is partly outside the blocks that the GPT reserves for partitions.
    OutsideUsable {
        /// The partition.
        number: u32,
    },
    /// Two partitions share bytes; see `Partition::refusal`.
    Overlap {
        /// The partition that BLKPG refuses.
        number: u32,
        /// The partition that it overlaps.
        other: u32,
    },
    /// A partition is not made of whole blocks; see `Partition::refusal`.
    Unaligned {
        /// The partition.
        number: u32,
    },
    /// A partition may contain a partition table, which is not read.
    NestedTable {
        /// The partition.
        number: u32,
        /// The system that uses such tables.
        system: &'static str,
    },
    /// The chain of logical partitions contains a loop.
    ChainLoop,
    /// The chain of logical partitions leads to a sector that is no link.
    ChainBroken,
    /// The chain of logical partitions has too many links.
    ChainTooLong,
}

/// Why a copy of a GPT cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The image ends before it.
    PastEnd,
    /// It does not begin with `EFI PART`.
    NoSignature,
    /// The header claims this size in bytes.
    HeaderSize(u32),
    /// The header's checksum is wrong.
    HeaderChecksum,
    /// The header was written for another place.
    Elsewhere,
    /// The space for partitions ends before it starts, or past the image.
    UsableRange,
    /// The entries claim this size in bytes.
    EntrySize(u32),
    /// The header claims this many entries.
    EntryCount(u32),
    /// The entries lie past the end of the image.
    EntriesPastEnd,
    /// The entries' checksum is wrong.
    EntriesChecksum,
}

impl Fault {
    /// The more specific one of the two: a copy that is missing has no other fault.
    #[must_use]
    pub(super) fn or(self, other: Self) -> Self {
        if matches!(self, Self::PastEnd | Self::NoSignature) { other } else { self }
    }
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PrimaryDamaged(fault) => write!(f, "the primary GPT cannot be used: {fault}"),
            Self::BackupUsed => {
                f.write_str("the backup GPT is read instead, which the kernel's own scan does not do")
            }
            Self::BackupDamaged(fault) => write!(f, "the backup GPT cannot be used: {fault}"),
            Self::BackupMisplaced => f.write_str(
                "the backup GPT is not at the end of the image: the image was made larger or smaller",
            ),
            Self::BackupDiffers => f.write_str("the primary and the backup GPT differ"),
            Self::OtherSectorSize { table, written, read } => {
                let table = match table {
                    TableKind::Gpt => "GPT",
                    TableKind::Dos => "DOS partition table",
                };
                write!(
                    f,
                    "the {table} counts sectors of {written} bytes and the device has {read}: the right block size \
                     is {written}"
                )
            }
            Self::MisplacedProtection => f.write_str(
                "the MBR's entry for the GPT does not start at sector 1: the kernel does not read the GPT",
            ),
            Self::UnprotectedGpt => {
                f.write_str("there is a GPT that the MBR does not mention: the kernel does not read it")
            }
            Self::HybridMbr => f.write_str(
                "the MBR has further partitions beside its entry for the GPT, which are ignored in favour of the GPT",
            ),
            Self::TooManyPartitions => {
                write!(f, "partitions above number {MAX_PARTITIONS} cannot have a node")
            }
            Self::PastEnd { number } => {
                write!(f, "partition {number} is left out: it lies past the end of the image")
            }
            Self::Truncated { number } => write!(f, "partition {number} is cut off by the end of the image"),
            Self::EndsBeforeStart { number } => {
                write!(f, "partition {number} is left out: it ends before it starts")
            }
            Self::OutsideUsable { number } => {
                write!(f, "partition {number} reaches into what the GPT keeps for itself")
            }
            Self::Overlap { number, other } => write!(
                f,
                "partition {number} overlaps partition {other}: only the kernel's own scan makes a node of it"
            ),
            Self::Unaligned { number } => write!(
                f,
                "partition {number} is not made of whole blocks: only the kernel's own scan makes a node of it"
            ),
            Self::NestedTable { number, system } => {
                write!(f, "partition {number} may hold partitions of {system}, which are not listed")
            }
            Self::ChainLoop => f.write_str("the chain of logical partitions runs in a circle"),
            Self::ChainBroken => {
                f.write_str("the chain of logical partitions is broken: what followed is left out")
            }
            Self::ChainTooLong => {
                f.write_str("the chain of logical partitions is too long: what followed is left out")
            }
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PastEnd => f.write_str("the image ends before it"),
            Self::NoSignature => f.write_str("there is none"),
            Self::HeaderSize(size) => write!(f, "its header claims a size of {size} bytes"),
            Self::HeaderChecksum => f.write_str("its header's checksum is wrong"),
            Self::Elsewhere => f.write_str("its header was written for another place"),
            Self::UsableRange => f.write_str("its space for partitions is none, or ends past the image"),
            Self::EntrySize(size) => write!(f, "its entries have {size} bytes, and only 128 are read"),
            Self::EntryCount(count) => write!(f, "it claims {count} entries"),
            Self::EntriesPastEnd => f.write_str("its entries lie past the end of the image"),
            Self::EntriesChecksum => f.write_str("its entries' checksum is wrong"),
        }
    }
}
