//! The stable JSON output.

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::{NO_OWNER, from_bus_path};
use serde::Serialize;

use crate::bus::attachment::{AttachmentInfo, FileState};
use crate::bus::cleartext::CleartextInfo;
use crate::bus::partition::PartitionInfo;
use crate::message::shown;
use crate::show::property::{CRYPTO, encryption_type};

/// A loop device. An unknown string is null.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Device node.
    pub device: String,
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Disk sequence.
    pub disk_sequence: u64,
    /// Path of the backing file, or the one that it had, for display: JSON strings are Unicode, so U+FFFD replaces
    /// bytes that are not UTF-8.
    pub backing_file: Option<String>,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Maximum number of bytes; 0 is up to the end of the file.
    pub size_limit: u64,
    /// Size of the device in bytes.
    pub size: u64,
    /// Whether the device is read-only.
    pub read_only: bool,
    /// Whether direct I/O bypasses the page cache of the backing file.
    pub direct_io: bool,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Whether the kernel scans for partitions.
    pub partition_scan: bool,
    /// Whether the kernel detaches the device at its last close.
    pub autoclear: bool,
    /// The reference, which losetup shows as REF.
    pub reference: Option<String>,
    /// When it is detached; null if loopd did not attach it.
    pub lifetime: Option<String>,
    /// Whether loopd attached it.
    pub managed: bool,
    /// The uid of its owner; null if loopd did not attach it.
    pub owner: Option<u32>,
    /// `attached` or `detaching`.
    pub state: Option<String>,
    /// What has become of the backing file: `present`, `deleted`, or `replaced`, if another file has its path; null if
    /// that cannot be determined with the user's rights.
    pub backing_file_state: Option<&'static str>,
    /// What is unusual about it.
    pub warnings: Vec<Warning>,
    /// The file system on the whole device.
    pub filesystem: Option<Filesystem>,
    /// How the whole device is encrypted; null if it is not.
    pub encrypted: Option<Encrypted>,
    /// Mount points of the whole device.
    pub mount_points: Vec<String>,
    /// Partitions by number.
    pub partitions: Vec<Partition>,
}

/// A warning. A detail that does not apply is left out.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Warning {
    /// A stable name.
    pub code: String,
    /// The warning in English.
    pub message: String,
    /// How many bytes are missing or cannot be reached.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bytes: Option<u64>,
    /// The number of a partition, or a sector size in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<u32>,
    /// The format of the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
}

/// A partition of a loop device. An unknown string is null.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Partition {
    /// Device node.
    pub device: String,
    /// N of `/dev/loop0pN`.
    pub number: u32,
    /// Offset on the device, in bytes.
    pub offset: u64,
    /// Size in bytes.
    pub size: u64,
    /// Type of the partition table.
    pub table: Option<String>,
    /// Type of the partition.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// UUID of the partition.
    pub uuid: Option<String>,
    /// Name of the partition.
    pub label: Option<String>,
    /// Its file system.
    pub filesystem: Option<Filesystem>,
    /// How it is encrypted; null if it is not.
    pub encrypted: Option<Encrypted>,
    /// Its mount points.
    pub mount_points: Vec<String>,
}

/// A file system, or other content that udev recognizes.
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

/// An encrypted volume.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Encrypted {
    /// `luks`, `bitlocker`, `veracrypt` or `truecrypt`; udev's type for one that loopd cannot unlock.
    #[serde(rename = "type")]
    pub kind: String,
    /// Version; null if it is unknown.
    pub version: Option<String>,
    /// Its cleartext; null while it is locked.
    pub cleartext: Option<Cleartext>,
}

/// The cleartext of a volume that is unlocked.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Cleartext {
    /// Device node.
    pub device: String,
    /// Its file system.
    pub filesystem: Option<Filesystem>,
    /// Its mount points.
    pub mount_points: Vec<String>,
}

impl From<&AttachmentInfo> for Device {
    fn from(info: &AttachmentInfo) -> Self {
        let AttachmentInfo { attachment, volume, partitions, cleartext, file_state, .. } = info;
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
            backing_file_state: file_state.map(FileState::as_str),
            warnings: shown(&attachment.warnings).map(Warning::from).collect(),
            filesystem: filesystem(volume),
            encrypted: encrypted(volume, cleartext.as_ref()),
            mount_points: mount_points(volume),
            partitions: partitions.iter().map(Partition::from).collect(),
        }
    }
}

