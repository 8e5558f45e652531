//! The kernel as the engine sees it.

use std::collections::HashSet;
use std::ops::Range;
use std::path::PathBuf;

use loopd_common::Error;

use crate::AttachRequest;
use crate::mount_table::MountTable;

/// The kernel's disk sequence number: never used twice while the machine is up (Linux 5.15).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DiskSequence(pub u64);

impl std::fmt::Display for DiskSequence {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// What kind of file stands behind a descriptor that can be attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// What is known of a file before it is attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileFacts {
    /// Regular file or block device.
    pub kind: FileKind,
    /// The path as the kernel tells it: bytes, for display only.
    pub path: Vec<u8>,
    /// Which file it is.
    pub identity: FileIdentity,
    /// Whether the descriptor allows writing.
    pub writable: bool,
    /// Whether every write goes to the end of the file.
    pub appends: bool,
    /// Whether the file is root's, and nobody else may write to it.
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

/// A loop device with something attached.
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
    /// Bytes into the file.
    pub offset: u64,
    /// Bytes at most; 0 is up to the end of the file.
    pub size_limit: u64,
    /// Size of the device in bytes.
    pub size: u64,
    /// The kernel's `lo_file_name`, at most 63 bytes.
    pub reference: String,
    /// What its attach has marked it with; 0 for nothing.
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
    /// Which file it is attached to.
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

/// What udev found on a volume; empty strings where it found nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileSystem {
    /// `ID_FS_USAGE`: `filesystem`, `crypto`, `raid`, `other`.
    pub usage: String,
    /// `ID_FS_TYPE`.
    pub kind: String,
    /// `ID_FS_VERSION`.
    pub version: String,
    /// `ID_FS_LABEL_ENC`, decoded.
    pub label: String,
    /// `ID_FS_UUID`.
    pub uuid: String,
}

/// What udev found on a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeResult {
    /// The file system.
    pub file_system: FileSystem,
    /// The entry of a partition in its table.
    pub entry: TableEntry,
    /// Where udev saw a partition begin, in bytes; `None` where it does not tell.
    pub start: Option<u64>,
    /// Whether the device has a partition table.
    pub has_table: bool,
}

impl ProbeResult {
    /// Whether udev found nothing at all, not even a partition's entry in its table: so it says of
    /// one that went while it was probed.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.file_system == FileSystem::default() && self.entry == TableEntry::default()
    }
}

/// A partition's node, as sysfs shows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PartitionNode {
    /// N of `/dev/loop0pN`.
    pub number: u32,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// Bytes into the device.
    pub start: u64,
    /// Bytes.
    pub size: u64,
}

/// What the partition table says of a partition; empty where that is not known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TableEntry {
    /// `gpt`, `dos`, or what libblkid calls it.
    pub table: String,
    /// The type: a GUID, or `0x83`.
    pub kind: String,
    /// The partition's UUID.
    pub uuid: String,
    /// The partition's name.
    pub label: String,
}

/// A partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partition {
    /// Its node.
    pub node: PartitionNode,
    /// Its entry in the table.
    pub entry: TableEntry,
}

/// The partitions of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Partitioning {
    /// Those that have nodes, by number.
    pub partitions: Vec<Partition>,
    /// Whether there are more, whose nodes are still to be made.
    pub missing: bool,
    /// Whether there are more, and making their nodes was not allowed.
    pub unmade: bool,
    /// Whether the kernel, which reads tables itself, has other partitions than the table.
    pub outdated: bool,
    /// Whether udev was asked to have the table read again: its event for the device follows.
    pub udev_rereads: bool,
}

/// Why a device's partitions are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScanReason {
    /// Nodes may have to be made or deleted.
    Changed,
    /// Someone wants the table to be read again.
    Rescan,
    /// It is not for us to make its nodes.
    Foreign,
}

