//! Reads the partitions of a disk image from its bytes.
//!
//! Reads GPT and DOS partition tables, and lists the partitions that the kernel makes nodes for
//! when it scans the same bytes (`block/partitions/{core,efi,msdos}.c`), with the names that
//! libblkid gives them. The bytes are not trusted: every number in them is checked before it is
//! used, every read is within the image, and the size of reads, memory and results is bounded. A [`Warning`] names
//! what cannot be used.
//!
//! Differences from the kernel's scan (`tests/kernel.rs` compares the two; `tests/libblkid/differences.rs` has those from
//! libblkid):
//! - A damaged primary GPT is replaced by the backup, as libblkid does. The kernel does so only
//!   if booted with `gpt`; see [`Table::from_backup`].
//! - GPT entries that end before they start are left out. The kernel makes a node of absurd size.
//! - A chain of logical partitions ends at its first repetition. The kernel follows it until all
//!   numbers are used up.
//! - A GPT may have at most 8192 entries; the kernel takes about four times as many.
//! - Tables within DOS partitions (BSD, Solaris, Unixware), Windows' dynamic disks and the tables
//!   of other machines (SGI, AIX, Apple) are not read. The first two are named in a warning.
//! - A boot sector of FAT, exFAT, NTFS or `BitLocker` whose entries are not plausible is one volume, not a table. The
//!   kernel makes nodes of its entries; libblkid decides by the file system alone. See `dos`.
//!
//! Why no library: `gptman` 3.1.1 and `mbrman` 0.6.1 were tried. `gptman` aborts on a header that
//! claims 2³²−1 entries (it allocates 653 GB), panics on entry sizes other than 128 (release) and on
//! an entry array near 2⁶⁴ (debug), accepts headers that name another place or end past the
//! image, refuses headers longer than 92 bytes, and looks for the backup in the last sector only.
//! `mbrman` wraps around in release builds if a logical partition's start passes 2³², which gives
//! a wrong partition, loses all partitions when one link of the chain is bad or has an odd boot
//! flag, and follows chains without bound (98 MB for 200,000 links).

#![forbid(unsafe_code)]

mod boot_sector;
mod disk;
mod dos;
mod dos_sectors;
mod gpt;
mod image;
mod read;
mod table;
#[cfg(test)]
mod tests;
mod warning;

pub use image::Image;
pub use read::{Reading, read, sector_size};
pub use table::{MAX_PARTITIONS, Partition, Refusal, Table, TableKind};
pub use warning::{Fault, Warning};
