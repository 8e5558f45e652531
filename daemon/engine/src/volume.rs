//! Volumes: the whole device of an attachment, or a partition of it.

use std::ops::Range;
use std::path::PathBuf;

use loopd_common::text::printable;

use crate::error::Error;
use crate::kernel::{DiskSequence, FileSystem};
use crate::snapshot::Snapshot;

/// An attachment's whole device, or a partition of it, or the cleartext of one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeId {
    /// The attachment.
    pub attachment: DiskSequence,
    /// N of `/dev/loop0pN`.
    pub partition: Option<u32>,
    /// Whether it is the cleartext of that volume.
    pub is_cleartext: bool,
}

/// The state of a volume.
pub(super) struct VolumeState {
    pub node: String,
    /// Where it starts on the device, in bytes.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
    pub file_system: FileSystem,
    pub mount_points: Vec<PathBuf>,
}

impl VolumeState {
    /// The volume of an attachment.
    ///
    /// # Errors
    /// `NotFound` if the partition is gone.
    pub fn of(attachment: &Snapshot, partition: Option<u32>) -> Result<Self, Error> {
        let Some(number) = partition else {
            return Ok(Self {
                node: attachment.device.node(),
                start: 0,
                size: attachment.device.size,
                file_system: attachment.file_system.clone(),
                mount_points: attachment.mount_points.clone(),
            });
        };
        let node = attachment.device.partition_node(number);
        let found = attachment.partitions.iter().find(|shown| shown.partition.node.number == number);
        let found = found.ok_or_else(|| Error::NoPartition { node: node.clone() })?;
        Ok(Self {
            node,
            start: found.partition.node.start,
            size: found.partition.node.size,
            file_system: found.file_system.clone(),
            mount_points: found.mount_points.clone(),
        })
    }

    /// The bytes of the device that it has.
    pub fn bytes(&self) -> Range<u64> {
        self.start..self.start.saturating_add(self.size)
    }

    /// The node and the backing file, for messages.
    pub fn shown(&self, attachment: &Snapshot) -> String {
        format!("{} ({})", self.node, printable(&attachment.device.backing_file))
    }
}
