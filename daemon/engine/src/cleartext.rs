//! The cleartext of an unlocked volume: a device of the device mapper.

use std::path::PathBuf;

use loopd_common::EncryptionType;
use loopd_common::text::printable;

use crate::device::DiskSequence;
use crate::udev::FileSystem;

/// A mapping, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// N of `/dev/dm-N`.
    pub number: u32,
    /// Major and minor number of the node.
    pub device_number: (u32, u32),
    /// Identity of the mapping: the numbers of all disks are one sequence.
    pub disk_sequence: DiskSequence,
    /// The device mapper's name of it (`dm/name`).
    pub name: String,
    /// How its volume is encrypted (`dm/uuid`).
    pub kind: EncryptionType,
    /// Size in bytes.
    pub size: u64,
    /// Whether writing is impossible.
    pub read_only: bool,
}

impl Mapping {
    /// The device node.
    #[must_use]
    pub fn node(&self) -> String {
        format!("/dev/dm-{}", self.number)
    }

    /// The node and the name, for messages.
    pub(super) fn shown(&self) -> String {
        format!("{} ({})", self.node(), printable(self.name.as_bytes()))
    }

    /// Whether it is this one, whatever has changed of it.
    pub(super) fn is(&self, other: &Self) -> bool {
        (self.number, self.disk_sequence) == (other.number, other.disk_sequence)
    }
}

/// What the name of each mapping of loopd begins with.
const PREFIX: &str = "loopd-";

/// Whether loopd has made the mapping, by its name: of this attachment, or of an earlier one of the device.
pub(super) fn is_named_by_loopd(mapping: &Mapping) -> bool {
    let rest = mapping.name.strip_prefix(PREFIX);
    rest.is_some_and(|rest| rest.bytes().all(|byte| byte.is_ascii_digit() || byte == b'p'))
}

/// The name of the mapping that loopd makes for a volume. The disk sequence of the attach is never used again.
pub(super) fn mapping_name(attachment: DiskSequence, partition: Option<u32>) -> String {
    match partition {
        None => format!("{PREFIX}{attachment}"),
        Some(number) => format!("{PREFIX}{attachment}p{number}"),
    }
}

/// What clients can see of a cleartext.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CleartextSnapshot {
    /// The mapping.
    pub mapping: Mapping,
    /// When it was unlocked: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// What udev found on it.
    pub file_system: FileSystem,
    /// Where it is mounted.
    pub mount_points: Vec<PathBuf>,
}

/// What neither the kernel nor udev knows of a cleartext.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SavedCleartext {
    /// N of `/dev/loop0pN`; `None` for the whole device.
    pub partition: Option<u32>,
    /// The disk sequence of the mapping.
    pub disk_sequence: DiskSequence,
    /// When it was unlocked: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// The user who unlocked it.
    pub uid: u32,
    /// Whether it was locked lazily: it is closed with its last user.
    pub closing: bool,
    /// How the caller has said that it is encrypted, since sysfs tells TrueCrypt not from VeraCrypt; `None` for what
    /// sysfs shows.
    pub kind: Option<EncryptionType>,
}

/// An event of a mapping, from udev or, without udev, from the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MappingEvent {
    /// N of `/dev/dm-N`.
    pub number: u32,
    /// Whether the mapping is gone.
    pub removed: bool,
    /// The disk sequence that the event names.
    pub disk_sequence: Option<DiskSequence>,
    /// What udev found on it; `None` for an event of the kernel, and if udev has not probed it.
    pub file_system: Option<FileSystem>,
}
