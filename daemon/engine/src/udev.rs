//! udev, as the engine sees it.

use crate::device::DiskSequence;
use crate::error::Error;
use crate::future::BoxFuture;
use crate::partitioning::TableEntry;

/// The file system that udev found on a volume. Strings are empty if it found none.
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

/// What udev found on a device or partition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProbeResult {
    /// The file system.
    pub file_system: FileSystem,
    /// The entry of a partition in its table.
    pub entry: TableEntry,
    /// Where the partition started when udev probed it, in bytes; `None` if that is unknown.
    pub start: Option<u64>,
    /// Whether the device has a partition table.
    pub has_table: bool,
}

impl ProbeResult {
    /// Whether udev found nothing, not even the entry of a partition. That is its result for a partition that
    /// disappears while it is probed.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.file_system == FileSystem::default() && self.entry == TableEntry::default()
    }
}

/// udev.
pub trait Udev: Send + Sync + 'static {
    /// Whether udev runs.
    fn udev_runs(&self) -> bool;

    /// Whether udev has processed all events.
    fn udev_is_idle(&self) -> bool;

    /// The entry of a device or partition in udev's database; `None` if udev has not processed it.
    fn stored(&self, number: u32, partition: Option<u32>) -> Option<ProbeResult>;

    /// The file system on the mapping `/dev/dm-N`, by udev's database; `None` if udev has not processed it.
    fn stored_mapping(&self, number: u32) -> Option<FileSystem>;

    /// The entries of several partitions, or of the device (`None`). Those that udev has not processed are left
    /// out.
    fn stored_of(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>>;

    /// The same, of those that were written since a time: microseconds of `CLOCK_REALTIME`.
    fn stored_since(
        &self,
        number: u32,
        partitions: Vec<Option<u32>>,
        since: u64,
    ) -> BoxFuture<'_, Vec<(Option<u32>, ProbeResult)>>;

    /// Whether udev answers. An ended udev leaves its socket behind, so [`udev_runs`](Self::udev_runs) does not show this.
    /// Never blocks.
    fn udev_answers(&self) -> bool;

    /// Makes udev activate nothing on this device from now on: a user other than root has chosen its content.
    ///
    /// # Errors
    /// The mark for udev's rules cannot be written.
    fn mark_untrusted(&self, disk_sequence: DiskSequence) -> Result<(), Error>;
}