/// A device just attached.
pub struct Attached<K: Kernel + ?Sized> {
    /// The device.
    pub device: Device,
    /// Keeps an autoclear device alive: the device goes when this is released. `None` for a
    /// device that lives until it is cleared.
    pub hold: Option<K::Hold>,
    /// Its partitions, where the request wants them: those that the kernel made, and whether more
    /// are to be made.
    pub partitioning: Partitioning,
    /// While it lives, [`Kernel::peek`] says so.
    pub claim: K::Claim,
    /// Whether the device node was made for this attach.
    pub node_made: bool,
}

/// What can be changed of an attached device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// The size is taken from the file anew.
    Capacity,
    /// The page cache of the backing file is bypassed, or not.
    DirectIo(bool),
    /// The logical block size, in bytes: a power of two from 512 to 65536.
    BlockSize(u32),
    /// Whether the device goes at its last close. Setting it fails on some kernels while the device
    /// is mounted.
    Autoclear(bool),
}

/// Who uses a device, as far as the kernel tells.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Where the device or a partition of it is mounted.
    pub mount_points: Vec<PathBuf>,
    /// Block devices built on it, swap, further loop devices: words for a message.
    pub holders: Vec<String>,
}

impl Users {
    /// Whether nobody was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.mount_points.is_empty() && self.holders.is_empty()
    }
}

/// Where a btrfs with a UUID is found; nodes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BtrfsDevices {
    /// The devices of the mounted one.
    pub mounted: Vec<String>,
    /// All that udev knows of.
    pub present: Vec<String>,
}

/// A number at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Binding {
    /// The disk sequence of what is attached.
    pub bound: Option<DiskSequence>,
    /// Whether an attach of ours is under way on it.
    pub claimed: bool,
}