impl From<&loopd_dbus::Warning> for Warning {
    fn from(warning: &loopd_dbus::Warning) -> Self {
        let loopd_dbus::Warning { code, message, bytes, number, format } = warning.clone();
        Self { code, message, bytes, number, format }
    }
}

impl From<&PartitionInfo> for Partition {
    fn from(info: &PartitionInfo) -> Self {
        let PartitionInfo { partition, volume, cleartext, .. } = info;
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
            encrypted: encrypted(volume, cleartext.as_ref()),
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

/// A volume that is not recognized is encrypted if it is unlocked.
fn encrypted(volume: &VolumeProperties, cleartext: Option<&CleartextInfo>) -> Option<Encrypted> {
    let is_recognized = volume.usage == CRYPTO;
    if cleartext.is_none() && !is_recognized {
        return None;
    }
    let kind = match cleartext {
        Some(cleartext) => cleartext.cleartext.kind.clone(),
        None => encryption_type(&volume.filesystem_type).to_owned(),
    };
    let version = if is_recognized { known(&volume.filesystem_version) } else { None };
    Some(Encrypted { kind, version, cleartext: cleartext.map(Cleartext::from) })
}

impl From<&CleartextInfo> for Cleartext {
    fn from(info: &CleartextInfo) -> Self {
        let CleartextInfo { cleartext, volume, .. } = info;
        Self {
            device: cleartext.device.clone(),
            filesystem: filesystem(volume),
            mount_points: mount_points(volume),
        }
    }
}

fn mount_points(volume: &VolumeProperties) -> Vec<String> {
    volume.mount_points.iter().map(|bytes| path(bytes)).collect()
}

/// A bus path as a string; see [`Device::backing_file`] for one that is not UTF-8.
#[must_use]
pub fn path(bytes: &[u8]) -> String {
    String::from_utf8_lossy(from_bus_path(bytes)).into_owned()
}

fn known(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use loopd_dbus::properties::to_bus_path;
    use loopd_dbus::{PartitionProperties, Warnings};
    use serde_json::Value;

    use super::*;
    use crate::bus::example::{attachment, cleartext, partition};

    const CONTRACT: &str = r#"{"device": "/dev/loop0", "number": 0, "disk_sequence": 12,
        "backing_file": "/home/a/x.img", "offset": 0, "size_limit": 0, "size": 67108864, "read_only": false,
        "direct_io": false, "block_size": 512, "partition_scan": true, "autoclear": false,
        "reference": null, "lifetime": "persistent", "managed": true, "owner": 1000, "state": "attached",
        "backing_file_state": "present", "warnings": [{"code": "truncated", "message": "…", "bytes": 25165824}],
        "filesystem": null, "encrypted": null, "mount_points": [],
        "partitions": [{"device": "/dev/loop0p1", "number": 1, "offset": 1048576, "size": 20971520, "table": "gpt",
            "type": "0fc63daf-8483-4772-8e79-3d69d8477de4", "uuid": "…", "label": null,
            "filesystem": {"type": "ext4", "version": "1.0", "label": "data", "uuid": "…"},
            "encrypted": null, "mount_points": ["/run/media/a/data"]}]}"#;

    /// The keys in the order of the text: serde_json's own maps would sort them.
    fn keys(text: &str) -> Vec<String> {
        let ends = text.match_indices("\":").map(|(end, _)| end);
        ends.map(|end| text[..end].rsplit('"').next().unwrap().to_owned()).collect()
    }

    #[test]
    fn fields_and_their_order_are_those_of_the_contract() {
        let text = serde_json::to_string(&Device::from(&attachment())).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            serde_json::from_str::<Value>(CONTRACT).unwrap()
        );
        assert_eq!(keys(&text), keys(CONTRACT));
    }

