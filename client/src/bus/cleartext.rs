//! Cleartexts of unlocked volumes as loopd publishes them.

use loopd_dbus::names::{CLEARTEXT, VOLUME};
use loopd_dbus::{CleartextProperties, VolumeProperties};
use zbus::wire::OwnedObjectPath;

use super::objects::Interfaces;

/// The cleartext of an encrypted volume that is unlocked.
#[derive(Clone, Debug)]
pub struct CleartextInfo {
    /// Its object on the bus.
    pub path: OwnedObjectPath,
    /// `org.loopd1.Cleartext`.
    pub cleartext: CleartextProperties,
    /// `org.loopd1.Volume`.
    pub volume: VolumeProperties,
}

impl CleartextInfo {
    /// Reads the object; `None` if an interface is missing, because the object is being added or removed.
    ///
    /// # Errors
    /// A property is missing or has another type.
    pub fn read(path: &str, interfaces: &Interfaces) -> zbus::Result<Option<Self>> {
        let (Some(cleartext), Some(volume)) = (interfaces.get(CLEARTEXT), interfaces.get(VOLUME)) else {
            return Ok(None);
        };
        Ok(Some(Self {
            path: OwnedObjectPath::try_from(path)?,
            cleartext: CleartextProperties::from_dict(cleartext)?,
            volume: VolumeProperties::from_dict(volume)?,
        }))
    }
}
