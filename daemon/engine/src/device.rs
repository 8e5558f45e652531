//! Loop devices, and the files that are attached to them.

use std::fmt;
use std::path::PathBuf;

use loopd_common::busy::CLAIMED;
use loopd_common::text::printable;

/// The kernel's disk sequence number, never used twice until the next boot (Linux 5.15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSequence(pub u64);

impl fmt::Display for DiskSequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The kind of a file that can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// The properties of a file before it is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Regular file or block device.
    pub kind: FileKind,
    /// The path as the kernel shows it: bytes, for display only.
    pub path: Vec<u8>,
    /// Which file it is.
    pub identity: FileIdentity,
    /// Whether the descriptor allows writing.
    pub writable: bool,
    /// Whether every write goes to the end of the file.
    pub appends: bool,
    /// Whether root owns the file, and nobody else may write to it.
    pub only_root_writes: bool,
}

/// Which file it is, whatever its path.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileIdentity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// A loop device that a file is attached to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Device {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// Identity of this attach.
    pub disk_sequence: DiskSequence,
    /// Path of the backing file as sysfs shows it: bytes, for display only.
    pub backing_file: Vec<u8>,
    /// `st_dev` of the backing file.
    pub backing_device: u64,
    /// `st_ino` of the backing file.
    pub backing_inode: u64,
    /// Major and minor number of the backing file if it is a block device.
    pub backing_block_device: Option<(u32, u32)>,
    /// Where the device starts in the file, in bytes.
    pub offset: u64,
    /// The size limit in bytes; 0 is the end of the file.
    pub size_limit: u64,
    /// Size of the device in bytes.
    pub size: u64,
    /// The reference in the kernel's `lo_file_name`, at most 63 bytes.
    pub reference: String,
    /// The mark of the attach; 0 is none.
    pub mark: u64,
    /// Whether writing is impossible.
    pub read_only: bool,
    /// Whether the page cache of the backing file is bypassed.
    pub direct_io: bool,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// `LO_FLAGS_PARTSCAN`.
    pub partition_scan: bool,
    /// `LO_FLAGS_AUTOCLEAR`.
    pub autoclear: bool,
}

impl Device {
    /// Which file is attached.
    #[must_use]
    pub fn file(&self) -> FileIdentity {
        FileIdentity { device: self.backing_device, inode: self.backing_inode }
    }

    /// Whether this is the backing file.
    #[must_use]
    pub fn shows(&self, file: FileIdentity) -> bool {
        self.file() == file
    }

    /// The device node.
    #[must_use]
    pub fn node(&self) -> String {
        node(self.number)
    }

    /// The node and the backing file, for messages.
    #[must_use]
    pub fn shown(&self) -> String {
        format!("{} ({})", self.node(), printable(&self.backing_file))
    }

    /// The node of a partition.
    #[must_use]
    pub fn partition_node(&self, partition: u32) -> String {
        partition_node(self.number, partition)
    }
}

/// The node of a partition of a loop device.
#[must_use]
pub fn partition_node(number: u32, partition: u32) -> String {
    format!("/dev/loop{number}p{partition}")
}

/// The device node of a loop device.
#[must_use]
pub fn node(number: u32) -> String {
    format!("/dev/loop{number}")
}

/// A change of an attached device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Updates the size from the file.
    Capacity,
    /// Switches direct I/O on or off: whether the page cache of the backing file is bypassed.
    DirectIo(bool),
    /// Sets the logical block size, in bytes: a power of two from 512 to 65536.
    BlockSize(u32),
    /// Sets whether the device is detached at its last close. Setting it fails on some kernels while the device
    /// is mounted.
    Autoclear(bool),
}

/// The users of a device, as far as the kernel shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Where the device or a partition of it is mounted.
    pub mount_points: Vec<PathBuf>,
    /// The cleartexts of the device and of its partitions: words for a message.
    pub cleartexts: Vec<String>,
    /// Block devices built on it, swap, further loop devices: words for a message.
    pub holders: Vec<String>,
    /// Set if somebody has claimed the device or a partition of it, and nothing above explains that.
    pub claim: Option<Claim>,
}

/// An exclusive claim of a device by somebody unknown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// The nodes on which udev has found a swap area.
    pub swap_areas: Vec<String>,
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let on = if self.swap_areas.is_empty() { "" } else { " on " };
        write!(
            f,
            "{CLAIMED} swap{on}{}, by a file system that is unmounted lazily or mounted in another mount namespace, or \
             by another program",
            self.swap_areas.join(", ")
        )
    }
}

impl Users {
    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        let is_listed =
            !(self.mount_points.is_empty() && self.cleartexts.is_empty() && self.holders.is_empty());
        !is_listed && self.claim.is_none()
    }
}

/// The nodes of the devices that have a btrfs with the same UUID.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BtrfsDevices {
    /// The devices of the mounted file system.
    pub mounted: Vec<String>,
    /// All devices in udev's database.
    pub present: Vec<String>,
}

/// The state of a number at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The disk sequence of the device, if a file is attached.
    pub bound: Option<DiskSequence>,
    /// Whether an attach of this daemon is in progress on the number.
    pub claimed: bool,
}
