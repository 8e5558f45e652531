//! Conversions between the types of the engine and those of the D-Bus interface.

use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use loopd_dbus::names::{attachment_path, volume_path};
use loopd_dbus::properties::{NO_OWNER, to_bus_path};
use loopd_dbus::{
    AttachOptions, AttachmentProperties, CleartextProperties, MountOptions, PartitionProperties,
    VolumeProperties, Warning, Warnings,
};

use loopd_engine::kernel::{DiskSequence, FileSystem, Partition, partition_node};
use loopd_engine::{AttachRequest, CleartextSnapshot, MountRequest, PartitionSnapshot, Snapshot};

/// The request for the options of `SetupLoop`.
pub fn attach_request(options: AttachOptions) -> AttachRequest {
    AttachRequest {
        offset: options.offset,
        size_limit: options.size_limit,
        read_only: options.read_only,
        partition_scan: options.partition_scan,
        direct_io: options.direct_io,
        block_size: options.block_size,
        lifetime: options.lifetime,
        reference: options.reference,
        number: options.number,
        overlap: options.overlap,
        wait: options.wait,
        ..AttachRequest::default()
    }
}

/// The request for the options of `Mount`.
pub fn mount_request(options: MountOptions) -> MountRequest {
    let MountOptions { read_only, filesystem, options } = options;
    MountRequest { read_only, filesystem, options }
}

/// The properties of `org.loopd1.Attachment`.
pub fn attachment(snapshot: &Snapshot) -> AttachmentProperties {
    let device = &snapshot.device;
    let ownership = snapshot.ownership.as_ref();
    let client = ownership.and_then(|ownership| ownership.client.as_ref());
    AttachmentProperties {
        device: device.node(),
        number: device.number,
        disk_sequence: device.disk_sequence.0,
        backing_file: to_bus_path(&device.backing_file),
        backing_device: device.backing_device,
        backing_inode: device.backing_inode,
        offset: device.offset,
        size_limit: device.size_limit,
        reference: device.reference.clone(),
        read_only: device.read_only,
        direct_io: device.direct_io,
        block_size: device.block_size,
        partition_scan: device.partition_scan,
        autoclear: device.autoclear,
        lifetime: ownership.map(|ownership| ownership.lifetime.as_str().to_owned()).unwrap_or_default(),
        managed: ownership.is_some(),
        owner: ownership.map_or(NO_OWNER, |ownership| ownership.uid),
        client: client.map(|client| client.0.clone()).unwrap_or_default(),
        since: ownership.map(|ownership| ownership.since).unwrap_or_default(),
        state: snapshot.state.as_str().to_owned(),
        warnings: Warnings(snapshot.warnings.iter().map(warning).collect()),
    }
}

fn warning(warning: &loopd_engine::Warning) -> Warning {
    Warning {
        code: warning.code().to_owned(),
        message: warning.to_string(),
        bytes: warning.bytes(),
        number: warning.number(),
        format: warning.format().map(str::to_owned),
    }
}

/// The properties of the `org.loopd1.Volume` of the whole device.
pub fn volume(snapshot: &Snapshot) -> VolumeProperties {
    volume_of(snapshot.device.node(), snapshot.device.size, &snapshot.file_system, &snapshot.mount_points)
}

/// The properties of the `org.loopd1.Partition` of a partition.
pub fn partition(attachment: DiskSequence, partition: &PartitionSnapshot) -> PartitionProperties {
    let Partition { node, entry } = &partition.partition;
    PartitionProperties {
        number: node.number,
        offset: node.start,
        size: node.size,
        table: entry.table.clone(),
        kind: entry.kind.clone(),
        uuid: entry.uuid.clone(),
        label: entry.label.clone(),
        attachment: attachment_path(attachment.0).into(),
    }
}

/// The properties of the `org.loopd1.Volume` of a partition of the loop device with this number.
pub fn partition_volume(number: u32, partition: &PartitionSnapshot) -> VolumeProperties {
    let node = &partition.partition.node;
    let device = partition_node(number, node.number);
    volume_of(device, node.size, &partition.file_system, &partition.mount_points)
}

/// The properties of the `org.loopd1.Cleartext` of a volume: a partition, or the whole device (`None`).
pub fn cleartext(
    attachment: DiskSequence,
    partition: Option<u32>,
    snapshot: &CleartextSnapshot,
) -> CleartextProperties {
    CleartextProperties {
        device: snapshot.mapping.node(),
        crypto: volume_path(attachment.0, partition).into(),
        kind: snapshot.mapping.kind.as_str().to_owned(),
        since: snapshot.since,
    }
}

/// The properties of the `org.loopd1.Volume` of a cleartext.
pub fn cleartext_volume(snapshot: &CleartextSnapshot) -> VolumeProperties {
    let CleartextSnapshot { mapping, file_system, mount_points, .. } = snapshot;
    volume_of(mapping.node(), mapping.size, file_system, mount_points)
}

fn volume_of(
    device: String,
    size: u64,
    file_system: &FileSystem,
    mount_points: &[PathBuf],
) -> VolumeProperties {
    VolumeProperties {
        device,
        size,
        usage: file_system.usage.clone(),
        filesystem_type: file_system.kind.clone(),
        filesystem_version: file_system.version.clone(),
        filesystem_label: file_system.label.clone(),
        filesystem_uuid: file_system.uuid.clone(),
        mount_points: mount_points.iter().map(|path| to_bus_path(path.as_os_str().as_bytes())).collect(),
    }
}
