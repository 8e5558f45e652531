//! Volumes: the whole device of an attachment, a partition of it, or the cleartext of one of these.

use std::ops::Range;
use std::path::PathBuf;

use loopd_common::text::printable;

use crate::error::Error;
use crate::kernel::{DiskSequence, FileSystem, Mapping};
use crate::snapshot::Snapshot;

/// An attachment's whole device, or a partition of it, or the cleartext of one of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
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
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// The mapping of a cleartext.
    pub mapping: Option<Mapping>,
    /// The bytes of the device that it has, or that its ciphertext has.
    pub bytes: Range<u64>,
    /// Size in bytes.
    pub size: u64,
    pub read_only: bool,
    pub file_system: FileSystem,
    pub mount_points: Vec<PathBuf>,
}

impl VolumeState {
    /// The volume of an attachment.
    ///
    /// # Errors
    /// `NotFound` if the partition or the cleartext is gone.
    pub fn of(attachment: &Snapshot, volume: VolumeId) -> Result<Self, Error> {
        let found = match volume.partition {
            None => Self::of_device(attachment),
            Some(number) => Self::of_partition(attachment, number)?,
        };
        if !volume.is_cleartext {
            return Ok(found);
        }
        let cleartext = attachment.cleartext_of(volume.partition);
        let cleartext =
            cleartext.ok_or_else(|| Error::NotUnlocked { volume: found.shown(attachment) })?.clone();
        Ok(Self {
            node: cleartext.mapping.node(),
            device_number: cleartext.mapping.device_number,
            bytes: found.bytes,
            size: cleartext.mapping.size,
            read_only: cleartext.mapping.read_only,
            mapping: Some(cleartext.mapping),
            file_system: cleartext.file_system,
            mount_points: cleartext.mount_points,
        })
    }

    fn of_device(attachment: &Snapshot) -> Self {
        let device = &attachment.device;
        Self {
            node: device.node(),
            device_number: device.device_number,
            mapping: None,
            bytes: 0..device.size,
            size: device.size,
            read_only: device.read_only,
            file_system: attachment.file_system.clone(),
            mount_points: attachment.mount_points.clone(),
        }
    }

    fn of_partition(attachment: &Snapshot, number: u32) -> Result<Self, Error> {
        let node = attachment.device.partition_node(number);
        let found = attachment.partitions.iter().find(|shown| shown.partition.node.number == number);
        let found = found.ok_or_else(|| Error::NoPartition { node: node.clone() })?;
        let (start, size) = (found.partition.node.start, found.partition.node.size);
        Ok(Self {
            node,
            device_number: found.partition.node.device_number,
            mapping: None,
            bytes: start..start.saturating_add(size),
            size,
            read_only: attachment.device.read_only,
            file_system: found.file_system.clone(),
            mount_points: found.mount_points.clone(),
        })
    }

    /// The node and the backing file, for messages.
    pub fn shown(&self, attachment: &Snapshot) -> String {
        format!("{} ({})", self.node, printable(&attachment.device.backing_file))
    }
}
