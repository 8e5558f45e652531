//! Attachments as loopd publishes them, with their partitions.

use std::fs::File;

use loopd_dbus::names::{ATTACHMENT, BUS_NAME, VOLUME};
use loopd_dbus::proxy::{Listed, Manager};
use loopd_dbus::{AttachmentProperties, ListOptions, State, VolumeProperties};
use zbus::Connection;
use zbus::wire::OwnedObjectPath;

use super::cleartext::CleartextInfo;
use super::connection::Bus;
use super::error::explain;
use super::objects::{Objects, managed_objects, parse_path, volume_of_cleartext};
use super::partition::PartitionInfo;

/// What has become of a backing file since it was attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileState {
    /// It has its path.
    Present,
    /// It was deleted, and nothing has its path.
    Deleted,
    /// Another file has its path.
    Replaced,
}

impl FileState {
    /// The word for it in tables and in JSON.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Present => "present",
            Self::Deleted => "deleted",
            Self::Replaced => "replaced",
        }
    }
}

/// An attachment and its properties.
#[derive(Clone, Debug)]
pub struct AttachmentInfo {
    /// Its object on the bus.
    pub path: OwnedObjectPath,
    /// `org.loopd1.Attachment`.
    pub attachment: AttachmentProperties,
    /// `org.loopd1.Volume`.
    pub volume: VolumeProperties,
    /// Its partitions by number; empty until [`add_partitions`] has read them.
    pub partitions: Vec<PartitionInfo>,
    /// The cleartext of the whole device if that is encrypted and unlocked; `None` until [`add_partitions`] has read it.
    pub cleartext: Option<CleartextInfo>,
    /// What has become of the backing file; `None` if that cannot be determined, and until
    /// [`add_file_states`](crate::image::file_state::add_file_states) has looked.
    pub file_state: Option<FileState>,
}

impl AttachmentInfo {
    /// Whether it ends at the last close.
    #[must_use]
    pub fn is_detaching(&self) -> bool {
        self.attachment.state == State::Detaching.as_str()
    }
}

impl TryFrom<Listed> for AttachmentInfo {
    type Error = zbus::Error;

    fn try_from((path, properties): Listed) -> zbus::Result<Self> {
        let attachment = AttachmentProperties::from_dict(&properties)?;
        let volume = VolumeProperties::from_dict(&properties)?;
        Ok(Self { path, attachment, volume, partitions: Vec::new(), cleartext: None, file_state: None })
    }
}

/// The attachments by number, without their partitions.
///
/// # Errors
/// The call failed.
pub async fn list(manager: &Manager, options: &ListOptions) -> anyhow::Result<Vec<AttachmentInfo>> {
    let listed = manager.list(options).await.map_err(explain)?;
    let attachments = listed.into_iter().map(AttachmentInfo::try_from).collect::<zbus::Result<Vec<_>>>();
    let mut attachments = attachments.map_err(explain)?;
    attachments.sort_by_key(|info| info.attachment.number);
    Ok(attachments)
}

/// The attachment with this path, with its partitions; `None` if it has ended.
///
/// # Errors
/// The call failed.
pub async fn find(bus: &Bus, path: &OwnedObjectPath) -> anyhow::Result<Option<AttachmentInfo>> {
    let (_, objects) = managed_objects(&bus.connection, BUS_NAME).await.map_err(explain)?;
    let interfaces = objects.get(path.as_str());
    let Some((Some(attachment), Some(volume))) =
        interfaces.map(|found| (found.get(ATTACHMENT), found.get(VOLUME)))
    else {
        return Ok(None);
    };
    let mut info = AttachmentInfo {
        path: path.clone(),
        attachment: AttachmentProperties::from_dict(attachment).map_err(explain)?,
        volume: VolumeProperties::from_dict(volume).map_err(explain)?,
        partitions: Vec::new(),
        cleartext: None,
        file_state: None,
    };
    join(std::slice::from_mut(&mut info), &objects).map_err(explain)?;
    Ok(Some(info))
}

/// The attachment that was just made of the file, without its partitions.
///
/// # Errors
/// The call failed, or the attachment has ended.
pub async fn find_new(
    manager: &Manager,
    file: &File,
    path: &OwnedObjectPath,
    device: &str,
) -> anyhow::Result<AttachmentInfo> {
    let same_file = ListOptions { file: Some(file.try_clone()?.into()), all: true, ..ListOptions::default() };
    let found = list(manager, &same_file).await?.into_iter().find(|info| info.path == *path);
    found.ok_or_else(|| anyhow::anyhow!("{device} was attached, but has been detached since"))
}

/// Reads the partitions and cleartexts of the attachments, with one call.
///
/// # Errors
/// The call failed.
pub async fn add_partitions(
    connection: &Connection,
    attachments: &mut [AttachmentInfo],
) -> anyhow::Result<()> {
    if attachments.is_empty() {
        return Ok(());
    }
    let (_, objects) = managed_objects(connection, BUS_NAME).await.map_err(explain)?;
    join(attachments, &objects).map_err(explain)
}

