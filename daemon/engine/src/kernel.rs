//! The kernel, as the engine sees it.

use std::collections::HashSet;
use std::ops::Range;

pub use crate::cleartext::Mapping;
pub use crate::device::{
    Binding, BtrfsDevices, Change, Claim, Device, DiskSequence, FileFacts, FileIdentity, FileKind, Users,
    node, partition_node,
};
use crate::error::Error;
pub use crate::findings::{FileEnd, Findings};
use crate::future::BoxFuture;
pub use crate::image_format::ImageFormat;
use crate::mount_table::MountTable;
pub use crate::partitioning::{Partition, PartitionNode, Partitioning, ScanReason, TableEntry};
use crate::request::AttachRequest;
pub use crate::udev::{FileSystem, ProbeResult, Udev};
pub use crate::warning::{Describer, NotMade};

/// A device that was attached.
pub struct Attached<K: Kernel + ?Sized> {
    /// The device.
    pub device: Device,
    /// Keeps an autoclear device attached until it is released. `None` for a persistent device.
    pub hold: Option<K::Hold>,
    /// Its partitions, if the request has partition scan: those that the kernel made, and whether others are
    /// still to be made. The findings in any case.
    pub partitioning: Partitioning,
    /// The end of the file.
    pub file_end: FileEnd,
    /// Until this is dropped, [`Kernel::peek`] reports the number as claimed.
    pub claim: K::Claim,
    /// Whether the device node was made for this attach.
    pub node_made: bool,
}

/// How a number differs from what was known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Difference {
    /// Only the path of the backing file does: this is the new one, as sysfs shows it.
    Renamed(Vec<u8>),
    /// Something was attached to it, detached from it, or changed.
    Other,
}

/// A device that shows another file than before.
pub struct Replaced {
    /// The device.
    pub device: Device,
    /// The end of the file.
    pub file_end: FileEnd,
}

/// The copies of holds in the service manager's descriptor store, which outlive the daemon.
pub trait StoredHolds: Send + Sync + 'static {
    /// Whether the last daemon has left a hold of this device or mapping that was not adopted yet.
    fn has_stored_hold(&self, disk_sequence: DiskSequence) -> bool;

    /// Closes the holds that the last daemon has left and that were not adopted, except those of these devices.
    fn release_unadopted<'a>(&'a self, except: &'a HashSet<DiskSequence>) -> BoxFuture<'a, ()>;
}

/// The kernel: loop devices, sysfs, mounts.
///
/// udev and the descriptor store are separate traits, but one type implements all three: an attach marks its
/// device for udev and stores its hold, and the engine needs no further type parameters.
///
/// A method that returns a future may take as long as the file system of a backing file does. Dropping the
/// future does not undo what it began: the engine waits for each to end.
pub trait Kernel: Udev + StoredHolds {
    /// A descriptor from a client.
    type File: Send + Sync + 'static;
    /// A read-only descriptor of a loop device. It outlives the daemon if the service manager has a copy.
    type Hold: Send + 'static;
    /// A number with an attach in progress.
    type Claim: Send + 'static;
    /// Exclusive claims on block devices: while they exist, none of these can be mounted.
    type Claims: Send + 'static;

    /// Examines a file. Fails with `InvalidBackingFile` if it can never be attached.
    fn examine<'a>(&'a self, file: &'a Self::File) -> BoxFuture<'a, Result<FileFacts, Error>>;

