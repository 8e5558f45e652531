//! A partition table and its partitions.

/// The highest partition number of Linux (`DISK_MAX_PARTS` − 1, `include/linux/blkdev.h`).
pub const MAX_PARTITIONS: u32 = 255;

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
    /// GPT: the disk's GUID. DOS: the disk signature as eight hexadecimal digits, empty if it is
    /// zero. Lower case.
    pub uuid: String,
    /// Whether the primary GPT is damaged. The kernel's own scan makes no nodes then
    /// (`block/partitions/efi.c`, `find_valid_gpt`); BLKPG does.
    pub from_backup: bool,
    /// In ascending order of their numbers.
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
    /// of its node: 1 KiB, or one block if blocks are larger.
    pub size: u64,
    /// GPT: the type's GUID. DOS: as libblkid prints it, `0x83`. Lower case.
    pub kind: String,
    /// The name in `/dev/disk/by-partuuid`. GPT: the partition's GUID. DOS: `1a2b3c4d-01`, empty if
    /// the disk signature is zero. Lower case.
    pub uuid: String,
    /// GPT: the name, up to its first NUL. It may contain any other character. DOS: empty.
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

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
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
    /// `blkpg_do_ioctl`). Only an image that ends in the middle of a block has such partitions.
    Unaligned,
}
