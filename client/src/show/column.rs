//! The columns of `loopctl list`.

use clap::ValueEnum;

/// The columns that are shown by default.
pub const DEFAULT: &str = "DEVICE,SIZE,RO,TYPE,LABEL,MOUNTPOINTS,STATE,FILESTATE,FILE";

/// A column of `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum Column {
    /// Device node
    Device,
    /// N of /dev/loopN, or the partition's number
    Number,
    /// Size of the device or partition
    Size,
    /// Whether the device is read-only
    Ro,
    /// Type of the file system
    Type,
    /// Version of the file system
    Version,
    /// Label of the file system
    Label,
    /// UUID of the file system
    Uuid,
    /// Mount points of the device or partition
    Mountpoints,
    /// Offset of the partition on its device, in bytes
    Start,
    /// Type of the partition table: gpt, dos
    Pttype,
    /// Type of the partition: a GUID, or a number such as 0x83
    Parttype,
    /// Name of the partition in the partition table
    Partlabel,
    /// UUID of the partition in the partition table
    Partuuid,
    /// When the device is detached automatically; - if loopd did not attach it
    Lifetime,
    /// attached, or detaching: detached at the last close
    State,
    /// present, deleted, or replaced: another file has the path of the backing file; - if unknown
    Filestate,
    /// Backing file, or the path that it had
    File,
    /// Inode of the backing file
    Inode,
    /// Offset of the device in the backing file, in bytes
    Offset,
    /// Maximum number of bytes of the backing file; 0 is up to its end
    Sizelimit,
    /// Logical block size in bytes
    Blocksize,
    /// Whether direct I/O bypasses the page cache of the backing file
    Dio,
    /// Whether the kernel scans for partitions
    Partscan,
    /// Whether the kernel detaches the device at the last close
    Autoclear,
    /// Reference
    Ref,
    /// Whether loopd attached the device
    Managed,
    /// uid of the user who attached the device
    Owner,
    /// When it was attached
    Since,
    /// Disk sequence
    Diskseq,
}
