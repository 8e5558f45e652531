//! `org.loopd1.Partition`.

use std::sync::RwLockReadGuard;

use loopd_dbus::PartitionProperties;
use zbus::interface;
use zbus::wire::OwnedObjectPath;

use super::interfaces::Shared;

/// The interface, on a partition object.
pub struct Partition {
    properties: Shared<PartitionProperties>,
}

impl Partition {
    /// The interface of a partition. The publisher updates the properties.
    pub fn new(properties: Shared<PartitionProperties>) -> Self {
        Self { properties }
    }

    fn properties(&self) -> RwLockReadGuard<'_, PartitionProperties> {
        self.properties.read()
    }
}

#[interface(name = "org.loopd1.Partition", introspection_docs = false)]
impl Partition {
    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> u32 {
        self.properties().number
    }

    #[zbus(property)]
    fn offset(&self) -> u64 {
        self.properties().offset
    }

    #[zbus(property)]
    fn size(&self) -> u64 {
        self.properties().size
    }

    #[zbus(property)]
    fn table(&self) -> String {
        self.properties().table.clone()
    }

    #[zbus(property, name = "Type")]
    fn kind(&self) -> String {
        self.properties().kind.clone()
    }

    #[zbus(property)]
    fn uuid(&self) -> String {
        self.properties().uuid.clone()
    }

    #[zbus(property)]
    fn label(&self) -> String {
        self.properties().label.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn attachment(&self) -> OwnedObjectPath {
        self.properties().attachment.clone()
    }
}
