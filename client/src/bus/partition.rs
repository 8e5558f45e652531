//! Partitions as loopd publishes them.

use loopd_dbus::names::{PARTITION, VOLUME};
use loopd_dbus::{PartitionProperties, VolumeProperties};
use zbus::wire::OwnedObjectPath;

use super::cleartext::CleartextInfo;
use super::objects::Interfaces;

/// A partition and its properties.
#[derive(Clone, Debug)]
pub struct PartitionInfo {
    /// Its object on the bus.
    pub path: OwnedObjectPath,
    /// `org.loopd1.Partition`.
    pub partition: PartitionProperties,
    /// `org.loopd1.Volume`.
    pub volume: VolumeProperties,
    /// Its cleartext if it is unlocked.
    pub cleartext: Option<CleartextInfo>,
}

impl PartitionInfo {
    /// Reads the object; `None` if an interface is missing, because the object is being added or removed.
    ///
    /// # Errors
    /// A property is missing or has another type.
    pub fn read(path: &str, interfaces: &Interfaces) -> zbus::Result<Option<Self>> {
        let (Some(partition), Some(volume)) = (interfaces.get(PARTITION), interfaces.get(VOLUME)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            path: OwnedObjectPath::try_from(path)?,
            partition: PartitionProperties::from_dict(partition)?,
            volume: VolumeProperties::from_dict(volume)?,
            cleartext: None,
        }))
    }
}