/// The kernel: loop devices, sysfs, mounts.
///
/// Every method but [`Kernel::peek`] may block for as long as the backing file's file system
/// does, and so is a future. Dropping the future does not undo what it began: the engine sees each
/// to its end.
pub trait Kernel: Send + Sync + 'static {
    /// A descriptor that a client handed over.
    type File: Send + Sync + 'static;
    /// A read-only descriptor of a loop device; it outlives the daemon where a service manager keeps a
    /// copy.
    type Hold: Send + 'static;
    /// A number that an attach is working on.
    type Claim: Send + 'static;
    /// Exclusive claims on block devices: while they live nobody can mount those.
    type Claims: Send + 'static;

    /// ScanQueue at a file. Fails with `InvalidBackingFile` where it can never be attached.
    fn examine(&self, file: &Self::File) -> impl Future<Output = Result<FileFacts, Error>> + Send;

    /// Attaches the file to a free device, or to the one that the request names. After an error
    /// nothing is attached and no node is left that was not there.
    fn attach(
        &self,
        file: Self::File,
        request: &AttachRequest,
    ) -> impl Future<Output = Result<Attached<Self>, Error>> + Send;

    /// Closes a hold: an autoclear device goes with its last user.
    fn release(&self, hold: Self::Hold) -> impl Future<Output = ()> + Send;

    /// Takes a hold of a device anew; `None` where this attach is over or being taken down. One that
    /// an earlier daemon has left is taken up so.
    fn hold(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
    ) -> impl Future<Output = Result<Option<Self::Hold>, Error>> + Send;

    /// Whether an earlier daemon has left a hold of this device, to be taken up.
    fn has_stored_hold(&self, disk_sequence: DiskSequence) -> bool;

    /// Closes what an earlier daemon has left and nobody has taken up, except the holds of these devices.
    fn release_unadopted(&self, except: &HashSet<DiskSequence>) -> impl Future<Output = ()> + Send;

    /// `LOOP_CLR_FD`. Its success means nothing ([`Kernel::peek`] tells); where the device is in
    /// use it is autoclear from then on. Does nothing where this attach is over.
    fn clear(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
    ) -> impl Future<Output = Result<(), Error>> + Send;

    /// Waits until the kernel has taken down the device with its partitions, in whoever's last close:
    /// other openers of the node wait for that (`bdev_release`, block/bdev.c).
    fn await_rundown(&self, number: u32) -> impl Future<Output = ()> + Send;

    /// Changes the device and gives what it is then; `None` where this attach is over. After an
    /// error it is as it was.
    fn change(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        change: Change,
    ) -> impl Future<Output = Result<Option<Device>, Error>> + Send;

    /// Has a read-only device show another file of the same size, under a new disk sequence; `None`
    /// where this attach is over.
    fn replace(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        file: Self::File,
        untrusted: bool,
    ) -> impl Future<Output = Result<Option<Device>, Error>> + Send;

    /// Makes udev activate nothing of what this device shows from now on: a user other than root has
    /// chosen it.
    ///
    /// # Errors
    /// The mark for udev's rules cannot be written.
    fn mark_untrusted(&self, disk_sequence: DiskSequence) -> Result<(), Error>;

    /// The number of a device that nothing is attached to; made where there is none.
    fn free_number(&self) -> impl Future<Output = Result<u32, Error>> + Send;

    /// Removes a device. Fails with `NotFound`, or with `Busy` where it is attached or stays open.
    fn remove_device(&self, number: u32) -> impl Future<Output = Result<(), Error>> + Send;

    /// The device with all that is known of it; `None` where nothing is attached.
    fn status(&self, number: u32) -> impl Future<Output = Result<Option<Device>, Error>> + Send;

    /// The user that another daemon has set the device up for, who can have that daemon detach it; `None`
    /// if no daemon says so. Never blocks.
    ///
    /// # Errors
    /// The daemon's record cannot be read or understood.
    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error>;

    /// What udev's database has of a device or of a partition; `None` where udev has not seen it.
    fn stored(&self, number: u32, partition: Option<u32>) -> Option<ProbeResult>;

    /// The same of some of them: what udev has not seen is left out.
    fn stored_of(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
    ) -> impl Future<Output = Vec<(Option<u32>, ProbeResult)>> + Send;

    /// Who uses the device.
    fn users(&self, number: u32) -> impl Future<Output = Result<Users, Error>> + Send;

    /// Bytes of the device, from an offset on; fewer where it ends before, none where this attach is over.
    fn read(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        offset: u64,
        length: usize,
    ) -> impl Future<Output = Result<Vec<u8>, Error>> + Send;

    /// Where a btrfs with this UUID is found.
    fn btrfs(&self, uuid: &str) -> impl Future<Output = Result<BtrfsDevices, Error>> + Send;
    /// Claims every other block device that shows some of these bytes of the device, directly or through
    /// what is stacked. `others` are all other loop devices; `None` stands for one whose backing file does not
    /// answer. Fails with `Busy`, naming its user, if one is claimed and one of the two can be written to;
    /// with `Timeout` if that is one that does not answer. `asked` begins the message.
    fn claim_overlapping(
        &self,
        device: &Device,
        bytes: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        asked: String,
    ) -> impl Future<Output = Result<Self::Claims, Error>> + Send;

    /// What is mounted where now: never blocks. `None` where it cannot be told.
    fn mounts(&self) -> Option<MountTable>;

    /// Removes a device node that was made for an attach; quietly keeps one that is in use.
    fn remove(&self, number: u32) -> impl Future<Output = ()> + Send;

    /// Makes the partitions' nodes what the table says, where the kernel does not do so itself, and
    /// tells which there are; none where this attach is over.
    fn partition(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        reason: ScanReason,
    ) -> impl Future<Output = Result<Partitioning, Error>> + Send;

    /// The partitions' nodes: reads sysfs and never blocks.
    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode>;

    /// One of them; `None` if it is not there. Reads sysfs and never blocks.
    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode>;

    /// Whether the kernel is known to read partition tables.
    fn scans_itself(&self) -> bool;

    /// The numbers of all loop devices that have something attached.
    fn bound_numbers(&self) -> Vec<u32>;

    /// What the number is bound to: reads two files of sysfs and never blocks.
    fn peek(&self, number: u32) -> Binding;

    /// Whether udev is there to process events.
    fn udev_runs(&self) -> bool;

    /// Whether udev has nothing left to process.
    fn udev_is_idle(&self) -> bool;
}