/// Adds each partition to its attachment, sorted by number, and each cleartext to its volume; ignores those of other
/// attachments.
fn join(attachments: &mut [AttachmentInfo], objects: &Objects) -> zbus::Result<()> {
    for (path, interfaces) in objects {
        if !matches!(parse_path(path), Some((_, Some(_)))) {
            continue;
        }
        if let Some(partition) = PartitionInfo::read(path, interfaces)?
            && let Some(info) =
                attachments.iter_mut().find(|info| info.path == partition.partition.attachment)
        {
            info.partitions.push(partition);
        }
    }
    for info in attachments {
        info.partitions.sort_by_key(|partition| partition.partition.number);
        info.cleartext = cleartext_of(&info.path, objects)?;
        for partition in &mut info.partitions {
            partition.cleartext = cleartext_of(&partition.path, objects)?;
        }
    }
    Ok(())
}

fn cleartext_of(volume: &OwnedObjectPath, objects: &Objects) -> zbus::Result<Option<CleartextInfo>> {
    let found = objects.iter().find(|(path, _)| volume_of_cleartext(path) == Some(volume.as_str()));
    found.map_or(Ok(None), |(path, interfaces)| CleartextInfo::read(path, interfaces))
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{CLEARTEXT, PARTITION, attachment_path, cleartext_path, partition_path};

    use super::*;
    use crate::bus::example::{attachment, cleartext, partition, received};
    use crate::bus::objects::{Interfaces, Properties};

    /// The object of a partition with both of its interfaces.
    fn object(partition: &PartitionInfo) -> (String, Interfaces) {
        let interfaces = Interfaces::from([
            (PARTITION.to_owned(), received(partition.partition.to_dict())),
            (VOLUME.to_owned(), received(partition.volume.to_dict())),
        ]);
        (partition.path.to_string(), interfaces)
    }

    fn numbers(info: &AttachmentInfo) -> Vec<u32> {
        info.partitions.iter().map(|partition| partition.partition.number).collect()
    }

    #[test]
    fn partitions_are_added_to_their_attachment_by_number() {
        let mut all = [attachment(), attachment()];
        all[1].path = attachment_path(13).into();
        all.iter_mut().for_each(|info| info.partitions.clear());
        let partitions = [(12, 10), (13, 1), (12, 2), (12, 1), (14, 1)];
        let mut objects: Objects =
            partitions.map(|(sequence, number)| object(&partition(sequence, number))).into();
        let whole = Interfaces::from([(ATTACHMENT.to_owned(), received(all[0].attachment.to_dict()))]);
        objects.insert(all[0].path.to_string(), whole);
        objects.insert("/org/loopd1".to_owned(), Interfaces::new());
        join(&mut all, &objects).unwrap();
        assert_eq!((numbers(&all[0]), numbers(&all[1])), (vec![1, 2, 10], vec![1]));
        assert_eq!(all[0].partitions[0].path, partition_path(12, 1).into());
        assert_eq!(all[0].partitions[0].volume.device, "/dev/loop0p1");
    }

    #[test]
    fn a_cleartext_is_added_to_its_volume() {
        let mut objects = Objects::from([object(&partition(12, 1)), object(&partition(12, 2))]);
        for volume in [None, Some(2)] {
            let info = cleartext(volume);
            let interfaces = Interfaces::from([
                (CLEARTEXT.to_owned(), received(info.cleartext.to_dict())),
                (VOLUME.to_owned(), received(info.volume.to_dict())),
            ]);
            objects.insert(cleartext_path(12, volume).to_string(), interfaces);
        }
        let mut all = [AttachmentInfo { partitions: Vec::new(), ..attachment() }];
        join(&mut all, &objects).unwrap();
        let path = |info: &Option<CleartextInfo>| info.as_ref().map(|info| info.path.to_string());
        assert_eq!(path(&all[0].cleartext).unwrap(), "/org/loopd1/attachment/12/cleartext");
        assert_eq!(path(&all[0].partitions[0].cleartext), None);
        assert_eq!(path(&all[0].partitions[1].cleartext).unwrap(), "/org/loopd1/attachment/12/p2/cleartext");
        // Half of it, while it is being removed.
        objects.get_mut(cleartext_path(12, None).as_str()).unwrap().remove(VOLUME);
        join(&mut all, &objects).unwrap();
        assert!(all[0].cleartext.is_none());
    }

    #[test]
    fn a_partition_without_one_of_its_interfaces_is_ignored() {
        for missing in [PARTITION, VOLUME] {
            let mut all = [AttachmentInfo { partitions: Vec::new(), ..attachment() }];
            let (path, mut interfaces) = object(&partition(12, 1));
            interfaces.remove(missing);
            join(&mut all, &Objects::from([(path, interfaces)])).unwrap();
            assert_eq!(numbers(&all[0]), [0; 0], "{missing}");
        }
    }

    #[test]
    fn a_missing_property_is_an_error() {
        let (path, mut interfaces) = object(&partition(12, 1));
        interfaces.insert(PARTITION.to_owned(), Properties::new());
        assert!(join(&mut [attachment()], &Objects::from([(path, interfaces)])).is_err());
    }
}