    #[test]
    fn known_values_are_shown() {
        let mut attached = attachment();
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
    fn details_of_a_warning_are_left_out_if_they_do_not_apply() {
        let mut attached = attachment();
        let warning = |number, format: Option<&str>| loopd_dbus::Warning {
            code: "code".to_owned(),
            message: "a message".to_owned(),
            number,
            format: format.map(str::to_owned),
            ..loopd_dbus::Warning::default()
        };
        attached.attachment.warnings = Warnings(vec![warning(Some(7), None), warning(None, Some("xz"))]);
        let value = serde_json::to_value(Device::from(&attached)).unwrap();
        let expected = serde_json::json!([{"code": "code", "message": "a message", "number": 7},
            {"code": "code", "message": "a message", "format": "xz"}]);
        assert_eq!(value["warnings"], expected);
        attached.attachment.warnings = Warnings::default();
        assert_eq!(serde_json::to_value(Device::from(&attached)).unwrap()["warnings"], serde_json::json!([]));
    }

    #[test]
    fn unknown_values_of_a_partition_are_null() {
        let mut shown = partition(12, 3);
        shown.partition = PartitionProperties { number: 3, ..PartitionProperties::default() };
        shown.volume = VolumeProperties { device: "/dev/loop0p3".to_owned(), ..VolumeProperties::default() };
        let expected = serde_json::json!({"device": "/dev/loop0p3", "number": 3, "offset": 0, "size": 0,
            "table": null, "type": null, "uuid": null, "label": null, "filesystem": null, "encrypted": null,
            "mount_points": []});
        assert_eq!(serde_json::to_value(Partition::from(&shown)).unwrap(), expected);
        let attached = AttachmentInfo { partitions: Vec::new(), ..attachment() };
        assert_eq!(
            serde_json::to_value(Device::from(&attached)).unwrap()["partitions"],
            serde_json::json!([])
        );
    }

    #[test]
    fn an_encrypted_volume_is_shown_with_its_cleartext() {
        let mut attached = attachment();
        attached.volume.usage = "crypto".to_owned();
        attached.volume.filesystem_type = "crypto_LUKS".to_owned();
        attached.volume.filesystem_version = "2".to_owned();
        let encrypted = |attached: &AttachmentInfo| {
            let text = serde_json::to_string(&Device::from(attached).encrypted).unwrap();
            text.replace("\"", "'")
        };
        assert_eq!(encrypted(&attached), "{'type':'luks','version':'2','cleartext':null}");
        attached.cleartext = Some(cleartext(None));
        let open = "{'device':'/dev/dm-3','filesystem':{'type':'xfs','version':null,'label':null,'uuid':null},\
                    'mount_points':[]}";
        assert_eq!(encrypted(&attached), format!("{{'type':'luks','version':'2','cleartext':{open}}}"));
        // VeraCrypt: udev finds nothing.
        attached.volume = VolumeProperties::default();
        attached.cleartext.as_mut().unwrap().cleartext.kind = "veracrypt".to_owned();
        assert_eq!(encrypted(&attached), format!("{{'type':'veracrypt','version':null,'cleartext':{open}}}"));
        let mut shown = partition(12, 1);
        shown.cleartext = Some(cleartext(Some(1)));
        assert_eq!(Partition::from(&shown).encrypted.unwrap().cleartext.unwrap().device, "/dev/dm-3");
    }

    #[test]
    fn the_state_of_the_file_is_a_word_or_null() {
        use FileState::{Deleted, Replaced};
        for (state, word) in
            [(Some(Deleted), "deleted".into()), (Some(Replaced), "replaced".into()), (None, Value::Null)]
        {
            let attached = AttachmentInfo { file_state: state, ..attachment() };
            assert_eq!(serde_json::to_value(Device::from(&attached)).unwrap()["backing_file_state"], word);
        }
    }

    #[test]
    fn a_foreign_device_has_no_owner_and_no_lifetime() {
        let mut attached = attachment();
        attached.attachment.owner = NO_OWNER;
        attached.attachment.lifetime = String::new();
        attached.attachment.backing_file = to_bus_path(b"");
        let device = Device::from(&attached);
        assert_eq!((device.owner, device.lifetime, device.backing_file), (None, None, None));
    }
}
