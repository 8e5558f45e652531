//! The JSON that the contract promises.

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::{NO_OWNER, from_bus_path};
use serde::Serialize;

use crate::partition;
use crate::target::Attached;

/// A loop device, with the fields in the contract's order. An unknown string is null.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Device node.
    pub device: String,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Disk sequence.
    pub disk_sequence: u64,
    /// Path of the backing file, for display: JSON knows no bytes, so a path that is not UTF-8 has
    /// U+FFFD in place of the others.
    pub backing_file: Option<String>,
    /// Bytes into the file.
    pub offset: u64,
    /// Bytes at most; 0 is up to the end of the file.
    pub size_limit: u64,
    /// Bytes of the device.
    pub size: u64,
    /// Whether writing is impossible.
    pub read_only: bool,
    /// Whether the page cache of the backing file is bypassed.
    pub direct_io: bool,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Whether the kernel looks for partitions.
    pub partition_scan: bool,
    /// Whether the kernel detaches the device at its last close.
    pub autoclear: bool,
    /// What losetup shows as REF.
    pub reference: Option<String>,
    /// When it ends; null where loopd did not attach it.
    pub lifetime: Option<String>,
    /// Whether loopd attached it.
    pub managed: bool,
    /// The uid that attached it; null where loopd did not.
    pub owner: Option<u32>,
    /// `attached` or `detaching`.
    pub state: Option<String>,
    /// What the whole device holds.
    pub filesystem: Option<Filesystem>,
    /// Where the whole device is mounted.
    pub mount_points: Vec<String>,
    /// By number.
    pub partitions: Vec<Partition>,
}

/// A partition of a loop device, with the fields in the contract's order. An unknown string is null.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Device node.
    pub device: String,
    /// N of `/dev/loop0pN`.
    pub number: u32,
    /// Bytes into the device.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
    /// Kind of the partition table.
    pub table: Option<String>,
    /// Type of the partition.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// UUID of the partition.
    pub uuid: Option<String>,
    /// Name of the partition.
    pub label: Option<String>,
    /// What it holds.
    pub filesystem: Option<Filesystem>,
    /// Where it is mounted.
    pub mount_points: Vec<String>,
}

/// A file system, or what else udev finds on a device.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Filesystem {
    /// udev's `ID_FS_TYPE`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Version.
    pub version: Option<String>,
    /// Label.
    pub label: Option<String>,
    /// UUID.
    pub uuid: Option<String>,
}

impl From<&Attached> for Device {
    fn from(attached: &Attached) -> Self {
        let Attached { attachment, volume, partitions, .. } = attached;
        Self {
            device: attachment.device.clone(),
            number: attachment.number,
            disk_sequence: attachment.disk_sequence,
            backing_file: known(&path(&attachment.backing_file)),
            offset: attachment.offset,
            size_limit: attachment.size_limit,
            size: volume.size,
            read_only: attachment.read_only,
            direct_io: attachment.direct_io,
            block_size: attachment.block_size,
            partition_scan: attachment.partition_scan,
            autoclear: attachment.autoclear,
            reference: known(&attachment.reference),
            lifetime: known(&attachment.lifetime),
            managed: attachment.managed,
            owner: (attachment.owner != NO_OWNER).then_some(attachment.owner),
            state: known(&attachment.state),
            filesystem: filesystem(volume),
            mount_points: mount_points(volume),
            partitions: partitions.iter().map(Partition::from).collect(),
        }
    }
}

impl From<&partition::Partition> for Partition {
    fn from(shown: &partition::Partition) -> Self {
        let partition::Partition { partition, volume, .. } = shown;
        Self {
            device: volume.device.clone(),
            number: partition.number,
            offset: partition.offset,
            size: partition.size,
            table: known(&partition.table),
            kind: known(&partition.kind),
            uuid: known(&partition.uuid),
            label: known(&partition.label),
            filesystem: filesystem(volume),
            mount_points: mount_points(volume),
        }
    }
}

fn filesystem(volume: &VolumeProperties) -> Option<Filesystem> {
    Some(Filesystem {
        kind: known(&volume.filesystem_type)?,
        version: known(&volume.filesystem_version),
        label: known(&volume.filesystem_label),
        uuid: known(&volume.filesystem_uuid),
    })
}

fn mount_points(volume: &VolumeProperties) -> Vec<String> {
    volume.mount_points.iter().map(|bytes| path(bytes)).collect()
}

/// A path of the bus as a string; see [`Device::backing_file`] for one that is not UTF-8.
#[must_use]
pub fn path(bytes: &[u8]) -> String {
    String::from_utf8_lossy(from_bus_path(bytes)).into_owned()
}

fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
pub(crate) mod tests {
    use loopd_dbus::names::{attachment_path, partition_path};
    use loopd_dbus::properties::to_bus_path;
    use loopd_dbus::{AttachmentProperties, PartitionProperties};
    use serde_json::Value;

    use super::*;

