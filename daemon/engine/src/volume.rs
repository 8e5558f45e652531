//! Volumes: the whole device of an attachment, or a partition of it.

use std::path::PathBuf;

use loopd_common::text::printable;
use loopd_common::{Error, ErrorKind};

use crate::kernel::{DiskSequence, FileSystem};
use crate::snapshot::Snapshot;

/// An attachment's whole device, or a partition of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VolumeId {
    /// The attachment.
    pub attachment: DiskSequence,
    /// N of `/dev/loop0pN`.
    pub partition: Option<u32>,
}

/// What is known of a volume.
pub(super) struct VolumeState {
    pub node: String,
    /// In bytes, on the device.
    pub start: u64,
    /// In bytes.
    pub size: u64,
    pub file_system: FileSystem,
    pub mount_points: Vec<PathBuf>,
}

impl VolumeState {
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
        let found =
            found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("the partition {node} is gone")))?;
        Ok(Self {
            node,
            start: found.partition.node.start,
            size: found.partition.node.size,
            file_system: found.file_system.clone(),
            mount_points: found.mount_points.clone(),
        })
    }

    pub fn shown(&self, attachment: &Snapshot) -> String {
        format!("{} ({})", self.node, printable(&attachment.device.backing_file))
    }
}
