//! `org.loopd1.Volume`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::VolumeProperties;
use zbus::interface;

/// What may hold a file system.
pub struct Volume {
    properties: Arc<RwLock<VolumeProperties>>,
}

impl Volume {
    /// A volume. The publisher keeps the properties up to date.
    pub fn new(properties: Arc<RwLock<VolumeProperties>>) -> Self {
        Self { properties }
    }

    fn properties(&self) -> RwLockReadGuard<'_, VolumeProperties> {
        self.properties.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[interface(name = "org.loopd1.Volume", introspection_docs = false)]
impl Volume {
    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties().device.clone()
    }

    #[zbus(property)]
    fn size(&self) -> u64 {
        self.properties().size
    }

    #[zbus(property)]
    fn usage(&self) -> String {
        self.properties().usage.clone()
    }

    #[zbus(property)]
    fn filesystem_type(&self) -> String {
        self.properties().filesystem_type.clone()
    }

    #[zbus(property)]
    fn filesystem_version(&self) -> String {
        self.properties().filesystem_version.clone()
    }

    #[zbus(property)]
    fn filesystem_label(&self) -> String {
        self.properties().filesystem_label.clone()
    }

    #[zbus(property)]
    fn filesystem_uuid(&self) -> String {
        self.properties().filesystem_uuid.clone()
    }

    #[zbus(property)]
    fn mount_points(&self) -> Vec<Vec<u8>> {
        self.properties().mount_points.clone()
    }
}
