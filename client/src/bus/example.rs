//! An attachment with one partition, for tests.

use std::collections::HashMap;

use loopd_dbus::names::{attachment_path, cleartext_path, partition_path, volume_path};
use loopd_dbus::properties::to_bus_path;
use loopd_dbus::{
    AttachmentProperties, CleartextProperties, PartitionProperties, VolumeProperties, Warning, Warnings,
};
use zbus::Variant;

use super::attachment::{AttachmentInfo, FileState};
use super::cleartext::CleartextInfo;
use super::objects::Properties;
use super::partition::PartitionInfo;

/// The example of the contract.
pub fn attachment() -> AttachmentInfo {
    AttachmentInfo {
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
            warnings: Warnings(vec![Warning {
                code: "truncated".to_owned(),
                message: "…".to_owned(),
                bytes: Some(25_165_824),
                ..Warning::default()
            }]),
            ..AttachmentProperties::default()
        },
        volume: VolumeProperties {
            device: "/dev/loop0".to_owned(),
            size: 67_108_864,
            ..VolumeProperties::default()
        },
        partitions: vec![partition(12, 1)],
        cleartext: None,
        file_state: Some(FileState::Present),
    }
}

/// The partition of the example, with this number and on this attachment.
pub fn partition(disk_sequence: u64, number: u32) -> PartitionInfo {
    PartitionInfo {
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
        cleartext: None,
    }
}

/// The cleartext of the example's device (`None`) or of its partition with this number.
pub fn cleartext(partition: Option<u32>) -> CleartextInfo {
    CleartextInfo {
        path: cleartext_path(12, partition).into(),
        cleartext: CleartextProperties {
            device: "/dev/dm-3".to_owned(),
            crypto: volume_path(12, partition).into(),
            kind: "luks".to_owned(),
            since: 1_700_000_000_000_000,
        },
        volume: VolumeProperties {
            device: "/dev/dm-3".to_owned(),
            size: 4_194_304,
            usage: "filesystem".to_owned(),
            filesystem_type: "xfs".to_owned(),
            ..VolumeProperties::default()
        },
    }
}

/// Properties as they are received.
pub fn received(dict: HashMap<&'static str, Variant<'static>>) -> Properties {
    dict.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
}