    /// The contract's example, as loopd lists it.
    pub(crate) fn example() -> Attached {
        Attached {
            path: attachment_path(12).into(),
            attachment: AttachmentProperties {
                device: "/dev/loop0".to_owned(),
                disk_sequence: 12,
                backing_file: to_bus_path(b"/home/a/x.img"),
                block_size: 512,
                partition_scan: true,
                lifetime: "persistent".to_owned(),
                managed: true,
                owner: 1000,
                state: "attached".to_owned(),
                ..AttachmentProperties::default()
            },
            volume: VolumeProperties {
                device: "/dev/loop0".to_owned(),
                size: 67_108_864,
                ..VolumeProperties::default()
            },
            partitions: vec![partition(12, 1)],
        }
    }

    /// The example's partition, with this number and on this attachment.
    pub(crate) fn partition(disk_sequence: u64, number: u32) -> partition::Partition {
        partition::Partition {
            path: partition_path(disk_sequence, number).into(),
            partition: PartitionProperties {
                number,
                offset: 1_048_576,
                size: 20_971_520,
                table: "gpt".to_owned(),
                kind: "0fc63daf-8483-4772-8e79-3d69d8477de4".to_owned(),
                uuid: "…".to_owned(),
                label: String::new(),
                attachment: attachment_path(disk_sequence).into(),
            },
            volume: VolumeProperties {
                device: format!("/dev/loop0p{number}"),
                size: 20_971_520,
                usage: "filesystem".to_owned(),
                filesystem_type: "ext4".to_owned(),
                filesystem_version: "1.0".to_owned(),
                filesystem_label: "data".to_owned(),
                filesystem_uuid: "…".to_owned(),
                mount_points: vec![to_bus_path(b"/run/media/a/data")],
            },
        }
    }

    const CONTRACT: &str = r#"{"device": "/dev/loop0", "number": 0, "disk_sequence": 12,
        "backing_file": "/home/a/x.img", "offset": 0, "size_limit": 0, "size": 67108864, "read_only": false,
        "direct_io": false, "block_size": 512, "partition_scan": true, "autoclear": false,
        "reference": null, "lifetime": "persistent", "managed": true, "owner": 1000, "state": "attached",
        "filesystem": null, "mount_points": [],
        "partitions": [{"device": "/dev/loop0p1", "number": 1, "offset": 1048576, "size": 20971520, "table": "gpt",
            "type": "0fc63daf-8483-4772-8e79-3d69d8477de4", "uuid": "…", "label": null,
            "filesystem": {"type": "ext4", "version": "1.0", "label": "data", "uuid": "…"},
            "mount_points": ["/run/media/a/data"]}]}"#;

    /// The keys in the order of the text: serde_json's own maps would sort them.
    fn keys(text: &str) -> Vec<String> {
        let ends = text.match_indices("\":").map(|(end, _)| end);
        ends.map(|end| text[..end].rsplit('"').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn the_shape_is_the_contract_s() {
        let text = serde_json::to_string(&Device::from(&example())).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            serde_json::from_str::<Value>(CONTRACT).unwrap()
        );
        assert_eq!(keys(&text), keys(CONTRACT));
    }

    #[test]
    fn what_is_known_is_shown() {
        let mut attached = example();
        attached.attachment.reference = "ref".to_owned();
        attached.attachment.backing_file = to_bus_path(b"/a/\xff.img");
        attached.volume.filesystem_type = "ext4".to_owned();
        attached.volume.filesystem_version = "1.0".to_owned();
        attached.volume.filesystem_label = "data".to_owned();
        attached.volume.mount_points = vec![to_bus_path(b"/mnt"), to_bus_path(b"/srv")];
        let value = serde_json::to_value(Device::from(&attached)).unwrap();
        assert_eq!(value["reference"], "ref");
        assert_eq!(value["backing_file"], "/a/\u{fffd}.img");
        assert_eq!(
            value["filesystem"],
            serde_json::json!({"type": "ext4", "version": "1.0", "label": "data", "uuid": null})
        );
        assert_eq!(value["mount_points"], serde_json::json!(["/mnt", "/srv"]));
    }

    #[test]
    fn what_is_not_known_of_a_partition_is_null() {
        let mut shown = partition(12, 3);
        shown.partition = PartitionProperties { number: 3, ..PartitionProperties::default() };
        shown.volume = VolumeProperties { device: "/dev/loop0p3".to_owned(), ..VolumeProperties::default() };
        let expected = serde_json::json!({"device": "/dev/loop0p3", "number": 3, "offset": 0, "size": 0,
            "table": null, "type": null, "uuid": null, "label": null, "filesystem": null, "mount_points": []});
        assert_eq!(serde_json::to_value(Partition::from(&shown)).unwrap(), expected);
        let attached = Attached { partitions: Vec::new(), ..example() };
        assert_eq!(
            serde_json::to_value(Device::from(&attached)).unwrap()["partitions"],
            serde_json::json!([])
        );
    }

    #[test]
    fn a_foreign_device_has_no_owner_and_no_lifetime() {
        let mut attached = example();
        attached.attachment.owner = NO_OWNER;
        attached.attachment.lifetime = String::new();
        attached.attachment.backing_file = to_bus_path(b"");
        let device = Device::from(&attached);
        assert_eq!((device.owner, device.lifetime, device.backing_file), (None, None, None));
    }
}