    /// Attaches the file to a free device, or to the one that the request names. After an error nothing is
    /// attached, and no node is left that was not there before.
    fn attach<'a>(
        &'a self,
        file: Self::File,
        request: &'a AttachRequest,
    ) -> BoxFuture<'a, Result<Attached<Self>, Error>>;

    /// Closes a hold: an autoclear device is detached at its last close.
    fn release(&self, hold: Self::Hold) -> BoxFuture<'_, ()>;

    /// Opens a hold of a device; `None` if this attach has ended or is ending. It replaces a hold that the last
    /// daemon has left.
    fn hold(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
    ) -> BoxFuture<'_, Result<Option<Self::Hold>, Error>>;

    /// `LOOP_CLR_FD`. Success does not mean that the device is detached ([`Kernel::peek`] shows that): a device
    /// in use becomes autoclear. Does nothing if this attach has ended.
    fn clear(&self, number: u32, disk_sequence: DiskSequence) -> BoxFuture<'_, Result<(), Error>>;

    /// Waits until the kernel has taken down the device with its partitions, in the last close of any process:
    /// others that open the node wait for that (`bdev_release`, block/bdev.c).
    fn await_rundown(&self, number: u32) -> BoxFuture<'_, ()>;

    /// Changes the device and returns its new state; `None` if this attach has ended. After an error it is
    /// unchanged.
    fn change(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        change: Change,
    ) -> BoxFuture<'_, Result<Option<Device>, Error>>;

    /// Shows another file of the same size on a read-only device, under a new disk sequence; `None` if this
    /// attach has ended.
    fn replace(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        file: Self::File,
        untrusted: bool,
    ) -> BoxFuture<'_, Result<Option<Replaced>, Error>>;

    /// The number of a device that nothing is attached to. The device is made if there is none.
    fn free_number(&self) -> BoxFuture<'_, Result<u32, Error>>;

    /// Removes a device. Fails with `NotFound`, or with `Busy` if a file is attached or a process keeps it open.
    fn remove_device(&self, number: u32) -> BoxFuture<'_, Result<(), Error>>;

    /// The state of the device; `None` if nothing is attached.
    fn status(&self, number: u32) -> BoxFuture<'_, Result<Option<Device>, Error>>;

    /// The user that another daemon has set the device up for, who can make that daemon detach it; `None`
    /// if no daemon has. Never blocks.
    ///
    /// # Errors
    /// The daemon's record cannot be read or understood.
    fn set_up_for(&self, number: u32) -> Result<Option<u32>, Error>;

    /// The users of the device that the kernel lists.
    fn users(&self, number: u32) -> BoxFuture<'_, Result<Users, Error>>;

    /// Whether the device or a partition of it is claimed: by a mount in any mount namespace, by swap, by a device
    /// built on it or by a program. Claims the device itself for a moment, which can make a mount fail: only for a
    /// device that is in use.
    fn is_claimed(&self, number: u32) -> BoxFuture<'_, bool>;

    /// Bytes of the device from an offset on; fewer at its end, none if this attach has ended.
    fn read(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'_, Result<Vec<u8>, Error>>;

    /// The devices with a btrfs of this UUID.
    fn btrfs<'a>(&'a self, uuid: &'a str) -> BoxFuture<'a, Result<BtrfsDevices, Error>>;

    /// Claims every other block device that shows some of these bytes of the device, directly or through
    /// stacked devices. `others` are all other loop devices; `None` stands for one whose backing file does not
    /// answer. Fails with `Busy`, naming the user, if one is claimed already and one of the two can be written
    /// to; with `Timeout` if that one does not answer. `operation` completes "cannot" in the text.
    fn claim_overlapping<'a>(
        &'a self,
        device: &'a Device,
        bytes: Range<u64>,
        others: Vec<(u32, Option<Device>)>,
        operation: String,
    ) -> BoxFuture<'a, Result<Self::Claims, Error>>;

    /// The mappings directly on the device (`None`) and on its partitions. Reads sysfs and never blocks.
    ///
    /// # Errors
    /// `Kernel` if sysfs cannot be read.
    fn mappings(&self, number: u32) -> Result<Vec<(Option<u32>, Mapping)>, Error>;

    /// Opens a hold of a mapping; `None` if it is gone. It replaces a hold that the last daemon has left. Released as
    /// any hold.
    fn hold_mapping<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Option<Self::Hold>, Error>>;

    /// Who uses a mapping: its mounts and the devices built on it, not the processes that have it open. None if it is
    /// gone.
    fn mapping_users<'a>(&'a self, mapping: &'a Mapping) -> BoxFuture<'a, Result<Users, Error>>;

    /// Bytes of a mapping from an offset on; fewer at its end, none if it is gone.
    fn read_mapping<'a>(
        &'a self,
        mapping: &'a Mapping,
        offset: u64,
        length: usize,
    ) -> BoxFuture<'a, Result<Vec<u8>, Error>>;

    /// The mount table; `None` if it cannot be read. Never blocks.
    fn mounts(&self) -> Option<MountTable>;

    /// Removes a device node that was made for an attach, unless it is in use.
    fn remove(&self, number: u32) -> BoxFuture<'_, ()>;

    /// Makes the partitions' nodes match the table, if the kernel does not do so itself, and returns the
    /// partitions and the findings; none if this attach has ended.
    fn partition(
        &self,
        number: u32,
        disk_sequence: DiskSequence,
        reason: ScanReason,
    ) -> BoxFuture<'_, Result<Partitioning, Error>>;

    /// The partitions' nodes. Reads sysfs and never blocks.
    fn partition_nodes(&self, number: u32) -> Vec<PartitionNode>;

    /// The node of one partition; `None` if it does not exist. Reads sysfs and never blocks.
    fn partition_node(&self, number: u32, partition: u32) -> Option<PartitionNode>;

    /// Whether the kernel is known to read partition tables.
    fn scans_itself(&self) -> bool;

    /// The numbers of all loop devices that a file is attached to.
    ///
    /// # Errors
    /// `Kernel` if sysfs cannot be read.
    fn bound_numbers(&self) -> Result<Vec<u32>, Error>;

    /// The numbers that sysfs shows otherwise than `known`, the devices that were known, does. Waits for no backing file.
    fn differences(&self, known: Vec<Device>) -> BoxFuture<'_, Vec<(u32, Difference)>>;

    /// What the number is bound to. Reads two files of sysfs and never blocks.
    ///
    /// # Errors
    /// `Kernel` if sysfs cannot be read.
    fn peek(&self, number: u32) -> Result<Binding, Error>;
}
